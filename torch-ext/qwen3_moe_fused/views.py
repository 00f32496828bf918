"""``View``: a tensor's memory as the argument of a kernel, without making a tensor of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """A tensor's memory from an element on, as a kernel's argument: torch takes 5 µs to make a slice of it.

    Attributes:
        base: the tensor.
        first: the element, counted in memory, in elements of ``base``.
        dtype: that the memory is read as.
    """

    base: Tensor
    first: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.base.data_ptr() + self.first * self.base.itemsize

    def checked(self) -> Tensor:
        """As a tensor, of whose shape kernels know nothing."""
        size = self.dtype.itemsize // self.base.itemsize
        return self.base.as_strided((size,), (1,), self.base.storage_offset() + self.first).view(self.dtype)
