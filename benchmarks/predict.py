"""Predicts how long the kernels take on a GPU from what the compiler made of them and from the GPU's data sheet.

    python -m benchmarks.predict --gpu "RTX 4090" --tokens 4096
    python -m benchmarks.predict --check              the measured times beside the predicted ones

A launch has tiles, which programs compute, each in turns of a main loop. ``Facts`` say what a turn takes. From them come the
times in which the parts of a GPU could do their share of the work if they had nothing to wait for:

    memory         bytes over the data sheet's bandwidth; less of it while too few bytes are on their way (``LATENCY``)
    cache          bytes that tiles read through the L2, at 64 bytes a clock and multiprocessor
    tensor cores   operations of whole tiles, idle rows included, over the data sheet's rate
    issue          instructions of the main loop, of all warps, over what the schedulers of the multiprocessors issue
    shared memory  bytes between registers, tensor cores and shared memory, at 128 bytes a clock and multiprocessor
    waiting        a program's own instructions, loads to registers (as those of 4-bit scales, of which one needs the other's
                   data) and, over 4-bit weights, its products, one after the other, over the programs that run side by side

The longest of these is the *bound*. The time is a norm of them, because they overlap only in part, plus what each program
needs before and after its loop, which other programs of the multiprocessor hide, plus a fixed time for each launch.
``Constants`` holds the few numbers that no data sheet says. ``fit`` takes them from measured rows; ``constants`` are those
of the H200. What is measured are whole calls of ``benchmarks/results`` and the single kernels of ``KERNELS``.

The form of the model was chosen with the rows of both GPUs in view. It knows nothing of power limits, of clocks below the
boost clock, or of bank conflicts.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fused.benchmark.layers import FORWARD, FORWARD_BACKWARD, LAYERS, RECOMPUTE, Layer

from .compiled import Facts, fields_of, key_of, read_facts
from .gpus import BY_NAME, Card
from .rows import OURS, read_rows

RESULTS = Path(__file__).resolve().parent / "results"
QWEN3 = LAYERS["qwen3-30b-a3b"]
BF16, NF4 = "bf16", "nf4"
# Bytes of a weight: half a byte and a byte of scale for each block of 64.
WEIGHT_BYTES = {BF16: 2.0, NF4: 0.5 + 1 / 64}
ACTIVATION = 2  # bytes
SHORT_K = 1024  # of the kernel's tuning: products over fewer in features are of the family gemm_short
WORKSPACE = 256 * 2**20  # bytes into which packed weights are dequantized at a time
CACHE_BYTES, SHARED_BYTES = 64, 128  # a clock and multiprocessor
SCHEDULERS = 4
FULL_WAVE = 16  # lanes of an AMD SIMD, which takes four clocks for the 64 of an instruction
TERMS = ("memory", "cache", "tensor cores", "issue", "shared memory", "waiting")


@dataclass(frozen=True)
class Constants:
    """What no data sheet says.

    Attributes:
        memory, cache, tensor, shared: The shares of the nominal rates that are reached at most.
        latency: Seconds that a byte of memory is on its way.
        trip: Seconds that a load to registers takes.
        stall: Clocks from an instruction of a warp to its next one, on average; other warps fill them.
        program: Clocks that a program takes before and after its main loop.
        norm: The exponent of the norm in which the times add up: 1 is a sum, a large number the longest of them.
        launch: Seconds of a launch.
    """

    memory: float = 0.89
    cache: float = 0.6
    tensor: float = 0.75
    shared: float = 0.8
    latency: float = 800e-9
    trip: float = 600e-9
    stall: float = 3.0
    program: float = 3000.0
    norm: float = 3.0
    launch: float = 4e-6


@dataclass(frozen=True)
class Launch:
    """A product or a pass over memory.

    Attributes:
        name: What users call it.
        family: The kernel family, or "" for a pass over memory.
        packed: Whether the row tiles are those of packed weights.
        adapted: Whether an adapter's product is added.
        rows, experts, top_k: S = T·top_k routed rows, E experts.
        n, k: Out features (gate and up together) and in features; for weight gradients the two sizes of the gradient.
        bytes: Bytes of memory that it reads and writes.
        launches: How many kernels it is.
    """

    name: str
    family: str
    packed: bool
    adapted: bool
    rows: int
    experts: int
    top_k: int
    n: int
    k: int
    bytes: float
    launches: int = 1


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a launch.

    Attributes:
        seconds: Its time.
        bound: The part of the GPU that takes longest, of ``TERMS``.
        programs: Programs that a multiprocessor holds, or None for a pass over memory.
        spills: Bytes of spills a thread.
    """

    seconds: float
    bound: str
    programs: int | None = None
    spills: int = 0


