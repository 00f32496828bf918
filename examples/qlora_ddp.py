"""Trains a QLoRA on several GPUs: each GPU has the whole 4-bit model and a share of every batch.

    accelerate launch --multi_gpu --num_processes 2 examples/qlora_ddp.py
    accelerate launch --multi_gpu --num_processes 8 examples/qlora_ddp.py --model Qwen/Qwen3-30B-A3B --dataset chats.jsonl
    python examples/qlora_ddp.py --output examples-output/one_process

The processes average the gradients of the adapters. Without a GPU they run on the CPU; accelerate needs --multi_gpu to
start several processes there, too. --batch-size counts the rows of all processes together. The third command, with one
process, therefore trains the same adapter up to rounding.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, load_dataset
from peft import LoraConfig
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import moe_fused

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a directory or a name on the Hub; a tiny random model by default")
parser.add_argument("--dataset", help="JSON Lines with a list of `messages` in each row; a few sums by default")
parser.add_argument("--output", type=Path, default=Path("examples-output/qlora_ddp"))
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=8, help="rows in a step, over all processes")
options = parser.parse_args()

# Joins the other processes, and says which of them this one is and which device it has.
state = PartialState(cpu=not torch.cuda.is_available())
if options.batch_size % state.num_processes:
    parser.error(f"--batch-size {options.batch_size} cannot be shared by {state.num_processes} processes")
with state.main_process_first():  # the other processes find what the first has made or downloaded
    made = options.output / "model"
    model_id = options.model or (tiny_model(made) if state.is_main_process else str(made))
    tokenizer = AutoTokenizer.from_pretrained(model_id)

moe_fused.enable()
dtype = torch.float32 if state.device.type == "cpu" else torch.bfloat16
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
# Each process loads the whole model to its own GPU. device_map="auto" would spread one copy over all GPUs instead.
model = AutoModelForCausalLM.from_pretrained(
    model_id, dtype=dtype, quantization_config=quantization, device_map={"": state.device}
)
lora = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
if options.dataset:
    dataset = load_dataset("json", data_files=options.dataset, split="train")
else:
    sums = [(a, b) for a in range(8) for b in range(8)]
    questions = [
        [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}] for a, b in sums
    ]
    dataset = Dataset.from_dict({"messages": questions})

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size // state.num_processes,
        learning_rate=2e-4 if options.model else 1e-2,
        use_cpu=state.device.type == "cpu",
        bf16=False,
        optim="adamw_torch" if state.device.type == "cpu" else "paged_adamw_8bit",
        gradient_checkpointing=True,
        # Every adapter gets a gradient on every process. It is zero for experts without tokens there. DDP therefore need
        # not look for parameters without a gradient.
        ddp_find_unused_parameters=False,
        # The router's load-balancing loss is not a mean over tokens, so its mean over shares of a batch is not that of the
        # batch.
        router_aux_loss_coef=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=lora,
)
for parameter in trainer.model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.to(dtype)  # TRL makes adapters of every 4-bit model bf16, on a CPU as well
trainer.train()

digest = hashlib.sha256()
for parameter in trainer.model.parameters():
    if parameter.requires_grad:
        digest.update(parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
digests = gather_object([digest.hexdigest()])
if len(set(digests)) != 1:
    raise RuntimeError(f"the processes ended with different adapters: {digests}")

if state.is_main_process:
    trainer.model.save_pretrained(options.output / "adapter")
    losses = [f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry]
    print(f"{state.num_processes} processes on {state.device.type}, {options.batch_size} rows in a step")
    print(f"losses: {' '.join(losses)}")
    print(f"adapters of all processes are equal, bit for bit; saved in {options.output / 'adapter'}")
state.destroy_process_group()
