"""Plugins of pytest that switch off what a patch of ``docs/upstream`` makes superfluous in ``moe_fused``.

``Tree.pytest`` loads one before it collects this repository's own tests, which then pass with the patch alone.
"""
