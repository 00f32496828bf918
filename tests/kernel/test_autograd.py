"""The autograd formulas and the custom ops: float64 gradcheck, opcheck, torch.compile, and no second order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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


def operators() -> dict[str, tuple[object, tuple]]:
    """Every custom op with arguments a model would call it with; in fp32, which the kernels serve everywhere."""
    experts, linear, permute = (module(name) for name in ("experts", "linear", "permute"))
    case = replace(SMALL, bias=True, index="partly mine")
    inputs = make_inputs(case, torch.float32)
    t = inputs.tensors
    order = ("top_k_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    weights, up, down, up_bias, down_bias = (t[name] for name in order)
    x = t["hidden_states"]
    # Of the up projection separate ones. In fp64: gradients have the dtype of the factors.
    factors = tuple(
        torch.randn(shape, device=DEVICE, dtype=torch.float64).requires_grad_()
        for shape in ((3, 4, 5), (3, 6, 2), (3, 2, 3), (3, 5, 2))
    )
    no_factors = (None,) * 4
    gate = ("silu", True, False, 1.702, 7.0, False)
    options = (*gate, "", "", 0.5, 2.0, False)
    recompute = (*options[:-1], True)
    dense = ([], [])
    up4, down4 = (
        kernel.Packed4bitWeights.quantize(torch.randn(3, *shape, device=DEVICE), projections=projections)
        for shape, projections in (((64, 4), 1), ((4, 32), 1))
    )
    (up_bytes, up_scales, up_format), (down_bytes, down_scales, down_format) = map(
        module("weights").operands, (up4, down4)
    )
    x4 = torch.randn(case.tokens, 4, device=DEVICE).requires_grad_()
    packed = (up_bytes, down_bytes, None, None, *no_factors, up_scales, down_scales)
    packed_options = (*gate, up_format, down_format, 1.0, 1.0, False)
    rows, weight, m_sizes, bias = linear_arguments((2, 0, 3), True, torch.float32)
    lora_a = torch.randn((3, 2, 3), device=DEVICE, dtype=torch.float64).requires_grad_()
    lora_b = torch.randn((3, 4, 2), device=DEVICE).requires_grad_()
    tensors = (x, inputs.index, weights, up, down, up_bias, down_bias)
    frozen = (x.detach(), weights.detach(), up.detach(), down.detach(), up_bias.detach(), down_bias.detach())
    frozen_factors = tuple(factor.detach() for factor in factors)
    with torch.no_grad():
        y, *saved = experts.experts_op(*tensors, *no_factors, *dense, *options, True)
        _, *adapted = experts.experts_op(*tensors, *factors, *dense, *options, True)
        _, *remade = experts.experts_op(*tensors, *factors, *dense, *recompute, True)
        sorted_buffer = permute.route_sorted_op(m_sizes, 5, torch.float32, False)
        y4, *saved4 = experts.experts_op(x4, inputs.index, weights, *packed, *packed_options, True)
    grad = y.detach()
    buffer = saved[1]
    z = torch.randn(8, 5, device=DEVICE).requires_grad_()
    without = (*frozen, *no_factors, *saved, *dense)
    frozen4 = (x4.detach(), weights.detach(), up_bytes, down_bytes, None, None, *no_factors, *saved4)
    out = torch.ones(5, 4, device=DEVICE)
    sorted_rows = ([], "", False, True, False, 1, 0.0, 0.5)
    linear_backward = (out, rows.detach(), weight.detach(), None, None, sorted_buffer, *sorted_rows)
    linear_adapted = (*linear_backward[:3], lora_a.detach(), lora_b.detach(), *linear_backward[5:])
    backward = experts.experts_backward_op
    return {
        "experts, partly mine": (experts.experts_op, (*tensors, *no_factors, *dense, *options, True)),
        "experts": (
            experts.experts_op,
            (x, inputs.index % 3, weights, up, down, up_bias, down_bias, *no_factors, *dense, *options, True),
        ),
        "experts, inference": (
            experts.experts_op,
            (*(v.detach() for v in tensors[:5]), None, None, *no_factors, *dense, *options, False),
        ),
        "experts, adapted": (experts.experts_op, (*tensors, *factors, *dense, *options, True)),
        "experts, adapted, recompute": (experts.experts_op, (*tensors, *factors, *dense, *recompute, True)),
        "experts backward": (backward, (grad, *without, *options, [True] * 6 + [False] * 4)),
        "experts backward, some": (
            backward,
            (grad, *without, *options, [True, False, False, True, False, False, *[False] * 4]),
        ),
        "experts backward, adapted": (
            backward,
            (grad, *frozen, *frozen_factors, *adapted, *dense, *options, [True] * 10),
        ),
        "experts backward, factors": (
            backward,
            (grad, *frozen, *frozen_factors, *remade, *dense, *recompute, [False] * 6 + [True, False, False, True]),
        ),
        "linear": (linear.grouped_linear_op, (rows, weight, bias, None, None, sorted_buffer, *sorted_rows)),
        "linear, no bias": (linear.grouped_linear_op, (rows, weight, None, None, None, sorted_buffer, *sorted_rows)),
        "linear, adapted": (
            linear.grouped_linear_op,
            (rows, weight, bias, lora_a, lora_b, sorted_buffer, *sorted_rows),
        ),
        "linear backward": (
            linear.grouped_linear_backward_op,
            (*linear_backward, [True, True, True, False, False]),
        ),
        "linear backward, input": (
            linear.grouped_linear_backward_op,
            (*linear_backward, [True, False, False, False, False]),
        ),
        "linear backward, adapted": (linear.grouped_linear_backward_op, (*linear_adapted, [True] * 5)),
        "dispatch": (permute.dispatch_op, (x, buffer, 3, 2)),
        "combine": (permute.combine_op, (z, weights, buffer, 3, 2)),
        "combine, no weights": (permute.combine_op, (z, None, buffer, 3, 2)),
        "combine backward": (permute.combine_backward_op, (x.detach(), z.detach(), weights.detach(), buffer, 3, 2)),
        "route": (permute.route_op, (inputs.index, 3, torch.float32, False)),
        "route sorted": (permute.route_sorted_op, (m_sizes, 5, torch.float32, False)),
        "experts, packed": (experts.experts_op, (x4, inputs.index, weights, *packed, *packed_options, True)),
        "experts backward, packed": (
            backward,
            (y4.detach(), *frozen4, up_scales, down_scales, *packed_options, [True, True, *[False] * 8]),
        ),
    }


OPERATORS = operators()


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    op, arguments = OPERATORS[name]
    torch.library.opcheck(op, arguments)


def test_every_operator_is_checked() -> None:
    names = {op._name.split("::")[-1] for op, _ in OPERATORS.values()}
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
        weights.attach(experts, name)
    options = {"activation": lambda gate_up: plain_gate(gate_up, case)} if gate_function else {}

    def function(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        up, down = (kernel.Packed4bitWeights.of_module(experts, name) for name in ("gate_up_proj", "down_proj"))
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
