"""Timing experts: what ``moe-fused bench``, ``moe-fused tune`` and the repository's own benchmarks have in common."""
