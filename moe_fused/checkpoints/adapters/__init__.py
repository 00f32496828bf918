"""Reads adapter files with LoRA on experts in every known layout, and converts exactly between the layouts.

E is the number of experts, r the rank, "in" and "out" are a projection's features. Every layout holds the same
``W + scaling · B @ A`` for each expert, with A (r, in) and B (out, r):

per-expert
    ``experts.{i}.{gate,up,down}_proj.lora_{A,B}.weight``. PEFT under Transformers 4 wrote it; vLLM, SGLang and llama.cpp
    load it.
peft-fused
    PEFT's ``target_parameters`` from 0.19.1 on. ``experts.base_layer.lora_{A,B}.weight`` is gate_up_proj, with one A for
    both. ``experts.lora_{A,B}.weight`` is down_proj, or the only parameter that is adapted. In lora_A (E·r, in) the expert
    is the slowest index, in lora_B (out, r·E) the fastest.
peft-swapped
    The same keys, from PEFT 0.17 to 0.19.0. These took the experts' (E, out, in) for (E, in, out), so that lora_A (E·r, out)
    holds B and lora_B (in, r·E) holds A.
gpt-oss-inverted
    The same mistake in PEFT 0.19.0 on gpt-oss, whose experts are (E, in, out). 0.17 and 0.18 were right there.
unsloth-grouped, unsloth-swapped
    Like peft-fused and peft-swapped, but the expert is the slowest index of lora_B. Unsloth wrote these before September
    2026. The shapes are the same as in the other two. Today's Unsloth leaves a mark, ``lora_B_layout``, in the config.
original
    ``{gate,up,down}_proj.lora_{A,B}.weight`` beside the router, (E, r, in) and (E, out, r), as the original qwen3-moe-fused
    wrote it.

This was checked by running PEFT 0.18.0, 0.18.1, 0.19.0, 0.19.1 and 0.21.2 under Transformers 5.22 on a Qwen3-MoE: an adapter
that each of them saved gives the same logits after conversion to peft-fused and to per-expert in 0.21.2. On a gpt-oss, the
conversion to peft-fused was checked with 0.18.1, 0.19.0 and 0.19.1. The code of PEFT 0.17.0 was only read, because it cannot
be imported there. The original project's layout follows from its LoRA layer. Unsloth's order and mark are known from what
its authors and users write and from its tests. The integration tests contain the formulas of all layouts.

PEFT itself loads per-expert files by a conversion to rank 2r with a block-diagonal B. This is exact, except that for rsLoRA
it doubles alpha as well, which makes the scaling √2 too large. If such an adapter is saved again, it is converted back to
rank r here, as long as the zero blocks were not trained.
"""

from __future__ import annotations

from .names import Layout, ScalingChoice

__all__ = ["Layout", "ScalingChoice"]
