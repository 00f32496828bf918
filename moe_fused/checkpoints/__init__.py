"""Reads and writes experts in checkpoints, bit for bit, in three layouts, and as mxfp4 and nvfp4 are published.

Per expert:
    ``experts.{i}.gate_proj.weight``, in 4 bits with ``….weight.absmax``, ``….weight.quant_state.bitsandbytes__nf4`` and so
    on. This is the layout of the Hub and of bitsandbytes under Transformers 4, and the one that we write by default.
Stacked:
    ``gate_proj.weight``, in 4 bits with ``gate_proj.weight.absmax`` and so on, beside the router, with all experts quantized
    as one matrix. This is the layout of the original qwen3-moe-fused.
Fused:
    ``experts.gate_up_proj``, as Transformers 5 has it in memory, and in 4 bits ``experts.gate_up_proj_absmax``, …,
    ``experts.gate_up_proj_format``. This is our own layout, written on demand.

mxfp4 and nvfp4 have tensors of other names in these places: ``experts.{i}.gate_proj.weight_packed`` and so on per expert, as
compressed-tensors has them, and ``experts.gate_up_proj_blocks`` and ``_scales`` for the stacks of gpt-oss.

Reading while Transformers loads: ``names`` finds the parameter that a tensor belongs to, ``quant_state`` reads a matrix of
bitsandbytes, ``fused`` reads our own layout, ``entries`` joins the tensors of one parameter, and ``converter`` does all of
this within Transformers' loading loop.

Rewriting saved models: ``models`` is the entry, ``tensor_files`` reads and writes files, ``architecture`` knows the model,
``checkpoint`` finds the experts among the tensors, and ``stacks`` and ``published_stacks`` bring them from one layout into
another. ``adapters`` does the same for LoRA on experts, and ``optimizers`` for the state of AdamW.
"""
