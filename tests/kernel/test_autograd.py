"""The autograd formulas and the custom ops: float64 gradcheck, opcheck, torch.compile, and no second order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernel.cases import ExpertsCase, gradients, make_inputs, plain_gate, run_experts, seeded
from tests.kernel.machine import DEVICE, ON_GPU, kernel, module
from tests.kernel.packed_cases import ONE, PackedCase, decoding, make_packed_inputs

# float64 runs in plain torch, on a CPU: the formulas are those of the kernels.
on_cpu = pytest.mark.skipif(
    ON_GPU, reason="the formulas are checked in float64, which the GPU kernels do not compute in"
)

SMALL = ExpertsCase("small", "", tokens=4, top_k=2, experts=3, hidden=5, intermediate=3)
FORMULAS = [
    *(replace(SMALL, id=name, activation=name) for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2")),
    *(replace(SMALL, id=f"{name}-no-gate", activation=name, gated=False) for name in ("silu", "gelu", "gelu_tanh")),
    *(replace(SMALL, id=f"{name}-no-gate", activation=name, gated=False, bias=True) for name in ("relu", "relu2")),
    replace(SMALL, id="bias", bias=True),
    replace(SMALL, id="interleaved", interleaved=True),
    replace(SMALL, id="transposed", transposed=True),
    replace(SMALL, id="gpt-oss", activation="swiglu_oai", interleaved=True, transposed=True, bias=True),
    replace(SMALL, id="not-mine", index="partly mine", bias=True),
    replace(SMALL, id="repeated", index="repeated"),
    replace(SMALL, id="top-all", top_k=3),
]


def experts_of(case: ExpertsCase, **options: object) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """``moe_experts`` as a function of its differentiable tensors, and those in float64."""
    inputs = make_inputs(case, torch.float64)
    names = list(inputs.tensors)

    def function(*tensors: Tensor) -> Tensor:
        return run_experts(case, replace(inputs, tensors=dict(zip(names, tensors, strict=True))), **options)

    return function, tuple(inputs.tensors.values())


@on_cpu
@pytest.mark.parametrize("case", FORMULAS, ids=lambda case: case.id)
def test_experts_gradcheck(case: ExpertsCase) -> None:
    assert torch.autograd.gradcheck(*experts_of(case))


@on_cpu
@pytest.mark.parametrize("case", [SMALL, FORMULAS[-4], FORMULAS[-3]], ids=lambda case: case.id)
def test_experts_gradcheck_with_a_gate_function(case: ExpertsCase) -> None:
    function, tensors = experts_of(case, activation=lambda gate_up: plain_gate(gate_up, case))
    assert torch.autograd.gradcheck(function, tensors)


LINEAR_SIZES = {"plain": (2, 0, 3), "one-expert": (4,), "no-rows": (0, 0)}


def linear_arguments(
    sizes: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rng = seeded(f"linear {sizes}")

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()

    m_sizes = torch.tensor(sizes, device=DEVICE)
    biases = leaf(len(sizes), 4) if bias else None
    return leaf(sum(sizes), 3), leaf(len(sizes), 4, 3), m_sizes, biases


@on_cpu
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("sizes", LINEAR_SIZES.values(), ids=LINEAR_SIZES)
def test_linear_gradcheck(sizes: tuple[int, ...], bias: bool) -> None:
    rows, weight, m_sizes, biases = linear_arguments(sizes, bias, torch.float64)
    leaves = (rows, weight) if biases is None else (rows, weight, biases)
    assert torch.autograd.gradcheck(lambda x, w, b=None: kernel.moe_fused_linear(x, w, m_sizes, b), leaves)


# ------------------------------------------------------------------------------------------------------------- opcheck


@dataclass(frozen=True)
class OperatorCase:
    """One call of a custom operator: ``operator`` as the kernel defines it, and the record of its arguments."""

    operator: Any
    arguments: Any

    @property
    def flat(self) -> tuple[Any, ...]:
        return tuple(module("ops.schema").flatten(self.arguments))

    def results(self) -> Any:
        """The operator's results without gradients, as a record where it has several."""
        with torch.no_grad():
            output = self.operator.op(*self.flat)
        return output if self.operator.results is None else self.operator.results.unflatten(output)


