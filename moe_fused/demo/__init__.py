"""The demo: the whole way of a small Qwen3-MoE on real text, from its first weights to an adapter that every tool reads.

Read it in this order: ``cli`` (the options), ``run`` (the sequence of steps), ``data`` (the texts), ``model`` (the
configuration), ``train``, ``compare`` (against Transformers' own experts), ``four_bit`` (the same model in 4 bits),
``finetune`` (``moe-fused finetune`` and the adapter in PEFT), ``stock`` (the script that reads it without moe_fused),
``report`` (the picture and the summary), ``output`` (nothing appears under the output path before all of it is there).
"""
