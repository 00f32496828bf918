"""The cases of ``test_finetune_adamw.py`` that run the kernel, for a process of their own.

On a GPU the kernel is compared with bitsandbytes' own. On a CPU it runs in Triton's interpreter, which has to be chosen
before anything imports triton, and is compared with bitsandbytes' implementation for CPUs. That one rounds states to
multiples of 2⁻¹⁵ of their block's maximum before it looks for the nearest code, so it gets a quantizer here that does not.
"""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import triton
import triton.language as tl
from bitsandbytes.backends.cpu import ops as cpu_ops
from torch import Tensor, nn

from moe_fused.finetune import adamw, adamw_device, variables
from moe_fused.finetune.host import queued
from tests.kernel import interpreter
from tests.support import accelerator

os.environ[variables.ADAMW] = "1"
DEVICE = accelerator() or torch.device("cpu")
ON_GPU = DEVICE.type != "cpu"
if not ON_GPU:
    interpreter.mend()
    interpreter.make_faster()

ADAMW: Any = bnb.optim.AdamW8bit
Change = Callable[[Tensor], Tensor]
# The distance of 1 to the next number of each dtype.
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
# A tensor of two programs, two whose last block is not full, and one whose elements are no multiple of 8.
SHAPES = [(20, 256), (72, 72), (67, 73), (16, 264)]
LR, DECAY = 0.01, 0.1
pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning"),
]


def nearest(values: Tensor, numbers: Tensor) -> Tensor:
    """The codes of the nearest of 256 ascending values. A number on the border between two has the code that is even."""
    borders = (values[1:] + values[:-1]) * 0.5
    codes = torch.searchsorted(borders, numbers)
    return codes + ((borders[codes.clamp(max=254)] == numbers) & (codes % 2 == 1))


def quantize(value: Tensor, values: Tensor, absmax: Tensor, codes: Tensor, blocksize: int) -> None:
    """Quantizes into ``absmax`` and ``codes`` as bitsandbytes does on a GPU."""
    blocks = nn.functional.pad(value.flatten(), (0, -value.numel() % blocksize)).view(-1, blocksize)
    absmax.copy_(blocks.abs().amax(1))
    numbers = blocks / absmax[:, None].clamp(min=2.0**-126)
    codes.copy_(nearest(values, numbers.flatten()[: value.numel()]).view_as(codes))


COARSE_QUANTIZER = cpu_ops._quant_blockwise_fp32_direct


@pytest.fixture(autouse=True)
def _exact_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "_quant_blockwise_fp32_direct", quantize)


def made(
    ours: bool,
    kind: Any = ADAMW,
    dtype: torch.dtype = torch.bfloat16,
    shapes: Any = SHAPES,
    decay: float = DECAY,
    **options: Any,
) -> Any:
    """An optimizer over parameters of two groups, of which one has weights that decay."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]
    groups = [{"params": parameters[1:], "weight_decay": decay}, {"params": parameters[:1], "weight_decay": 0.0}]
    optimizer = (queued(kind) if ours else kind)(groups, lr=LR, **options)
    if ours:
        optimizer.allocate()
    return optimizer


def pair(**options: Any) -> tuple[Any, Any]:
    """An optimizer with the kernel, and bitsandbytes' own."""
    return made(True, **options), made(False, **options)


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def step(optimizer: Any, number: int, change: Change = torch.clone, without: Sequence[int] = ()) -> None:
    """Makes step ``number`` on gradients that depend on it alone, without those of some parameters."""
    generator = torch.Generator().manual_seed(number)
    for index, parameter in enumerate(parameters_of(optimizer)):
        gradient = torch.randn(parameter.shape, generator=generator)
        gradient *= torch.randn(parameter.shape, generator=generator).exp()
        parameter.grad = None if index in without else change(gradient.to(parameter))
    optimizer.step()


def left_to_bitsandbytes(optimizer: Any) -> list[int]:
    """From now on, the numbers of elements of the parameters that bitsandbytes updates."""
    noted: list[int] = []
    update = optimizer.update_step

    def update_step(group: Any, parameter: Tensor, *rest: int) -> None:
        noted.append(parameter.numel())
        update(group, parameter, *rest)

    optimizer.update_step = update_step
    return noted