def detached(record: Any) -> Any:
    """``record`` with all of its tensors detached, those in its records as well."""
    values = (
        detached(value) if isinstance(value, tuple) else value.detach() if isinstance(value, Tensor) else value
        for value in record
    )
    return record._make(values)


def experts_cases() -> dict[str, OperatorCase]:
    """The experts and their backward, called as a model would; in fp32, which the kernels serve everywhere."""
    ops, arguments = module("ops.experts"), module("ops.arguments")
    forward, backward = ops.experts_operator, ops.experts_backward_operator
    case = replace(SMALL, bias=True, index="partly mine")
    inputs = make_inputs(case, torch.float32)
    t = inputs.tensors
    plain = ops.Experts(
        hidden_states=t["hidden_states"],
        top_k_weights=t["top_k_weights"],
        up=arguments.StackArguments(t["gate_up_proj"], [], "", False),
        down=arguments.StackArguments(t["down_proj"], [], "", False),
        gate_up_bias=t["gate_up_bias"],
        down_bias=t["down_bias"],
        up_lora=arguments.NO_LORA,
        down_lora=arguments.NO_LORA,
        gate=module("activations").Gate("silu"),
        recompute=False,
    )
    # Those of the up projection are separate. They are in fp64: gradients have the dtype of the factors.
    up_a, up_b, down_a, down_b = (
        torch.randn(shape, device=DEVICE, dtype=torch.float64).requires_grad_()
        for shape in ((3, 4, 5), (3, 6, 2), (3, 2, 3), (3, 5, 2))
    )
    adapted = plain._replace(
        up_lora=arguments.LoraArguments(up_a, up_b, 0.5), down_lora=arguments.LoraArguments(down_a, down_b, 2.0)
    )
    remade = adapted._replace(recompute=True)
    up4, down4 = (
        kernel.Packed4bitWeights.quantize(torch.randn(3, *shape, device=DEVICE), projections=projections)
        for shape, projections in (((64, 4), 1), ((4, 32), 1))
    )
    packed = plain._replace(
        hidden_states=torch.randn(case.tokens, 4, device=DEVICE).requires_grad_(),
        up=arguments.StackArguments(*module("weights").operands(up4), False),
        down=arguments.StackArguments(*module("weights").operands(down4), False),
        gate_up_bias=None,
        down_bias=None,
    )

    def of_forward(experts: Any, index: Tensor = inputs.index, save: bool = True) -> OperatorCase:
        return OperatorCase(forward, ops.ExpertsForward(experts, index, save))

    def of_backward(experts: Any, **needs: bool) -> OperatorCase:
        y, made = detached(of_forward(experts).results())
        kept = ops.Kept(detached(experts), made)
        return OperatorCase(backward, ops.ExpertsBackward(y, kept, ops.ExpertsNeeds(**needs)))

    every = dict.fromkeys(ops.ExpertsNeeds._fields, True)
    without_factors = {name: "_lora_" not in name for name in every}
    frozen = detached(plain)._replace(gate_up_bias=None, down_bias=None)
    return {
        "experts, partly mine": of_forward(plain),
        "experts": of_forward(plain, inputs.index % 3),
        "experts, inference": of_forward(frozen, save=False),
        "experts, adapted": of_forward(adapted),
        "experts, adapted, recompute": of_forward(remade),
        "experts backward": of_backward(plain, **without_factors),
        "experts backward, some": of_backward(plain, hidden_states=True, down_weight=True),
        "experts backward, adapted": of_backward(adapted, **every),
        "experts backward, factors": of_backward(remade, up_lora_a=True, down_lora_b=True),
        "experts, packed": of_forward(packed),
        "experts backward, packed": of_backward(packed, hidden_states=True, top_k_weights=True),
    }


