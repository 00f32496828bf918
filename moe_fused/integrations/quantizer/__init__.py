"""Transformers' quantizer for bitsandbytes in 4 bits, extended to experts, and repairs of bitsandbytes on a CPU.

- ``packed_experts``: experts modules that hold 4-bit weights, and the way back to dense weights.
- ``hf_quantizer``: ``BitsAndBytesConfig(load_in_4bit=True)`` that includes the experts, and its registration.
- ``conversions``: changes to the conversions of weights that Transformers runs while it loads and saves.
- ``saving``: the tensors and the config that ``save_pretrained`` writes.
- ``bitsandbytes_cpu``: repairs of bitsandbytes on a CPU.
"""
