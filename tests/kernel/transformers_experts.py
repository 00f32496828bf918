"""What Transformers' decorator gives a class of experts, for tests that run without Transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def default_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


# The kernel knows the gate by where it is defined.
default_gate.__module__, default_gate.__qualname__ = "transformers.integrations.moe", "_default_apply_gate"


def interface_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    raise AssertionError("a layer takes the place of this forward")


# The kernel knows the forward by the file of its code, and by what functools.wraps leaves.
interface_forward.__wrapped__ = interface_forward  # type: ignore[attr-defined]
interface_forward.__code__ = interface_forward.__code__.replace(co_filename="/lib/transformers/integrations/moe.py")
