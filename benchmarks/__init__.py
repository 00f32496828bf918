"""Benchmarks: ``python -m benchmarks.experts`` times, ``.plot`` and ``.table`` show what was timed."""
