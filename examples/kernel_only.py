"""The experts of one layer with nothing but torch and the kernel: forward, backward, and a check against plain torch.

    python examples/kernel_only.py

Loads the kernel as any program would; in this repository, after `make build`, point LOCAL_KERNELS at the checkout:

    LOCAL_KERNELS=org/qwen3-moe-fused=$PWD python examples/kernel_only.py
"""

import torch
from kernels import get_kernel

kernel = get_kernel("org/qwen3-moe-fused", version=0, trust_remote_code=True)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32

tokens, hidden, intermediate, num_experts, top_k = 256, 512, 256, 16, 4
torch.manual_seed(0)
x = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
gate_up_proj = torch.randn(num_experts, 2 * intermediate, hidden, device=device, dtype=dtype) / hidden**0.5
down_proj = torch.randn(num_experts, hidden, intermediate, device=device, dtype=dtype) / intermediate**0.5
top_k_weights, top_k_index = torch.randn(tokens, num_experts, device=device).softmax(-1).topk(top_k)

y = kernel.moe_experts(x, top_k_index, top_k_weights, gate_up_proj, down_proj)
y.square().mean().backward()

with torch.no_grad():
    expected = torch.zeros_like(y)
    for k in range(top_k):
        gate, up = torch.einsum("th,tih->ti", x, gate_up_proj[top_k_index[:, k]]).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        z = torch.einsum("ti,thi->th", h, down_proj[top_k_index[:, k]])
        expected += (z * top_k_weights[:, k, None]).to(dtype)
difference = (y - expected).norm() / expected.norm()
print(f"{tokens} tokens on {device}: relative difference from plain torch {difference:.1e}")
print(f"gradient of the input: {tuple(x.grad.shape)}, norm {x.grad.norm():.3f}")
