"""Launch configurations: data, one rule of validity, an analytic default for every target, measured overrides.

A configuration is looked up by kernel family, target and *bucket*, the typical number of rows an expert gets: with the
expected S/E rows, a tile taller than that is mostly empty, and below a few hundred rows the weights' bytes, not the tensor
cores, set the pace. ``configs/*.json`` replaces the default where something measured better; nobody waits for autotuning.
Tables of one's own, named the same, in the directory ``MOE_FUSED_CONFIGS`` come before them: entry by entry, a kernel in a
bucket for a size of element, with the fields that an entry leaves out as in the default.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

# Kernel families with a tile to choose. "up" multiplies two BLOCK_N-wide column tiles when the experts are gated;
# "gemm_short" is "gemm" over few in features, where the epilogue weighs more than the loop. The "4bit" ones decode packed
# weights on the way, "transposed_4bit" for the gradient of tokens. "shrink" and "gram_thin" are an adapter's products, as
# thin as its rank: block_n, of gram_thin block_m, is what they are at most.
KERNELS_4BIT = ("up_4bit", "gemm_4bit", "transposed_4bit", "down_backward_4bit")
DOWN_BACKWARDS = ("down_backward", "down_backward_4bit")
KERNELS = ("up", "gemm", "gemm_short", "down_backward", "gram", "shrink", "gram_thin", *KERNELS_4BIT)
GRAMS = ("gram", "gram_thin")
SHORT_K = 1024

# Rows per expert up to which each bucket's tile height serves; the last bucket has no end. Over packed weights every row
# tile decodes its expert again, which makes a second tile dearer than idle rows; tiles 32 high are good for little there,
# as tensor cores that read decoded weights from shared memory take 64 rows.
BUCKETS = {16: 4, 32: 16, 64: 48, 128: None}
PACKED_BUCKETS = {16: 11, 32: 14, 64: 128, 128: None}

# Rows per expert up to which decoding inside a product beats decoding into a workspace first, by compute capability. For a
# Qwen3-30B-A3B layer on an H100, in µs and in brackets by way of the workspace, all at 256 and 512 rows: up projection 615
# (853) and 1121 (1130), down projection 349 (452) and 612 (599), gradient of the tokens 762 (some 830) and 1312 (some 1150),
# back through the down projection 583 (568) and 941 (793), at 128 rows 339 (467).
DECODE_ROWS: dict[int | str, dict[str, int]] = {
    90: {"up_4bit": 448, "gemm_4bit": 448, "transposed_4bit": 320, "down_backward_4bit": 240}
}
DEFAULT_DECODE_ROWS = 192

_CONFIGS = Path(__file__).parent / "configs"
CONFIGS_VARIABLE = "MOE_FUSED_CONFIGS"


@dataclass(frozen=True)
class LaunchConfig:
    """One launch configuration.

    Attributes:
        block_m, block_n, block_k: tile sizes; for ``gram`` and ``gram_thin`` block_k counts rows and block_m, block_n the
            output features.
        num_warps, num_stages: of Triton.
        descriptor: load weights (and rows, where they are not gathered) through a tensor descriptor (TMA) if the layout
            allows it.
        half_tiles: the last row tile of an expert is computed at half the height where its rows fit in that.
        slices: of the tile the epilogue of ``DOWN_BACKWARDS`` works on one after the other, to save registers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptor: bool = False
    slices: int = 1
    half_tiles: bool = False


@dataclass(frozen=True)
class Target:
    """What the choice depends on.

    Attributes:
        backend: "cuda", "hip" or "xpu".
        arch: compute capability as 10·major + minor, or the gfx name.
        shared_memory: bytes a program may use.
    """

    backend: str
    arch: int | str
    shared_memory: int


