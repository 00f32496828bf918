"""A model of the time of a fine-tuning step on one GPU, fitted to the measured steps in ``benchmarks/results``.

The time of a step is a sum of five terms. Each has one constant, and nothing else is fitted:

    products    operations of the products with weights, over what a large bf16 product reaches
    scores      operations of attention's scores, over the same
    dequantize  bytes of the experts' weights, packed and dense, over what a large copy reaches
    layer       a fixed time for each decoder layer: norms, routing and everything else
    optimizer   bytes for each parameter that is trained, over what a large copy reaches

The operations are those that run: a layer's forward, its recomputation up to the experts' down projections, and the
gradients of its inputs. Adapters, some 2 % of the products, are left out. Up to ``DEQUANTIZE_ROWS`` rows to an expert, every
tile of rows dequantizes weights for itself, so that the bytes grow with the rows; from there on all weights are dequantized
once in a pass. Experts that are packed transposed are always dequantized once.

``fit`` takes the rows of the benchmark ``finetune_30b`` with CUDA graphs: Qwen3-30B-A3B, DeepSeek-V2-Lite and gpt-oss-20b on
an H200. The optimizer's constant is the mean over the rows. The other four are a least-squares fit to the rows' parts
(experts, attention with everything beside it, loss) and to whole steps, which count twice because rows that are left out
are then predicted best. All errors are relative to the step. The tests hold the result to 15 % of each row, and the fit
without a row to 15 % of that row.

The model does not cover recurrent layers, as in Qwen3.5. Their only measured row ran the recurrence in plain torch, where
the host is the limit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_fused.benchmark.layers import Ceilings
from moe_fused.memory import Workload, predict, sizes_of

from .model import Model
from .models import BY_NAME
from .rows import EAGER, OURS, Row, read_rows

RESULTS = Path(__file__).resolve().parent / "results"
BENCHMARK = "finetune_30b"
# Rows to an expert from which all of its weights are dequantized at once (DEFAULT_DEQUANTIZE_ROWS of the kernel).
DEQUANTIZE_ROWS = 192
# How often whole steps count beside their parts.
STEPS_COUNT = 2.0
# A step of which kernels fill less than this share waits for the host.
BUSY = 0.9


# What the rooflines in ``results/experts-4bit_h200.json`` were computed with.
H200 = Ceilings(bytes_per_second=4.25e12, flops_per_second=680e12)


@dataclass(frozen=True)
class Work:
    """What is computed, in the terms of the cost model.

    Attributes:
        products, scores: Operations.
        dequantized: Bytes.
        layers: The number of decoder layers, weighted: a forward counts a quarter of a layer's fixed time, and a backward
            with its recomputation three quarters.
    """

    products: float = 0.0
    scores: float = 0.0
    dequantized: float = 0.0
    layers: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def at(self, ceilings: Ceilings) -> np.ndarray:
        """The seconds that the terms take at the ceilings, and the number of layers."""
        return np.array(
            [
                self.products / ceilings.flops_per_second,
                self.scores / ceilings.flops_per_second,
                self.dequantized / ceilings.bytes_per_second,
                self.layers,
            ]
        )


@dataclass(frozen=True)
class Batch:
    """The work of one sequence.

    Attributes:
        forward, backward: That of all decoder layers.
        head: That of the head and the loss, forward and backward.
        experts: The part of the experts in ``forward`` and ``backward``.
    """

    forward: Work
    backward: Work
    head: Work
    experts: Work

    @property
    def whole(self) -> Work:
        """The work of all of it."""
        return self.forward + self.backward + self.head


@functools.cache
def model_of(name: str) -> Model:
    """Returns a published model by the name of its rows."""
    return Model(name, BY_NAME[name].config())


@functools.cache
def batch_of(name: str, tokens: int) -> Batch:
    """Counts the work of one sequence of so many tokens.

    Raises:
        ValueError: The model has recurrent layers, or no experts.
    """
    model = model_of(name)
    sizes = sizes_of(model.skeleton)
    if sizes.recurrent or sizes.uncounted or not sizes.stacks:
        raise ValueError(f"the time of {name} is not modelled: it has recurrent layers or no experts")
    numel = sum(stack.numel for stack in sizes.stacks)
    rows = tokens * sizes.top_k / sizes.experts
    once = sizes.stacks[0].transposed or rows >= DEQUANTIZE_ROWS
    moved = (predict(sizes, Workload()).parts["experts"] + 2 * numel) * (1.0 if once else rows / DEQUANTIZE_ROWS)
    body = model.multiplied_parameters - model.head_parameters
    up = body - model.down_parameters
    scores = model.attention_flops(tokens)
    layers = sizes.layers
    # The down projection is not computed again. It is half as large as the up projection.
    return Batch(
        forward=Work(2.0 * body * tokens, scores, moved, 0.25 * layers),
        backward=Work(2.0 * (up + body) * tokens, 3.0 * scores, moved * 5 / 3, 0.75 * layers),
        head=Work(products=4.0 * model.head_parameters * tokens),
        experts=Work(
            products=(6.0 * numel * sizes.top_k / sizes.experts - 2.0 * model.down_parameters) * tokens,
            dequantized=moved * 8 / 3,
        ),
    )


def shortened(batch: Batch, share: float) -> Batch:
    """Returns the work of a model that has a share of the decoder layers."""

    def of(work: Work) -> Work:
        return Work(*(share * term for term in astuple(work)))

    return Batch(of(batch.forward), of(batch.backward), batch.head, of(batch.experts))


@functools.cache
def trained_parameters(name: str) -> int:
    """Returns the number of parameters of the default adapters, which the rows have as well."""
    return predict(sizes_of(model_of(name).skeleton), Workload()).trainable


@dataclass(frozen=True)
class StepCost:
    """The constants of the cost model.

    Attributes:
        products, scores, dequantize: How many times longer each term takes than at the GPU's ceilings.
        layer: Seconds of a decoder layer.
        optimizer: Bytes for each trained parameter.
    """

    products: float
    scores: float
    dequantize: float
    layer: float
    optimizer: float

    def seconds(self, work: Work, ceilings: Ceilings) -> float:
        """Returns the time of some work on a GPU."""
        return float(work.at(ceilings) @ np.array([self.products, self.scores, self.dequantize, self.layer]))

    def optimizer_seconds(self, parameters: float, ceilings: Ceilings) -> float:
        """Returns the time of the optimizer's step on so many parameters."""
        return self.optimizer * parameters / ceilings.bytes_per_second

    def step_seconds(self, name: str, tokens: int, ceilings: Ceilings = H200) -> float:
        """Returns the time of a step on one sequence, on one GPU that holds the whole model."""
        optimizer = self.optimizer_seconds(trained_parameters(name), ceilings)
        return self.seconds(batch_of(name, tokens).whole, ceilings) + optimizer


