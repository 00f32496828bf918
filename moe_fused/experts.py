"""The experts implementation ``"moe_fused"`` of Transformers.

Transformers' experts modules are containers of stacked weights with flags that say how they are laid out. This module
translates the flags into the arguments of the kernel's ``moe_experts``. It keeps nothing on or about the modules, so
they copy, pickle, shard and wrap as if it were not there, and reads each weight once per call: on a parametrized module
(PEFT, bitsandbytes) reading is what computes it.

A module that cannot be served keeps its own implementation, and a warning says why, once for its class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

if TYPE_CHECKING:
    from qwen3_moe_fused.lora import LoraWeights

IMPLEMENTATION = "moe_fused"

# An experts module of Transformers; its flags and weights are attributes that nn.Module's type does not know.
Experts: TypeAlias = Any
ExpertsForward: TypeAlias = Callable[[Experts, Tensor, Tensor, Tensor], Tensor]
Loras: TypeAlias = "Sequence[LoraWeights]"

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_FORMATS = tuple(f"{name}_format" for name in _PROJECTIONS)
# Of packed weights, beside the packed bytes, which have the name of the dense ones.
_COMPANIONS = ("absmax", "nested_absmax", "nested_offset")
_PARAMETERS = frozenset(
    name for p in _PROJECTIONS for name in (p, f"{p}_bias", *(f"{p}_{companion}" for companion in _COMPANIONS))
)
# torch.nn.utils.parametrize moves the parameters that it computes into a module of that name.
_MODULES = frozenset({"act_fn", "parametrizations"})
# Other subclasses (quantized, distributed) need not mean what their shape says. torch.export traces with FakeTensor.
_TENSORS = frozenset({Tensor, nn.Parameter, FakeTensor})
_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})

# Classes whose gate equals the kernel's "swiglu_oai": their model, the attributes that hold alpha and limit, and whether
# gate and up features alternate. By class, for torch 2.11 cannot trace the name of a function.
_SWIGLU_OAI = {
    "GptOssExperts": ("gpt_oss", "alpha", "limit", True),
    "OpenAIPrivacyFilterExperts": ("openai_privacy_filter", "alpha", "limit", False),
    "MiniMaxM3VLExperts": ("minimax_m3_vl", "swiglu_alpha", "swiglu_limit", False),
}

# Transformers' activations are modules, which the kernel knows by their class, but for the odd function.
_FUNCTIONS = {functional.silu: "silu", functional.relu: "relu"}


class Gate(NamedTuple):
    """What happens between a module's projections, as ``moe_experts`` takes it."""

    activation: str | Callable[[Tensor], Tensor]
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0


def gate_of(module: Experts, activation_of: Callable[[object], str | None]) -> Gate:
    """The kernel's gate that equals the module's own, or the module's own as a function if there is none.

    Args:
        activation_of: from a module's ``act_fn`` to the kernel's name for it, or None.
    """
    gated = getattr(module, "has_gate", True)
    own = module._apply_gate if gated else module.act_fn
    function = getattr(own, "__func__", own)
    if not gated or function is _default_apply_gate:
        act_fn = module.act_fn
        return Gate(_FUNCTIONS.get(act_fn) or activation_of(act_fn) or own, gated)
    cls = type(module)
    model, alpha, limit, interleaved = _SWIGLU_OAI.get(cls.__name__, ("", "", "", False))
    if cls.__module__ != f"transformers.models.{model}.modeling_{model}" or function is not cls._apply_gate:
        return Gate(own)
    return Gate("swiglu_oai", True, interleaved, getattr(module, alpha), getattr(module, limit))


def is_packed(module: Experts) -> bool:
    """Whether ``module`` holds 4-bit weights."""
    own = vars(module)  # nn.Module takes its time to say what it has not
    return any(own.get(name) is not None for name in _FORMATS)


def layout_refusal(module: Experts) -> str | None:
    """Why ``moe_experts`` cannot compute what ``module`` does, judged by everything but its weights; None if it can."""
    if getattr(module, "has_post_expert_norm", False):
        return "it normalizes the output of each expert"
    if not getattr(module, "is_concatenated", True) and module._apply_gate.__func__ is _default_apply_gate:
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
    """Why ``moe_experts`` cannot multiply with these weights; None if it can."""
    for name, weight in (("up", up), ("down", down)):
        if type(weight) not in _TENSORS:
            return f"its {name} projection is a {type(weight).__name__}, not a plain tensor"
        if weight.dtype not in _DTYPES:
            return f"its {name} projection is of dtype {weight.dtype}"
    if up.dtype is not down.dtype:
        return f"its projections differ in dtype: up {up.dtype}, down {down.dtype}"
    if up.dtype is torch.float64 and up.device.type != "cpu":
        return "GPU kernels do not compute in float64"
    return None