KIB = 1024
TARGETS = {
    80: Target("cuda", 80, 163 * KIB),
    86: Target("cuda", 86, 99 * KIB),
    89: Target("cuda", 89, 99 * KIB),
    90: Target("cuda", 90, 227 * KIB),
    100: Target("cuda", 100, 227 * KIB),
    120: Target("cuda", 120, 99 * KIB),
    "gfx942": Target("hip", "gfx942", 64 * KIB),
    "xpu": Target("xpu", "xpu", 128 * KIB),
}


def decode_rows(kernel: str, target: Target) -> int:
    """Rows per expert up to which ``kernel`` of ``KERNELS_4BIT`` is launched."""
    if kernel not in KERNELS_4BIT:
        raise AssertionError(f"{kernel} decodes no packed weights")
    return DECODE_ROWS.get(target.arch, {}).get(kernel, DEFAULT_DECODE_ROWS)


def decodes_in_gemm(kernel: str, num_rows: int, num_experts: int, target: Target) -> bool:
    """Whether a product over packed weights decodes them itself, by ``kernel``, for S = num_rows over E = num_experts."""
    return num_rows <= num_experts * decode_rows(kernel, target)


@functools.lru_cache(maxsize=1024)  # of any number of tokens
def bucket(num_rows: int, num_experts: int, packed: bool = False) -> int:
    """The tile height for S = num_rows routed rows over E = num_experts."""
    rows_per_expert = num_rows / max(num_experts, 1)
    for block_m, limit in (PACKED_BUCKETS if packed else BUCKETS).items():
        if limit is None or rows_per_expert <= limit:
            return block_m
    raise AssertionError("the last bucket has no limit")


def tile_height(block_m: int, itemsize: int) -> int:
    """The height of the row tiles of a bucket, which its row-tiled kernels share; fp32 tiles are at most 64 high."""
    return min(block_m, 64) if itemsize == 4 else block_m


