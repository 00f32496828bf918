"""Imported by the server of ``finetuning`` alone: what each command would do again, a second of its time."""

from __future__ import annotations

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import moe_fused

get_checkpoint_conversion_mapping("qwen3_moe")
moe_fused.get_kernel()