# What a call launches.


def active_experts(layer: Layer, tokens: int) -> float:
    """Returns how many experts random routing chooses for so many tokens, on average."""
    return layer.experts * (1 - (1 - layer.top_k / layer.experts) ** tokens)


def dequantizing(layer: Layer, name: str, active: float, elements: int) -> Launch:
    """Writing an expert's packed weights (``elements`` of them) into the workspace, for all active experts."""
    moved = active * elements * (WEIGHT_BYTES[NF4] + ACTIVATION)
    parts = max(1, math.ceil(layer.experts * elements * ACTIVATION / WORKSPACE))
    return Launch(f"dequantize, {name}", "", False, False, 0, layer.experts, layer.top_k, 0, 0, moved, parts)


Paths = Callable[[str, int, int], bool]
"""``paths(family, rows, experts)``: whether a product dequantizes packed weights itself."""


def products(
    layer: Layer, tokens: int, phase: str, weights: str, *, in_product: Paths, trained: bool = True
) -> Iterator[Launch]:
    """Yields what a call of ``moe_experts`` launches.

    Args:
        layer: Its shapes; adapters if it has a ``lora_rank``.
        tokens: The number of tokens.
        phase: One of ``moe_fused.benchmark.layers``.
        weights: "bf16" or "nf4".
        in_product: Says which products over packed weights dequantize them.
        trained: Whether gradients of the weights or adapters are computed. Packed weights have none.
    """
    hidden, inner, experts, top_k, rank = (
        layer.hidden, layer.intermediate, layer.experts, layer.top_k, layer.lora_rank,
    )  # fmt: skip
    rows, active = tokens * top_k, active_experts(layer, tokens)
    adapted, is_packed = rank > 0, weights == NF4
    backward = phase in (FORWARD_BACKWARD, RECOMPUTE)

    def moved(n: int, k: int, into: float, out: float, stored: float) -> float:
        return active * n * k * stored + ACTIVATION * (into + out)

    def product(name: str, family: str, n: int, k: int, into: float, out: float) -> Iterator[Launch]:
        dense = "gemm_short" if family == "gemm" and k <= SHORT_K else family
        fused = {"down": "gemm_4bit", "back through up": "transposed_4bit"}.get(name, f"{family}_4bit")
        inside = is_packed and in_product(fused, rows, experts)
        if is_packed and not inside:
            yield dequantizing(layer, name, active, n * k)
        stored = WEIGHT_BYTES[NF4] if inside else ACTIVATION
        # Dense weights are cut into parts as the workspace is.
        parts = max(1, math.ceil(experts * n * k * ACTIVATION / WORKSPACE)) if is_packed and not inside else 1
        yield Launch(
            name, fused if inside else dense, is_packed, adapted, rows, experts, top_k, n, k,
            moved(n, k, into, out, stored), parts,
        )  # fmt: skip

    def thin(name: str, family: str, features: int, into: float) -> Launch:
        return Launch(
            name, family, is_packed, True, rows, experts, top_k, rank, features,
            ACTIVATION * (into + rows * rank) + active * rank * features * 4,
        )  # fmt: skip

    def combine(name: str) -> Launch:
        return _pass(name, layer, ACTIVATION * (rows * hidden + tokens * hidden))

    def up(keep: bool) -> Iterator[Launch]:
        if adapted:
            yield thin("shrink, x", "shrink", hidden, tokens * hidden)
        yield from product(
            "up", "up", 2 * inner, hidden, tokens * hidden, rows * inner * (3 if keep and backward else 1)
        )

    yield _pass("route", layer, 16.0 * rows, 2)
    yield from up(phase != RECOMPUTE)
    if adapted:
        yield thin("shrink, h", "shrink", inner, rows * inner)
    yield from product("down", "gemm", hidden, inner, rows * inner, rows * hidden)
    yield combine("combine")
    if not backward:
        return
    if phase == RECOMPUTE:
        yield from up(True)
    if adapted:
        yield thin("shrink, grad y", "shrink", hidden, tokens * hidden)
    yield from product(
        "back through down", "down_backward", inner, hidden, tokens * hidden + 2 * rows * inner, 3 * rows * inner
    )
    if adapted:
        yield thin("shrink, grad gate_up", "shrink", 2 * inner, 2 * rows * inner)
    yield from product("back through up", "gemm", hidden, 2 * inner, 2 * rows * inner, rows * hidden)
    yield combine("combine, grad x")
    if not trained:
        return
    if adapted:
        yield thin("grad A of down", "wgrad_thin", inner, rows * inner)
        yield thin("grad B of down", "wgrad_thin", hidden, tokens * hidden)
        yield thin("grad A of up", "wgrad_thin", hidden, tokens * hidden)
        yield thin("grad B of up", "wgrad_thin", 2 * inner, 2 * rows * inner)
    elif not is_packed:
        for name, n, k, read in (
            ("grad of down", hidden, inner, tokens * hidden + rows * inner),
            ("grad of up", 2 * inner, hidden, tokens * hidden + 2 * rows * inner),
        ):
            out = experts * n * k
            yield Launch(name, "wgrad", False, False, rows, experts, top_k, n, k, ACTIVATION * float(read + out))


