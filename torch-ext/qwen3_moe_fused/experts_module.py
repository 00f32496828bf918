"""Transformers' experts modules, in the terms of ``moe_experts``: ``experts_forward`` computes one.

Such a module is a container of stacked weights with flags that say how the weights are laid out. This file reads the flags.
It needs no Transformers, and it keeps nothing on or about the modules, so they copy, pickle, shard and wrap as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .experts import moe_experts
from .lora import LoraWeights
from .modules import weights_of
from .ops._torch_compat import is_plain_or_fake
from .packed import Packed4bitWeights

# An experts module of Transformers. Its flags and weights are attributes that nn.Module's type does not know.
Experts: TypeAlias = Any

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_FORMATS = tuple(f"{name}_format" for name in _PROJECTIONS)
# The tensors of packed weights beside the packed bytes, which have the name of the dense weights.
_COMPANIONS = ("absmax", "nested_absmax", "nested_offset", "block_scale", "global_scale")
_PARAMETERS = frozenset(
    name for p in _PROJECTIONS for name in (p, f"{p}_bias", *(f"{p}_{companion}" for companion in _COMPANIONS))
)
# torch.nn.utils.parametrize moves the parameters that it computes into a module called "parametrizations".
_MODULES = frozenset({"act_fn", "parametrizations"})
_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})

# The file whose decorator gives experts classes their forward.
_INTERFACE = "transformers/integrations/moe.py"
# The gate that Transformers gives to experts without one of their own: act_fn(gate) * up.
_DEFAULT_GATE = ("transformers.integrations.moe", "_default_apply_gate")
# Classes whose gate equals the kernel's "swiglu_oai": their model, the attributes that hold alpha and limit, and whether
# gate and up features alternate.
_SWIGLU_OAI = {
    "GptOssExperts": ("gpt_oss", "alpha", "limit", True),
    "OpenAIPrivacyFilterExperts": ("openai_privacy_filter", "alpha", "limit", False),
    "MiniMaxM3VLExperts": ("minimax_m3_vl", "swiglu_alpha", "swiglu_limit", False),
}

# Activation modules by class name, so that torch's own and Transformers' both count.
_ACTIVATION_OF_CLASS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
}


def activation_of(act_fn: Callable[[Tensor], Tensor]) -> str | None:
    """The name under which the kernels fuse ``act_fn``, a module or function, or None if they do not know it."""
    if act_fn is nn.functional.silu:
        return "silu"
    if act_fn is nn.functional.relu:
        return "relu"
    if isinstance(act_fn, nn.GELU):
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    return _ACTIVATION_OF_CLASS.get(type(act_fn).__name__)


class ExpertActivation(NamedTuple):
    """What an expert computes between its up and its down projection, as arguments of ``moe_experts``."""

    activation: str | Callable[[Tensor], Tensor]
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0


@torch.compiler.assume_constant_result  # tracers do not know the code of a function
def is_under_interface(cls: type) -> bool:
    """Whether the forward of ``cls`` is the one that Transformers' ``use_experts_implementation`` gives a class.

    A class that derives from such a class and has a forward of its own computes something else.
    """
    forward: Any = getattr(cls, "forward", None)
    code = getattr(forward, "__code__", None)
    return (
        hasattr(cls, "_apply_gate")
        and hasattr(forward, "__wrapped__")
        and code is not None
        and code.co_filename.replace("\\", "/").endswith(_INTERFACE)
    )


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the names of a function
def _gate_of(cls: type) -> str:
    """Whose gate the experts of a class have: "default", "swiglu_oai", or "own" for one that the kernels do not know."""
    gate: Any = getattr(cls, "_apply_gate", None)
    if gate is None or (gate.__module__, gate.__qualname__) == _DEFAULT_GATE:
        return "default"
    model = _SWIGLU_OAI.get(cls.__name__, ("",))[0]
    home = f"transformers.models.{model}.modeling_{model}"
    return "swiglu_oai" if cls.__module__ == home and "_apply_gate" in vars(cls) else "own"


def _gate(module: Experts) -> str:
    """As ``_gate_of``, for a module, which can have a gate that its class lacks."""
    cls = type(module)
    gate = getattr(module, "_apply_gate", None)
    if gate is not None and getattr(gate, "__func__", gate) is not cls._apply_gate:
        return "own"
    return _gate_of(cls)


def _gate_function(act_fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The default gate around an activation that the kernels do not know, over (S, 2·I) with gate columns first."""

    def apply(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act_fn(gate) * up

    return apply


def expert_activation(module: Experts) -> ExpertActivation:
    """Names the kernel's activation that equals that of ``module``; without one, passes on the module's own function."""
    if not getattr(module, "has_gate", True):
        return ExpertActivation(activation_of(module.act_fn) or module.act_fn, gated=False)
    gate = _gate(module)
    if gate == "own":
        return ExpertActivation(module._apply_gate)
    if gate == "default":
        return ExpertActivation(activation_of(module.act_fn) or _gate_function(module.act_fn))
    _, alpha, limit, interleaved = _SWIGLU_OAI[type(module).__name__]
    return ExpertActivation("swiglu_oai", True, interleaved, getattr(module, alpha), getattr(module, limit))


def projections_of(module: Experts) -> tuple[str, str]:
    """The names of the weight parameters of an experts module: up projection, down projection."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")


def is_packed(module: Experts) -> bool:
    """Whether ``module`` holds 4-bit weights."""
    attributes = vars(module)  # nn.Module's __getattr__ is slow for attributes that do not exist
    return any(attributes.get(name) is not None for name in _FORMATS)


def layout_refusal(module: Experts) -> str | None:
    """Why ``moe_experts`` cannot compute what ``module`` does, or None if it can; does not look at the weights."""
    if getattr(module, "has_post_expert_norm", False):
        return "it normalizes the output of each expert"
    if not getattr(module, "is_concatenated", True) and _gate(module) == "default":
        return "gate and up features alternate, which its gate function does not expect"
    for name in module._parameters:
        if name not in _PARAMETERS:
            return f"it has a parameter of unknown purpose, {name}"
    for name in module._modules:
        if name not in _MODULES:
            return f"it has a submodule of unknown purpose, {name}"
    for name in module._buffers:
        return f"it has a buffer of unknown purpose, {name}"
    return None


def weights_refusal(up: Tensor, down: Tensor) -> str | None:
    """Why ``moe_experts`` cannot multiply with these weights, or None if it can."""
    for name, weight in (("up", up), ("down", down)):
        if not is_plain_or_fake(weight):
            return f"its {name} projection is a {type(weight).__name__}, not a plain tensor"
        if weight.dtype not in _DTYPES:
            return f"its {name} projection has dtype {weight.dtype}"
    if up.dtype is not down.dtype:
        return f"its projections differ in dtype: up {up.dtype}, down {down.dtype}"
    if up.dtype is torch.float64 and up.device.type != "cpu":
        return "GPU kernels do not compute in float64"
    return None


def refusal(module: Experts) -> str | None:
    """Why the kernel does not compute ``module``, or None if it does; does not compute parametrized weights."""
    reason = layout_refusal(module)
    if reason is not None or is_packed(module):
        return reason
    # Read from _parameters, because reading an attribute of a parametrized module computes the parameter.
    up_name, down_name = projections_of(module)
    up, down = module._parameters.get(up_name), module._parameters.get(down_name)
    if up is None or down is None:
        return f"its {up_name if up is None else down_name} is no parameter of its own"
    return weights_refusal(up, down)


class ExpertsWeights(NamedTuple):
    """What ``read_experts`` finds in an experts module: stacks as ``moe_experts`` takes them, biases and the activation."""

    up: Tensor | Packed4bitWeights
    down: Tensor | Packed4bitWeights
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: ExpertActivation
    transposed: bool


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # The comparison is here for speed: a `to` that changes nothing takes longer than the rest of this function.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def read_experts(module: Experts) -> ExpertsWeights | str:
    """Reads each weight of ``module`` once; returns the reason instead if the kernel cannot compute the module.

    On a parametrized module (PEFT, bitsandbytes) reading a weight is what computes it.
    """
    reason = layout_refusal(module)
    if reason is not None:
        return reason
    activation = expert_activation(module)
    up = weights_of(module, "gate_up_proj" if activation.gated else "up_proj")
    down = weights_of(module, "down_proj")
    if isinstance(up, Tensor) and isinstance(down, Tensor):
        reason = weights_refusal(up, down)
        if reason is not None:
            return reason
    up_bias = down_bias = None
    if getattr(module, "has_bias", False):
        up_bias = _cast(module.gate_up_proj_bias if activation.gated else module.up_proj_bias, up.dtype)
        down_bias = _cast(module.down_proj_bias, up.dtype)
    return ExpertsWeights(up, down, up_bias, down_bias, activation, getattr(module, "is_transposed", False))


def compute_experts(
    weights: ExpertsWeights,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_lora: Sequence[LoraWeights] = (),
    down_lora: Sequence[LoraWeights] = (),
    recompute: bool = False,
) -> Tensor:
    """The output of an experts module, like hidden_states (…, H), for top_k_index and top_k_weights (…, K).

    Products are in the dtype of the weights unless autocast is on, as in Transformers' ``grouped_mm``.
    """
    up, down, up_bias, down_bias, activation, transposed = weights
    shape, dtype = hidden_states.shape, hidden_states.dtype
    is_flat = hidden_states.dim() == 2
    if not is_flat:
        hidden_states = hidden_states.reshape(-1, shape[-1])
        top_k_index = top_k_index.reshape(-1, top_k_index.shape[-1])
        top_k_weights = top_k_weights.reshape(-1, top_k_weights.shape[-1])
    if dtype is not up.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
        hidden_states = _cast(hidden_states, up.dtype)
    y = moe_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        up,
        down,
        gate_up_bias=up_bias,
        down_bias=down_bias,
        activation=activation.activation,
        gated=activation.gated,
        interleaved=activation.interleaved,
        transposed=transposed,
        swiglu_alpha=activation.alpha,
        swiglu_limit=activation.limit,
        gate_up_lora=gate_up_lora,
        down_lora=down_lora,
        recompute=recompute,
    )
    y = _cast(y, dtype)
    return y if is_flat else y.view(shape)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module of Transformers, as ``ALL_EXPERTS_FUNCTIONS`` calls it.

    It serves every class under ``use_experts_implementation`` whose layout the kernel knows: gated or not, with biases,
    transposed or interleaved weights, and gates of its own. 4-bit weights that this package attached count as well.

    Args:
        self: the experts module; its flags and weights are read, and nothing of it is changed.
        hidden_states: (…, H), floating point.
        top_k_index: (…, K), the experts of each token. An id outside [0, E) means an expert that is not held here.
        top_k_weights: (…, K), their weights.

    Returns:
        The weighted sum of the experts' outputs, in the shape and dtype of ``hidden_states``. It is differentiable in
        hidden_states, top_k_weights and dense weights and biases.

    Raises:
        NotImplementedError: the kernel cannot compute this module. The message says why.
    """
    weights = read_experts(self)
    if isinstance(weights, str):
        raise NotImplementedError(
            f"{type(self).__name__} has a layout that this kernel does not compute: {weights}. Use another experts "
            'implementation, such as "grouped_mm"'
        )
    return compute_experts(weights, hidden_states, top_k_index, top_k_weights)
