"""Runs a dense Qwen3-MoE on the fused experts: compares logits with Transformers' experts, generates text and trains.

    python examples/transformers_model.py
    python examples/transformers_model.py --model Qwen/Qwen3-30B-A3B --steps 0

The example works for every model whose experts Transformers can exchange. Its last part trains all weights with AdamW and
gradient checkpointing, which takes 16 bytes for each weight in float32. --steps 0 leaves this part out.
"""

import argparse
from pathlib import Path

import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_fused

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a directory or a name on the Hub; a tiny random model by default")
parser.add_argument("--output", type=Path, default=Path("examples-output/transformers_model"))
parser.add_argument("--steps", type=int, default=5)
options = parser.parse_args()
model_id = options.model or tiny_model(options.output / "model")

# Adds "moe_fused" to Transformers' implementations of experts. A model changes only when it is set to "moe_fused".
moe_fused.enable()
device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(
    model_id, dtype="auto", experts_implementation="moe_fused", device_map={"": device}
)
prompt = tokenizer("1+1=2, and 2+2=", return_tensors="pt").to(device)


@torch.no_grad()
def logits(experts: str) -> torch.Tensor:
    model.set_experts_implementation(experts)
    return model.eval()(**prompt).logits.float()


expected, fused = logits("eager"), logits("moe_fused")
print(f"logits: relative difference from eager experts {(fused - expected).norm() / expected.norm():.1e}")
tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
print(f"generated: {tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :])!r}")

model.train()
model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(options.steps):
    loss = model(**prompt, labels=prompt.input_ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss:.3f}")
