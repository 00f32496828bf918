"""Measures causal attention alone, over whole sequences and over documents side by side, forward and backward.

    python -m benchmarks.attention                         what can run here, in two minutes
    python -m benchmarks.attention --kernel cudnn          one contender beside torch's; may be given again
    python -m benchmarks.attention --kernel kernels-community/flash-attn3
    python -m benchmarks.attention --device cpu --quick    smoke-tests the benchmark itself, writes nothing

Shapes are those of a layer of Qwen3-30B-A3B: 32 heads for queries, 4 for keys and values, 128 features, in bf16.
``documents`` has the mix of documents. Contenders:

- ``sdpa``: torch's ``scaled_dot_product_attention``, which is cuDNN's attention on Hopper. Whole sequences only.
- ``torch``, ``cudnn`` and kernels of the Hub: those of ``moe_fused.finetune.varlen``, which ``--attn`` names.
- ``cudnn_aten``: torch's own operator for cuDNN's attention over documents. By ``--kernel cudnn_aten`` only, because its
  backward reads beyond its memory in torch 2.11 (pytorch#186142). After such an error nothing else runs in the process.
- ``flex``: FlexAttention, compiled. Its block mask is made once for a batch, before the time that is measured.
- ``masked``: ``sdpa`` with a mask of all pairs of tokens, which is made once, too.
- ``each``: torch's flash attention for one document after the other. The host must know their lengths.

Contenders first give their output and gradients, which must be those of ``each`` but for roundings. Then each is recorded as
a CUDA graph. Contenders over documents get other documents in the graph's memory, of which the last ones are empty, and must
again be right. A contender that cannot be recorded, as ``each``, is timed without a graph (``graph`` is 0 then). Phases are
``whole`` and ``packed``, forward and backward together, and ``whole_forward`` and ``packed_forward``. A layer that is
computed again in the backward pass takes the sum of the two.

``tflops`` counts four operations for each pair of tokens that is not masked, head and feature, and twice as many backward.
``details``: the number of documents, the tokens of the longest, and the GPU's compute capability.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from moe_fused.benchmark import harness
from moe_fused.benchmark.harness import MismatchError, UnavailableError, current_environment
from moe_fused.finetune import attention, varlen

from . import runner
from .documents import boundaries_of, packed_lengths, pairs_of
from .rows import Row, merge, new_row, read_rows, slug, write_rows

NAME = "attention"
LAYER = "qwen3-30b-a3b"
TOKENS, QUICK_TOKENS = (4096, 8192, 16384), (2048,)
SDPA, ATEN, FLEX, MASKED, EACH = "sdpa", "cudnn_aten", "flex", "masked", "each"
DEFAULTS = (varlen.TORCH, varlen.CUDNN, FLEX, MASKED, EACH)
WHOLE, PACKED = "whole", "packed"
# Boundaries have room for this share of documents more than a batch has, as those of a run mostly have.
ROOM = 1.25


@dataclass(frozen=True)
class Shape:
    """The shape of a layer's attention."""

    heads: int = 32
    groups: int = 4
    features: int = 128


