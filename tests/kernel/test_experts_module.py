"""``experts_forward``: what Transformers' experts modules compute, read from their flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernel.machine import DEVICE, kernel, module
from tests.kernel.transformers_experts import default_gate, interface_forward

TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 7, 4, 2, 24, 20
reader = module("experts_module")


def own_gate(self: Any, gate_up: Tensor) -> Tensor:
    return torch.sin(gate_up[..., ::2]) * gate_up[..., 1::2]


@dataclass(frozen=True)
class Flags:
    """An experts module by what makes it special."""

    id: str
    reason: str
    gate: bool = True
    bias: bool = False
    transposed: bool = False
    own_gate: bool = False
    act_fn: Any = nn.SiLU

    def module(self, dtype: torch.dtype = torch.float32) -> Any:
        """Experts with the attributes and flags that Transformers' decorator leaves."""
        members = {"_apply_gate": own_gate if self.own_gate else default_gate}
        experts: Any = type("SomeExperts", (nn.Module,), members)()
        torch.manual_seed(3)
        up = "gate_up_proj" if self.gate else "up_proj"
        width = INTERMEDIATE * (2 if self.gate else 1)
        shapes = {up: (EXPERTS, width, HIDDEN), "down_proj": (EXPERTS, HIDDEN, INTERMEDIATE)}
        for name, shape in shapes.items():
            weight = torch.randn(shape, device=DEVICE) * shape[2] ** -0.5
            weight = weight.mT.contiguous() if self.transposed else weight
            experts.register_parameter(name, nn.Parameter(weight.to(dtype)))
            if self.bias:
                bias = torch.randn(shape[:2], device=DEVICE).to(dtype)
                experts.register_parameter(f"{name}_bias", nn.Parameter(bias))
        experts.act_fn = self.act_fn()
        experts.has_gate, experts.has_bias, experts.is_transposed = self.gate, self.bias, self.transposed
        experts.is_concatenated = not self.own_gate
        return experts


CASES = (
    Flags("gated", "Qwen3-MoE and most others"),
    Flags("no gate", "Nemotron-H", gate=False, act_fn=nn.ReLU),
    Flags("bias", "gpt-oss has them", bias=True),
    Flags("no gate, bias", "the bias of another projection", gate=False, bias=True),
    Flags("transposed", "gpt-oss", transposed=True),
    Flags("transposed, bias", "both", transposed=True, bias=True),
    Flags("own gate", "a function that the kernel does not fuse, over alternating features", own_gate=True),
    Flags("own activation", "the default gate around an activation that the kernel does not know", act_fn=nn.Tanh),
)
BY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    x = torch.randn(TOKENS, HIDDEN, device=DEVICE).to(dtype)
    logits = torch.randn(TOKENS, EXPERTS, device=DEVICE)
    weights, index = logits.softmax(-1).topk(TOP_K, dim=-1)
    return x, index, weights


