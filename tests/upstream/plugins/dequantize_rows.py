"""Leaves ``dequantize_4bit`` to bitsandbytes while ``moe_fused`` is enabled, as on a processor with AVX-512."""

from __future__ import annotations

from moe_fused.integrations.quantizer import bitsandbytes_cpu

from .avx512 import imitate


def pytest_configure() -> None:
    bitsandbytes_cpu._dequantize_whole_blocks = lambda: None
    with bitsandbytes_cpu._without_hub_kernel():
        imitate()