def serves(module: Experts) -> bool:
    """Whether ``module`` is an experts module whose forward under ``"moe_fused"`` is the kernel's, and takes adapters."""
    if not hasattr(type(module), "_apply_gate") or layout_refusal(module) is not None:
        return False
    if is_packed(module):
        return True
    # Not the attributes, for reading those of a parametrized module computes them.
    up = module._parameters.get("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj")
    down = module._parameters.get("down_proj")
    return up is not None and down is not None and weights_refusal(up, down) is None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A no-op `to` takes longer than everything else here.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


_warned: set[str] = set()


@torch.compiler.assume_constant_result  # so that tracing runs it instead of breaking the graph
def _warn_once(class_name: str, reason: str) -> None:
    if class_name not in _warned:
        _warned.add(class_name)
        warnings.warn(f"{class_name} keeps its own implementation instead of {IMPLEMENTATION}: {reason}", stacklevel=2)


def _own_forward(module: Experts, reason: str) -> ExpertsForward:
    """The forward that ``module`` has without us; warns, once for each class."""
    _warn_once(type(module).__name__, reason)
    original = getattr(type(module).forward, "__wrapped__", None)
    # Transformers' grouped_mm knows the norm, and is what such a model gets by default.
    if original is None or getattr(module, "has_post_expert_norm", False):
        original = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return original


def implementation(kernel: ModuleType, recompute: bool = False) -> Callable[..., Tensor]:
    """The function that Transformers calls as the forward of an experts module, bound to the kernel module.

    Args:
        recompute: as ``moe_experts`` takes it.
    """
    moe_experts, activation_of = kernel.moe_experts, kernel.layers.activation_of
    packed_weights, of_module = kernel.Packed4bitWeights, kernel.Packed4bitWeights.of_module

    def refused(self: Experts, reason: str, adapted: bool) -> ExpertsForward:
        if adapted or is_packed(self):
            what = "adapters" if adapted else "4-bit weights"
            raise NotImplementedError(f"{type(self).__name__} with {what} has no other implementation: {reason}")
        return _own_forward(self, reason)

    def experts_forward(
        self: Experts,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        gate_up_lora: Loras = (),
        down_lora: Loras = (),
    ) -> Tensor:
        """The experts' output, like hidden_states (…, H), for top_k_index and top_k_weights (…, K).

        Adapters come from the wrappers that ``moe_fused.peft`` puts around the module, if ``serves`` says yes.
        """
        adapted = len(gate_up_lora) + len(down_lora) > 0  # not bool(): torch 2.11 does not compile that of a list
        reason = layout_refusal(self)
        if reason is not None:
            return refused(self, reason, adapted)(self, hidden_states, top_k_index, top_k_weights)
        gate = gate_of(self, activation_of)
        up = of_module(self, "gate_up_proj" if gate.gated else "up_proj")
        down = of_module(self, "down_proj")
        reason = None if isinstance(up, packed_weights) else weights_refusal(up, down)
        if reason is not None:
            return refused(self, reason, adapted)(self, hidden_states, top_k_index, top_k_weights)
        up_bias = down_bias = None
        if getattr(self, "has_bias", False):
            up_bias = _cast(self.gate_up_proj_bias if gate.gated else self.up_proj_bias, up.dtype)
            down_bias = _cast(self.down_proj_bias, up.dtype)
        shape, dtype = hidden_states.shape, hidden_states.dtype
        is_flat = hidden_states.dim() == 2
        if not is_flat:
            hidden_states = hidden_states.reshape(-1, shape[-1])
            top_k_index = top_k_index.reshape(-1, top_k_index.shape[-1])
            top_k_weights = top_k_weights.reshape(-1, top_k_weights.shape[-1])
        if dtype is not up.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = _cast(hidden_states, up.dtype)  # as Transformers' grouped_mm does
        y = moe_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            up,
            down,
            gate_up_bias=up_bias,
            down_bias=down_bias,
            activation=gate.activation,
            gated=gate.gated,
            interleaved=gate.interleaved,
            transposed=getattr(self, "is_transposed", False),
            swiglu_alpha=gate.alpha,
            swiglu_limit=gate.limit,
            gate_up_lora=gate_up_lora,
            down_lora=down_lora,
            recompute=recompute,
        )
        y = _cast(y, dtype)
        return y if is_flat else y.view(shape)

    experts_forward.recompute = recompute  # type: ignore[attr-defined]
    return experts_forward


def register(kernel: ModuleType, recompute: bool = False) -> None:
    """Registers ``"moe_fused"`` with Transformers; a second call changes nothing but ``recompute``."""
    if IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS and ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION].recompute is recompute:
        return
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, implementation(kernel, recompute))


def unregister() -> None:
    """Undoes ``register``; does nothing without one."""
    # The interface has no public way back: its ``del`` only removes the overrides of one instance.
    type(ALL_EXPERTS_FUNCTIONS)._global_mapping.pop(IMPLEMENTATION, None)
    _warned.clear()
