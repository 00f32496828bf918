"""Launch configurations: their fields, the one rule of validity, and the analytic defaults of every family of GPUs.

A configuration belongs to a kernel family, a size of element and a *bucket*. A bucket is a height of row tiles, and it is
chosen by the S/E rows that an expert gets on average: a tile much taller than that is mostly empty, and below a few hundred
rows the weights' bytes, not the tensor cores, set the pace.

Beside the configurations there are three kinds of *thresholds*, which decide which kernel or tile serves a call. The
defaults below hold for every family; ``configs/sm_90.json`` has those that were measured on an H100, with the times that
explain them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..formats.base import ROW_UNIT
from .targets import KIB, Target

# Kernel families with a tile to choose. "up" multiplies two BLOCK_N-wide column tiles when the experts are gated;
# "gemm_short" is "gemm" over few in features, where the epilogue weighs more than the loop. The "4bit" ones dequantize
# packed weights on the way, "transposed_4bit" for the gradient of tokens. "shrink" and "wgrad_thin" are an adapter's
# products, as thin as its rank: block_n, for wgrad_thin block_m, is the most that they use.
KERNELS_4BIT = ("up_4bit", "gemm_4bit", "transposed_4bit", "down_backward_4bit")
DOWN_BACKWARDS = ("down_backward", "down_backward_4bit")
KERNELS = ("up", "gemm", "gemm_short", "down_backward", "wgrad", "shrink", "wgrad_thin", *KERNELS_4BIT)
WGRADS = ("wgrad", "wgrad_thin")
# The families of few rows over packed weights. Their buckets are not heights of tiles: they count slots, or rows for
# "few_linear_4bit", up to which a configuration serves. The last bucket has no end.
KERNELS_FEW = ("few_up_4bit", "few_down_4bit", "few_linear_4bit")
# Slots up to which estimates say that tensor cores are faster. ``moe-fused tune`` measures that far.
FEW_SLOTS = 128
SHORT_K = 1024

# The heights of row tiles, by which configurations are looked up.
BUCKETS = (16, 32, 64, 128)
# Rows per expert up to which a product over packed weights dequantizes them itself, where nobody has measured it.
DEFAULT_DEQUANTIZE_ROWS = 192


@dataclass(frozen=True)
class LaunchConfig:
    """One launch configuration.

    Attributes:
        block_m, block_n, block_k: tile sizes; for ``wgrad`` and ``wgrad_thin`` block_k counts rows and block_m, block_n the
            output features.
        num_warps, num_stages: of Triton.
        descriptor: load weights (and rows, where they are not gathered) through a tensor descriptor (TMA) if the layout
            allows it.
        half_tiles: the last row tile of an expert is computed at half the height where its rows fit in that.
        split_k: of ``KERNELS_FEW``: into how many parts a program divides the inner dimension. Each part of it and of the
            columns has a warp.
        registers: of ``KERNELS_FEW`` on NVIDIA GPUs: the most that a thread may have, or 0. The compiler takes more than it
            needs, which leaves room for fewer programs.
        prefetch: of ``KERNELS_FEW`` on NVIDIA GPUs: a program first asks for all of its weights to be brought into the L2.
        slices: number of column slices in which the epilogue of ``DOWN_BACKWARDS`` works on its tile, one after the other,
            to save registers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptor: bool = False
    slices: int = 1
    half_tiles: bool = False
    split_k: int = 1
    registers: int = 0
    prefetch: bool = False

    def __hash__(self) -> int:  # every launch asks; the hash of all fields takes five times as long
        return 1024 * self.block_m + self.block_n


@dataclass(frozen=True)
class Thresholds:
    """Where one way of computing a call ends and the next one begins.

    Attributes:
        dense: rows per expert up to which each tile height serves, by height. The last bucket has no end, so it has no
            entry.
        packed: the same for products over packed weights. There every row tile dequantizes its expert's weights again, so a
            second tile costs more than idle rows do; tiles 32 high serve few sizes, because tensor cores that read
            dequantized weights from shared memory take 64 rows.
        dequantize_rows: rows per expert up to which a kernel of ``KERNELS_4BIT`` dequantizes the weights that it multiplies.
            Above it the weights are dequantized into a workspace first.
        gemv_slots: slots (tokens times top_k) up to which the few-row path serves a call without gradients.
        few_slots: the same for packed weights that tensor cores multiply, in 16 bits on NVIDIA GPUs. It is 0 until a GPU was
            measured, because estimates alone speak for it.
    """

    dense: Mapping[int, int]
    packed: Mapping[int, int]
    dequantize_rows: Mapping[str, int]
    gemv_slots: int
    few_slots: int = 0

    def check(self) -> None:
        """Raises ValueError if a shorter tile would serve more rows than a taller one."""
        for name in ("dense", "packed"):
            limits: Mapping[int, int] = getattr(self, name)
            heights = BUCKETS[:-1]
            for shorter, taller in itertools.pairwise(heights):
                if limits[shorter] > limits[taller]:
                    raise ValueError(
                        f"buckets/{name}: tiles of {shorter} rows must not serve more rows than tiles of {taller}, "
                        f"got {limits[shorter]} and {limits[taller]}"
                    )


