"""Trains a QLoRA inside Unsloth: its loader, its gradient checkpointing and its trainer, with the experts in our kernels.

    python examples/unsloth_qlora.py
    python examples/unsloth_qlora.py --model Qwen/Qwen3-30B-A3B --dataset chats.jsonl --output my-adapter --steps 500

This needs a GPU and an environment with `pip install 'moe-fused[bnb]' peft unsloth`. Unsloth 2026.10 wants older versions of
Transformers, TRL and datasets than `moe-fused[train]`, so the two do not share an environment.
"""

import argparse
from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip  # Unsloth wants to be imported before Transformers

import torch
from datasets import Dataset, load_dataset
from tiny import tiny_model
from trl import SFTConfig, SFTTrainer

import moe_fused

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a directory or a name on the Hub; a tiny random model by default")
parser.add_argument("--dataset", help="JSON Lines with a list of `messages` in each row; a few sums by default")
parser.add_argument("--output", type=Path, default=Path("examples-output/unsloth_qlora"))
parser.add_argument("--steps", type=int, default=10)
options = parser.parse_args()

# Call this before the model is loaded. The experts then keep Transformers' class, are quantized by moe_fused, and run in its
# kernels with their adapters. All other layers are Unsloth's.
moe_fused.enable()
model, tokenizer = FastLanguageModel.from_pretrained(
    options.model or tiny_model(options.output / "model"),
    max_seq_length=2048 if options.model else 128,
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=8,
    lora_alpha=16,
    lora_dropout=0,
    # Unsloth makes target_parameters of the experts' names: one lora_A for gate and up, in PEFT's own file format.
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    use_gradient_checkpointing="unsloth",
)

if options.dataset:
    rows = load_dataset("json", data_files=options.dataset, split="train")["messages"]
else:
    sums = [(a, b) for a in range(8) for b in range(8)]
    rows = [[{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}] for a, b in sums]
texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]

trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict({"text": texts}),
    args=SFTConfig(
        output_dir=str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-4 if options.model else 1e-2,
        optim="adamw_8bit",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")

adapter = options.output / "adapter"
model.save_pretrained(adapter)
ours = sum(type(module).__module__ == "moe_fused.integrations.peft.wrapper" for module in model.modules())
print(f"{ours} stacks of experts trained in the kernels, adapter saved in {adapter}")
print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