def moments(optimizer: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The 8-bit moments: codes, values and maxima in rows of a block, (blocks, 256) and (blocks, 1)."""
    for parameter in parameters_of(optimizer):
        state = optimizer.state[parameter]
        for number in (1, 2):
            codes = nn.functional.pad(state[f"state{number}"].flatten().int(), (0, -parameter.numel() % 256)).view(
                -1, 256
            )
            absmax = state[f"absmax{number}"][:, None]
            yield codes, state[f"qmap{number}"][codes] * absmax, absmax


def assert_same_codes(left: Any, right: Any, share: float, steps: int = 1) -> None:
    """At most this share of all codes differs, after a single step by one. Maxima differ by roundings, also of the betas.

    Codes say nothing in blocks of zeros.
    """
    differing, total = 0, 0
    for (mine, _, mine_max), (other, _, other_max) in zip(moments(left), moments(right), strict=True):
        apart = (mine - other).abs() * (other_max >= 2.0**-126)
        assert steps > 1 or int(apart.max()) <= 1
        torch.testing.assert_close(mine_max, other_max, rtol=2e-5 if steps == 1 else 0.02, atol=2.0**-126)
        differing, total = differing + int((apart > 0).sum()), total + apart.numel()
    print(f"{differing} of {total} codes differ")
    assert differing <= share * total


def assert_close(left: Any, right: Any, ulps: float = 1, steps: float = 0) -> None:
    """Parameters differ by some roundings of their dtype, and by a part of a step.

    On a GPU, bitsandbytes lets weights decay after the step, not before it, and rounds between them. A step, of which few
    are four times the learning rate, decays with the weights then.
    """
    for mine, other in zip(parameters_of(left), parameters_of(right), strict=True):
        part = steps + 1e-5 + (max(ULP[mine.dtype], 4 * LR * DECAY) if ON_GPU else 0)
        roundings = ulps + (1 if ON_GPU else 0)
        torch.testing.assert_close(mine, other, rtol=roundings * ULP[mine.dtype], atol=LR * part)


@triton.jit
def _codes_of(numbers, codes, entries, SHIFT, LOWEST, FIRST, ENTRIES: tl.constexpr):
    at = tl.arange(0, 32)[:, None] * 256 + tl.arange(0, 256)[None, :]
    found = adamw_device._nearest(entries, tl.load(numbers + at), SHIFT, LOWEST, FIRST, ENTRIES, 32)
    tl.store(codes + at, (found >> 24) & 255)


@pytest.mark.parametrize("name", ["qmap1", "qmap2"])
def test_codes_are_the_nearest(name: str) -> None:
    """For all borders between codes and the numbers beside them, for all codes, and for others of any magnitude."""
    book, zero = adamw._books(DEVICE)[name], {"qmap1": 127, "qmap2": 0}[name]
    values = book.values.cpu()
    borders = (values[zero + 1 :] + values[zero:-1]) * 0.5
    beside = [(borders.view(torch.int32) + i).view(torch.float32) for i in range(-4, 5)]
    extremes = torch.tensor([0.0, -0.0, 1e-45, 2.0**-126, 1.0, 1.0 + 2.0**-23])
    generator = torch.Generator().manual_seed(0)
    known = torch.cat([*beside, values[zero:], extremes])
    others = 10 ** (-9 * torch.rand(32 * 256 - len(known), generator=generator))
    numbers = torch.cat([known, others])
    codes = torch.empty(len(numbers), dtype=torch.int32, device=DEVICE)
    sizes = {"qmap1": ("SHIFT1", "LOWEST1", "FIRST1", "ENTRIES1"), "qmap2": ("SHIFT2", "LOWEST2", "FIRST2", "ENTRIES2")}
    limits = [getattr(adamw_device, size) for size in sizes[name]]
    _codes_of[(1,)](numbers.to(DEVICE), codes, book.entries, *limits)
    assert torch.equal(codes.cpu(), nearest(values, numbers).int())


CHANGES: dict[str, Change] = {
    "usual": torch.clone,
    # Half of the blocks have no gradient yet, as those of a LoRA's first factor.
    "zeros": lambda gradient: gradient * (torch.arange(gradient.numel(), device=DEVICE) // 300 % 2).view_as(gradient),
    "huge": lambda gradient: gradient.clamp(-8, 8) * (2.0**12 if gradient.dtype is torch.float16 else 2.0**60),
    # Squares are below the smallest number of fp32, or near it.
    "tiny": lambda gradient: gradient * (2.0**-22 if gradient.dtype is torch.float16 else 2.0**-64),
}


@pytest.mark.parametrize(
    ("dtype", "change", "options"),
    [
        *((torch.bfloat16, change, {}) for change in CHANGES),
        (torch.float16, "tiny", {}),
        (torch.float32, "huge", {}),
        (torch.float32, "usual", {"eps": 0.5, "betas": (0.75, 0.5)}),
    ],
)
def test_a_step_from_the_same_state(dtype: torch.dtype, change: str, options: dict[str, Any]) -> None:
    """Codes differ by one at most and rarely, maxima by roundings, parameters by one rounding of their dtype."""
    mine, other = pair(dtype=dtype, **options)
    step(other, 0)
    step(other, 1)
    mine.load_state_dict(copy.deepcopy(other.state_dict()))
    for parameter, of_other in zip(parameters_of(mine), parameters_of(other), strict=True):
        parameter.data.copy_(of_other)
    noted = left_to_bitsandbytes(mine)
    for optimizer in (mine, other):
        step(optimizer, 2, CHANGES[change])
    assert noted == [67 * 73]
    assert_close(mine, other)
    assert_same_codes(mine, other, share=1e-3)


@pytest.mark.skipif(ON_GPU, reason="is about bitsandbytes on a CPU")
def test_a_step_by_bitsandbytes_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are one apart, or their values 2⁻¹⁵ of the maximum, to which it rounds. Parameters are the same."""
    monkeypatch.setattr(cpu_ops, "_quant_blockwise_fp32_direct", COARSE_QUANTIZER)
    mine, other = pair(shapes=SHAPES[:2])
    for optimizer in (mine, other):
        step(optimizer, 0)
    assert_close(mine, other)
    differing, total = 0, 0
    for (codes, values, absmax), (of_other, other_values, _) in zip(moments(mine), moments(other), strict=True):
        is_near = ((codes - of_other).abs() <= 1) | ((values - other_values).abs() <= 2.0**-15 * absmax)
        assert bool(is_near.all())
        differing, total = differing + int((codes != of_other).sum()), total + codes.numel()
    print(f"{differing} of {total} codes differ")
    assert differing < 0.2 * total


def _with_wrong(gradient: Tensor) -> Tensor:
    gradient.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    return gradient


def test_gradients_that_are_not_finite() -> None:
    """They clear their state and leave their parameter as it is, as with bitsandbytes on a GPU."""
    mine, other = pair(shapes=SHAPES[:2], dtype=torch.float32)
    for optimizer in (mine, other):
        step(optimizer, 0)
    before = [parameter.detach().clone() for parameter in parameters_of(mine)]
    step(mine, 1, _with_wrong)
    if ON_GPU:
        step(other, 1, _with_wrong)
    else:
        for parameter in parameters_of(other):
            for name, zero in (("state1", 127), ("state2", 0)):
                other.state[parameter][name].view(-1)[:3] = zero
        step(other, 1, lambda gradient: _with_wrong(gradient).nan_to_num(0, 0, 0))
    for parameter, of_other, kept in zip(parameters_of(mine), parameters_of(other), before, strict=True):
        assert torch.equal(parameter.view(-1)[:3], kept.view(-1)[:3])
        of_other.data.view(-1)[:3] = kept.view(-1)[:3]
        assert not torch.equal(parameter, kept)
        for name, zero in (("state1", 127), ("state2", 0)):
            assert mine.state[parameter][name].view(-1)[:3].tolist() == [zero] * 3
    assert_close(mine, other)
    assert_same_codes(mine, other, share=1e-3)


def test_many_steps() -> None:
    """After 20 steps, few codes differ, by three of the largest distances of values at most, and parameters are close."""
    # In bf16, bitsandbytes' kernel for GPUs loses decays of less than 2⁻⁹ to rounding.
    mine, other = pair(shapes=[(16, 256), (64, 64)], decay=0 if ON_GPU else DECAY)
    for number in range(20):
        step(mine, number)
        step(other, number)
    for (codes, values, _), (of_other, other_values, absmax) in zip(moments(mine), moments(other), strict=True):
        assert float((codes != of_other).float().mean()) < 0.01
        assert float(((values - other_values).abs() / absmax).max()) < 0.045
    differing = 0
    for parameter, of_other in zip(parameters_of(mine), parameters_of(other), strict=True):
        differing += int((parameter != of_other).sum())
    assert differing < 0.005 * sum(parameter.numel() for parameter in parameters_of(mine))
    assert_close(mine, other, ulps=2, steps=0.2)


def test_parameters_without_a_gradient() -> None:
    """They stay, with their states. Later they are a step behind, each with its own correction of the bias."""
    mine, other = pair()
    noted = left_to_bitsandbytes(mine)
    for number, without in enumerate([(0,), (1, 3), (0, 1, 2, 3), ()]):
        before = [parameter.detach().clone() for parameter in parameters_of(mine)]
        step(mine, number, without=without)
        step(other, number, without=without)
        for index, (parameter, kept) in enumerate(zip(parameters_of(mine), before, strict=True)):
            assert torch.equal(parameter, kept) == (index in without)
    assert noted == [67 * 73] * 2
    steps = [
        [optimizer.state[parameter]["step"] for parameter in parameters_of(optimizer)] for optimizer in (mine, other)
    ]
    assert steps[0] == steps[1] == [2, 2, 3, 2]
    assert_close(mine, other, ulps=3)
    assert_same_codes(mine, other, share=2e-3, steps=3)


@pytest.mark.parametrize("second_is_ours", [True, False])
@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit])
def test_either_goes_on_from_the_others_file(kind: Any, second_is_ours: bool) -> None:
    """Files have the same entries, dtypes and shapes."""

    def tensors_of(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        for name, value in state.items():
            yield from tensors_of(value) if isinstance(value, dict) else [(name, torch.as_tensor(value))]

    def saved(optimizer: Any) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        loaded: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        return loaded

    shapes = [(400, 256), (16, 256), (3, 5)] if ON_GPU else [(16, 256), (16, 264), (3, 5)]
    first, second = (made(ours, kind, shapes=shapes) for ours in (not second_is_ours, second_is_ours))
    step(first, 0)
    step(second, 0)
    files = [saved(optimizer) for optimizer in (first, second)]
    assert files[0]["param_groups"] == files[1]["param_groups"]
    kinds = [
        [(name, value.dtype, value.shape) for state in file["state"].values() for name, value in tensors_of(state)]
        for file in files
    ]
    assert kinds[0] == kinds[1]
    for parameter, of_first in zip(parameters_of(second), parameters_of(first), strict=True):
        parameter.data.copy_(of_first)
    second.load_state_dict(saved(first))
    noted = left_to_bitsandbytes(second)
    for optimizer in (first, second):
        step(optimizer, 1)
    elements = [math.prod(shape) for shape in shapes]
    assert noted == ([15] if second_is_ours else [*elements[1:], elements[0]])
    assert_close(first, second)


def test_parameters_and_gradients_elsewhere() -> None:
    """Parameters may move, and gradients may lie anywhere in memory."""

    def transposed(gradient: Tensor) -> Tensor:
        return gradient.T.contiguous().T

    def shifted(gradient: Tensor) -> Tensor:
        place = torch.empty(gradient.numel() + 1, dtype=gradient.dtype, device=DEVICE)[1:].view_as(gradient)
        return place.copy_(gradient)

    mine, other = pair(shapes=[(16, 256), (72, 64)])
    noted = left_to_bitsandbytes(mine)
    for number, change in enumerate((torch.clone, transposed, shifted)):
        if number == 1:
            for parameter in parameters_of(mine):
                parameter.data = parameter.data.clone()
        step(mine, number, change)
        step(other, number)
    assert noted == []
    assert_close(mine, other, ulps=3)
    assert_same_codes(mine, other, share=2e-3, steps=3)


def test_paged_states_are_prefetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each state of a parameter with a gradient, before the kernel reads it."""
    optimizer = made(True, bnb.optim.PagedAdamW8bit, shapes=[(400, 256), (16, 256)])
    prefetched: list[int] = []
    monkeypatch.setattr(bnb.functional, "prefetch_tensor", lambda value: prefetched.append(value.data_ptr()))
    first, second = (optimizer.state[parameter] for parameter in parameters_of(optimizer))
    for state in (first, second):
        state["state1"].is_paged = state is second
    step(optimizer, 0)
    assert prefetched == [second["state1"].data_ptr(), second["state2"].data_ptr()]
    step(optimizer, 1, without=[1])
    assert len(prefetched) == 2


def _all_left(optimizer: Any) -> bool:
    noted = left_to_bitsandbytes(optimizer)
    step(optimizer, 0)
    return sorted(noted) == sorted(parameter.numel() for parameter in parameters_of(optimizer))


def test_what_is_left_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other optimizers, 32-bit states, other code books, configurations of single parameters; all, if it is off."""
    shapes = [(16, 256), (20, 256)]
    for kind in ("AdEMAMix8bit", "Lion8bit", "AdamW32bit"):
        assert _all_left(made(True, getattr(bnb.optim, kind), shapes=shapes))
    assert _all_left(made(True, eps=0.0, shapes=shapes))
    assert _all_left(made(True, shapes=[(63, 64), (5,)]))
    with monkeypatch.context() as changed:
        changed.delenv(variables.ADAMW)
        assert _all_left(made(True, shapes=shapes))
    optimizer = made(True, shapes=shapes)
    for parameter in parameters_of(optimizer):
        optimizer.state[parameter]["qmap2"] = optimizer.state[parameter]["qmap2"] * 0.5
    optimizer.allocate()
    assert _all_left(optimizer)
    optimizer = made(True, shapes=shapes)
    special = parameters_of(optimizer)[1]
    monkeypatch.setitem(optimizer.mng.pid2config, id(special), {"lr": 0.1})
    noted = left_to_bitsandbytes(optimizer)
    step(optimizer, 0)
    assert noted == [special.numel()]
