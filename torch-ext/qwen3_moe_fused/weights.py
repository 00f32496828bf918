"""Weight providers: how the grouped GEMMs see a stack of expert matrices.

Callers hand the public functions a parameter in whatever layout their model keeps; a provider turns it into the one view
the stages read, (E, out, in) with any strides. It is the only place that knows how a layer's weights are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseWeights:
    """A dense stack, in the compute dtype.

    Attributes:
        stack: (E, out, in) view of the parameter; rows of gated up projections as ``activations.Gate`` lays out columns.
    """

    stack: Tensor

    @classmethod
    def of(cls, parameter: Tensor, transposed: bool = False) -> DenseWeights:
        """The provider of an (E, out, in) parameter, or of an (E, in, out) one with ``transposed``.

        A stack in which neither features dimension is contiguous is copied: no kernel reads it well. So is one in which
        an expert's matrix spans 2³¹ elements, beyond the 32-bit offsets inside a matrix.
        """
        stack = parameter.mT if transposed else parameter
        _, stride_out, stride_in = stack.stride()
        span = (stack.shape[1] - 1) * stride_out + (stack.shape[2] - 1) * stride_in
        if 1 not in (stride_out, stride_in) or span >= 2**31:
            stack = stack.contiguous()
        return cls(stack)

    def empty_grad(self) -> Tensor:
        """An uninitialised gradient in the layout of the stack, for ``grouped_gram`` to fill."""
        stack = self.stack
        if stack.stride(2) != 1 and stack.stride(1) == 1:
            return stack.new_empty((stack.shape[0], stack.shape[2], stack.shape[1])).mT
        return stack.new_empty(stack.shape)
