"""The layers as ``kernels.kernelize`` uses them: their forwards, bound to modules of a model."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernel.accuracy import assert_accurate
from tests.kernel.cases import ExpertsCase, make_inputs, plain_experts, run_experts
from tests.kernel.machine import DEVICE, kernel, module
from tests.kernel.transformers_experts import default_gate, interface_forward

LAYERS = {
    name: layer
    for name, layer in vars(kernel.layers).items()
    if inspect.isclass(layer) and issubclass(layer, nn.Module)
}
CASE = ExpertsCase("layer", "", tokens=6, experts=4, top_k=2)

# The arguments of what each forward replaces: Transformers' experts and sparse block, layers of PEFT, grouped linear layers.
EXPERTS = ["self", "hidden_states", "top_k_index", "top_k_weights"]
SIGNATURES = {
    "MoeExperts": EXPERTS,
    "Qwen3MoeExperts": EXPERTS,
    "LoraMoeExperts": [*EXPERTS, "gate_up_lora", "down_lora", "adapter_names"],
    "LoraParamWrapper": ["self", "x", "args", "kwargs"],
    "Qwen3MoeSparseMoeBlock": ["self", "hidden_states"],
    "MoeFusedLinear": ["self", "input", "m_sizes"],
    "LoraMoeFusedLinear": ["self", "input", "m_sizes"],
}


def test_every_layer_is_known() -> None:
    assert set(LAYERS) == set(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_layers_are_pure(name: str) -> None:
    """``kernelize`` takes the forward alone: a layer with state, a constructor or other methods would lose them."""
    layer = LAYERS[name]
    assert layer.__bases__ == (nn.Module,)
    assert layer.has_backward is True
    assert layer.can_torch_compile is True
    members = {member for member in vars(layer) if not member.startswith("__")}
    assert members == {"forward", "has_backward", "can_torch_compile"}
    assert not {"__init__", "__getattr__", "__setattr__"} & set(vars(layer))
    assert set(layer.__annotations__).isdisjoint(members), "annotations must be bare"
    assert list(inspect.signature(layer.forward).parameters) == SIGNATURES[name]


class Experts(nn.Module):
    """As Transformers' module of that kind keeps its parameters."""

    _apply_gate, forward = default_gate, interface_forward

    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        inputs = make_inputs(CASE, torch.float32)
        self.gate_up_proj = nn.Parameter(inputs.tensors["gate_up_proj"].detach())
        self.down_proj = nn.Parameter(inputs.tensors["down_proj"].detach())
        self.act_fn = act_fn


class Router(nn.Module):
    """Returns logits, weights and ids; counts its calls by a hook, as output recorders do."""

    def __init__(self) -> None:
        super().__init__()
        inputs = make_inputs(CASE, torch.float32)
        self.index, self.weights = inputs.index, inputs.tensors["top_k_weights"].detach()
        self.seen: list[Tensor] = []
        self.register_forward_hook(lambda _module, _arguments, output: self.seen.append(output[0]))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return hidden_states[:, : CASE.experts], self.weights, self.index


class Block(nn.Module):
    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate = Router()
        self.experts = Experts(act_fn)


def bind(name: str, to: nn.Module) -> nn.Module:
    to.forward = types.MethodType(LAYERS[name].forward, to)
    return to


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", ["MoeExperts", "Qwen3MoeExperts"])
def test_experts(name: str) -> None:
    inputs = make_inputs(CASE, torch.float32)
    layer = bind(name, Experts(nn.SiLU()))
    t = inputs.tensors
    y = layer(t["hidden_states"], inputs.index, t["top_k_weights"])
    assert torch.equal(y, run_experts(CASE, inputs))
    y.backward(inputs.grad)
    assert layer.gate_up_proj.grad is not None
    assert layer.down_proj.grad is not None


@pytest.mark.kernels_ci
def test_block_calls_its_router() -> None:
    inputs = make_inputs(CASE, torch.float32)
    block = bind("Qwen3MoeSparseMoeBlock", Block(nn.SiLU()))
    batched = inputs.tensors["hidden_states"].view(2, 3, -1)
    y = block(batched)
    assert y.shape == batched.shape
    assert torch.equal(y.view(6, -1), run_experts(CASE, inputs))
    (logits,) = block.gate.seen
    assert logits.shape == (6, CASE.experts)
    y.backward(torch.ones_like(y))
    assert block.experts.gate_up_proj.grad is not None