def linear_cases() -> dict[str, OperatorCase]:
    """The grouped linear layer and its backward."""
    ops, arguments, permute = (module(f"ops.{name}") for name in ("linear", "arguments", "permute"))
    forward, backward = ops.linear_operator, ops.linear_backward_operator
    rows, weight, m_sizes, bias = linear_arguments((2, 0, 3), True, torch.float32)
    lora_a = torch.randn((3, 2, 3), device=DEVICE, dtype=torch.float64).requires_grad_()
    lora_b = torch.randn((3, 4, 2), device=DEVICE).requires_grad_()
    sorting = OperatorCase(
        permute.route_sorted_operator, permute.RouteSortedArguments(m_sizes, 5, torch.float32, False)
    )
    plain = ops.Linear(
        stack=arguments.StackArguments(weight, [], "", False),
        lora=arguments.NO_LORA,
        rows=ops.Rows(buffer=sorting.results(), sorted_rows=True, packed=False, top_k=1, fill=0.0),
    )
    adapted = plain._replace(lora=arguments.LoraArguments(lora_a, lora_b, 0.5))

    def of_backward(linear: Any, **needs: bool) -> OperatorCase:
        kept = ops.Kept(rows.detach(), detached(linear))
        grad = torch.ones(5, 4, device=DEVICE)
        return OperatorCase(backward, ops.LinearBackward(grad, kept, ops.LinearNeeds(**needs)))

    return {
        "route sorted": sorting,
        "linear": OperatorCase(forward, ops.LinearForward(rows, plain, bias)),
        "linear, no bias": OperatorCase(forward, ops.LinearForward(rows, plain)),
        "linear, adapted": OperatorCase(forward, ops.LinearForward(rows, adapted, bias)),
        "linear backward": of_backward(plain, input=True, weight=True, bias=True),
        "linear backward, input": of_backward(plain, input=True),
        "linear backward, adapted": of_backward(adapted, **dict.fromkeys(ops.LinearNeeds._fields, True)),
    }


def permute_cases() -> dict[str, OperatorCase]:
    """Routing, and the ways to rows in expert order and back."""
    ops = module("ops.permute")
    inputs = make_inputs(replace(SMALL, index="partly mine"), torch.float32)
    x, weights = inputs.tensors["hidden_states"], inputs.tensors["top_k_weights"]
    routing = OperatorCase(ops.route_operator, ops.RouteArguments(inputs.index, 3, torch.float32, False))
    slots = ops.Slots(buffer=routing.results(), num_experts=3, top_k=2)
    z = torch.randn(8, 5, device=DEVICE).requires_grad_()
    return {
        "route": routing,
        "dispatch": OperatorCase(ops.dispatch_operator, ops.DispatchArguments(x, slots)),
        "combine": OperatorCase(ops.combine_operator, ops.CombineArguments(z, weights, slots)),
        "combine, no weights": OperatorCase(ops.combine_operator, ops.CombineArguments(z, None, slots)),
        "combine backward": OperatorCase(
            ops.combine_backward_operator, ops.CombineBackward(x.detach(), z.detach(), weights.detach(), slots)
        ),
    }


def few_rows_cases() -> dict[str, OperatorCase]:
    """Linear layers over two 4-bit matrices, one of which has a bias."""
    ops, weights = module("ops.few_rows"), module("weights")
    matrices = [
        weights.operands(
            kernel.Packed4bitWeights.quantize(torch.randn(1, out, 64, device=DEVICE), quant_type=quant_type)
        )
        for out, quant_type in ((6, "nf4"), (3, "fp4"))
    ]
    bytes_of, scales, formats = zip(*matrices, strict=True)
    arguments = ops.FewRowsArguments(
        input=torch.randn(5, 64, device=DEVICE),
        packed=list(bytes_of),
        scales=[scale for each in scales for scale in each],
        formats=ops.SEPARATOR.join(formats),
        biases=[torch.randn(6, device=DEVICE), torch.empty(0, device=DEVICE)],
    )
    return {"few rows": OperatorCase(ops.few_rows_operator, arguments)}


@functools.cache
def operators() -> dict[str, OperatorCase]:
    """All cases. Making them runs kernels, and a GPU compiles these, so it is not done while tests are collected."""
    return {**experts_cases(), **linear_cases(), **permute_cases(), **few_rows_cases()}


