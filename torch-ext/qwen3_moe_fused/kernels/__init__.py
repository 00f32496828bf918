"""Triton device code, one kernel family a file; launched from ``launch``."""
