"""The one place that decides which way a product over a stack of experts takes.

A dense stack is read as it is. Packed weights have three ways:

- Few slots and no gradient to come: products slot by slot, which dequantize what they read (``use_gemv``), on tensor cores
  where these do not round (``multiplies_few_slots``).
- Few rows to an expert: grouped GEMMs dequantize what they multiply, if the layout allows it.
- Many rows: every row tile would dequantize its expert again, so the dense kernels run over a workspace into which some
  features of all experts with rows are dequantized at a time (``dequantize.dense_parts``).

``tuning.dequantizes_in_product`` draws the line between the last two. Dequantizing first costs what it writes: at 4096
tokens of a Qwen3-30B-A3B layer on an H100 the up projection takes 0.85 ms, dense 0.50. Two alternatives lost there: the
row tiles of an expert dequantizing their weights together into a ring that stays in the L2, each behind a counter (1.09
ms; 2.2 against 1.76 at 16384), and parts on two streams, one dequantizing while the other multiplies (0.83, and 1.80 at
16384: the products want the same memory).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from torch import Tensor

from ... import tuning
from ...formats.base import ROW_UNIT
from ..stacks import PackedStack
from .operands import config_of

if TYPE_CHECKING:
    from ...routing import Routing
    from ...tuning import LaunchConfig
    from ..stacks import Stack


class Path(Enum):
    """Which kernels a product takes."""

    DENSE = "dense kernels over the stack"
    IN_PRODUCT = "kernels that dequantize what they multiply"
    WORKSPACE = "dense kernels over a workspace"


IN_PRODUCT, WORKSPACE, DENSE = (
    Path.IN_PRODUCT,
    Path.WORKSPACE,
    Path.DENSE,
)  # a member of an Enum takes a while to look up


# The kernel families that dequantize in the product, by the dense family: for a stack as it is stored, and for its
# transpose.
_PACKED_FAMILIES: dict[str, tuple[str | None, str | None]] = {
    "up": ("up_4bit", None),
    "gemm": ("gemm_4bit", "transposed_4bit"),
    "down_backward": ("down_backward_4bit", None),
}


# Rows that an expert may have on average where rows are not sorted. Its tiles have as many, and each dequantizes again.
ROWS_OF_FEW = 8


def product_path(
    family: str, stack: Stack, num_rows: int, routing: Routing, like: Tensor, plain: bool = True
) -> tuple[Path, LaunchConfig]:
    """The path of a product of S = num_rows rows with ``stack``, and the configuration of its kernels.

    Args:
        family: "up", "gemm" or "down_backward".
        stack: (E, N, K) of the product; for ``down_backward`` the down projection (E, H, I) itself.
        like: a tensor of the product's device and dtype.
        plain: rows are not gathered, and there is no bias: all that a product with a transposed packed stack can be.
    """
    if isinstance(stack, PackedStack):
        packed_family = _PACKED_FAMILIES[family][1 if stack.transposed else 0]
        fits = packed_family is not None and (plain or not stack.transposed)
        if packed_family is not None and fits and dequantizes(packed_family, stack, num_rows, like):
            return IN_PRODUCT, config_of(packed_family, num_rows, routing, like)
    if family == "gemm" and stack.shape[2] <= tuning.SHORT_K:
        family = "gemm_short"
    return WORKSPACE if isinstance(stack, PackedStack) else DENSE, config_of(family, num_rows, routing, like)


def dequantizes(family: str, stack: PackedStack, num_rows: int, like: Tensor) -> bool:
    """Whether the kernels of ``family`` take ``stack`` as it is, and are faster than the workspace."""
    return is_readable(stack) and tuning.dequantizes_in_product(
        family, num_rows, stack.shape[0], tuning.target_of(like.device)
    )


def is_readable(stack: PackedStack) -> bool:
    """Whether kernels can dequantize ``stack`` in tiles: rows of whole units, 32-bit offsets in a matrix, whole words.

    A part of a larger tensor may start at any byte.
    """
    _, rows, columns = stack.format.shape
    return columns % ROW_UNIT == 0 and rows * columns < 2**31 and stack.packed.data_ptr() % 4 == 0


def use_gemv(num_tokens: int, top_k: int, up: Stack, down: Stack) -> bool:
    """``reference.use_gemv``: with few slots sorting costs more launches than sharing weights saves bytes.

    In a CUDA graph, where launches cost nothing, products over packed weights that are sorted are faster from 4 tokens on
    than matrix-vector products: on an H100, of a Qwen3-30B-A3B layer, 73 against 82 µs, with 8 tokens 112 against 149. But a
    call must not depend on being captured: nobody has compiled what it takes then.
    """
    num_slots = num_tokens * top_k
    if num_slots == 0 or down.numel() == 0:
        return False
    if multiplies_few_slots(num_slots, up, down):
        return True
    if num_slots > tuning.gemv_slots(tuning.target_of(down.device)):
        return False
    if not isinstance(up, PackedStack) or not isinstance(down, PackedStack):
        return isinstance(up, Tensor) and isinstance(down, Tensor)
    return _is_readable_by_slots(num_slots, up, down)


def multiplies_few_slots(num_slots: int, up: Stack, down: Stack) -> bool:
    """Whether tensor cores multiply the rows of so many slots with packed weights, without sorting them.

    In fp32 they would round, and elsewhere than on NVIDIA GPUs nobody has compiled it.
    """
    if not isinstance(up, PackedStack) or not isinstance(down, PackedStack) or up.format.dtype.itemsize != 2:
        return False
    target = tuning.target_of(down.device)
    most = min(tuning.few_slots(target), ROWS_OF_FEW * down.shape[0])
    if target.backend != "cuda" or num_slots > most:
        return False
    return _is_readable_by_slots(num_slots, up, down)


def _is_readable_by_slots(num_slots: int, up: PackedStack, down: PackedStack) -> bool:
    """Whether the kernels that do not sort rows take both stacks as they are, and are faster than the workspace."""
    readable = not up.transposed and not down.transposed and is_readable(up)
    return readable and dequantizes("gemm_4bit", down, num_slots, down.packed)