def measured_rows(implementation: str = OURS) -> list[Row]:
    """Returns the measured steps of whole models that the cost model is about."""
    rows = [row for file in sorted(RESULTS.glob("finetune-*_h200.json")) for row in read_rows(file)]
    rows = [row for row in rows if (row.benchmark, row.implementation) == (BENCHMARK, implementation) and row.ms]
    return [row for row in rows if not sizes_of(model_of(row.layer).skeleton).recurrent]


def fit(rows: Iterable[Row], ceilings: Ceilings = H200) -> StepCost:
    """Fits the constants to measured steps on a GPU with these ceilings."""
    rows = list(rows)
    optimizer = np.mean([_detail(row, "optimizer") / trained_parameters(row.layer) for row in rows])
    equations = itertools.chain.from_iterable(_equations(row, ceilings) for row in rows)
    terms, values = zip(*equations, strict=True)
    products, scores, dequantize, layer = np.linalg.lstsq(np.array(terms), np.array(values), rcond=None)[0].tolist()
    return StepCost(products, scores, dequantize, layer, float(optimizer) * ceilings.bytes_per_second)


def _equations(row: Row, ceilings: Ceilings) -> Sequence[tuple[np.ndarray, float]]:
    """Returns the terms of each part of a step, and its time, over the time of the step."""
    batch, step = batch_of(row.layer, row.tokens), _seconds(row)
    experts, head = batch.experts.at(ceilings), batch.head.at(ceilings)
    whole = batch.whole.at(ceilings)
    # The parts are the times of kernels. The time between kernels is spread over them.
    names = ("experts", "attention", "loss", "optimizer", "other")
    seconds = {name: _detail(row, name) for name in names}
    gaps = step / sum(seconds.values())
    equations: list[tuple[np.ndarray, float]] = [
        (experts, seconds["experts"] * gaps),
        (whole - experts - head, (seconds["attention"] + seconds["other"]) * gaps),
        (head, seconds["loss"] * gaps),
        (STEPS_COUNT * whole, STEPS_COUNT * (step - seconds["optimizer"])),
    ]
    return [(terms / step, value / step) for terms, value in equations]


def _seconds(row: Row) -> float:
    if row.ms is None:
        raise ValueError(f"{row.layer} with {row.tokens} tokens has no time")
    return row.ms / 1e3


def _detail(row: Row, part: str) -> float:
    return row.details[f"{part}_ms"] / 1e3


@functools.cache
def fitted() -> StepCost:
    """Returns the constants that all rows give."""
    return fit(measured_rows())


@functools.cache
def host_seconds() -> float:
    """Returns the time that the host needs for the kernels of one decoder layer in a step without CUDA graphs.

    It is the mean over the rows without graphs in which the GPU waits for the host. It depends on the host: single rows
    differ from it by up to a fifth.
    """
    rows: list[Any] = [row for row in measured_rows(EAGER) if row.details["gpu_busy"] < BUSY]
    return float(np.mean([_seconds(row) / sizes_of(model_of(row.layer).skeleton).layers for row in rows]))