@dataclass
class Batch:
    """The documents of one batch.

    Attributes:
        lengths: The numbers of tokens of the documents.
        boundaries: (N + 1,) int32, with empty documents at the end.
        longest: The number of tokens of the longest document that a batch may have.
    """

    lengths: list[int]
    boundaries: Tensor
    longest: int

    @functools.cached_property
    def documents(self) -> Tensor:
        """The number of each token's document, (S,)."""
        place = torch.arange(int(self.boundaries[-1]), device=self.boundaries.device)
        return torch.searchsorted(self.boundaries[1:].contiguous(), place, right=True)

    @functools.cached_property
    def mask(self) -> Tensor:
        """The mask of all pairs of tokens, (1, 1, S, S)."""
        return attention.causal_mask(self.boundaries, int(self.boundaries[-1]), None, self.boundaries.device)

    @functools.cached_property
    def block_mask(self) -> Any:
        """FlexAttention's mask."""
        from torch.nn.attention.flex_attention import create_block_mask

        documents, tokens = self.documents, int(self.boundaries[-1])

        def allowed(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (documents[query] == documents[key])

        return create_block_mask(allowed, None, None, tokens, tokens, device=str(self.boundaries.device))


Attend = Callable[[Tensor, Tensor, Tensor, Batch], Tensor]
"""Takes query (S, heads, D), key and value (S, groups, D), and the batch. Returns (S, heads, D)."""


def _heads_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def sdpa(query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
    out = scaled_dot_product_attention(*_heads_first(query, key, value), is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def masked(query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
    # The kernel that takes a mask needs keys and values for each head.
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(*_heads_first(query, key, value), attn_mask=batch.mask)[0].transpose(0, 1)


def each(query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
    documents = zip(*(tensor.split(batch.lengths) for tensor in (query, key, value)), strict=True)
    # cuDNN would build a plan for each length, which takes it longer than all that is measured here.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return torch.cat([sdpa(rows[0], rows[1], rows[2], batch) for rows in documents])


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
    out: Tensor = _compiled_flex()(*_heads_first(query, key, value), block_mask=batch.block_mask, enable_gqa=True)
    return out[0].transpose(0, 1)


class _Aten(torch.autograd.Function):
    """torch's operators for cuDNN's attention over documents."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int) -> Tensor:
        found = torch.ops.aten._cudnn_attention_forward(
            query, key, value, None, boundaries, boundaries, longest, longest, True, 0.0, True, False
        )
        ctx.longest = longest
        ctx.save_for_backward(query, key, value, boundaries, found[0], found[1], found[6], found[7])
        out: Tensor = found[0]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, boundaries, out, lse, seed, offset = ctx.saved_tensors
        grads = torch.ops.aten._cudnn_attention_backward(
            grad.contiguous(), query, key, value, out, lse, seed, offset, None, boundaries, boundaries, ctx.longest,
            ctx.longest, 0.0, True,
        )  # fmt: skip
        return *grads, None, None


def aten(query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
    out: Tensor = _Aten.apply(query, key, value, batch.boundaries, batch.longest)
    return out


def contender(name: str, device: torch.device) -> Attend:
    """Returns a contender by its name.

    Raises:
        UnavailableError: it cannot be had here.
    """
    known = {SDPA: sdpa, MASKED: masked, EACH: each, FLEX: flex, ATEN: aten}
    if name in known:
        if device.type != "cuda" and name in (FLEX, ATEN):
            raise UnavailableError("needs a GPU")
        return known[name]
    if device.type != "cuda":
        raise UnavailableError("needs a GPU")
    if name == varlen.CUDNN and (reason := varlen.cudnn_refusal(device)) is not None:
        raise UnavailableError(reason)
    kernel = varlen.kernel_of(name)
    if kernel is None:
        raise UnavailableError("this torch, or the kernel, has no attention over documents")

    def attend(query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
        repeats = 1 if kernel.groups else query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        return kernel.attend(query, key, value, batch.boundaries, batch.longest, None, None)

    return attend


def batch_of(lengths: list[int], entries: int, longest: int, device: torch.device) -> Batch:
    """Makes a batch whose boundaries have so many entries."""
    ends = boundaries_of(lengths)
    ends += ends[-1:] * (entries - len(ends))
    return Batch(lengths, torch.tensor(ends, dtype=torch.int32, device=device), longest)


class Point:
    """Inputs of one number of tokens, and what each contender does with them."""

    def __init__(self, tokens: int, shape: Shape, device: torch.device, *, packed: bool, seed: int = 0) -> None:
        self.tokens, self.shape, self.device, self.packed = tokens, shape, device, packed
        mixes = packed_lengths(tokens, 2, seed=seed) if packed else [[tokens]] * 2
        longest = max(map(max, mixes))
        entries = 2 if not packed else 1 + round(ROOM * max(map(len, mixes)))
        self.batch, self.other = (batch_of(lengths, entries, longest, device) for lengths in mixes)
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        heads = (shape.heads, shape.groups, shape.groups, shape.heads)
        made = [torch.randn(tokens, count, shape.features, generator=generator) for count in heads]
        *self.inputs, self.gradient = (tensor.to(device, dtype) for tensor in made)

    def call(self, attend: Attend, *, backward: bool, batch: Batch | None = None) -> Callable[[int], dict[str, Tensor]]:
        """Returns a call that computes the output, and the gradients if ``backward``."""

        def run(_: int) -> dict[str, Tensor]:
            # New leaves: the nodes of old ones would belong to another stream than that of a recording.
            leaves = [tensor.detach().requires_grad_(backward) for tensor in self.inputs]
            with torch.set_grad_enabled(backward):
                out = attend(leaves[0], leaves[1], leaves[2], batch or self.batch)
            if not backward:
                return {"out": out}
            grads = torch.autograd.grad(out, leaves, self.gradient)
            return dict(zip(("out", "query", "key", "value"), (out.detach(), *grads), strict=True))

        return run

    def operations(self, *, backward: bool) -> int:
        """The operations that are needed."""
        pairs = pairs_of(self.batch.lengths)
        return (12 if backward else 4) * self.shape.heads * self.shape.features * pairs


def check(name: str, point: Point, attend: Attend) -> None:
    """Compares the results of a contender with those of ``each``.

    Raises:
        MismatchError: they differ by more than roundings.
    """
    want = point.call(each, backward=True)(0)
    harness.compare(name, point.call(attend, backward=True)(0), want)


def recorded(name: str, point: Point, attend: Attend, *, backward: bool) -> Callable[[int], Any] | None:
    """Records a call as a CUDA graph, and checks that it also computes other documents in the same memory.

    Returns:
        A call that replays the graph. None if the call cannot be recorded.

    Raises:
        MismatchError: the graph gives other results for other documents.
    """
    if name == EACH or point.device.type != "cuda":
        return None
    try:
        replay, results = harness.graph_of(point.call(attend, backward=backward), 1)
    except RuntimeError:
        return None
    if name in (MASKED, FLEX) or not point.packed:  # their masks are made outside, or there is but one document
        return replay
    before = point.batch.boundaries.clone()
    point.batch.boundaries.copy_(point.other.boundaries)
    replay(0)
    harness.compare(f"{name} in a graph", results, point.call(each, backward=backward, batch=point.other)(0))
    point.batch.boundaries.copy_(before)
    return replay


def measure(
    point: Point, names: Sequence[str], hub_ids: Sequence[str], seconds: float, note: Callable[[str], None]
) -> list[Row]:
    """The rows of one number of tokens, whole or packed.

    Raises:
        MismatchError: a contender gives other results than ``each``.
    """
    kind, rows = PACKED if point.packed else WHOLE, []
    names = [
        name
        for name in names
        if (name != SDPA if point.packed else name in (SDPA, varlen.TORCH, varlen.CUDNN, *hub_ids))
    ]
    found: dict[str, Attend] = {}
    for name in names:
        try:
            found[name] = contender(name, point.device)
            check(name, point, found[name])
        except MismatchError:
            raise
        except RuntimeError as error:  # It is not available, or a kernel refuses the call, or memory is not enough.
            found.pop(name, None)
            note(f"  {name} is left out: {str(error) or 'no memory'}")
        harness.release_memory(point.device)
    for backward in (False, True):
        plain = {name: point.call(attend, backward=backward) for name, attend in found.items()}
        replays = {name: recorded(name, point, attend, backward=backward) for name, attend in found.items()}
        calls = {name: replays[name] or call for name, call in plain.items()}
        timings = harness.time_interleaved(calls, harness.clock_for(point.device), seconds=seconds)
        for name, timing in timings.items():
            peak = None if timing is None else harness.peak_mib(plain[name], point.device)
            row = new_row(
                current_environment(point.device),
                benchmark=NAME,
                layer=LAYER,
                tokens=point.tokens,
                implementation=name,
                phase=kind if backward else f"{kind}_forward",
                weights="none",
                ms=None if timing is None else timing.ms,
                flops=point.operations(backward=backward),
                peak_mib=peak,
            )
            details = {
                "documents": float(len(point.batch.lengths)),
                "longest": float(point.batch.longest),
                "features": float(point.shape.features),
                "graph": float(replays[name] is not None),
            }
            if point.device.type == "cuda":
                major, minor = torch.cuda.get_device_capability(point.device)
                details["capability"] = major + minor / 10
            rows.append(dataclasses.replace(row, details=details))
        del replays, calls
        harness.release_memory(point.device)
    return rows


def results_table(rows: Sequence[Row]) -> Table:
    """What was measured, for the terminal."""
    table = Table(title=f"attention of {LAYER}", title_justify="left")
    for column in (
        "tokens",
        "documents",
        "implementation",
        "forward ms",
        "forward + backward ms",
        "TFLOP/s",
        "peak MiB",
        "graph",
    ):
        table.add_column(column, justify="left" if column == "implementation" else "right", no_wrap=True)
    found = {(row.tokens, row.phase, row.implementation): row for row in rows}
    for row in rows:
        if row.phase.endswith("_forward"):
            continue
        forward = found[row.tokens, f"{row.phase}_forward", row.implementation]
        times = ["no memory" if each.ms is None else f"{each.ms:.3f}" for each in (forward, row)]
        numbers = ["–" if value is None else f"{value:.0f}" for value in (row.tflops, row.peak_mib)]
        graph = "yes" if row.details["graph"] else "no"
        table.add_row(str(row.tokens), f"{row.details['documents']:.0f}", row.implementation, *times, *numbers, graph)
    return table


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a sequence; may be given again.", min=2)] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="A contender beside torch's and sdpa; may be given again. Writes only to --output."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time per contender, phase and size.", min=0.001)] = 0.3,
    output: Annotated[Path | None, typer.Option(help="The JSON to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small size. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
) -> None:
    """Measures attention alone and writes rows under benchmarks/results."""
    names = list(dict.fromkeys([SDPA, varlen.TORCH, *(kernel or DEFAULTS)]))
    hub_ids = [name for name in names if varlen.is_hub_id(name)]
    for name in names:
        if name not in (SDPA, ATEN, *DEFAULTS, *hub_ids):
            known = ", ".join((*DEFAULTS, ATEN))
            raise typer.BadParameter(f"{name} is none of {known}, and no id of the Hub", param_hint="--kernel")
    runner.check_device(device, quick)
    runner.check_output(output)
    chosen = runner.pick_device(device, "--device cpu --quick")
    environment = current_environment(chosen)
    shared = runner.ROOT / "results" / f"{NAME}_{slug(environment.gpu)}.json"
    path = output or (None if quick or kernel else shared)
    console = runner.make_console()
    console.print(f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}")
    shape = Shape(4, 2, 16) if quick else Shape()
    rows: list[Row] = []
    with runner.one_line_errors():
        kept = read_rows(path) if path is not None and path.exists() else []
    try:
        for count in sorted(tokens or (QUICK_TOKENS if quick else TOKENS)):
            for packed in (False, True):
                point = Point(count, shape, chosen, packed=packed)
                console.print(f"{count} tokens, {len(point.batch.lengths)} documents")
                rows += measure(point, names, hub_ids, seconds, console.print)
                del point
                harness.release_memory(chosen)
        console.print(results_table(rows))
        if path is not None:
            write_rows(path, merge(kept, rows))
            console.print(f"Wrote {path}")
    except (MismatchError, OSError, RuntimeError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
