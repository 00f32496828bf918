"""Finds weights that hold NaN or infinite values, at little cost.

A sum is not finite if one of its terms is not. It takes one pass without a temporary tensor, and on a GPU the host does not
wait for it. The elements themselves are checked only where a sum is not finite, because large finite values can add up to an
infinite sum, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_fused.hub import get_kernel

if TYPE_CHECKING:
    from typing_extensions import Self

    from qwen3_moe_fused import Packed4bitWeights

_SUMMED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# For each dtype of a byte, the bits that are all set in what is not finite. E4M3 has no infinite values.
_SPECIAL = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
# Scales of mxfp4 in E8M0: from the first one on, the largest values of 4 bits become infinite, and the second one is NaN.
_OVERFLOWS, _NAN = 253, 255
# The smallest global scale of nvfp4 whose largest weights are finite.
_LOWEST = 2688 / torch.finfo(torch.float32).max
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
    if name.endswith("global_scale"):
        return "must hold positive finite numbers, because other scales make weights NaN or infinite"
    return "holds NaN or infinite values"


def is_finite_e8m0(scales: Tensor) -> bool:
    """Whether no scale of mxfp4, uint8, is NaN."""
    return not bool((scales == _NAN).any())


def are_global_scales(scales: Tensor) -> bool:
    """Whether global scales of nvfp4, fp32, divide the scales of blocks to finite ones. They have to be positive."""
    return not bool(_not_global(scales).any())


def _not_global(scales: Tensor) -> Tensor:
    return ~(scales.isfinite() & (scales >= _LOWEST))


def broken_scales(weights: Packed4bitWeights) -> tuple[str, int, int] | None:
    """Finds a scale with which 4-bit weights are NaN or infinite, or a global scale that is not a positive finite number.

    Returns:
        The name of the stored tensor, the expert and the projection of the first one; None if all weights are finite.
    """
    stored = weights.tensors()
    for part, value in stored.items():
        found = _broken_experts(weights, part, value, "nested_absmax" in stored)
        if found is not None and bool(found.any()):
            expert, place = found.nonzero()[0].tolist()
            return part, expert, place * weights.format.projections // found.shape[1]
    return None


def _broken_experts(weights: Packed4bitWeights, part: str, value: Tensor, double_quant: bool) -> Tensor | None:
    """Returns which elements of a stored tensor are broken, (E, any), or None if none can be."""
    if part == "global_scale":
        return _not_global(value.contiguous().view(torch.float32))
    if part == "block_scale" and weights.format.quant_type == "nvfp4":
        special = _SPECIAL[torch.float8_e4m3fn]
        return (value & special) == special
    if part == "block_scale" and weights.format.quant_type == "mxfp4":
        large = value >= _OVERFLOWS
        for expert in large.any(1).nonzero().flatten().tolist():  # few if any, so these are computed
            blocks = weights.narrow(expert, 1).dequantize(torch.float32).view(value.shape[1], -1)
            large[expert] &= ~blocks.isfinite().all(1)
        return large
    if part in ("nested_absmax", "nested_offset") or (part == "absmax" and not double_quant):
        return ~value.contiguous().view(torch.float32).isfinite()
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
    """Yields the floating-point weights of ``model`` by name, and the scales of its 4-bit weights."""
    # Parameters and buffers are read directly, because reading an attribute of a parametrized module computes it.
    persistent: dict[str, Tensor] = dict(model.named_parameters())
    persistent |= _bytes_of_stacks(model)
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                persistent[f"{path}.{name}" if path else name] = buffer
    for name, value in persistent.items():
        if (state := getattr(value, "quant_state", None)) is not None:
            yield from _scales(name, state)
        elif value.is_floating_point():
            yield name, value
        elif name.endswith(("_absmax", "_nested_absmax", "_nested_offset")) and value.dtype == torch.uint8:
            yield from _as_floats(name, value, persistent)


def _bytes_of_stacks(model: nn.Module) -> dict[str, Tensor]:
    """Returns the bytes of packed experts by the names of the parameters that hold them, in whatever dtype."""
    kernel = get_kernel()
    found = {}
    for path, module in model.named_modules():
        formats = [name for name, value in vars(module).items() if isinstance(value, kernel.Format4bit)]
        for name in (attribute.removesuffix("_format") for attribute in formats):
            for part, value in kernel.modules.weights_of(module, name).tensors().items():
                parameter = kernel.modules.parameter_name(name, part)
                found[f"{path}.{parameter}" if path else parameter] = value
    return found


def _scales(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the scales of a linear layer of bitsandbytes."""
    second = getattr(state, "state2", None)
    for part, value in (
        ("absmax", state.absmax),
        ("nested_absmax", getattr(second, "absmax", None)),
        ("nested_offset", getattr(state, "offset", None)),
    ):
        if isinstance(value, Tensor) and value.is_floating_point():
            yield f"{name}.{part}", value


def _as_floats(name: str, value: Tensor, named: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields a companion of packed experts as fp32, which its bytes are unless the absmaxes are in 8 bits."""
    nested = name.endswith(("_nested_absmax", "_nested_offset"))
    if nested or f"{name.removesuffix('_absmax')}_nested_absmax" not in named:
        yield name, value.contiguous().view(torch.float32)


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