@pytest.mark.kernels_ci
def test_linear() -> None:
    layer = bind("MoeFusedLinear", nn.Module())
    layer.weight = nn.Parameter(torch.randn(3, 5, 4, device=DEVICE))
    rows, sizes = torch.randn(6, 4, device=DEVICE), torch.tensor([1, 0, 5], device=DEVICE)
    y = layer(rows, sizes)
    assert torch.equal(y, kernel.moe_fused_linear(rows, layer.weight, sizes))
    y.sum().backward()
    assert layer.weight.grad is not None


class Factor(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, device=DEVICE))


class LoraLinear(nn.Module):
    """The attributes of PEFT's layer of that kind over a grouped linear layer (3, 5, 4), with two adapters."""

    def __init__(self, base: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_layer = Factor(3, 5, 4) if base is None else base
        out_features, in_features = (5, 4) if base is None else (32, 64)
        ranks = {"default": 2, "other": 3}
        self.lora_A = nn.ModuleDict({name: Factor(3, rank, in_features) for name, rank in ranks.items()})
        self.lora_B = nn.ModuleDict({name: Factor(3, out_features, rank) for name, rank in ranks.items()})
        self.lora_dropout = nn.ModuleDict(
            {"default": nn.Identity(), "other": nn.Dropout(dropout) if dropout else nn.Identity()}
        )
        self.scaling = {"default": 0.5, "other": 2.0}
        self.active_adapters = ["default"]
        self.disable_adapters = self.merged = False

    def lora(self, name: str, dropout: float = 0.0) -> Any:
        weights = (self.lora_A[name].weight, self.lora_B[name].weight)
        return kernel.LoraWeights(*weights, self.scaling[name], dropout)


ROWS, SIZES = (6, 4), (1, 0, 5)


@pytest.mark.parametrize(
    "active",
    [
        [],
        ["default"],
        pytest.param(["other", "default"], marks=pytest.mark.kernels_ci),
        ["default", "of another layer"],
    ],
    ids=str,
)
def test_lora_linear(active: list[str]) -> None:
    """Active adapters that this layer has count, by their own scaling; only they get gradients."""
    layer = bind("LoraMoeFusedLinear", LoraLinear())
    layer.active_adapters = active
    rows, sizes = torch.randn(ROWS, device=DEVICE), torch.tensor(SIZES, device=DEVICE)
    y = layer(rows, sizes)
    loras = [layer.lora(name) for name in active if name in layer.scaling]
    assert torch.equal(y, kernel.moe_fused_linear(rows, layer.base_layer.weight, sizes, lora=loras))
    y.sum().backward()
    for name in layer.scaling:
        for factors in (layer.lora_A, layer.lora_B):
            assert (factors[name].weight.grad is not None) is (name in active)


@pytest.mark.parametrize("switch", ["disable_adapters", "merged"])
def test_lora_linear_without_its_adapters(switch: str) -> None:
    layer = bind("LoraMoeFusedLinear", LoraLinear())
    rows, sizes = torch.randn(ROWS, device=DEVICE), torch.tensor(SIZES, device=DEVICE)
    adapted = layer(rows, sizes)
    setattr(layer, switch, True)
    y = layer(rows, sizes)
    assert torch.equal(y, kernel.moe_fused_linear(rows, layer.base_layer.weight, sizes))
    assert not torch.equal(y, adapted)


def test_lora_linear_drops_in_training_only() -> None:
    layer = bind("LoraMoeFusedLinear", LoraLinear(dropout=0.5))
    layer.active_adapters = ["default", "other"]
    rows, sizes = torch.randn(ROWS, device=DEVICE), torch.tensor(SIZES, device=DEVICE)
    weight = layer.base_layer.weight
    for training, dropout in ((True, 0.5), (False, 0.0)):
        layer.train(training)
        torch.manual_seed(1)
        y = layer(rows, sizes)
        torch.manual_seed(1)
        loras = [layer.lora("default"), layer.lora("other", dropout)]
        assert torch.equal(y, kernel.moe_fused_linear(rows, weight, sizes, lora=loras))


def test_packed_lora_linear() -> None:
    """As in QLoRA: the base layer in 4 bits, factors in fp32 and their gradients too."""
    base = nn.Module()
    weight = pack(base, "weight", (3, 32, 64), 1)
    layer = bind("LoraMoeFusedLinear", LoraLinear(base))
    rows, sizes = torch.randn((6, 64), device=DEVICE).half(), torch.tensor(SIZES, device=DEVICE)
    y = layer(rows, sizes)
    assert torch.equal(y, kernel.moe_fused_linear(rows, weight, sizes, lora=layer.lora("default")))
    y.float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


def pack(to: nn.Module, name: str, shape: tuple[int, int, int], projections: int) -> Any:
    """Random packed weights that ``to`` owns, computing in fp16."""
    dense = torch.randn(shape, device=DEVICE) * shape[2] ** -0.5
    weights = kernel.Packed4bitWeights.quantize(dense, projections=projections, dtype=torch.float16)
    kernel.modules.attach(weights, to, name)
    return weights


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_packed_experts(dtype: torch.dtype) -> None:
    """They compute in the dtype of their format; inputs are cast to it and outputs back."""
    torch.manual_seed(0)
    experts = nn.Module()
    experts.act_fn = nn.SiLU()
    up = pack(experts, "gate_up_proj", (CASE.experts, 64, 64), 2)
    down = pack(experts, "down_proj", (CASE.experts, 64, 32), 1)
    inputs = make_inputs(CASE, torch.float32)
    x, weights = torch.randn(CASE.tokens, 64, device=DEVICE, dtype=dtype), inputs.tensors["top_k_weights"].detach()
    expected = kernel.moe_experts(x.half(), inputs.index, weights, up, down).to(dtype)
    y = bind("Qwen3MoeExperts", experts)(x, inputs.index, weights)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    block = nn.Module()
    block.gate, block.experts = Router(), experts
    y = bind("Qwen3MoeSparseMoeBlock", block)(x.view(2, 3, -1))
    assert torch.equal(y.view(expected.shape), expected)


@pytest.mark.kernels_ci
def test_packed_linear() -> None:
    layer = bind("MoeFusedLinear", nn.Module())
    weight = pack(layer, "weight", (3, 32, 64), 1)
    rows, sizes = torch.randn(6, 64, device=DEVICE).half(), torch.tensor([1, 0, 5], device=DEVICE)
    assert torch.equal(layer(rows, sizes), kernel.moe_fused_linear(rows, weight, sizes))


class ParamWrapper(nn.Module):
    """As PEFT's layer around a parameter of experts, with two adapters. Its own forward answers with zeros."""

    def __init__(self, base_layer: Any, parameter_name: str) -> None:
        super().__init__()
        self.base_layer, self.parameter_name, self.num_experts = base_layer, parameter_name, CASE.experts
        inner: Any = base_layer
        while isinstance(inner, ParamWrapper):
            inner = inner.base_layer
        _, out_features, in_features = getattr(inner, parameter_name).shape
        torch.manual_seed(len(parameter_name))
        ranks = {"default": 2, "other": 3}
        self.lora_A = nn.ModuleDict({n: Factor(CASE.experts * r, in_features) for n, r in ranks.items()})
        self.lora_B = nn.ModuleDict({n: Factor(out_features, r * CASE.experts) for n, r in ranks.items()})
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity(), "other": nn.Dropout(0.5)})
        self.scaling: dict[str, Any] = {"default": 0.5, "other": torch.tensor(2.0, device=DEVICE)}
        self.active_adapters = ["default"]
        self.disable_adapters = self.merged = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)

    def loras(self, *names: str, dropout: float = 0.0) -> list[Any]:
        """The adapters in the kernel's terms, by PEFT's definition of their layout: B is expert-fastest."""
        found = []
        for name in names:
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            rank = len(a) // CASE.experts
            scaling = float(self.scaling[name])
            factors = (a.reshape(CASE.experts, rank, -1), b.reshape(len(b), rank, CASE.experts).permute(2, 0, 1))
            found.append(kernel.LoraWeights(*factors, scaling, dropout if name == "other" else 0.0))
        return found


