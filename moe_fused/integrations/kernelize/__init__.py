"""The kernel's layers through ``kernels.kernelize``.

- ``mapping``: ``KERNEL_MAPPING``, the layers in the format of ``kernels``. It imports neither torch nor ``kernels``.
- ``selection``: which modules of a model each layer serves, and why it does not serve the others.
- ``apply``: ``moe_fused.kernelize``, which changes one model and nothing else.
- ``registration``: ``moe_fused.register_layers``, after which ``kernels.kernelize`` alone does it.
"""
