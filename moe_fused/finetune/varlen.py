"""The kernels that compute causal attention over documents side by side, and which of them a run takes.

    torch    flash attention of ``torch.nn.attention.varlen``
    cudnn    cuDNN's attention on Hopper and datacenter Blackwell, through the package ``nvidia-cudnn-frontend``
    a Hub id  the flash attention of a kernel on the Hub, such as ``kernels-community/flash-attn3``

All take rows of tokens and the boundaries of the documents, which may be empty, and none waits for the GPU. So they run
within CUDA graphs, where the number of boundaries is always the same.

torch has an operator for cuDNN's attention over several lengths as well. It is not used: in torch 2.11 its backward takes
the number of features for the length of the longest document (pytorch#186142), and its gradients are summed in memory for
as many documents of the longest length as there are boundaries.

``attention_speeds/*.json`` hold what the kernels took on a GPU. ``scripts/speeds.py`` makes these files from the rows of the
benchmark ``attention``. Without a file for the GPU and the torch of a run, "auto" is torch's flash attention.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

TORCH, CUDNN = "torch", "cudnn"
# Whose attention over documents cuDNN has: compute capabilities 9.x and 10.x, with up to so many features of a head.
_CUDNN_MAJORS, _CUDNN_FEATURES = (9, 10), 128
# The oldest cuDNN whose attention over documents torch itself uses.
_CUDNN_VERSION = 91800
# What another kernel than torch's must gain to be taken: below that, two measurements differ by as much.
WORTH_IT = 0.97

# The largest number of features of a head that torch's flash attention takes.
_FLASH_FEATURES = 256

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, "float | None", "int | None"], Tensor]
"""Takes query (S, heads, D), key and value (S, groups, D), boundaries (N + 1,) int32, the number of tokens of the longest
document or more, the factor of the scores, and the window or None. Returns (S, heads, D)."""


def takes(features: int, values: int, most: int = _FLASH_FEATURES) -> bool:
    """Whether a flash attention takes queries and keys of so many features. Values are filled up to the same number."""
    return values <= features <= most and features % 8 == 0


@dataclass(frozen=True)
class Kernel:
    """One way to compute causal attention over documents side by side.

    Attributes:
        name: Its name, as ``--attn`` and the tables of speeds have it.
        attend: What computes it.
        groups: Whether it takes fewer heads for keys and values than for queries.
        windows: Whether it takes windows.
        most_features: The largest number of features of a head.
    """

    name: str
    attend: Attend
    groups: bool = True
    windows: bool = True
    most_features: int = _FLASH_FEATURES

    def fits(self, features: int, values: int) -> bool:
        """Whether it takes queries and keys of so many features. Values are filled up to the same number."""
        return takes(features, values, self.most_features)


@functools.cache
def operators_run() -> bool:
    """Whether torch has the operators of flash attention, with the arguments that windows and sinks need.

    Those of ROCm come from another library, which was not tested.
    """
    if torch.version.hip is not None:
        return False
    names = ("_flash_attention_forward", "_flash_attention_backward")
    schemas = [str(getattr(torch.ops.aten, name).default._schema) for name in names if hasattr(torch.ops.aten, name)]
    return len(schemas) == 2 and all("window_size_left" in schema for schema in schemas)


def flash_forward(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    length: int,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs torch's operator and notes in ``ctx`` what ``flash_backward`` needs beside tensors.

    Returns:
        The output (S, heads, D), the log-sum-exp (heads, S) fp32, the random state, and a tensor without use.
    """
    ctx.length, ctx.options = length, {"scale": scale}
    if window is not None:
        ctx.options |= {"window_size_left": window - 1, "window_size_right": 0}
    out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, boundaries, boundaries, length, length, 0.0, True, False, **ctx.options
    )
    return out, lse, state, unused