def wrapped_experts(parameters: tuple[str, ...]) -> Any:
    """Experts inside a layer for each parameter, the first one innermost."""
    layer: Any = Experts(nn.SiLU()).requires_grad_(False)
    for name in parameters:
        layer = ParamWrapper(layer, name)
    return layer.eval()


WRAPPERS = pytest.mark.parametrize("name", ["LoraMoeExperts", "LoraParamWrapper"])
ADAPTED = [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")]


def arguments_of_experts() -> tuple[Tensor, Tensor, Tensor]:
    inputs = make_inputs(CASE, torch.float32)
    return inputs.tensors["hidden_states"].detach(), inputs.index, inputs.tensors["top_k_weights"].detach()


def wrappers_of(layer: Any) -> dict[str, ParamWrapper]:
    found = {}
    while isinstance(layer, ParamWrapper):
        found[layer.parameter_name] = layer
        layer = layer.base_layer
    return found | {"": layer}


@WRAPPERS
@pytest.mark.parametrize("parameters", ADAPTED, ids="+".join)
@pytest.mark.parametrize("active", [[], ["default"], ["other", "default"], ["of another layer"]], ids=str)
def test_adapted_experts(name: str, parameters: tuple[str, ...], active: list[str]) -> None:
    """The adapters of every layer around the experts count, and only active ones get gradients."""
    layer = bind(name, wrapped_experts(parameters))
    layers = wrappers_of(layer)
    experts = layers.pop("")
    for wrapper in layers.values():
        wrapper.active_adapters = active
    arguments = arguments_of_experts()
    known = [adapter for adapter in active if adapter in ("default", "other")]
    loras = {f"{key.removesuffix('_proj')}_lora": wrapper.loras(*known) for key, wrapper in layers.items()}
    expected = kernel.moe_experts(*arguments, experts.gate_up_proj, experts.down_proj, **loras)
    y = layer(*arguments)
    assert torch.equal(y, expected)
    if known:
        y.sum().backward()
    for wrapper in layers.values():
        for adapter in ("default", "other"):
            assert (wrapper.lora_A[adapter].weight.grad is not None) is (adapter in known)


@pytest.mark.kernels_ci
@WRAPPERS
def test_adapters_of_experts_drop_in_training_only(name: str) -> None:
    layer = bind(name, wrapped_experts(("down_proj",)))
    layer.active_adapters = ["other"]
    arguments, experts = arguments_of_experts(), layer.base_layer
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(1)
        y = layer(*arguments)
        torch.manual_seed(1)
        loras = layer.loras("other", dropout=0.5 if training else 0.0)
        expected = kernel.moe_experts(*arguments, experts.gate_up_proj, experts.down_proj, down_lora=loras)
        assert torch.equal(y, expected)


@pytest.mark.kernels_ci
@WRAPPERS
@pytest.mark.parametrize("switch", ["disable_adapters", "merged"])
def test_adapters_of_experts_switched_off(name: str, switch: str) -> None:
    layer = bind(name, wrapped_experts(("gate_up_proj", "down_proj")))
    for wrapper in (layer, layer.base_layer):
        setattr(wrapper, switch, True)
    arguments, experts = arguments_of_experts(), layer.base_layer.base_layer
    assert torch.equal(layer(*arguments), kernel.moe_experts(*arguments, experts.gate_up_proj, experts.down_proj))


def _is_unmerged(layer: Any) -> None:
    layer.disable_adapters = layer.merged = True


def _has_another_parameter(layer: Any) -> None:
    layer.base_layer.parameter_name = "gate_up_proj_bias"


def _has_hooks(layer: Any) -> None:
    layer.base_layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)


