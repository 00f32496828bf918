"""Experts in checkpoints: which layouts there are, and how to read and write them bit for bit.

Per expert:
    ``experts.{i}.gate_proj.weight``, in 4 bits with ``….weight.absmax``, ``….weight.quant_state.bitsandbytes__nf4`` and so
    on: the Hub, bitsandbytes under Transformers 4, and ours by default.
Stacked:
    ``gate_proj.weight``, in 4 bits with ``gate_proj.weight.absmax`` and so on, beside the router, all experts quantized as
    one matrix: the original qwen3-moe-fused.
Fused:
    ``experts.gate_up_proj``, as Transformers 5 has it in memory, and in 4 bits ``experts.gate_up_proj_absmax``, …,
    ``experts.gate_up_proj_format``: ours on demand.

``names`` says which tensor belongs where, ``quant_state`` knows a matrix of bitsandbytes, ``fused`` our own layout, and
``entries`` what the tensors of one parameter make up. ``converter`` puts them together while Transformers loads them.

``models`` rewrites saved models: ``tensor_files`` reads and writes files, ``architecture`` knows what model they are of,
``checkpoint`` finds the experts among the tensors, and ``stacks`` brings those from one layout into another. ``adapters``
does so for LoRA on experts, and ``optimizers`` for what AdamW remembers of either.
"""
