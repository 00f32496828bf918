"""The demo: trains a small Qwen3-MoE on real text, fine-tunes it in 4 bits, and loads the adapter in other tools.

Read the files in this order: ``cli`` (the options), ``run`` (the sequence of steps), ``data`` (the texts), ``model`` (the
configuration), ``train`` (the training loop), ``compare`` (comparison with Transformers' experts), ``four_bit`` (the same
model in 4 bits), ``finetune`` (``moe-fused finetune`` and the adapter in PEFT), ``stock`` (the script that reads the adapter
without moe_fused), ``report`` (the picture and the summary), ``output`` (the output directory appears when it is complete).
"""