def _pass(name: str, layer: Layer, num_bytes: float, launches: int = 1) -> Launch:
    return Launch(name, "", False, False, 0, layer.experts, layer.top_k, 0, 0, num_bytes, launches)


# How many tiles there are.


@functools.lru_cache(maxsize=4096)
def _rows_of_an_expert(rows: int, experts: int, top_k: int) -> tuple[tuple[int, float], ...]:
    """The numbers of rows that an expert gets, each with its probability: each of T tokens chooses top_k of E experts."""
    tokens, share = rows // top_k, top_k / experts
    if share >= 1:
        return ((tokens, 1.0),)
    spread = 8 * math.sqrt(tokens * share) + 8
    counts = range(max(0, int(tokens * share - spread)), min(tokens, int(tokens * share + spread)) + 1)
    log = [
        math.lgamma(tokens + 1) - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)
        + n * math.log(share) + (tokens - n) * math.log1p(-share)
        for n in counts
    ]  # fmt: skip
    return tuple((n, math.exp(value)) for n, value in zip(counts, log, strict=True))


@functools.lru_cache(maxsize=4096)
def row_tiles(rows: int, experts: int, top_k: int, height: int, half: bool) -> tuple[float, float]:
    """Returns the mean number of row tiles over random routing, and their number where half tiles count half."""
    tiles = whole = 0.0
    for n, probability in _rows_of_an_expert(rows, experts, top_k):
        count = math.ceil(n / height)
        tiles += probability * count
        whole += probability * (count - (0.5 if half and 0 < n - height * (count - 1) <= height // 2 else 0.0))
    return experts * tiles, experts * whole


# What a launch takes.


@dataclass(frozen=True)
class Demand:
    """What a launch asks of each part of a GPU, without any constant of the model.

    Attributes:
        bytes: Of memory. cached: Bytes that tiles read through the L2.
        flying: Bytes that a multiprocessor has on their way, at most.
        flops: Of whole tiles.
        issued: Clocks in which a multiprocessor's schedulers issue the main loops, for all programs of the launch.
        shared: Bytes of shared memory.
        steps, trips: Instructions of a warp, and waits for loads to registers, in the main loops of all programs.
        synchronous: The operations for which a program has to dequantize first.
        programs: Of the launch. resident: Of them on a multiprocessor at a time.
        launches: Kernels.
    """

    bytes: float
    cached: float
    flying: float
    flops: float
    issued: float
    shared: float
    steps: float
    synchronous: float
    trips: float
    programs: float
    resident: int
    launches: int


def demand(launch: Launch, facts: Facts | None) -> Demand:
    """Returns what a launch asks of a GPU; ``facts`` is None for a pass over memory.

    Raises:
        ValueError: The facts have no main loop.
    """
    if facts is None:
        return Demand(launch.bytes, 0.0, math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1, launch.launches)
    config, loop = facts.config, facts.loop
    if loop is None:
        raise ValueError(f"the main loop of {facts.family} is that of the launch without an adapter")
    tile_m, tile_n, tile_k = config["block_m"], config["block_n"], config["block_k"]
    gated = launch.family in ("up", "up_4bit")
    width = tile_n * (2 if gated else 1)
    thin = launch.family in ("shrink", "wgrad_thin")
    if launch.family in ("wgrad", "wgrad_thin"):
        tile_m, tile_n = min(tile_m, _power(launch.n)), min(tile_n, _power(launch.k))
        width = tile_n
        programs = float(launch.experts * math.ceil(launch.n / tile_m) * math.ceil(launch.k / tile_n))
        _, steps = row_tiles(launch.rows, launch.experts, launch.top_k, tile_k, False)
        turns = steps * programs / launch.experts
        full = 1.0
    else:
        width = min(width, _power(launch.n)) if thin else width
        tiles, whole = row_tiles(launch.rows, launch.experts, launch.top_k, tile_m, config["half_tiles"])
        columns = math.ceil(launch.n / width)
        programs = tiles * columns
        full = whole / tiles if tiles else 1.0
        turns = programs * math.ceil(launch.k / tile_k)
    stored = WEIGHT_BYTES[NF4] if launch.family.endswith("_4bit") else ACTIVATION
    of_turn = tile_k * (tile_m * ACTIVATION * full + width * stored)
    flops = 2.0 * tile_m * width * tile_k * full
    # A loop that the compiler unrolled does several turns at once, and one of fewer columns less.
    share = flops / full / loop.flops if loop.flops else 1.0
    clocks = max(loop.instructions, 2 * loop.conversions) * facts.warps / SCHEDULERS
    if isinstance(facts.arch, str):
        clocks = (loop.instructions - loop.products) * 64 / FULL_WAVE * facts.warps / SCHEDULERS
    spilled = 2.0 * facts.spills * 32 * facts.warps  # written and read again, once a program
    return Demand(
        bytes=launch.bytes,
        cached=turns * of_turn + programs * spilled,
        flying=facts.programs * max(1, config["num_stages"] - 1) * of_turn,
        flops=turns * flops,
        issued=turns * share * full * clocks,
        shared=turns * (share * full * loop.shared_bytes + of_turn),
        steps=turns * share * full * loop.instructions,
        synchronous=turns * flops if launch.family.endswith("_4bit") else 0.0,
        trips=turns * share * loop.trips,
        programs=programs,
        resident=facts.programs,
        launches=launch.launches,
    )


def _power(value: int) -> int:
    """The next power of two, and at least 16."""
    return max(16, 1 << (value - 1).bit_length())


def terms(asked: Demand, card: Card, constants: Constants) -> tuple[float, ...]:
    """Returns the seconds of each of ``TERMS``."""
    clocks = card.clock * card.multiprocessors
    bandwidth = card.ceilings.bytes_per_second * constants.memory
    busy = min(card.multiprocessors, max(asked.programs, 1.0)) if asked.programs else card.multiprocessors
    flying = busy * asked.flying / constants.latency
    # Programs are dealt to multiprocessors one by one: the last ones leave some of them idle.
    uneven = 1.0
    if asked.programs:
        each = asked.programs / card.multiprocessors
        uneven = math.ceil(each) / each if each < 1 else 1 + 0.5 / each
    # A slot is the room for a program on a multiprocessor. The last programs leave half of the slots idle.
    slots = card.multiprocessors * asked.resident
    alone = asked.steps * constants.stall / card.clock + asked.trips * constants.trip
    alone += asked.synchronous * card.multiprocessors / (card.ceilings.flops_per_second * constants.tensor)
    ending = 1 + 0.5 * slots / asked.programs if asked.programs else 1.0
    return (
        asked.bytes / min(bandwidth, flying),
        asked.cached / (CACHE_BYTES * clocks * constants.cache),
        uneven * asked.flops / (card.ceilings.flops_per_second * constants.tensor),
        uneven * asked.issued / clocks,
        uneven * asked.shared / (SHARED_BYTES * clocks * constants.shared),
        ending * alone / slots,
    )


def seconds_of(asked: Demand, card: Card, constants: Constants) -> tuple[float, str]:
    """Returns the time of a launch, and its bound."""
    times = terms(asked, card, constants)
    longest = max(times)
    norm = longest * sum((each / longest) ** constants.norm for each in times) ** (1 / constants.norm)
    around = asked.programs / card.multiprocessors * constants.program / (asked.resident * card.clock)
    return constants.launch * asked.launches + norm + around, TERMS[times.index(longest)]


# Predictions for a GPU.


@functools.cache
def _tuning() -> Any:
    """The module of the kernel that chooses paths, tiles and configurations."""
    from .compiled import provide_kernel

    provide_kernel()
    from tests.kernel.machine import module

    return module("tuning")


def paths_of(arch: int | str) -> Paths:
    """Returns how the kernel chooses on a GPU between dequantizing in a product and before it.

    Raises:
        KeyError: The GPU is not in the kernel's list.
    """
    tuning = _tuning()
    target = tuning.TARGETS[arch]
    return lambda family, rows, experts: bool(tuning.dequantizes_in_product(family, rows, experts, target))


class Predictor:
    """Predicts times on a GPU.

    Args:
        card: The GPU.
        facts: What launches take; those of other GPUs are ignored. By default those of results/compiled.json.
        fitted: What no data sheet says.

    Attributes:
        tuning: The kernel's module ``tuning``.
    """

    def __init__(self, card: Card, facts: Iterable[Facts] | None = None, fitted: Constants | None = None) -> None:
        self.card = card
        self._constants = fitted
        self.tuning = _tuning()
        self._target = self.tuning.TARGETS[card.arch]
        self._in_product = paths_of(card.arch)
        entries = read_facts() if facts is None else facts
        self._facts = {key_of(each): each for each in entries if each.arch == card.arch}

    def facts_of(self, launch: Launch) -> Facts | None:
        """Returns what the launch takes, or None for a pass over memory.

        Raises:
            ValueError: The configuration that the kernel chooses for it was not compiled.
        """
        if not launch.family:
            return None
        tuning, family = self.tuning, launch.family
        height = tuning.bucket(launch.rows, launch.experts, launch.packed, self._target)
        config = fields_of(tuning.launch_config(family, height, self._target, ACTIVATION))
        keys = [
            (str(self.card.arch), family, height, adapted, json.dumps(config, sort_keys=True))
            for adapted in (launch.adapted and family != "wgrad", False)
        ]
        if missing := [key for key in keys[:1] if key not in self._facts]:
            raise ValueError(f"not compiled: {missing[0]}; run python -m benchmarks.compiled --arch {self.card.arch}")
        facts = self._facts[keys[0]]
        return facts if facts.loop else replace(facts, loop=self._facts[keys[1]].loop)

    def launches(self, layer: Layer, tokens: int, phase: str, weights: str, *, trained: bool = True) -> list[Launch]:
        """Returns what a call launches on this GPU (see ``products``)."""
        return list(products(layer, tokens, phase, weights, in_product=self._in_product, trained=trained))

    def demand(self, launch: Launch) -> Demand:
        """Returns what a launch asks of this GPU."""
        return demand(launch, self.facts_of(launch))

    def predict(self, launch: Launch) -> Prediction:
        """Predicts the time of a launch."""
        facts = self.facts_of(launch)
        seconds, bound = seconds_of(demand(launch, facts), self.card, self._constants or constants())
        return Prediction(seconds, bound, facts.programs if facts else None, facts.spills if facts else 0)


# What was measured.


@dataclass(frozen=True)
class Measured:
    """A measured time.

    Attributes:
        card: The GPU.
        what: The call or the kernel, for people.
        ms: Milliseconds.
        launches: What was launched.
        point: What calls that can be compared have in common, as other ways of computing the same.
    """

    card: str
    what: str
    ms: float
    launches: tuple[Launch, ...]
    point: str


# Kernels of a layer of Qwen3-30B-A3B on an H100, in microseconds by tokens. The times stand in the docstrings of the kernel
# (``packed_gemm``, ``packed_down_backward``, ``grouped_wgrad``) and in the reasons of ``tuning/configs/sm_90.json``.
KERNELS: dict[str, dict[int, float]] = {
    "up_4bit": {32: 130, 512: 191, 4096: 615, 8192: 1121},
    "gemm_4bit": {4096: 349, 8192: 612},
    "transposed_4bit": {4096: 762, 8192: 1312},
    "down_backward_4bit": {128: 109, 512: 184, 1024: 228, 2048: 339, 4096: 583, 8192: 941},
    "up, workspace": {4096: 853, 8192: 1130},
    "gemm, workspace": {4096: 452, 8192: 599},
    "transposed, workspace": {4096: 830, 8192: 1150},
    "down_backward, workspace": {128: 388, 512: 358, 1024: 385, 2048: 467, 4096: 568, 8192: 793},
    "up": {4096: 503},
    "wgrad": {4096: 600, 16384: 1550},
}
_PRODUCT_OF = {
    "up": "up",
    "gemm": "down",
    "transposed": "back through up",
    "down_backward": "back through down",
    "wgrad": "grad of up",
}
# Whole calls of fewer tokens wait for the host, or go through the kernels for few rows, of which there is no model.
FEWEST_TOKENS = {FORWARD: 32, FORWARD_BACKWARD: 2048, RECOMPUTE: 4096}
# Our implementations in the rows: the weights, and whether products over packed weights may dequantize them.
_WAYS = {
    ("experts", OURS): (BF16, True),
    ("experts_4bit", OURS): (NF4, True),
    ("experts_4bit", "dequantize_first"): (NF4, False),
    ("experts_4bit", "moe_fused_bf16"): (BF16, True),
    ("experts_lora", OURS): (NF4, True),
    ("experts_lora", "moe_fused_bf16"): (BF16, True),
    ("experts_lora", "attention_only"): (NF4, True),
}


def measured_kernels() -> list[Measured]:
    """Returns the single kernels that were measured, by the way that computed the product."""
    found = []
    for name, times in KERNELS.items():
        family = name.removesuffix("_4bit").removesuffix(", workspace")
        packed, inside = name not in ("up", "wgrad"), name.endswith("_4bit")
        for tokens, us in times.items():
            every = products(
                QWEN3, tokens, FORWARD_BACKWARD, NF4 if packed else BF16, in_product=lambda *_, inside=inside: inside
            )  # fmt: skip
            product = _PRODUCT_OF[family]
            launches = tuple(each for each in every if each.name in (product, f"dequantize, {product}"))
            found.append(Measured("H100", f"{name}, {tokens} tokens", us / 1e3, launches, f"kernel {family} {tokens}"))
    return found


def measured_calls() -> list[Measured]:
    """Returns the calls in ``benchmarks/results`` whose time is that of the GPU."""
    inside = paths_of(90)
    found = []
    for path in sorted(RESULTS.glob("experts*_h[12]00*.json")):
        for row in read_rows(path):
            way = _WAYS.get((row.benchmark, row.implementation))
            layer = LAYERS.get(row.layer)
            if way is None or layer is None or row.ms is None or row.tokens < FEWEST_TOKENS.get(row.phase, 1 << 30):
                continue
            weights, may = way
            layer = replace(layer, lora_rank=row.lora_rank if row.implementation != "attention_only" else 0)
            launches = products(
                layer, row.tokens, row.phase, weights, trained=row.implementation != "attention_only",
                in_product=inside if may else lambda *_: False,
            )  # fmt: skip
            card = "H100" if "H100" in row.gpu else "H200"
            point = f"{row.benchmark} {row.layer} {row.tokens} {row.phase} {row.lora_rank}"
            what = f"{row.layer}, {row.implementation}, {row.phase}, {row.tokens} tokens"
            if row.lora_rank:
                what += f", rank {row.lora_rank}"
            found.append(Measured(card, what, row.ms, tuple(launches), point))
    return found


@functools.cache
def measured(card: str) -> tuple[Measured, ...]:
    """Returns everything that was measured on a GPU, by its name in ``gpus``."""
    return tuple(each for each in (*measured_calls(), *measured_kernels()) if each.card == card)


@functools.cache
def _demands(card: str) -> tuple[tuple[float, tuple[Demand, ...]], ...]:
    """The milliseconds of what was measured on a GPU, and what its launches ask of it."""
    predictor = Predictor(BY_NAME[card])
    return tuple((each.ms, tuple(map(predictor.demand, each.launches))) for each in measured(card))


def ratios(card: str, constants: Constants) -> list[float]:
    """Returns predicted over measured times, in the order of ``measured``."""
    gpu = BY_NAME[card]
    return [
        1e3 * sum(seconds_of(asked, gpu, constants)[0] for asked in demands) / ms for ms, demands in _demands(card)
    ]  # fmt: skip


def median_error(card: str, constants: Constants) -> float:
    """Returns the median over what was measured on a GPU of how far predictions are off, as a share."""
    return statistics.median(abs(ratio - 1) for ratio in ratios(card, constants))


def fit(cards: Sequence[str], start: Constants | None = None) -> Constants:
    """Fits the constants to what was measured on some GPUs.

    Starting from ``start``, one constant after the other is moved by smaller and smaller factors as long as the mean of the
    absolute logarithms of predicted over measured times falls.
    """
    best = start or Constants()

    def loss(constants: Constants) -> float:
        return statistics.fmean(abs(math.log(ratio)) for card in cards for ratio in ratios(card, constants))

    least, step = loss(best), 0.3
    while step > 0.01:
        moved = False
        for field in fields(Constants):
            for factor in (1 + step, 1 / (1 + step)):
                low, high = LIMITS[field.name]
                tried = replace(best, **{field.name: min(high, max(low, getattr(best, field.name) * factor))})
                found = loss(tried)
                if found < least - 1e-6:
                    best, least, moved = tried, found, True
        if not moved:
            step /= 2
    return best


# Beyond these the constants would not mean what they are called.
LIMITS = {
    "memory": (0.5, 0.95),
    "cache": (0.2, 1.0),
    "tensor": (0.4, 1.0),
    "shared": (0.3, 1.0),
    "latency": (300e-9, 2e-6),
    "trip": (200e-9, 2e-6),
    "stall": (1.0, 12.0),
    "program": (100.0, 20000.0),
    "norm": (1.0, 10.0),
    "launch": (1e-6, 10e-6),
}


# What was measured, by kind.
KINDS = ("calls over bf16 weights", "calls over nf4 weights", "steps with adapters", "single kernels")


def kind_of(each: Measured) -> str:
    """Returns which of ``KINDS`` a measured time is."""
    if each.point.startswith("kernel"):
        return KINDS[3]
    if each.point.startswith("experts_lora"):
        return KINDS[2]
    return KINDS[1] if any(launch.packed for launch in each.launches) else KINDS[0]


def order_of_ways(card: str, fitted: Constants, least: float) -> tuple[int, int]:
    """Returns how many pairs of ways of computing the same are predicted in the right order, and how many there are.

    Args:
        card: The GPU.
        fitted: What no data sheet says.
        least: The share by which the measured times of a pair differ at least.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for each, ratio in zip(measured(card), ratios(card, fitted), strict=True):
        points.setdefault(each.point, []).append((each.ms, each.ms * ratio))
    pairs = [
        (one, other)
        for ways in points.values()
        for one, other in itertools.combinations(ways, 2)
        if max(one[0], other[0]) / min(one[0], other[0]) >= 1 + least and one[0] != other[0]
    ]
    return sum((one[0] < other[0]) == (one[1] < other[1]) for one, other in pairs), len(pairs)


@functools.cache
def constants() -> Constants:
    """Returns the constants, fitted to the rows of the H200. Those of the H100 were never fitted: they tell the error."""
    return fit(["H200"])


# On the terminal.


def main(
    gpu: Annotated[str, typer.Option(help=f"The GPU: {', '.join(BY_NAME)}.")] = "RTX 4090",
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens of the layer.")] = 4096,
    weights: Annotated[str, typer.Option(help="Weights: bf16 or nf4.")] = BF16,
    rank: Annotated[int, typer.Option(min=0, help="Rank of adapters; 0 for none.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Compare with what was measured instead.")] = False,
) -> None:
    """Predicts the times of the kernels of a Qwen3-30B-A3B layer, forward and backward."""
    if gpu not in BY_NAME or weights not in WEIGHT_BYTES:
        raise typer.BadParameter("--gpu or --weights is not known")
    if check:
        for card in ("H200", "H100"):
            for each, ratio in zip(measured(card), ratios(card, constants()), strict=True):
                typer.echo(f"{card}  {each.what:75}{each.ms:9.3f} ms measured, {ratio - 1:+.0%} predicted")
            typer.echo(f"{card}: median error {median_error(card, constants()):.1%}")
        return
    predictor = Predictor(BY_NAME[gpu])
    for launch in predictor.launches(replace(QWEN3, lora_rank=rank), tokens, FORWARD_BACKWARD, weights):
        found = predictor.predict(launch)
        programs = "" if found.programs is None else f"{found.programs} programs, {found.spills} bytes spilled"
        typer.echo(f"{launch.name:28}{1e3 * found.seconds:9.3f} ms  {found.bound:16}{programs}")


if __name__ == "__main__":
    typer.run(main)
