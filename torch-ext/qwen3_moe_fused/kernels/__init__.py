"""Triton device code, one kernel family per file. ``stages.triton`` launches it."""
