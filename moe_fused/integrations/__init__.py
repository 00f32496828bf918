"""The places where this package plugs into other libraries, one folder or file for each.

- ``transformers``: the experts implementation ``"moe_fused"``.
- ``quantizer``: 4-bit experts under ``BitsAndBytesConfig``, and repairs of bitsandbytes on a CPU.
- ``peft``: LoRA on experts.
- ``kernelize``: the kernel's layers through ``kernels.kernelize``.

``moe_fused.enable`` registers the first three, ``moe_fused.disable`` takes them out again. Nothing here is imported before
it is needed, because each of them needs the library that it plugs into.
"""
