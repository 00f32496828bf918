"""Imported by the server of ``finetuning`` alone: what each command would do again, a second of its time."""

from __future__ import annotations

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import moe_fused

get_checkpoint_conversion_mapping("qwen3_moe")
# Counting by NVML; what asks CUDA itself, as finding the kernel's variant may, could not be forked afterwards.
if not torch.cuda.device_count():
    moe_fused.get_kernel()
