"""Check that an installed ``moe_fused`` loads the kernel it carries: ``python -I check_wheel.py CHECKOUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import moe_fused

checkout = Path(sys.argv[1])
package = Path(moe_fused.__file__).parent
kernel = moe_fused.get_kernel()
source = Path(kernel.__file__)

if package.parent == checkout:
    sys.exit(f"imported the checkout's {package}, not the wheel")
if not source.is_relative_to(package / "_kernel"):
    sys.exit(f"the kernel was loaded from {source}, not from {package / '_kernel'}")

x = torch.tensor([[1.0, -2.0]])
weight = torch.eye(2)[None]
index = torch.zeros(1, 1, dtype=torch.long)
y = kernel.moe_experts(x, index, torch.ones(1, 1), weight, weight, activation="relu", gated=False)
if y.tolist() != [[1.0, 0.0]]:
    sys.exit(f"the kernel computed {y.tolist()}, need [[1.0, 0.0]]")
print(f"wheel: {source.parent} runs")