def flash_backward(
    ctx: Any,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    unused: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value, from what ``flash_forward`` returned."""
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), query, key, value, out, lse, boundaries, boundaries, ctx.length, ctx.length, 0.0, True, state,
        unused, **ctx.options,
    )  # fmt: skip
    return grads


class _Flash(torch.autograd.Function):
    """Computes torch's flash attention by its operators. The arguments are those of ``Attend``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        boundaries: Tensor,
        length: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        found = flash_forward(ctx, query, key, value, boundaries, length, scale, window)
        ctx.save_for_backward(query, key, value, boundaries, *found)
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *flash_backward(ctx, grad, *ctx.saved_tensors), None, None, None, None


@functools.cache
def torch_kernel() -> Kernel | None:
    """Returns torch's flash attention, or None if this torch has none over several lengths."""
    try:
        from torch.nn.attention import varlen
    except ImportError:  # torch 2.9
        return None
    function: Any = varlen.varlen_attn
    known = inspect.signature(function).parameters
    if not {"scale", "window_size"} <= known.keys():  # torch 2.10
        return None
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    if not grouped and operators_run():
        # The function wants keys and values for each head, but its operators do not.
        return Kernel(TORCH, _Flash.apply)

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        boundaries: Tensor,
        length: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        size = (-1 if window is None else window - 1, 0)
        out: Tensor = function(
            query, key, value, boundaries, boundaries, length, length, scale=scale, window_size=size, **grouped
        )
        return out

    return Kernel(TORCH, attend, groups=bool(grouped))


@functools.cache
def _cudnn_function() -> Callable[..., Any] | str:
    """Returns the function of NVIDIA's package, or why there is none."""
    if importlib.util.find_spec("cudnn") is None:
        return "it needs the package nvidia-cudnn-frontend, which is not installed"
    try:
        package = importlib.import_module("cudnn")
        function: Callable[..., Any] = package.sdpa_torch
        version = package.backend_version()  # raises if cuDNN itself is missing
    except AttributeError:
        return "this nvidia-cudnn-frontend has no sdpa_torch, update it"
    except (ImportError, OSError, RuntimeError) as error:
        return f"nvidia-cudnn-frontend does not load: {error}"
    parameters = inspect.signature(function).parameters
    if not {"is_causal", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"} <= parameters.keys():
        return "this nvidia-cudnn-frontend computes no attention over several lengths, update it"
    if version < _CUDNN_VERSION:
        return f"it needs cuDNN 9.18, and this is {version // 10000}.{version // 100 % 100}"
    return function


def cudnn_refusal(device: torch.device) -> str | None:
    """Why cuDNN's attention over documents cannot be had on a device, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    # Without a GPU here, the run is a plan for another machine.
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] not in _CUDNN_MAJORS:
        return "it needs a GPU of compute capability 9 or 10, such as H100, H200 or B200"
    found = _cudnn_function()
    return found if isinstance(found, str) else None


@functools.cache
def cudnn_kernel() -> Kernel | None:
    """Returns cuDNN's attention through NVIDIA's package, or None if the package is missing or too old."""
    function = _cudnn_function()
    if isinstance(function, str):
        return None

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        boundaries: Tensor,
        length: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        # The backward pass needs the log-sum-exp, which the function then returns as well.
        try:
            out: Tensor = function(
                query, key, value, scale=scale, is_causal=True, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries,
                max_seqlen_q=length, max_seqlen_kv=length, return_lse=True,
            )[0]  # fmt: skip
        except Exception as error:
            if not type(error).__module__.startswith("cudnn"):
                raise
            # The package's own errors are no RuntimeErrors, and do not say where the call comes from.
            raise RuntimeError(f"cuDNN does not compute this attention, use --attn torch: {error}") from error
        return out

    # cuDNN has windows, too. They were never run here.
    return Kernel(CUDNN, attend, windows=False, most_features=_CUDNN_FEATURES)


def is_hub_id(name: str) -> bool:
    """Whether a name of an implementation of attention is that of a kernel on the Hub."""
    from transformers.integrations.hub_kernels import is_kernel

    return bool(is_kernel(name))


@functools.cache
def hub_kernel(name: str) -> Kernel | None:
    """Returns the flash attention of a kernel on the Hub, which Transformers loads, or None if it has none.

    ``LOCAL_KERNELS`` may name a directory to take instead.

    Args:
        name: The id of the kernel, as Transformers takes it for ``attn_implementation``.
    """
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    functions: tuple[Any, ...] = lazy_import_flash_attention(name)[0]
    function = functions[1]
    if function is None:
        return None
    known = inspect.signature(function).parameters
    names = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal"}
    if not names <= known.keys():
        return None

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        boundaries: Tensor,
        length: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        windows = {} if window is None else {"window_size": (window - 1, 0)}
        out: Any = function(
            query, key, value, cu_seqlens_q=boundaries, cu_seqlens_k=boundaries, max_seqlen_q=length,
            max_seqlen_k=length, softmax_scale=scale, causal=True, **windows,
        )  # fmt: skip
        # Some versions also return the log-sum-exp.
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    return Kernel(name, attend, windows="window_size" in known)


def kernel_of(name: str) -> Kernel | None:
    """Returns a kernel by its name, or None if it cannot be had here."""
    if name == TORCH:
        return torch_kernel()
    return cudnn_kernel() if name == CUDNN else hub_kernel(name)


# --- what was measured


@dataclass(frozen=True)
class Speeds:
    """What the kernels took on a GPU, forward and backward, over documents of one mix of lengths.

    Attributes:
        gpu: The name of the GPU.
        capability: Its compute capability.
        torch: The version of torch, without its last part.
        features: The number of features of a head.
        tokens: The numbers of tokens of all documents together, ascending.
        ms: For each kernel, the milliseconds for each number of tokens.
    """

    gpu: str
    capability: tuple[int, int]
    torch: str
    features: int
    tokens: Sequence[int]
    ms: Mapping[str, Sequence[float]]

    def best(self, tokens: int, runs: Callable[[str], bool]) -> str:
        """Returns the fastest kernel for a number of tokens of those that run, torch's unless another is worth it."""
        nearest = min(range(len(self.tokens)), key=lambda i: abs(self.tokens[i] - tokens))
        times = {name: ms[nearest] for name, ms in self.ms.items()}
        faster = [name for name, ms in times.items() if ms < WORTH_IT * times[TORCH] and runs(name)]
        return min(faster, key=lambda name: times[name], default=TORCH)


@functools.cache
def speeds() -> tuple[Speeds, ...]:
    """Reads all that was measured, from the files that ship with the package."""
    directory = resources.files(__package__).joinpath("attention_speeds")
    if not directory.is_dir():  # nothing was measured
        return ()
    files = [file for file in directory.iterdir() if file.name.endswith(".json")]
    entries = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return tuple(Speeds(**{**entry, "capability": tuple(entry["capability"])}) for entry in entries)


def torch_release() -> str:
    """The version of torch without its last part, such as 2.11."""
    return ".".join(torch.__version__.split(".")[:2])


def fastest(device: torch.device, tokens: int, features: int, runs: Callable[[str], bool]) -> str:
    """Returns the name of the kernel that was measured to be the fastest, or torch's if nothing was measured.

    Args:
        device: The device of the run.
        tokens: The number of tokens of a batch.
        features: The number of features of a head.
        runs: Whether a kernel can compute the run. Only faster ones than torch's are asked for, because they load.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return TORCH
    capability = torch.cuda.get_device_capability(device)
    fitting = [
        each
        for each in speeds()
        if (each.capability, each.torch, each.features) == (capability, torch_release(), features)
    ]
    return fitting[0].best(tokens, runs) if fitting else TORCH
