"""The demo: trains a small Qwen3-MoE on real text through the fused experts and shows what came of it.

Read it in this order: ``cli`` (the options), ``run`` (the sequence of steps), ``data`` (the text), ``model`` (the
configuration), ``train``, ``compare`` (against Transformers' own experts), ``four_bit`` (the same model in 4 bits),
``report`` (the picture and the summary), ``output`` (nothing appears under the output path before all of it is there).
"""