OPERATORS = [
    "experts, partly mine", "experts", "experts, inference", "experts, adapted", "experts, adapted, recompute",
    "experts backward", "experts backward, some", "experts backward, adapted", "experts backward, factors",
    "experts, packed", "experts backward, packed", "route sorted", "linear", "linear, no bias", "linear, adapted",
    "linear backward", "linear backward, input", "linear backward, adapted", "route", "dispatch", "combine",
    "combine, no weights", "combine backward", "few rows",
]  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    case = operators()[name]
    torch.library.opcheck(case.operator.op, case.flat)


def test_every_operator_is_checked() -> None:
    assert list(operators()) == OPERATORS
    names = {case.operator.name for case in operators().values()}
    prefix = f"{kernel._ops._OPS_NAME}::"
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)]
    assert names == {name.removeprefix(prefix) for name in registered}


# ------------------------------------------------------------------------------------------------------- torch.compile

COMPILED = [
    replace(SMALL, id="fused", hidden=8, intermediate=6, index="partly mine"),
    replace(SMALL, id="gpt-oss", activation="swiglu_oai", interleaved=True, transposed=True, bias=True),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def same_when_compiled(
    function: Callable[..., Tensor], leaves: list[Tensor], *rest: object, dynamic: bool = False
) -> None:
    """Forward and every gradient, compiled without graph breaks, equal eager bit by bit."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for call in (function, compiled):
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        y = call(*copies, *rest)
        y.backward(torch.ones_like(y))
        results.append([y.detach(), *(copy.grad for copy in copies)])
    for eager, other in zip(*results, strict=True):
        assert torch.equal(eager, other)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("gate_function", [False, True], ids=["named", "gate-function"])
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.id)
def test_compiled_experts(case: ExpertsCase, gate_function: bool, dynamic: bool) -> None:
    inputs = make_inputs(case, torch.float32)
    names = list(inputs.tensors)
    options = {"activation": lambda gate_up: plain_gate(gate_up, case)} if gate_function else {}

    def function(*tensors: Tensor) -> Tensor:
        *leaves, index = tensors
        t = dict(zip(names, leaves, strict=True))
        x, weights, up, down = (t.pop(n) for n in ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj"))
        return kernel.moe_experts(x, index, weights, up, down, **t, **{**case.options(), **options})

    same_when_compiled(function, list(inputs.tensors.values()), inputs.index, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_linear(dynamic: bool) -> None:
    rows, weight, m_sizes, bias = linear_arguments((2, 0, 3), True, torch.float32)

    def function(rows: Tensor, weight: Tensor, bias: Tensor, m_sizes: Tensor) -> Tensor:
        return kernel.moe_fused_linear(rows, weight, m_sizes, bias)

    same_when_compiled(function, [rows, weight, bias], m_sizes, dynamic=dynamic)


@pytest.mark.parametrize(
    "in_gemm, gate_function, dynamic",
    [(True, False, False), (False, False, True), (True, True, False)],
    ids=["decoded", "parts-dynamic", "gate-function"],
)
def test_compiled_packed_experts(in_gemm: bool, gate_function: bool, dynamic: bool) -> None:
    """With weights as an experts module owns them, of which the compiler sees the parameters."""
    case = PackedCase("compiled", "", tokens=4, experts=3, hidden=64, intermediate=64, projections=2)
    inputs = make_packed_inputs(case, torch.float32)
    experts = torch.nn.Module()
    for name, weights in inputs.packed.items():
        kernel.modules.attach(weights, experts, name)
    options = {"activation": lambda gate_up: plain_gate(gate_up, case)} if gate_function else {}

    def function(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        up, down = (kernel.modules.weights_of(experts, name) for name in ("gate_up_proj", "down_proj"))
        return kernel.moe_experts(x, index, weights, up, down, **options)

    leaves = [inputs.inputs.tensors[name] for name in ("hidden_states", "top_k_weights")]
    with decoding(in_gemm, ONE):
        same_when_compiled(function, leaves, inputs.inputs.index, dynamic=dynamic)


def test_compiled_packed_linear() -> None:
    weight = kernel.Packed4bitWeights.quantize(torch.randn(3, 24, 64, device=DEVICE))
    rows = torch.randn(5, 64, device=DEVICE)

    def function(rows: Tensor, m_sizes: Tensor) -> Tensor:
        return kernel.moe_fused_linear_4bit(rows, weight, m_sizes)

    same_when_compiled(function, [rows], torch.tensor([2, 0, 3], device=DEVICE))


def test_a_change_of_tokens_does_not_recompile_dynamic_shapes() -> None:
    """One graph serves every number of tokens: nothing in it depends on how they are routed."""
    # No number of tokens equals another size, or dynamo takes the two for one.
    case = replace(SMALL, tokens=9, hidden=8, intermediate=5)
    inputs = make_inputs(case, torch.float32)
    t = inputs.tensors
    graphs = CompileCounterWithBackend("aot_eager")

    def function(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return kernel.moe_experts(x, index, weights, t["gate_up_proj"], t["down_proj"])

    compiled = torch.compile(function, fullgraph=True, backend=graphs, dynamic=True)
    compilations = []
    for tokens in (9, 7, 6):
        # Clones: a view's base is guarded as well.
        x, weights = t["hidden_states"][:tokens].clone(), t["top_k_weights"][:tokens].clone()
        arguments = (x, inputs.index[:tokens].clone(), weights)
        assert torch.equal(compiled(*arguments), function(*arguments))
        compilations.append(graphs.frame_count)
    assert compilations[0] > 0
    assert compilations == [compilations[0]] * 3


# -------------------------------------------------------------------------------------------------------- second order


def test_second_order_gradients_of_experts_are_refused() -> None:
    """Also where only saved tensors lead to them, which torch's own once_differentiable lets pass as zeros."""
    inputs = make_inputs(SMALL, torch.float32)
    x = inputs.tensors["hidden_states"]
    with pytest.raises(RuntimeError, match="experts has no second derivative"):
        torch.autograd.grad(run_experts(SMALL, inputs).sum(), x, create_graph=True)


def test_second_order_gradients_of_the_linear_layer_are_refused() -> None:
    rows, weight, m_sizes, _ = linear_arguments((2, 0, 3), False, torch.float32)
    y = kernel.moe_fused_linear(rows, weight, m_sizes)
    with pytest.raises(RuntimeError, match="grouped_linear has no second derivative"):
        torch.autograd.grad(y.square().sum(), rows, create_graph=True)


def test_forward_mode_is_refused() -> None:
    """The implementation would drop the tangents without a word."""
    rows, weight, m_sizes, _ = linear_arguments((2, 0, 3), False, torch.float32)
    rows, weight = rows.detach(), weight.detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rows, torch.ones_like(rows))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward mode"):
            kernel.moe_fused_linear(dual, weight, m_sizes)


