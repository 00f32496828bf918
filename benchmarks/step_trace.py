"""Where the time of a training step goes: its trace by parts of the model, forward, recomputation and backward alike.

While ``parts`` is entered, a model's modules and its optimizer open and close ranges of the profiler. Autograd runs a
module's backward far from its forward, so identities at a module's ends open and close a range there too. A kernel counts
for the innermost range that was open on the thread, and at the moment, that launched it.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

EXPERTS, ATTENTION, LOSS, OPTIMIZER, OTHER = PARTS = ("experts", "attention", "loss", "optimizer", "other")

# What models call the part of a layer that mixes tokens.
MIXERS = ("self_attn", "linear_attn", "mamba")

_PREFIX = "step: "
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_KERNELS = {"kernel", "gpu_memcpy", "gpu_memset"}
Events = list[dict[str, Any]]


class _Span:
    """A range that begins in one node of autograd and ends in another."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._range: record_function | None = None

    def open(self) -> None:
        if self._range is not None:
            return
        self._range = record_function(_PREFIX + self._part)
        self._range.__enter__()

    def close(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


class _Boundary(torch.autograd.Function):
    """The identity; its backward calls ``reached``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reached: Callable[[], None]) -> Tensor:
        ctx.reached = reached
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.reached()
        return grad, None


def _boundary(x: Tensor, reached: Callable[[], None]) -> Tensor:
    y: Tensor = _Boundary.apply(x, reached)
    return y


def _part_of_model(forward: Callable[..., Any], part: str) -> Callable[..., Any]:
    """Opens ranges around a module. Its first argument and its result, or the first of a tuple, are hidden states."""

    @functools.wraps(forward)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        span = _Span(part)
        hidden = args[0] if args else kwargs["hidden_states"]
        # Without a gradient to come, nothing would close the span.
        differentiable = hidden.requires_grad
        if differentiable:
            hidden = _boundary(hidden, span.close)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs["hidden_states"] = hidden
        with record_function(_PREFIX + part):
            result = forward(*args, **kwargs)
        if not differentiable:
            return result
        if isinstance(result, tuple):
            return (_boundary(result[0], span.open), *result[1:])
        return _boundary(result, span.open)

    return ranged


def _in_range(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PREFIX + part):
            return function(*args, **kwargs)

    return ranged


def _loss_head(forward: Callable[..., Any], span: _Span) -> Callable[..., Any]:
    """Opens ranges around the loss of a causal language model, which is whatever is not in its decoder."""

    @functools.wraps(forward)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PREFIX + LOSS):
            output = forward(*args, **kwargs)
        # Whichever of them the loss is made of.
        for name, value in output.items():
            if isinstance(value, Tensor) and value.requires_grad:
                output[name] = _boundary(value, span.open)
        return output

    return ranged


def _decoder(forward: Callable[..., Any], span: _Span) -> Callable[..., Any]:
    @functools.wraps(forward)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PREFIX + OTHER):
            output = forward(*args, **kwargs)
        output.last_hidden_state = _boundary(output.last_hidden_state, span.close)
        return output

    return ranged


def _named(layer: nn.Module, names: Sequence[str], part: str) -> list[tuple[nn.Module, str]]:
    """The modules of a layer that have one of these names, but not those inside of another one of them."""
    found: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        outside = not any(path.startswith(f"{other}.") for other in found)
        if path.rpartition(".")[2] in names and outside:
            found[path] = module
    return [(module, part) for module in found.values()]


@contextlib.contextmanager
def parts(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Ranges around the parts of ``model``, a causal language model of Transformers, and the steps of ``optimizer``."""
    loss = _Span(LOSS)
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (model, "forward", _loss_head(model.forward, loss)),
        (model.model, "forward", _decoder(model.model.forward, loss)),
        (optimizer, "step", _in_range(optimizer.step, OPTIMIZER)),
    ]
    for layer in model.model.layers:
        # A layer's recomputation runs inside whatever range backward had open.
        replaced.append((layer, "forward", _in_range(layer.forward, OTHER)))
        for module, part in (*_named(layer, MIXERS, ATTENTION), *_named(layer, ("experts",), EXPERTS)):
            replaced.append((module, "forward", _part_of_model(module.forward, part)))
    with contextlib.ExitStack() as stack:
        for owner, name, function in replaced:
            stack.callback(_restore, owner, name, vars(owner).get(name))
            setattr(owner, name, function)
        yield


