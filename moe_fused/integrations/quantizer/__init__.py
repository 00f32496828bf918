"""Transformers' quantizers, extended to experts in 4 bits, and repairs of bitsandbytes on a CPU.

- ``packed_experts``: experts modules that hold 4-bit weights, and the way back to dense weights.
- ``experts_quantizer``: what the quantizers have in common: finding, loading, saving and dequantizing the experts.
- ``hf_quantizer``: ``BitsAndBytesConfig(load_in_4bit=True)`` that includes the experts, and its registration.
- ``published``: experts in mxfp4 and nvfp4 as gpt-oss and compressed-tensors publish them, and the registration of that.
- ``configs``: the ``quantization_config`` for a dense checkpoint and a format.
- ``division``: experts that a plan of Transformers divides among processes.
- ``conversions``: changes to the conversions of weights that Transformers runs while it loads and saves.
- ``saving``: the tensors and the config that ``save_pretrained`` writes.
- ``bitsandbytes_cpu``: repairs of bitsandbytes on a CPU.
"""