def _has_hooks_between(layer: Any) -> None:
    layer.base_layer.register_forward_pre_hook(lambda module, args: args)


def _has_another_forward(layer: Any) -> None:
    layer.base_layer.base_layer.forward = lambda *args: args[0]


def _has_another_method(layer: Any) -> None:
    experts = layer.base_layer.base_layer
    experts.forward = types.MethodType(lambda self, *args: args[0], experts)


def _has_a_derived_class(layer: Any) -> None:
    experts = layer.base_layer.base_layer
    experts.__class__ = type("Derived", (Experts,), {"forward": lambda self, *args: args[0]})


def _has_another_layer(layer: Any) -> None:
    other = nn.Module()
    other.base_layer = layer.base_layer.base_layer
    layer.base_layer.base_layer = other


def _is_refused(layer: Any) -> None:
    layer.base_layer.base_layer.has_post_expert_norm = True


@WRAPPERS
@pytest.mark.parametrize(
    "change",
    [
        _is_unmerged,
        _has_another_parameter,
        _has_hooks,
        _has_hooks_between,
        _has_another_forward,
        _has_another_method,
        _has_a_derived_class,
        _has_another_layer,
        _is_refused,
    ],
    ids=lambda change: change.__name__,
)
def test_what_the_kernel_cannot_do_runs_the_forward_of_the_class(name: str, change: Any) -> None:
    layer = bind(name, wrapped_experts(("gate_up_proj", "down_proj")))
    arguments = arguments_of_experts()
    assert layer(*arguments).abs().sum() > 0
    change(layer)
    assert layer(*arguments).abs().sum() == 0


