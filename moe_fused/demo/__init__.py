"""The demo: trains a small Qwen3-MoE on real text through the fused experts and shows what came of it.

``python -m moe_fused.demo`` reads in this order: ``cli`` (options and the sequence of steps), ``data`` (the text),
``model`` (the configuration), ``train``, ``compare`` (against Transformers' own experts), ``report`` (picture and JSON),
``output`` (nothing appears under the output path before all of it is there).
"""