DEFAULT_THRESHOLDS = Thresholds(
    dense={16: 4, 32: 16, 64: 48},
    packed={16: 11, 32: 14, 64: 128},
    dequantize_rows=dict.fromkeys(KERNELS_4BIT, DEFAULT_DEQUANTIZE_ROWS),
    gemv_slots=64,
)


def tile_height(block_m: int, itemsize: int) -> int:
    """The height of the row tiles of a bucket, which its row-tiled kernels share; fp32 tiles are at most 64 high."""
    return min(block_m, 64) if itemsize == 4 else block_m


def shared_memory(kernel: str, config: LaunchConfig, itemsize: int) -> int:
    """Bytes of shared memory that the pipelined operand tiles of ``config`` take, without the compiler's own scratch."""
    if kernel in KERNELS_FEW:
        rows = config.split_k * config.block_m * config.block_k * itemsize
        return config.num_stages * (rows + config.split_k * config.block_n * config.block_k // 2)
    if kernel in KERNELS_4BIT:
        rows = config.block_k * config.block_m * itemsize
        weights = config.block_k * config.block_n * (2 if kernel == "up_4bit" else 1)
        # Each stage holds rows and packed bytes; beside the stages there is one dequantized tile.
        return config.num_stages * (rows + weights // 2) + weights * itemsize
    if kernel in WGRADS:
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
    if kernel in KERNELS_FEW:
        _check_few(config)
    elif min(config.block_m, config.block_n, config.block_k) < 16:
        raise ValueError(f"blocks must be at least 16 for tl.dot, got {config}")
    if not 1 <= config.num_stages <= 8 or config.num_warps > 16:
        raise ValueError(f"num_stages must be 1 to 8 and num_warps at most 16, got {config}")
    if config.descriptor and not target.has_descriptors:
        raise ValueError(f"descriptors need compute capability 9.0, got {target.arch}")
    if kernel not in KERNELS_FEW and (config.split_k, config.registers, config.prefetch) != (1, 0, False):
        raise ValueError(f"split_k, registers and prefetch are for {', '.join(KERNELS_FEW)} alone, got {config}")
    need = shared_memory(kernel, config, itemsize)
    if need > target.shared_memory:
        raise ValueError(f"{config} needs {need} bytes of shared memory, {target.arch} has {target.shared_memory}")
    if kernel in KERNELS_4BIT:
        along = config.block_k if kernel in ("up_4bit", "gemm_4bit") else config.block_n
        if along % ROW_UNIT:
            raise ValueError(f"{kernel} needs tiles of multiples of {ROW_UNIT} along the packed features, got {config}")
    if config.half_tiles and config.block_m < 32:
        raise ValueError(f"half_tiles needs tiles of at least 32 rows, got {config}")
    if config.slices not in (1, 2, 4, 8) or config.block_n < 16 * config.slices:
        raise ValueError(f"slices must be 1, 2, 4 or 8 of at least 16 columns, got {config}")


def _check_few(config: LaunchConfig) -> None:
    """The part of ``check`` that is about tiles of few rows."""
    if config.block_m < 8 or config.block_k % ROW_UNIT:
        raise ValueError(f"tiles of few rows need block_m from 8 on and block_k a multiple of {ROW_UNIT}, got {config}")
    parts = config.num_warps // config.split_k if config.split_k in (1, 2, 4, 8, 16) else 0
    if parts < 1 or config.block_n < 16 * parts:
        raise ValueError(
            f"split_k must be a power of two up to num_warps, and leave each warp 16 columns of block_n, got {config}"
        )
    if config.registers and not 64 <= config.registers <= 255:
        raise ValueError(f"registers must be 0, or 64 to 255, got {config.registers}")


def bucket_of_few(count: int) -> int:
    """The bucket of so many slots or rows."""
    return next((limit for limit in BUCKETS if count <= limit), BUCKETS[-1])


def check_bucket(kernel: str, block_m: int, config: LaunchConfig, itemsize: int) -> None:
    """Raises ValueError unless ``config`` has the row tiles of its bucket, which all kernels of a call share."""
    if kernel not in (*WGRADS, *KERNELS_FEW) and config.block_m != tile_height(block_m, itemsize):
        raise ValueError(
            f"{kernel}: block_m must be the {tile_height(block_m, itemsize)} of its bucket, got {config.block_m}"
        )


def default_config(kernel: str, block_m: int, target: Target, itemsize: int) -> LaunchConfig:
    """The analytic default: the tile of the bucket, cut down until it fits the target."""
    if kernel in KERNELS_FEW:
        config = _few_rows_tile(kernel, block_m, target, itemsize)
    elif kernel in KERNELS_4BIT:
        config = _packed_tile(kernel, block_m, target, itemsize)
    elif itemsize == 4:
        config = _single_precision_tile(kernel, block_m)
    else:
        config = _tile(kernel, block_m, target)
    if kernel in DOWN_BACKWARDS:
        config = replace(config, slices=max(config.slices, config.block_n // 64))
    if target.family.most_stages is not None:
        config = replace(config, num_stages=target.family.most_stages)
    return fitted(kernel, config, target, itemsize)


def fitted(kernel: str, config: LaunchConfig, target: Target, itemsize: int) -> LaunchConfig:
    """``config`` with fewer stages, then a shorter block_k, until its tiles fit the shared memory of ``target``."""
    while config.num_stages > 2 and shared_memory(kernel, config, itemsize) > target.shared_memory:
        config = replace(config, num_stages=config.num_stages - 1)
    least = ROW_UNIT if kernel in (*KERNELS_4BIT, *KERNELS_FEW) else 16
    while config.block_k > least and shared_memory(kernel, config, itemsize) > target.shared_memory:
        config = replace(config, block_k=config.block_k // 2)
    return config


# GPUs on which a program may use less shared memory than this have about 100 KiB of it in all for two programs.
_ROOMY = 128 * KIB


def _packed_tile(kernel: str, block_m: int, target: Target, itemsize: int) -> LaunchConfig:
    """The default over packed weights.

    In 16 bits and 128 rows, the tiles are those of which two programs fit a multiprocessor: one dequantizes while the other
    multiplies. On GPUs whose tensor cores read registers, ``benchmarks.choose`` predicts 16 to 26 % less time than for one
    program of tiles twice as wide, and 10 to 39 % less on an MI300X.
    """
    height = tile_height(block_m, itemsize)
    if itemsize == 4:
        # Without tensor cores an operand's whole block_k lies in registers: larger tiles spill some KiB a thread.
        block_n, block_k = {"up_4bit": (16, 64), "gemm_4bit": (32, 64)}.get(kernel, (64, 32))
        return LaunchConfig(height, block_n, block_k, 8 if height == 64 else 4, 2)
    if height == 128 and target.family.from_registers:
        if kernel in DOWN_BACKWARDS:
            # With an adapter, eight warps take too many registers on an A100.
            return LaunchConfig(128, 64, 64, 4 if target.shared_memory > _ROOMY else 8, 3, slices=4)
        return LaunchConfig(128, 32 if kernel == "up_4bit" else 64, 64, 8, 3)
    if height == 128 and target.family.tensor_memory and kernel in DOWN_BACKWARDS:
        return LaunchConfig(128, 128, 64, 8, 3, slices=4)
    if height == 128 and target.backend == "hip":
        if kernel in DOWN_BACKWARDS:
            return LaunchConfig(128, 64, 64, 8, 3, slices=2)
        return LaunchConfig(128, 64 if kernel == "up_4bit" else 128, 64, 4, 3)
    return LaunchConfig(height, 64 if kernel == "up_4bit" else 128, 64, 8 if height == 128 else 4, 3)


def _few_rows_tile(kernel: str, bucket: int, target: Target, itemsize: int) -> LaunchConfig:
    """The default of few rows over packed weights: 128 weights a thread and step, which is what it has registers for.

    Experts give programs enough for all multiprocessors. A single matrix does not, so warps divide its inner dimension. The
    bits of a slot's result depend on block_k and split_k. These are the same in every bucket of the experts' kernels, so
    that the bits do not depend on how many slots there are.
    """
    if kernel != "few_linear_4bit":
        return LaunchConfig(8, 64, 256, 4, 3, registers=168, prefetch=bucket == BUCKETS[0])
    height = min(bucket, 64 if target.shared_memory > _ROOMY else 32)
    if itemsize == 4:
        return LaunchConfig(min(height, 16), 16, 64, 4, 2, split_k=4, prefetch=True)
    # The rows of a step lie in registers, too.
    return LaunchConfig(height, 16, {16: 256, 32: 128}.get(height, 64), 4, 3, split_k=4, prefetch=True)


def _single_precision_tile(kernel: str, block_m: int) -> LaunchConfig:
    """The default in fp32, which runs on the FMA units (or tf32 at half rate): small tiles, because registers are short."""
    if kernel in WGRADS:
        # The thin one's weighted operand lies in registers.
        return LaunchConfig(64 if kernel == "wgrad" else 32, 64, 32, 4, 3)
    return LaunchConfig(tile_height(block_m, 4), 64 if kernel != "up" else 32, 32, 4, 3)


def _tile(kernel: str, block_m: int, target: Target) -> LaunchConfig:
    """The default over dense weights in 16 bits."""
    family = target.family
    if family.from_registers:
        return _register_tile(kernel, block_m, target)
    if family.tensor_memory and block_m >= 64 and kernel not in WGRADS:
        return _tensor_memory_tile(kernel, block_m)
    descriptor, large = family.descriptors, family.large_tiles
    if kernel == "wgrad_thin":
        return LaunchConfig(64, 128, 32, 4, 3)
    if kernel == "shrink":
        return LaunchConfig(block_m, 64, 128, 4, 3, descriptor)
    if kernel == "wgrad":
        return LaunchConfig(128, 128, 64 if block_m > 32 else 32, 8, 3)
    if block_m == 16:
        return LaunchConfig(16, 32 if kernel == "up" else 64, 128, 4, 4, descriptor)
    if block_m == 32:
        return LaunchConfig(32, 64 if kernel == "up" else 128, 128, 4, 3, descriptor)
    if block_m == 64:
        return LaunchConfig(64, 64 if kernel == "up" else 128, 128 if large else 64, 4, 4, descriptor)
    return LaunchConfig(128, 128 if large or kernel != "up" else 64, 64, 8, 4 if large else 3, descriptor)


def _tensor_memory_tile(kernel: str, block_m: int) -> LaunchConfig:
    """The default over dense weights in 16 bits for tensor cores that keep sums in a memory of their own, of tall tiles.

    Two programs fit a multiprocessor, each with half of the shared memory. Only the up projection's tiles of 128 rows have
    the whole of it: tiles half as wide, of which two fit, are predicted to be 28 % slower on a B200.
    """
    if kernel == "shrink":
        return LaunchConfig(block_m, 64, 128 if block_m == 64 else 64, 4, 3 if block_m == 64 else 4, True)
    if block_m == 64:
        return LaunchConfig(64, 64 if kernel == "up" else 128, 64, 4, 4, True)
    if kernel == "up":
        return LaunchConfig(128, 128, 64, 8, 4, True)
    return LaunchConfig(128, 128, 64, 8, 3, True, slices=4 if kernel == "down_backward" else 1)


def _register_tile(kernel: str, block_m: int, target: Target) -> LaunchConfig:
    """The default over dense weights in 16 bits for tensor cores that read registers.

    The compiler keeps one stage fewer in shared memory than it is asked for. Two programs fit a multiprocessor: of four
    warps with up to 255 registers a thread, and of half the shared memory. For tiles 128 high, ``benchmarks.choose``
    predicts 6 to 15 % less time on an A100 than for one program of eight warps, and up to 4 % less on GPUs with 100 KiB.
    """
    roomy = target.shared_memory > _ROOMY
    if kernel == "wgrad_thin":
        return LaunchConfig(64, 128, 32, 4, 3)
    if kernel == "shrink":
        return LaunchConfig(block_m, 64, 64 if block_m >= (128 if roomy else 32) else 128, 4, 3)
    if kernel == "wgrad":
        return LaunchConfig(128, 128, 64 if block_m > 32 else 32, 4, 3)
    if block_m == 16:
        return LaunchConfig(16, 32 if kernel == "up" else 64, 128, 4, 4 if roomy else 3)
    if block_m == 32:
        return LaunchConfig(32, 64 if kernel == "up" else 128, 128, 4, 3)
    if block_m == 64:
        return LaunchConfig(64, 64 if kernel == "up" else 128, 64, 4, 4 if roomy else 3)
    if kernel == "up":
        # On an A100, gate and up with adapters of their own spill 24 bytes, once a program. Tiles of 32 columns, which do
        # not, are predicted to be 12 % slower.
        return LaunchConfig(128, 64, 32, 4, 4) if roomy else LaunchConfig(128, 32, 64, 4, 3)
    if kernel == "down_backward":
        # Tiles of 64 columns do not spill the 8 bytes that these do on an A100, and are predicted to be 13 % slower there.
        return LaunchConfig(128, 128, 32, 4, 4, slices=8) if roomy else LaunchConfig(128, 64, 64, 4, 3, slices=2)
    return LaunchConfig(128, 128, 32, 4, 4)
