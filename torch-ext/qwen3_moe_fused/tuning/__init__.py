"""Launch configurations and thresholds: which tile, which kernel and which way serve a call on a GPU.

- ``targets``: families of GPUs, and the limits of each GPU.
- ``config``: what a configuration is, the one rule of validity, and the analytic defaults.
- ``tables``: the measured tables (``configs/*.json`` and those in ``MOE_FUSED_CONFIGS``) laid over the defaults, and the
  questions that launches ask.

Other modules ask through this package (``tuning.launch_config``), not through its parts.
"""

from __future__ import annotations

from ..formats.base import ROW_UNIT
from .config import (
    BUCKETS,
    DEFAULT_DEQUANTIZE_ROWS,
    DEFAULT_THRESHOLDS,
    DOWN_BACKWARDS,
    FEW_SLOTS,
    KERNELS,
    KERNELS_4BIT,
    KERNELS_FEW,
    SHORT_K,
    WGRADS,
    LaunchConfig,
    Thresholds,
    bucket_of_few,
    check,
    check_bucket,
    default_config,
    fitted,
    shared_memory,
    tile_height,
)
from .tables import (
    CONFIGS,
    CONFIGS_VARIABLE,
    SECTIONS,
    THRESHOLD_SECTIONS,
    Table,
    bucket,
    dequantize_rows,
    dequantizes_in_product,
    few_config,
    few_slots,
    forget_tables,
    gemv_slots,
    launch_config,
    read_table,
    table_name,
    table_paths,
    thresholds_of,
    trying,
    trying_thresholds,
)
from .targets import FAMILIES, TARGETS, Family, Target, family_of, nearest_relative, target_of

__all__ = [
    "BUCKETS",
    "CONFIGS",
    "CONFIGS_VARIABLE",
    "DEFAULT_DEQUANTIZE_ROWS",
    "DEFAULT_THRESHOLDS",
    "DOWN_BACKWARDS",
    "FAMILIES",
    "FEW_SLOTS",
    "KERNELS",
    "KERNELS_4BIT",
    "KERNELS_FEW",
    "ROW_UNIT",
    "SECTIONS",
    "SHORT_K",
    "TARGETS",
    "THRESHOLD_SECTIONS",
    "WGRADS",
    "Family",
    "LaunchConfig",
    "Table",
    "Target",
    "Thresholds",
    "bucket",
    "bucket_of_few",
    "check",
    "check_bucket",
    "default_config",
    "dequantize_rows",
    "dequantizes_in_product",
    "family_of",
    "few_config",
    "few_slots",
    "fitted",
    "forget_tables",
    "gemv_slots",
    "launch_config",
    "nearest_relative",
    "read_table",
    "shared_memory",
    "table_name",
    "table_paths",
    "target_of",
    "thresholds_of",
    "tile_height",
    "trying",
    "trying_thresholds",
]
