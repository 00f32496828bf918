"""LoRA on experts in adapters' files: the layouts in the wild, and exact conversion between them.

E experts, r the rank, "in" and "out" a projection's features. Every layout holds the same ``W + scaling · B @ A`` for each
expert, A (r, in) and B (out, r):

per-expert
    ``experts.{i}.{gate,up,down}_proj.lora_{A,B}.weight``. PEFT under Transformers 4; what vLLM, SGLang and llama.cpp load.
peft-fused
    PEFT's ``target_parameters`` from 0.19.1 on: ``experts.base_layer.lora_{A,B}.weight`` is gate_up_proj, with one A for
    both, ``experts.lora_{A,B}.weight`` is down_proj, or the only one that is adapted. lora_A (E·r, in) has the expert
    slowest, lora_B (out, r·E) has it fastest.
peft-swapped
    The same keys of PEFT 0.17 to 0.19.0, which took the experts' (E, out, in) for (E, in, out): lora_A (E·r, out) holds B,
    lora_B (in, r·E) holds A.
gpt-oss-inverted
    The same of PEFT 0.19.0 on gpt-oss, whose experts are (E, in, out); 0.17 and 0.18 were right there.
unsloth-grouped, unsloth-swapped
    As peft-fused and peft-swapped, but lora_B has the expert slowest: Unsloth before September 2026. The shapes are the
    same; today's Unsloth leaves a mark, ``lora_B_layout``, in the config.
original
    ``{gate,up,down}_proj.lora_{A,B}.weight`` beside the router, (E, r, in) and (E, out, r): the original qwen3-moe-fused.

Checked by running PEFT 0.18.0, 0.18.1, 0.19.0, 0.19.1 and 0.21.2 under Transformers 5.22 on a Qwen3-MoE: adapters that each
of them saved have its logits after conversion to peft-fused and per-expert in 0.21.2. On a gpt-oss, to peft-fused, 0.18.1,
0.19.0 and 0.19.1. PEFT 0.17.0 was read only, it does not import there. The original's layout follows from its LoRA layer;
Unsloth's order and mark from what its authors and users write and from its tests. The integration tests hold the formulas
of all.

PEFT itself loads per-expert files by a conversion to rank 2r with a block-diagonal B. That is exact, but for rsLoRA it
doubles alpha as well, which makes the scaling √2 too large; saved again, such adapters come back to rank r here as long as
the zero blocks were not trained.
"""

from __future__ import annotations

from .names import Layout, ScalingChoice

__all__ = ["Layout", "ScalingChoice"]
