"""The experts interface of Transformers: ``experts_implementation="moe_fused"``.

- ``experts_module``: what an experts module of Transformers computes and how its weights lie.
- ``forward``: the experts implementation that calls the kernel, and its registration.
- ``originals``: experts whose class another library has replaced, and the way back to Transformers' class.
"""
