"""The commands of ``moe-fused`` beside ``convert``: a module each, which imports nothing heavy before it runs."""
