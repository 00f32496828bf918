"""Computes the experts of one layer with torch and the kernel alone: forward, backward, 4-bit weights and LoRA.

    LOCAL_KERNELS=org/qwen3-moe-fused=$PWD python examples/kernel_only.py
    python examples/kernel_only.py

The example loads the kernel as any program would. The first command takes the kernel from this checkout, after
`make build`; the second takes it from the Hub. A few lines of plain torch check every result.
"""

import torch
from kernels import get_kernel

kernel = get_kernel("org/qwen3-moe-fused", version=0, trust_remote_code=True)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32

tokens, hidden, intermediate, num_experts, top_k, rank = 128, 256, 128, 16, 4, 8
torch.manual_seed(0)


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype) * scale


x = randn(tokens, hidden)
gate_up_proj = randn(num_experts, 2 * intermediate, hidden, scale=hidden**-0.5)  # gate's rows, then up's
down_proj = randn(num_experts, hidden, intermediate, scale=intermediate**-0.5)
# The router chooses the experts of each token, and the weights of their outputs.
top_k_weights, top_k_index = torch.randn(tokens, num_experts, device=device).softmax(-1).topk(top_k)


def plain_torch(x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> torch.Tensor:
    """Computes what the kernel does, with a copy of the weights for each token."""
    y = torch.zeros_like(x)
    for k in range(top_k):
        gate, up = torch.einsum("th,tih->ti", x, gate_up_proj[top_k_index[:, k]]).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        z = torch.einsum("ti,thi->th", h, down_proj[top_k_index[:, k]])
        y = y + (z * top_k_weights[:, k, None]).to(dtype)
    return y


def show(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (got - expected).float().norm() / expected.float().norm()
    print(f"{what:28} {tuple(got.shape)!s:16} relative difference from plain torch {difference:.1e}")


print(f"{tokens} tokens to {top_k} of {num_experts} experts each, {dtype} on {device}")

# Dense experts. The kernel computes only the gradients that somebody asks for, here those of the tokens and of down_proj.
inputs = [value.clone().requires_grad_() for value in (x, down_proj)]
y = kernel.moe_experts(inputs[0], top_k_index, top_k_weights, gate_up_proj, inputs[1])
expected = plain_torch(inputs[0], gate_up_proj, inputs[1])
show("output", y, expected)
upstream = randn(tokens, hidden)
grads = torch.autograd.grad(y, inputs, upstream)
expected_grads = torch.autograd.grad(expected, inputs, upstream)
show("gradient of the tokens", grads[0], expected_grads[0])
show("gradient of down_proj", grads[1], expected_grads[1])

# The same experts in bitsandbytes' 4-bit format. They take the place of the dense weights and are frozen.
packed_up = kernel.Packed4bitWeights.quantize(gate_up_proj, projections=2)
packed_down = kernel.Packed4bitWeights.quantize(down_proj)
y = kernel.moe_experts(x, top_k_index, top_k_weights, packed_up, packed_down)
show("output in 4 bits", y, plain_torch(x, packed_up.dequantize(), packed_down.dequantize()))
dense_bytes = gate_up_proj.nbytes + down_proj.nbytes
print(f"{'':28} {(packed_up.nbytes + packed_down.nbytes) / dense_bytes:.2f} of the dense weights' bytes")

# LoRA over the 4-bit experts. Expert e works as if its matrix were W[e] + scaling · b[e] · a[e], but the kernel never forms
# that matrix. Training changes a and b. An adapter of gate_up_proj may also have 2·rank rows in a, for gate and up apart.
factors = [
    randn(num_experts, rank, hidden, scale=hidden**-0.5).requires_grad_(),
    randn(num_experts, 2 * intermediate, rank, scale=rank**-0.5).requires_grad_(),
    randn(num_experts, rank, intermediate, scale=intermediate**-0.5).requires_grad_(),
    randn(num_experts, hidden, rank, scale=rank**-0.5).requires_grad_(),
]
up_a, up_b, down_a, down_b = factors
y = kernel.moe_experts(
    x,
    top_k_index,
    top_k_weights,
    packed_up,
    packed_down,
    gate_up_lora=kernel.LoraWeights(up_a, up_b, scaling=0.5),
    down_lora=kernel.LoraWeights(down_a, down_b, scaling=0.5),
)
merged_up, merged_down = packed_up.dequantize() + 0.5 * up_b @ up_a, packed_down.dequantize() + 0.5 * down_b @ down_a
expected = plain_torch(x, merged_up, merged_down)
show("output with LoRA", y, expected)
grads = torch.autograd.grad(y, factors, upstream)
expected_grads = torch.autograd.grad(expected, factors, upstream)
for name, grad, expected_grad in zip(
    ("gate_up a", "gate_up b", "down a", "down b"), grads, expected_grads, strict=True
):
    show(f"gradient of {name}", grad, expected_grad)