@WRAPPERS
def test_hooks_for_all_modules_run(name: str) -> None:
    layer = bind(name, wrapped_experts(("down_proj",)))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert layer(*arguments_of_experts()).abs().sum() == 0
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["MoeExperts", "Qwen3MoeExperts"])
def test_experts_that_the_kernel_cannot_compute_run_the_forward_of_their_class(name: str) -> None:
    class Other(Experts):
        def forward(self, hidden_states: Tensor, *args: Any) -> Tensor:
            return torch.zeros_like(hidden_states)

    layer, arguments = bind(name, Other(nn.SiLU())), arguments_of_experts()
    assert layer(*arguments).abs().sum() > 0
    layer.register_buffer("counts", torch.zeros(1, device=DEVICE))
    assert layer(*arguments).abs().sum() == 0


def test_other_arguments_run_the_forward_of_the_class() -> None:
    arguments = arguments_of_experts()
    names = ["default"] * CASE.tokens
    for name in ("LoraMoeExperts", "LoraParamWrapper"):
        layer = bind(name, wrapped_experts(("down_proj",)))
        assert layer(*arguments, adapter_names=names).abs().sum() == 0


def test_further_adapters_come_first() -> None:
    """Adapters that a layer further out hands over are added to those of this layer."""
    layer = bind("LoraMoeExperts", wrapped_experts(("down_proj",)))
    arguments, experts = arguments_of_experts(), layer.base_layer
    further = layer.loras("other")
    loras = [*further, *layer.loras("default")]
    expected = kernel.moe_experts(*arguments, experts.gate_up_proj, experts.down_proj, down_lora=loras)
    assert torch.equal(layer(*arguments, down_lora=further), expected)


@pytest.mark.parametrize("hooked", [False, True], ids=["wrapped", "hooked"])
def test_block_calls_experts_that_something_is_around(hooked: bool) -> None:
    """Neither PEFT's layers nor a hook around the experts are passed by."""
    block = bind("Qwen3MoeSparseMoeBlock", Block(nn.SiLU()))
    arguments, seen = arguments_of_experts(), []
    if hooked:
        bind("MoeExperts", block.experts)
        block.experts.register_forward_hook(lambda module, args, output: seen.append(1))
        expected = block.experts(*arguments)
    else:
        block.experts = bind("LoraParamWrapper", wrapped_experts(("down_proj",)))
        expected = block.experts(*arguments)
    before = len(seen)
    assert torch.equal(block(arguments[0][None])[0], expected)
    assert len(seen) == before + hooked


class OwnActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class SiLUActivation(nn.Module):
    """Stands for Transformers' class of that name."""

    forward = nn.SiLU.forward
    inplace = False


