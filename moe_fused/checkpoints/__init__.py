"""4-bit experts in checkpoints: which layouts there are, and how to read and write them bit for bit.

Per expert:
    ``experts.{i}.gate_proj.weight``, ``….weight.absmax``, ``….weight.quant_state.bitsandbytes__nf4`` and so on: bitsandbytes
    under Transformers 4, and ours by default.
Stacked:
    ``gate_proj.weight``, ``gate_proj.weight.absmax`` and so on, beside the router, all experts quantized as one matrix: the
    original qwen3-moe-fused.
Fused:
    ``experts.gate_up_proj``, ``experts.gate_up_proj_absmax``, …, ``experts.gate_up_proj_format``: ours on demand.

``names`` says which tensor belongs where, ``quant_state`` knows a matrix of bitsandbytes, ``fused`` our own layout, and
``converter`` puts the tensors together while Transformers loads them.
"""
