"""Finds weights that hold NaN or infinite values, at little cost.

A sum is not finite if one of its terms is not. It takes one pass without a temporary tensor, and on a GPU the host does not
wait for it. The elements themselves are checked only where a sum is not finite, because large finite values can add up to an
infinite sum, too. Which scales of 4-bit weights are sound is for their formats to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_fused.hub import get_kernel

if TYPE_CHECKING:
    from typing_extensions import Self

    from qwen3_moe_fused import Format4bit, Packed4bitWeights

_SUMMED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# For each dtype of a byte, the bits that are all set in what is not finite. E4M3 has no infinite values.
_SPECIAL = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
# How many sums are read at once. Until then, each is a small tensor.
_AT_ONCE = 512
# How many pieces of a file may wait to be checked while it is copied, and the size in bytes of the largest such piece.
_WAITING, _PIECE = 4, 1 << 20


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements of ``tensor`` are finite. A dtype that is not a floating-point one counts as finite."""
    if (special := _SPECIAL.get(tensor.dtype)) is not None and not tensor.is_meta:
        return not bool(((tensor.view(torch.uint8) & special) == special).any())
    if tensor.dtype not in _SUMMED or tensor.is_meta or math.isfinite(tensor.sum()):
        return True
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(1 << 24))


def fault_of(name: str) -> str:
    """Says what is wrong with a tensor called ``name`` that is not sound."""
    if name.endswith("weight_global_scale"):
        return "must hold positive finite numbers, because other scales make weights NaN or infinite"
    return "holds NaN or infinite values"


@cache
def check_of_scales(part: str, dtype: torch.dtype) -> Callable[[Tensor], bool] | None:
    """Returns what says of scales, by their bytes, whether weights are finite with them, whatever these are.

    Args:
        part: the name of the tensor in checkpoints that publish 4-bit weights, without that of the matrix or stack.
        dtype: of the tensor.

    Returns:
        A function of whole scales as flat uint8, or None if no format publishes such scales.
    """
    kernel = get_kernel()
    for name in kernel.formats.names():
        form = kernel.Format4bit((1, 64, 64), name)  # the rules are the same for every shape
        for tensors in form.weight_format.published(form):
            stored = dict(zip(tensors, form.storage(), strict=True)).get(part, "packed")
            if stored != "packed" and tensors[part].dtype == dtype:
                return partial(_are_sound, form, stored)
    return None


def _are_sound(form: Format4bit, stored: str, values: Tensor) -> bool:
    broken = form.weight_format.is_broken(form, stored, values)
    return broken is None or not bool(broken.any())


def broken_scales(weights: Packed4bitWeights) -> tuple[str, int, int] | None:
    """Finds a scale with which 4-bit weights are NaN or infinite, or that is no scale at all.

    Returns:
        The name of the stored tensor, the expert and the projection of the first one; None if all weights are finite.
    """
    form = weights.format
    for part, broken in form.weight_format.broken(form, weights.tensors()).items():
        if bool(broken.any()):
            expert, place = broken.nonzero()[0].tolist()
            return part, expert, place * form.projections // broken.shape[1]
    return None


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Yields the names of the tensors that hold NaN or infinite values."""
    pending: list[tuple[str, Tensor, Tensor]] = []
    for name, tensor in tensors:
        if tensor.dtype in _SUMMED and not tensor.is_meta:
            pending.append((name, tensor, tensor.detach().sum().float()))
        if len(pending) >= _AT_ONCE:
            yield from _suspects(pending)
            pending = []
    yield from _suspects(pending)


def _suspects(pending: list[tuple[str, Tensor, Tensor]]) -> Iterator[str]:
    for device in {total.device for _, _, total in pending}:
        there = [one for one in pending if one[2].device == device]
        fine = torch.isfinite(torch.stack([total for _, _, total in there])).tolist()
        for (name, tensor, _), finite in zip(there, fine, strict=True):
            if not finite and not is_finite(tensor.detach()):
                yield name


def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Raises ValueError if some of ``tensors``, which belong to ``source``, hold NaN or infinite values, and names them."""
    if names := list(not_finite(tensors)):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{source} holds NaN or infinite values, in {', '.join(names[:3])}{more}")


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the floating-point weights of ``model`` by name, and the scales of its linear layers in 4 bits.

    Experts in 4 bits are left out, because they are checked when they are read or quantized.
    """
    # Parameters and buffers are read directly, because reading an attribute of a parametrized module computes it.
    persistent: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                persistent[f"{path}.{name}" if path else name] = buffer
    in_4bit = set(_names_of_stacks(model))
    for name, value in persistent.items():
        if (state := getattr(value, "quant_state", None)) is not None:
            for part, scales in scales_of(state).items():
                if scales.is_floating_point():  # those of 8 bits are finite
                    yield f"{name}.{part}", scales
        elif value.is_floating_point() and name not in in_4bit:
            yield name, value


def _names_of_stacks(model: nn.Module) -> Iterator[str]:
    """Yields the names of the parameters that hold the bytes of experts in 4 bits, in whatever dtype."""
    kernel = get_kernel()
    for path, module in model.named_modules():
        for attribute, form in vars(module).items():
            if isinstance(form, kernel.Format4bit):
                for part in form.storage():
                    name = kernel.modules.parameter_name(attribute.removesuffix("_format"), part)
                    yield f"{path}.{name}" if path else name


def scales_of(state: Any) -> dict[str, Tensor]:
    """Returns the scales in a ``QuantState`` of bitsandbytes, by the names that checkpoints have for them.

    Args:
        state: the state, or None for a weight without one, which has no scales.
    """
    found = {
        "absmax": getattr(state, "absmax", None),
        "nested_absmax": getattr(getattr(state, "state2", None), "absmax", None),
        "nested_offset": getattr(state, "offset", None),
    }
    return {part: value for part, value in found.items() if isinstance(value, Tensor)}


class Watch:
    """Checks bytes while they are copied from one file to another, in a thread beside the one that copies.

    Raises:
        ValueError: some values are not finite. It is raised at the end of the block or earlier, and names the tensor.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: list[tuple[str, Future[bool]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._settle(0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def see(
        self,
        name: str,
        data: bytearray | memoryview,
        dtype: torch.dtype,
        check: Callable[[Tensor], bool] = is_finite,
    ) -> None:
        """Checks ``data``, whole values of the tensor ``name``. It must not change any more.

        Args:
            check: whether values are sound.
        """
        if not len(data) or (check is is_finite and dtype not in (*_SUMMED, *_SPECIAL)):
            return
        future = self._pool.submit(lambda: check(torch.frombuffer(data, dtype=dtype)))
        self._pending.append((name, future))
        # Data that waits stays in memory. A few small pieces of a file may wait, but no large tensor.
        self._settle(_WAITING if len(data) <= _PIECE else 0)

    def _settle(self, left: int) -> None:
        while len(self._pending) > left:
            name, future = self._pending.pop(0)
            if not future.result():
                raise ValueError(f"{name} {fault_of(name)}")
