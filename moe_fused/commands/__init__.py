"""The commands of ``moe-fused``: a module each, which imports nothing heavy before it runs."""
