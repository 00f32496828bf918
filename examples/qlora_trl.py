"""Trains a QLoRA with Transformers, PEFT and TRL: adapters on attention and experts are trained, saved and loaded again.

    python examples/qlora_trl.py
    python examples/qlora_trl.py --model Qwen/Qwen3-30B-A3B --dataset chats.jsonl --output my-adapter --steps 500

`moe-fused finetune` does this in one command, with checkpoints to resume from and a plan of the memory. This example shows
the steps behind it, for scripts of your own.
"""

import argparse
import gc
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import moe_fused

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a directory or a name on the Hub; a tiny random model by default")
parser.add_argument("--dataset", help="JSON Lines with a list of `messages` in each row; a few sums by default")
parser.add_argument("--output", type=Path, default=Path("examples-output/qlora_trl"))
parser.add_argument("--steps", type=int, default=10)
options = parser.parse_args()
model_id = options.model or tiny_model(options.output / "model")

# Call this before the model is loaded. Transformers then quantizes the experts too, and PEFT's adapters on experts run in
# the kernels.
moe_fused.enable()
# The device needs its number, because accelerate trains a 4-bit model only on the very device that it was loaded to.
device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32


def load_in_4bit() -> torch.nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        model_id, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )


def hold_adapters_in_dtype(model: torch.nn.Module) -> None:
    """Casts the adapters to ``dtype``: TRL makes them bf16 in every 4-bit model, and PEFT loads them as float32."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


lora = LoraConfig(
    r=8,
    lora_alpha=16,
    # The names of the experts' linear layers in checkpoints. Gate and up get factors of their own, and the file gets a
    # matrix for each expert, which vLLM, SGLang and llama.cpp read. The same kernels run PEFT's target_parameters=
    # ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], with one lora_A for gate and up and PEFT's own file format.
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)

tokenizer = AutoTokenizer.from_pretrained(model_id)
if options.dataset:
    dataset = load_dataset("json", data_files=options.dataset, split="train")
else:
    sums = [(a, b) for a in range(8) for b in range(8)]
    questions = [
        [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}] for a, b in sums
    ]
    dataset = Dataset.from_dict({"messages": questions})

trainer = SFTTrainer(
    model=load_in_4bit(),
    args=SFTConfig(
        output_dir=str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-4 if options.model else 1e-2,
        gradient_checkpointing=True,
        bf16=False,  # TRL's default is autocast, which is needless if model and adapters have one dtype
        optim="paged_adamw_8bit" if device.type == "cuda" else "adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=lora,
)
hold_adapters_in_dtype(trainer.model)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    prompt = tokenizer("1+1=2, and 2+2=", return_tensors="pt").to(device)
    return model.eval()(**prompt).logits.float()


adapter = options.output / "adapter"
trainer.model.save_pretrained(adapter)
trained = logits(trainer.model)
trainable, total = trainer.model.get_nb_trainable_parameters()
print(f"{trainable:,} parameters trained, saved in {adapter}")

# Two models would not fit, so the first one is freed before the second is loaded.
del trainer
gc.collect()
torch.cuda.empty_cache()

base = load_in_4bit()
without = logits(base)
loaded = PeftModel.from_pretrained(base, adapter)
hold_adapters_in_dtype(loaded)
reloaded = logits(loaded)
print(f"largest logit difference, reloaded from trained: {(reloaded - trained).abs().max():.1e}")
print(f"largest logit difference, adapter from none: {(reloaded - without).abs().max():.1e}")
