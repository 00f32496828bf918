"""Times experts, for ``moe-fused bench``, ``moe-fused tune`` and the benchmarks of the repository."""