def shared_memory(kernel: str, config: LaunchConfig, itemsize: int) -> int:
    """Bytes of shared memory that the pipelined operand tiles of ``config`` take, without the compiler's own scratch."""
    if kernel in KERNELS_4BIT:
        rows = config.block_k * config.block_m * itemsize
        weights = config.block_k * config.block_n * (2 if kernel == "up_4bit" else 1)
        # Bytes on their way, and one tile decoded.
        return config.num_stages * (rows + weights // 2) + weights * itemsize
    if kernel in GRAMS:
        tile = config.block_k * (config.block_m + config.block_n)
    else:
        tile = config.block_k * (config.block_m + config.block_n * (2 if kernel == "up" else 1))
    return tile * itemsize * config.num_stages


def check(kernel: str, config: LaunchConfig, target: Target, itemsize: int) -> None:
    """The one rule of validity.

    Raises:
        ValueError: ``config`` cannot be launched on ``target`` for elements of ``itemsize`` bytes; says why.
    """
    for field in ("block_m", "block_n", "block_k", "num_warps"):
        value = getattr(config, field)
        if value < 1 or value & (value - 1):
            raise ValueError(f"{field} must be a power of two, got {value}")
    if min(config.block_m, config.block_n, config.block_k) < 16:
        raise ValueError(f"blocks must be at least 16 for tl.dot, got {config}")
    if not 1 <= config.num_stages <= 8 or config.num_warps > 16:
        raise ValueError(f"num_stages must be 1 to 8 and num_warps at most 16, got {config}")
    if config.descriptor and (target.backend != "cuda" or not isinstance(target.arch, int) or target.arch < 90):
        raise ValueError(f"descriptors need compute capability 9.0, got {target.arch}")
    need = shared_memory(kernel, config, itemsize)
    if need > target.shared_memory:
        raise ValueError(f"{config} needs {need} bytes of shared memory, {target.arch} has {target.shared_memory}")
    if kernel in KERNELS_4BIT and (config.block_k if kernel in ("up_4bit", "gemm_4bit") else config.block_n) % 64:
        raise ValueError(f"{kernel} needs tiles of multiples of 64 along the packed features, got {config}")
    if config.half_tiles and config.block_m < 32:
        raise ValueError(f"half_tiles needs tiles of at least 32 rows, got {config}")
    if config.slices not in (1, 2, 4, 8) or config.block_n < 16 * config.slices:
        raise ValueError(f"slices must be 1, 2, 4 or 8 of at least 16 columns, got {config}")


def default_config(kernel: str, block_m: int, target: Target, itemsize: int) -> LaunchConfig:
    """The analytic default: the tile of the bucket, cut down until it fits the target."""
    hopper = target.backend == "cuda" and isinstance(target.arch, int) and target.arch in (90, 100)
    if kernel in KERNELS_4BIT:
        height = tile_height(block_m, itemsize)
        if itemsize == 4:
            # Without tensor cores an operand's whole block_k lies in registers: larger tiles spill some KiB a thread.
            block_n, block_k = {"up_4bit": (16, 64), "gemm_4bit": (32, 64)}.get(kernel, (64, 32))
            config = LaunchConfig(height, block_n, block_k, 8 if height == 64 else 4, 2)
        else:
            config = LaunchConfig(height, 64 if kernel == "up_4bit" else 128, 64, 8 if height == 128 else 4, 3)
    elif itemsize == 4:
        # fp32 runs on the FMA units (or tf32 at half rate): small tiles, registers are what is short.
        config = LaunchConfig(tile_height(block_m, itemsize), 64 if kernel != "up" else 32, 32, 4, 3)
        if kernel in GRAMS:
            # The thin one's weighted operand lies in registers.
            config = LaunchConfig(64 if kernel == "gram" else 32, 64, 32, 4, 3)
    elif kernel == "gram_thin":
        config = LaunchConfig(64, 128, 32, 4, 3)
    elif kernel == "shrink":
        config = LaunchConfig(block_m, 64, 128, 4, 3, descriptor=hopper)
    elif kernel == "gram":
        config = LaunchConfig(128, 128, 64 if block_m > 32 else 32, 8, 3)
    elif block_m == 16:
        config = LaunchConfig(16, 32 if kernel == "up" else 64, 128, 4, 4, descriptor=hopper)
    elif block_m == 32:
        config = LaunchConfig(32, 64 if kernel == "up" else 128, 128, 4, 3, descriptor=hopper)
    elif block_m == 64:
        config = LaunchConfig(64, 64 if kernel == "up" else 128, 128 if hopper else 64, 4, 4, descriptor=hopper)
    else:
        config = LaunchConfig(
            128, 128 if hopper or kernel != "up" else 64, 64, 8, 4 if hopper else 3, descriptor=hopper
        )
    if kernel in DOWN_BACKWARDS:
        config = replace(config, slices=max(1, config.block_n // 64))
    if target.backend == "hip":
        config = replace(config, num_stages=2)
    while config.num_stages > 2 and shared_memory(kernel, config, itemsize) > target.shared_memory:
        config = replace(config, num_stages=config.num_stages - 1)
    least = 64 if kernel in KERNELS_4BIT else 16
    while config.block_k > least and shared_memory(kernel, config, itemsize) > target.shared_memory:
        config = replace(config, block_k=config.block_k // 2)
    return config


Table = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""Measured configurations, as JSON has them: {kernel: {bytes per element: {block_m: fields of a LaunchConfig}}}."""


def table_name(arch: int | str) -> str:
    """The file name of a table for ``arch``."""
    return f"{f'sm_{arch}' if isinstance(arch, int) else arch}.json"


def table_paths(arch: int | str) -> list[Path]:
    """The tables for ``arch`` that exist, each laid over those before it.

    Raises:
        ValueError: ``MOE_FUSED_CONFIGS`` is no directory.
    """
    folders = [_CONFIGS]
    if own := os.environ.get(CONFIGS_VARIABLE):
        folders.append(Path(own))
        if not folders[-1].is_dir():
            raise ValueError(f"{CONFIGS_VARIABLE} must be a directory with tables as {table_name(arch)}, got {own}")
    return [path for folder in folders if (path := folder / table_name(arch)).exists()]


def read_table(path: Path) -> Table:
    """The table in ``path``.

    Raises:
        ValueError: it is none; says what is wrong with which entry.
        OSError: it cannot be read.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    names = {field.name for field in fields(LaunchConfig)}

    def level(value: Any, *place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {'/'.join(place) or 'the table'} must be an object, got {json.dumps(value)}")
        return value

    for kernel, by_size in level(table).items():
        for size, by_bucket in level(by_size, kernel).items():
            for block_m, values in level(by_bucket, kernel, size).items():
                place = (kernel, size, block_m)
                known = kernel in KERNELS and size in ("2", "4") and block_m in map(str, BUCKETS)
                if not known or not set(level(values, *place)) <= names:
                    raise ValueError(f"{path}: {'/'.join(place)} does not describe a LaunchConfig: {values}")
                if not all(isinstance(value, int) for value in values.values()):
                    raise ValueError(f"{path}: {'/'.join(place)} must have whole numbers and booleans, got {values}")
    return table


@functools.cache
def _overrides(arch: int | str) -> dict[tuple[str, int, int], tuple[Path, dict[str, Any]]]:
    """Where each measured configuration for ``arch`` stands, and its fields: by kernel, bucket and bytes per element."""
    return {
        (kernel, int(block_m), int(size)): (path, values)
        for path in table_paths(arch)
        for kernel, by_size in read_table(path).items()
        for size, by_bucket in by_size.items()
        for block_m, values in by_bucket.items()
    }


# What ``trying`` asks for.
_trial: dict[tuple[str, int, int], LaunchConfig] = {}


@functools.cache
def launch_config(kernel: str, block_m: int, target: Target, itemsize: int) -> LaunchConfig:
    """The configuration of ``kernel`` in bucket ``block_m`` on ``target``, elements of ``itemsize`` bytes.

    Raises:
        ValueError: a measured one is not valid; says which, and why.
    """
    key = (kernel, block_m, itemsize)
    if key in _trial:
        return _trial[key]
    config = default_config(kernel, block_m, target, itemsize)
    path, values = _overrides(target.arch).get(key, (None, {}))
    config = replace(config, **values)
    try:
        check_bucket(kernel, block_m, config, itemsize)
        check(kernel, config, target, itemsize)
    except ValueError as error:
        if path is None:
            raise
        raise ValueError(f"{path}: {kernel}/{itemsize}/{block_m}: {error}") from error
    return config


def check_bucket(kernel: str, block_m: int, config: LaunchConfig, itemsize: int) -> None:
    """Raises ValueError unless ``config`` has the row tiles of its bucket, which all kernels of a call share."""
    if kernel not in GRAMS and config.block_m != tile_height(block_m, itemsize):
        raise ValueError(
            f"{kernel}: block_m must be the {tile_height(block_m, itemsize)} of its bucket, got {config.block_m}"
        )


@contextlib.contextmanager
def trying(kernel: str, block_m: int, itemsize: int, config: LaunchConfig) -> Iterator[None]:
    """Launches of ``kernel`` in that bucket use ``config`` within the block; for who measures."""
    _trial[kernel, block_m, itemsize] = config
    launch_config.cache_clear()
    try:
        yield
    finally:
        del _trial[kernel, block_m, itemsize]
        launch_config.cache_clear()


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target that describes ``device``; a CPU (Triton's interpreter) counts as compute capability 8.0."""
    if device.type == "xpu":
        return TARGETS["xpu"]
    if device.type == "cpu":
        return TARGETS[80]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return TARGETS["gfx942"]
    arch = properties.major * 10 + properties.minor
    if arch in TARGETS:
        return TARGETS[arch]
    # A relative of a known one: Orin is 8.7, Blackwell Ultra 10.3, Thor 11.0, GB10 12.1.
    relative = TARGETS[100 if arch in (103, 110) else 86]
    shared: int = getattr(properties, "shared_memory_per_block_optin", relative.shared_memory)
    return replace(relative, arch=arch, shared_memory=shared)
