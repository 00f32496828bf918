"""The experts implementation ``"moe_fused"`` of Transformers: the forward that calls the kernel, and its registration.

The forward reads each weight once per call, because on a parametrized module (PEFT, bitsandbytes) reading a weight is
what computes it. A module that the kernel cannot compute keeps the forward of its class, and a warning, once for each
class, says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts_module import Experts, compute_experts, is_packed, read_experts

if TYPE_CHECKING:
    from qwen3_moe_fused import LoraWeights

IMPLEMENTATION = "moe_fused"
# The attribute of an experts module that holds its adapters while a forward runs that passes none on.
_ADAPTERS = "_moe_fused_adapters"

ExpertsForward: TypeAlias = Callable[[Experts, Tensor, Tensor, Tensor], Tensor]
Loras: TypeAlias = "Sequence[LoraWeights]"


_warned: set[str] = set()


@torch.compiler.assume_constant_result  # tracing then calls the function instead of breaking the graph
def _warn_once(class_name: str, reason: str) -> None:
    if class_name not in _warned:
        _warned.add(class_name)
        warnings.warn(f"{class_name} keeps its own implementation instead of {IMPLEMENTATION}: {reason}", stacklevel=2)


def _class_forward(module: Experts, reason: str) -> ExpertsForward:
    """Returns the forward that ``module`` has without this package, and warns once for each class."""
    _warn_once(type(module).__name__, reason)
    original = getattr(type(module).forward, "__wrapped__", None)
    # Transformers' grouped_mm applies the norm after the experts, and such a model gets grouped_mm by default.
    if original is None or getattr(module, "has_post_expert_norm", False):
        original = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return original


def implementation(recompute: bool = False) -> Callable[..., Tensor]:
    """Makes the function that Transformers calls as the forward of an experts module.

    Args:
        recompute: passed on to ``moe_experts``.
    """

    def refused(self: Experts, reason: str, adapted: bool) -> ExpertsForward:
        if adapted or is_packed(self):
            what = "adapters" if adapted else "4-bit weights"
            raise NotImplementedError(f"{type(self).__name__} with {what} has no other implementation: {reason}")
        return _class_forward(self, reason)

    def experts_forward(
        self: Experts,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        gate_up_lora: Loras = (),
        down_lora: Loras = (),
    ) -> Tensor:
        """The experts' output, like hidden_states (…, H), for top_k_index and top_k_weights (…, K).

        The adapters come from the wrappers that ``integrations.peft`` puts around modules that the kernel ``serves``.
        """
        if handed := vars(self).get(_ADAPTERS):
            gate_up_lora, down_lora = handed
        weights = read_experts(self)
        if isinstance(weights, str):
            adapted = len(gate_up_lora) + len(down_lora) > 0  # torch 2.11 does not compile bool() of a list
            return refused(self, weights, adapted)(self, hidden_states, top_k_index, top_k_weights)
        return compute_experts(
            weights, hidden_states, top_k_index, top_k_weights, gate_up_lora, down_lora, recompute=recompute
        )

    experts_forward.recompute = recompute  # type: ignore[attr-defined]
    return experts_forward


def with_adapters(
    module: Experts, arguments: Sequence[Tensor], gate_up_lora: Loras = (), down_lora: Loras = ()
) -> Tensor:
    """Calls an experts module with adapters, whatever arguments its forward takes.

    A plan of Transformers that sends tokens to their experts' process replaces the forward of ``module`` by one that takes
    no adapters and calls the former one.
    """
    module.__dict__[_ADAPTERS] = (gate_up_lora, down_lora)
    try:
        output: Tensor = module(*arguments)
    finally:
        del module.__dict__[_ADAPTERS]
    return output


def register(recompute: bool = False) -> None:
    """Registers ``"moe_fused"`` with Transformers; a second call changes nothing but ``recompute``."""
    if IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS and ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION].recompute is recompute:
        return
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, implementation(recompute))


def unregister() -> None:
    """Undoes ``register``, and does nothing if that was never called."""
    # The interface has no public way to remove an entry: its ``del`` only removes the overrides of one instance.
    type(ALL_EXPERTS_FUNCTIONS)._global_mapping.pop(IMPLEMENTATION, None)
    _warned.clear()
