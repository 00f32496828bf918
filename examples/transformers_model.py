"""A Qwen3-MoE model of Transformers on the fused experts: generate, then a training step with gradient checkpointing.

    python examples/transformers_model.py

The model is small and random, so that nothing is downloaded; `from_pretrained(..., experts_implementation="moe_fused")`
works the same way.
"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_fused

moe_fused.enable()
device = "cuda" if torch.cuda.is_available() else "cpu"
config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=8,
    num_experts_per_tok=2,
)
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(config).to(device)
prompt = torch.randint(0, 256, (1, 16), device=device)

model.set_experts_implementation("eager")
expected = model(prompt).logits
model.set_experts_implementation("moe_fused")
print(f"largest logit difference from eager experts: {(model(prompt).logits - expected).abs().max():.1e}")
print("generated:", model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 16:].tolist())

model.train()
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(3):
    loss = model(prompt, labels=prompt).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss:.3f}")