def _restore(owner: Any, name: str, value: Any) -> None:
    if value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


@contextlib.contextmanager
def tracing(device: torch.device, *, ranges: bool) -> Iterator[Events]:
    """Traces what is done inside, which must have ended with it; the list has the events afterwards.

    Args:
        ranges: with the CPU's side, which slows the step down and is what ranges belong to; a CPU's trace always has it.
    """
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    if ranges or not activities:
        activities.append(ProfilerActivity.CPU)
    events: Events = []
    with profile(activities=activities) as profiler:
        yield events
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events += [event for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if "dur" in event]


@dataclass(frozen=True)
class _Work:
    """Something that took ``duration`` µs, asked for at ``moment`` by ``thread``; of kernels, run from ``start`` on."""

    name: str
    thread: Any
    moment: float
    start: float
    duration: float


def _work(events: Events) -> list[_Work]:
    """The kernels and copies of a GPU, or, of a trace without any, the innermost operators of the CPU."""
    launches = {event["args"].get("correlation"): event for event in events if event.get("cat") in _LAUNCHES}
    work = []
    for event in events:
        if event.get("cat") in _KERNELS:
            launch = launches.get(event["args"].get("correlation"), event)
            work.append(_Work(event["name"], launch["tid"], launch["ts"], event["ts"], event["dur"]))
    if work:
        return work
    return [_Work(event["name"], event["tid"], event["ts"], event["ts"], event["dur"]) for event in _leaves(events)]


def _leaves(events: Events) -> Iterator[dict[str, Any]]:
    """Operators that call no others."""
    operators = sorted(
        (event for event in events if event.get("cat") == "cpu_op"),
        key=lambda event: (event["tid"], event["ts"], -event["dur"]),
    )
    for event, after in zip(operators, [*operators[1:], None], strict=True):
        if after is None or after["tid"] != event["tid"] or after["ts"] >= event["ts"] + event["dur"]:
            yield event


def time_by_part(events: Events) -> dict[str, float]:
    """Milliseconds of GPU time by part of ``PARTS``, from a trace with ranges; of the CPU's own where there is no GPU."""
    ranges: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"].startswith(_PREFIX):
            interval = (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(_PREFIX))
            ranges.setdefault(event["tid"], []).append(interval)
    for opened in ranges.values():
        opened.sort()
    times = dict.fromkeys(PARTS, 0.0)
    for work in _work(events):
        times[_innermost(ranges.get(work.thread, []), work.moment)] += work.duration / 1e3
    return times


def _innermost(ranges: list[tuple[float, float, str]], moment: float) -> str:
    """The part of the range, of those sorted by their start, that was opened last and is still open."""
    last = bisect.bisect_right(ranges, (moment, float("inf"), ""))
    return next((part for _, end, part in reversed(ranges[:last]) if end >= moment), OTHER)


def time_by_kernel(events: Events) -> dict[str, tuple[float, int]]:
    """Milliseconds and number of runs of each kernel (of a CPU's trace, operator) by its name, the longest first."""
    times: dict[str, tuple[float, int]] = {}
    for work in _work(events):
        ms, runs = times.get(work.name, (0.0, 0))
        times[work.name] = ms + work.duration / 1e3, runs + 1
    return dict(sorted(times.items(), key=lambda item: -item[1][0]))


def wall_ms(events: Events) -> float:
    """Milliseconds from the first launch to the end of the last kernel, or, without a GPU, of operators."""
    counted = [event for event in events if event.get("cat") in _LAUNCHES | _KERNELS | {"cpu_op"}]
    return (max(event["ts"] + event["dur"] for event in counted) - min(event["ts"] for event in counted)) / 1e3


def busy_ms(events: Events) -> float:
    """Milliseconds in which a kernel ran, however many at once; of a CPU's trace, in which an operator did."""
    return _union((work.start, work.start + work.duration) for work in _work(events)) / 1e3


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
