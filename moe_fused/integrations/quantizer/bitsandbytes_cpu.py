"""Repairs of bitsandbytes on a CPU, in force while ``moe_fused`` is enabled.

bitsandbytes 0.50 has two faults on CPUs, both of which change results without an error:

* On processors with avx512_bf16, ``Linear4bit`` repacks its weight in place during an evaluation and multiplies in bfloat16
  with scales rounded to bfloat16. A later merge, backward or ``dequantize`` reads the repacked bytes as if they were still
  in the usual order. A number of rows that is no multiple of 32 fails with "N must be divisible by block_n".
* ``dequantize_4bit`` takes wrong scales wherever a row is not a whole number of blocks.

While this module is registered, ``Linear4bit`` keeps its weight as it is and computes what it computes on every other
processor. ``dequantize_4bit`` reshapes its input into rows of whole blocks, for which bitsandbytes' kernel is right. The
first import of bitsandbytes no longer asks the Hub for a kernel that only repacked weights need.

Neither torch nor bitsandbytes is imported before somebody else imports bitsandbytes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from moe_fused.imports import LibraryPatch, Undo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The kernel for repacked weights, which bitsandbytes asks the Hub for while it is imported.
_HUB_KERNEL = "kernels-community/quantization-bitsandbytes"
# The attribute of a Linear4bit that allows it to repack its weight.
REPACKS = "support_avx512bf16_for_cpu"
# The attribute of a QuantState that says that the weight has been repacked.
REPACKED = "packing_format_for_cpu"


def repacks_on_this_cpu() -> bool:
    """Whether bitsandbytes would repack weights on this processor if it were left alone. Imports bitsandbytes."""
    from bitsandbytes.nn import modules

    layers: Any = modules  # a layer calls this function when it is made
    return bool(layers.has_avx512bf16())


@contextlib.contextmanager
def _without_hub_kernel() -> Iterator[None]:
    """Keeps bitsandbytes from loading its CPU kernel from the Hub, and from the warning that it could not."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import kernels
    except ImportError:  # bitsandbytes then has nothing to load the kernel with
        kernels = None
    get_kernel = getattr(kernels, "get_kernel", None)

    def others_only(repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if repo_id == _HUB_KERNEL or get_kernel is None:
            raise RuntimeError("moe_fused leaves this kernel out")
        return get_kernel(repo_id, *args, **kwargs)

    if kernels is not None:
        kernels.get_kernel = others_only
    try:
        yield
    finally:
        logger.setLevel(level)
        if kernels is not None:
            kernels.get_kernel = get_kernel


def _patch(on_undo: Callable[[Undo], None]) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    on_undo(_never_repack(Linear4bit))
    if (undo := _dequantize_whole_blocks()) is not None:
        on_undo(undo)
    _restore_repacked(Linear4bit)


_patches = LibraryPatch("bitsandbytes", _patch, during_import=_without_hub_kernel)
register, unregister = _patches.register, _patches.unregister


def _never_repack(linear: Any) -> Undo:
    """Makes every layer, present and future, answer that it cannot repack its weight, and returns what undoes this.

    What a layer sets for itself is kept, and counts again once this is undone.
    """

    def keep(self: Any, value: object) -> None:
        vars(self)[REPACKS] = value

    # A property of the class takes precedence over an attribute of the instance.
    setattr(linear, REPACKS, property(lambda self: False, keep))
    return lambda: delattr(linear, REPACKS)


def _dequantize_whole_blocks() -> Undo | None:
    """Makes ``dequantize_4bit`` reshape rows into whole blocks on a CPU, and returns what undoes this.

    Returns None where bitsandbytes has no kernel of its own for CPUs, and nothing needs to be changed.
    """
    import torch

    try:
        original = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")
    except RuntimeError:  # without its native library, bitsandbytes has only a plain implementation, which is right
        return None
    registration = [torch.library.Library("bitsandbytes", "IMPL")]

    def dequantize(
        keys: Any,
        packed: Tensor,
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        shape: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        if shape[-1] % blocksize == 0:
            result: Tensor = original.call_boxed(keys, packed, absmax, blocksize, quant_type, shape, dtype)
            return result
        count = 1
        for size in shape:
            count *= size
        blocks = -(-count // blocksize)
        flat = packed.reshape(-1).view(torch.uint8)
        missing = -(-blocks * blocksize // 2) - flat.numel()
        if missing:
            flat = torch.nn.functional.pad(flat, (0, missing))
        values = original.call_boxed(keys, flat, absmax, blocksize, quant_type, [blocks, blocksize], dtype)
        return values.view(-1)[:count].reshape(shape)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns whenever a kernel takes the place of another
        # Without allow_override, older versions of torch (2.12 among them) refuse to replace a kernel.
        registration[0].impl("dequantize_4bit", dequantize, "CPU", with_keyset=True, allow_override=True)
    return registration.clear  # torch restores the previous kernel once the registration is gone


def _restore_repacked(linear: Any) -> None:
    """Restores the usual order of bytes in the layers that bitsandbytes repacked earlier; scales stay rounded."""
    if not repacks_on_this_cpu():
        return
    # By type() and not by isinstance(), which would trigger lazy proxies that answer for another class.
    for layer in [item for item in gc.get_objects() if issubclass(type(item), linear)]:
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, REPACKED, False):
            layer.weight.data = unpacked(layer.weight.data, state)


def unpacked(weight: Tensor, state: Any) -> Tensor:
    """Returns the bytes of a repacked weight in the usual order.

    The scales stay as the repacking left them: rounded to bfloat16, and no longer in 8 bits.

    Args:
        weight: (out, in / 2) uint8.
        state: the weight's QuantState, which is changed to describe the bytes that are returned.
    """
    import torch
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    absmax = state.absmax.T.to(torch.float32).reshape(-1).contiguous()
    state.original_nested = False  # otherwise the inverse would quantize the rounded scales to 8 bits again
    restored, state = _convert_weight_packed_for_cpu_inverse(weight, state)
    state.absmax = absmax
    return restored