ACTIVATIONS = {
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_modules_by_name(name: str) -> None:
    layers = module("experts_module")
    assert layers.activation_of(ACTIVATIONS[name]) == name
    x = torch.randn(4, 6, dtype=torch.float64)
    gate = module("activations").Gate(name, gated=False)
    assert torch.allclose(module("activations").apply_gate(x, gate), ACTIVATIONS[name](x))


@pytest.mark.parametrize("gated", [False, True], ids=["no-gate", "gated"])
def test_an_unknown_activation_is_an_error(gated: bool) -> None:
    activations = module("activations")
    gate, gate_up = activations.Gate("nobody's", gated=gated), torch.ones(2, 4)
    names = ", ".join(activations.OF_ONE_VALUE)
    grad = torch.ones(2, 2 if gated else 4)
    for call in (
        lambda: activations.apply_gate(gate_up, gate),
        lambda: activations.apply_gate_backward(gate_up, grad, gate),
    ):
        with pytest.raises(ValueError, match=f'activation must be one of {names}, got "nobody\'s"'):
            call()


def test_activation_modules_by_class_name() -> None:
    layers = module("experts_module")
    assert layers.activation_of(SiLUActivation()) == "silu"
    assert layers.activation_of(OwnActivation()) is None


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "Qwen3MoeSparseMoeBlock"])
def test_an_activation_the_kernels_do_not_know(name: str) -> None:
    inputs = make_inputs(CASE, torch.float32)
    if name == "Qwen3MoeExperts":
        layer = bind(name, Experts(OwnActivation()))
        y = layer(inputs.tensors["hidden_states"], inputs.index, inputs.tensors["top_k_weights"])
    else:
        y = bind(name, Block(OwnActivation()))(inputs.tensors["hidden_states"][None])[0]
    expected = run_experts(CASE, inputs, activation=lambda gate_up: torch.sin(gate_up[:, :20]) * gate_up[:, 20:])
    assert torch.equal(y, expected)


def test_experts_equal_truth() -> None:
    inputs = make_inputs(CASE, torch.float32)
    layer = bind("Qwen3MoeExperts", Experts(nn.SiLU()))
    y = layer(inputs.tensors["hidden_states"], inputs.index, inputs.tensors["top_k_weights"])
    truth = plain_experts(CASE, inputs.to(torch.float64)).detach()
    assert_accurate("y", y, truth, plain_experts(CASE, inputs))


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_layers_compile_without_graph_breaks(name: str, dynamic: bool) -> None:
    inputs = make_inputs(CASE, torch.float32)
    x = inputs.tensors["hidden_states"].detach()
    if name == "MoeFusedLinear":
        layer = bind(name, nn.Module())
        layer.weight = nn.Parameter(torch.randn(3, 5, 4, device=DEVICE))
        arguments = (torch.randn(6, 4, device=DEVICE), torch.tensor([1, 0, 5], device=DEVICE))
    elif name == "LoraMoeFusedLinear":
        layer = bind(name, LoraLinear())
        arguments = (torch.randn(ROWS, device=DEVICE), torch.tensor(SIZES, device=DEVICE))
    elif name in ("LoraMoeExperts", "LoraParamWrapper"):
        layer = bind(name, wrapped_experts(("gate_up_proj", "down_proj")))
        arguments = (x, inputs.index, inputs.tensors["top_k_weights"].detach())
    elif name.endswith("MoeExperts"):
        layer, arguments = bind(name, Experts(nn.SiLU())), (x, inputs.index, inputs.tensors["top_k_weights"].detach())
    else:
        layer, arguments = bind(name, Block(nn.SiLU())), (x.view(2, 3, -1),)
        layer.gate._forward_hooks.clear()  # appending to a list is not for graphs
    torch._dynamo.reset()
    eager = layer(*arguments)
    eager.sum().backward()
    grads = {key: parameter.grad.clone() for key, parameter in layer.named_parameters() if parameter.grad is not None}
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*arguments)
    compiled.sum().backward()
    assert torch.equal(eager, compiled)
    for key, parameter in layer.named_parameters():
        assert (parameter.grad is not None) is (key in grads), key
        assert parameter.grad is None or torch.equal(parameter.grad, grads[key]), key