def by_hand(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The definition, token by token, in float64."""
    parameters = {name: value.double() for name, value in experts.named_parameters(recurse=False)}
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"

    def linear(value: Tensor, name: str, expert: Tensor) -> Tensor:
        weight = parameters[name][expert]
        y = value @ (weight if experts.is_transposed else weight.T)
        return y + parameters[f"{name}_bias"][expert] if experts.has_bias else y

    rows = []
    for t in range(len(x)):
        total = torch.zeros(HIDDEN, dtype=torch.float64, device=DEVICE)
        for k in range(TOP_K):
            h = linear(x[t].double(), up_name, index[t, k])
            h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
            total = total + weights[t, k].double() * linear(h, "down_proj", index[t, k])
        rows.append(total)
    return torch.stack(rows)


@BY_CASE
def test_equals_the_definition(case: Flags) -> None:
    experts, arguments = case.module(), inputs()
    arguments[0].requires_grad_()
    y = kernel.experts_forward(experts, *arguments)
    truth = by_hand(experts, *arguments)
    torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=torch.float64).view(y.shape)
    leaves = [arguments[0], *experts.parameters()]
    ours = torch.autograd.grad((y * weights).sum(), leaves)
    for gradient, expected in zip(ours, torch.autograd.grad((truth * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


@BY_CASE
def test_compiles_without_graph_breaks(case: Flags) -> None:
    torch._dynamo.reset()
    experts, arguments = case.module(), inputs()
    compiled = torch.compile(
        lambda *values: kernel.experts_forward(experts, *values), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*arguments), kernel.experts_forward(experts, *arguments))


def test_tokens_in_batches() -> None:
    experts, (x, index, weights) = CASES[0].module(), inputs()
    y = kernel.experts_forward(experts, x[None], index[None], weights[None])
    assert torch.equal(y[0], kernel.experts_forward(experts, x, index, weights))


def test_computes_in_the_dtype_of_the_weights() -> None:
    experts, (x, index, weights) = CASES[0].module(torch.float16), inputs()
    y = kernel.experts_forward(experts, x, index, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, kernel.experts_forward(experts, x.half(), index, weights).float())


@pytest.mark.parametrize("name", reader._SWIGLU_OAI)
def test_gates_of_transformers_that_the_kernel_fuses(name: str) -> None:
    """A class counts by its name, its module and a gate of its own. Any other class of that name keeps its gate."""
    model, alpha, limit, interleaved = reader._SWIGLU_OAI[name]
    home = f"transformers.models.{model}.modeling_{model}"
    experts = type(name, (nn.Module,), {"_apply_gate": own_gate, "__module__": home})()
    setattr(experts, alpha, 1.5)
    setattr(experts, limit, 0.5)
    found = reader.expert_activation(experts)
    assert found == ("swiglu_oai", True, interleaved, 1.5, 0.5)
    derived = type(name, (type(experts),), {"__module__": home})()
    elsewhere = type(name, (nn.Module,), {"_apply_gate": own_gate, "__module__": "mine"})()
    for other in (derived, elsewhere):
        assert reader.expert_activation(other).activation == other._apply_gate
    experts._apply_gate = gate = lambda gate_up: gate_up
    assert reader.expert_activation(experts).activation is gate


def test_classes_under_the_interface() -> None:
    """A class that derives from one and has a forward of its own computes something else."""
    members = {"_apply_gate": default_gate, "forward": interface_forward}
    decorated = type("Decorated", (nn.Module,), members)
    derived = type("Derived", (decorated,), {})
    own = type("Own", (decorated,), {"forward": lambda self, *args: args[0]})
    bare = type("Bare", (nn.Module,), {"forward": interface_forward})
    assert [reader.is_under_interface(cls) for cls in (decorated, derived, own, bare)] == [True, True, False, False]


def _norm(experts: Any) -> None:
    experts.has_post_expert_norm = True


def _alternating(experts: Any) -> None:
    experts.is_concatenated = False


def _parameter(experts: Any) -> None:
    experts.gain = nn.Parameter(torch.ones(1))


def _submodule(experts: Any) -> None:
    experts.norm = nn.LayerNorm(2)


def _buffer(experts: Any) -> None:
    experts.register_buffer("counts", torch.zeros(1))


def _dtypes(experts: Any) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.half())


def _integers(experts: Any) -> None:
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_norm, "it normalizes the output of each expert"),
        (_alternating, "gate and up features alternate, which its gate function does not expect"),
        (_parameter, "it has a parameter of unknown purpose, gain"),
        (_submodule, "it has a submodule of unknown purpose, norm"),
        (_buffer, "it has a buffer of unknown purpose, counts"),
        (_dtypes, r"its projections differ in dtype: up torch\.float32, down torch\.float16"),
        (_integers, r"its up projection has dtype torch\.int8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refusals(change: Any, reason: str) -> None:
    experts = CASES[0].module()
    assert reader.refusal(experts) is None
    change(experts)
    with pytest.raises(
        NotImplementedError, match=f"SomeExperts has a layout that this kernel does not compute: {reason}"
    ):
        kernel.experts_forward(experts, *inputs())
    assert reader.refusal(experts) is not None
    # Whoever wraps experts asks before the weights exist.
    del experts.down_proj
    assert reader.refusal(experts) is not None