def test_a_frozen_weight_keeps_no_activations() -> None:
    """As in adapter training: what only the weight's gradient reads is not saved."""
    rows, weight, m_sizes, _ = linear_arguments((2, 0, 3), False, torch.float32)
    for frozen in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            kernel.moe_fused_linear(rows, weight.detach() if frozen else weight, m_sizes)
        assert any(t.data_ptr() == rows.data_ptr() for t in saved) is not frozen


def test_fake_and_meta_tensors_take_the_operator() -> None:
    rows, weight, m_sizes, _ = linear_arguments((2, 0, 3), False, torch.float32)
    meta = kernel.moe_fused_linear(rows.detach().to("meta"), weight.detach().to("meta"), m_sizes.to("meta"))
    assert (meta.shape, meta.device.type) == ((5, weight.shape[1]), "meta")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t.detach()) for t in (rows, weight, m_sizes)]
        assert kernel.moe_fused_linear(*fake).shape == (5, weight.shape[1])


def test_gradients_accumulate_over_two_calls() -> None:
    """One set of weights called twice in a graph, as under gradient accumulation or weight sharing."""
    inputs, twice = make_inputs(SMALL, torch.float32), make_inputs(SMALL, torch.float32)
    once = gradients(run_experts(SMALL, inputs), inputs)
    both = run_experts(SMALL, twice) + run_experts(SMALL, twice)
    for name, value in gradients(both, twice).items():
        assert torch.equal(value, 2 * once[name]), name
