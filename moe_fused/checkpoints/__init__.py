"""4-bit experts in checkpoints: which layouts there are, and how to read and write them bit for bit.

| layout | keys of one experts module | who writes it |
|---|---|---|
| per expert | ``experts.{i}.gate_proj.weight``, ``….weight.absmax``, ``….weight.quant_state.bitsandbytes__nf4``, … | Transformers 4 with bitsandbytes; we, by default |
| fused | ``experts.gate_up_proj``, ``experts.gate_up_proj_absmax``, …, ``experts.gate_up_proj_format`` | we, on demand |
| stacked | ``gate_proj.weight``, ``gate_proj.weight.absmax``, … beside the router, all experts quantized as one | the original qwen3-moe-fused |

``quant_state`` knows one matrix of bitsandbytes, ``fused`` our own layout, ``converter`` puts the tensors of a checkpoint
together while Transformers loads it, ``names`` says which tensor belongs where.
"""
