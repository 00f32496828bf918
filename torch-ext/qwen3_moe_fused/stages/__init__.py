"""Which implementation of the pipeline stages serves a tensor: the Triton kernels or plain torch.

Both modules, ``launch`` and ``reference``, offer the same functions over the same arguments; the autograd formulas in
``linear`` and ``experts`` are written once on top of either. That is why a float64 ``gradcheck`` of the reference checks the
formulas that train on a GPU.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import reference

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The interpreter multiplies bf16 bit patterns as integers in tl.dot (triton 3.6).
INTERPRETER_DTYPES = (torch.float16, torch.float32)


@functools.cache
def _interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (``TRITON_INTERPRET=1``), and so on CPU tensors."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _check_accelerator(device: torch.device) -> None:
    """Raises RuntimeError if the Triton kernels cannot run on ``device``."""
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(f"tensors on {device} need triton>=3.5, which is not installed: use CPU tensors") from error
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    if version < (3, 5):
        raise RuntimeError(f"triton {triton.__version__} is too old for tensors on {device}: triton>=3.5 is needed")
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            name = torch.cuda.get_device_name(device)
            raise RuntimeError(
                f"{name} has compute capability {capability[0]}.{capability[1]}: 8.0 (Ampere) or newer is needed"
            )


@functools.cache
def _launch() -> ModuleType:
    from . import triton as launch  # imports triton, which a CPU build does without

    return launch


def uses_triton(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels serve ``tensor`` when the grouped GEMMs compute in ``dtype``."""
    if tensor.device.type == "cpu":
        return _interpreting() and dtype in INTERPRETER_DTYPES
    return tensor.device.type in ("cuda", "xpu")


def backend_for(tensor: Tensor, dtype: torch.dtype) -> ModuleType:
    """The module of pipeline stages for tensors on ``tensor``'s device that compute in ``dtype``.

    Raises:
        RuntimeError: an accelerator on which the kernels cannot run: no or too old a triton, too old a GPU.
        TypeError: a dtype that the kernels do not compute in.
    """
    if not uses_triton(tensor, dtype):
        return reference
    if tensor.device.type != "cpu":
        _check_accelerator(tensor.device)
        if dtype not in TRITON_DTYPES:
            raise TypeError(f"dtype {dtype} is not supported on {tensor.device}: use bfloat16, float16 or float32")
    return _launch()
