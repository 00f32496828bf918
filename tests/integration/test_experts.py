"""Experts modules on their own: every class that Transformers decorates, every flag, and what cannot be served."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_fused import hub
from moe_fused.integrations.transformers.experts_module import weights_refusal

from .compare import assert_as_good
from .conftest import Calls

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 40, 12, 6, 3, 11


class AnyConfig:
    """Stands for the config of any experts class: sizes by what their name says."""

    def __init__(self, **options: Any) -> None:
        self._experts_implementation = "eager"
        self.__dict__.update(options)

    def __getattr__(self, name: str) -> Any:
        for part, value in (
            ("__", None),
            ("alpha", 1.5),
            ("limit", 0.5),  # so low that both clamps bite
            ("eps", 1e-6),
            ("softcap", 4.0),
            ("mlp_hidden_act", "relu2"),
            ("act", "silu"),
            ("intermediate", INTERMEDIATE),
            ("moe_inter", INTERMEDIATE),
            ("hidden", HIDDEN),
            ("latent", HIDDEN),
            ("expert", EXPERTS),
        ):
            if part in name:
                if value is None:
                    break
                return value
        raise AttributeError(name)


def make(cls: type[nn.Module], device: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    module = cls(AnyConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return module.to(device, dtype)


def inputs(device: str, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(tokens, HIDDEN, generator=generator)
    top_k_index = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    top_k_weights = torch.rand(tokens, TOP_K, generator=generator)
    return hidden_states.to(device, dtype), top_k_index.to(device), top_k_weights.to(device, dtype)


def run(module: nn.Module, name: str, *arguments: Tensor) -> list[Tensor]:
    """The output, and the gradients of the floating arguments and of the parameters."""
    module.config._experts_implementation = name
    arguments = tuple(a.clone().requires_grad_(a.is_floating_point()) for a in arguments)
    output = module(*arguments)
    wanted = [a for a in arguments if a.is_floating_point()] + list(module.parameters())
    scale = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output)
    return [output.detach(), *torch.autograd.grad((output * scale).sum(), wanted)]


def assert_equals_eager(module: nn.Module, *arguments: Tensor) -> None:
    double = [a.double() if a.is_floating_point() else a for a in arguments]
    truth = run(copy.deepcopy(module).double(), "eager", *double)
    theirs, ours = run(module, "eager", *arguments), run(module, "moe_fused", *arguments)
    for index, (mine, reference, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert_as_good(mine, reference, exact, str(index))


@functools.cache
def decorated_classes() -> dict[str, tuple[str, str]]:
    """(module, class) of every class that Transformers decorates with ``use_experts_implementation``."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(
            r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            found[name] = (f"transformers.models.{path.parent.name}.{path.stem}", name)
    return found


def load_class(name: str) -> type[nn.Module]:
    module, attribute = decorated_classes()[name]
    return getattr(importlib.import_module(module), attribute)


def test_finds_the_decorated_classes() -> None:
    assert {
        "Qwen3MoeExperts",
        "GptOssExperts",
        "NemotronHExperts",
        "OpenAIPrivacyFilterExperts",
    } < decorated_classes().keys()
    assert len(decorated_classes()) > 50


@pytest.mark.parametrize("name", decorated_classes())
def test_every_class_equals_eager(name: str, device: str, calls: Calls) -> None:
    module = make(load_class(name), device)
    if getattr(module, "has_post_expert_norm", False):
        pytest.skip("not served, see test_unservable")
    assert_equals_eager(module, *inputs(device))
    assert calls.count == 1


@dataclass(frozen=True)
class GateCase:
    """A class whose gate the kernel fuses, or must not mistake for one that it fuses."""

    name: str
    activation: str | None
    reason: str


GATES = (
    GateCase("Qwen3MoeExperts", "silu", "Transformers' default gate"),
    GateCase("GptOssExperts", "swiglu_oai", "interleaved, clamped, up + 1"),
    GateCase("OpenAIPrivacyFilterExperts", "swiglu_oai", "as gpt-oss, concatenated"),
    GateCase("MiniMaxM3VLExperts", "swiglu_oai", "as gpt-oss, concatenated, its attributes named otherwise"),
    GateCase("NemotronHExperts", "relu2", "no gate"),
    GateCase("Lfm2MoeExperts", "silu", "its activation is a function, not a module"),
    GateCase("DeepseekV4Experts", None, "clamped, but without up + 1"),
    GateCase("HYV4Experts", None, "clamped, no act_fn"),
)


@pytest.mark.parametrize("case", GATES, ids=lambda case: case.name)
def test_gates(case: GateCase, device: str, calls: Calls) -> None:
    """Which gates run inside the kernel; what they compute is compared for every class above."""
    if case.name not in decorated_classes():
        pytest.skip(f"transformers {transformers.__version__} has no {case.name}")
    module = make(load_class(case.name), device)
    run(module, "moe_fused", *inputs(device))
    (options,) = calls.options
    if case.activation is None:
        assert callable(options["activation"])
        return
    assert options["activation"] == case.activation
    if case.activation == "swiglu_oai":
        assert (options["swiglu_alpha"], options["swiglu_limit"]) in {(1.5, 0.5), (1.702, 7.0)}
        assert options["interleaved"] == (case.name == "GptOssExperts")


@pytest.mark.parametrize("limit", [0.5, 7.0])
def test_gpt_oss_gate_is_the_kernels(limit: float, device: str, enabled: None) -> None:
    """The fused gate and gpt-oss's own function, in the model's own terms, on values beyond both clamps."""
    module = make(GptOssExperts, device)
    module.alpha, module.limit = 1.3, limit
    with torch.no_grad():
        module.gate_up_proj.mul_(8)
    assert_equals_eager(module, *inputs(device))


def test_overridden_gate_is_respected(device: str, calls: Calls) -> None:
    """A subclass, or an instance, with a gate of its own is not taken for its parent."""

    class Halved(GptOssExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return super()._apply_gate(gate_up) / 2

    arguments = inputs(device)
    assert_equals_eager(make(Halved, device), *arguments)
    module = make(Qwen3MoeExperts, device)
    module.config._experts_implementation = "moe_fused"
    plain = module(*arguments)
    module._apply_gate = lambda gate_up: torch.zeros_like(gate_up[:, :INTERMEDIATE])
    assert plain.abs().max() > 0
    assert module(*arguments).abs().max() == 0
    assert calls.count == 3


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu", "relu2", "gelu_new", "quick_gelu", "xielu"])
def test_activations(act: str, device: str, enabled: None) -> None:
    """Those the kernel fuses and those it does not, one of which has parameters."""
    assert_equals_eager(make(Qwen3MoeExperts, device, hidden_act=act), *inputs(device))


def test_batch_dimension(device: str, enabled: None) -> None:
    """(batch, length, H), with routing of either shape."""
    module = make(Qwen3MoeExperts, device)
    module.config._experts_implementation = "moe_fused"
    x, index, weights = inputs(device, tokens=10)
    expected = module(x, index, weights)
    stacked = (x.view(2, 5, HIDDEN), index.view(2, 5, TOP_K), weights.view(2, 5, TOP_K))
    torch.testing.assert_close(module(*stacked), expected.view(2, 5, HIDDEN), rtol=0, atol=0)
    torch.testing.assert_close(module(stacked[0], index, weights), expected.view(2, 5, HIDDEN), rtol=0, atol=0)


@dataclass(frozen=True)
class DtypeCase:
    id: str
    reason: str
    weights: torch.dtype
    hidden: torch.dtype
    routing: torch.dtype
    autocast: bool = False


DTYPES = (
    DtypeCase("float32-activations", "a float32 norm in front", torch.bfloat16, torch.float32, torch.bfloat16),
    DtypeCase("float32-routing", "sigmoid routers", torch.bfloat16, torch.bfloat16, torch.float32),
    DtypeCase(
        "float32-experts", "upcast by prepare_model_for_kbit_training", torch.float32, torch.bfloat16, torch.bfloat16
    ),
    DtypeCase("autocast", "mixed precision training", torch.float32, torch.float32, torch.float32, autocast=True),
    DtypeCase(
        "autocast-cast", "its input is in bfloat16 already", torch.float32, torch.bfloat16, torch.float32, autocast=True
    ),
)


@pytest.mark.parametrize("case", DTYPES, ids=lambda case: case.id)
@pytest.mark.parametrize("cls", [Qwen3MoeExperts, GptOssExperts], ids=lambda cls: cls.__name__)
def test_dtypes(cls: type[nn.Module], case: DtypeCase, device: str, enabled: None) -> None:
    """As Transformers' grouped_mm: computes in the weights' dtype (autocast's, where it is on), returns the input's."""
    module = make(cls, device, case.weights)
    x, index, weights = inputs(device)
    arguments = (x.to(case.hidden), index, weights.to(case.routing))
    truth = run(copy.deepcopy(module).double(), "eager", arguments[0].double(), index, arguments[2].double())
    with torch.autocast(device, torch.bfloat16, enabled=case.autocast):
        ours = run(module, "moe_fused", *arguments)
    assert ours[0].dtype == case.hidden
    assert ours[1].dtype == case.hidden
    assert all(gradient.dtype == case.weights for gradient in ours[3:])
    lowest = torch.bfloat16 if case.autocast or torch.bfloat16 in (case.weights, case.hidden) else torch.float32
    for mine, exact in zip(ours, truth, strict=True):
        error = (mine.double() - exact).norm() / exact.norm()
        assert error <= 4 * torch.finfo(lowest).eps


@pytest.mark.parametrize("cls", [Qwen3MoeExperts, GptOssExperts], ids=lambda cls: cls.__name__)
def test_expert_parallel_ids(cls: type[nn.Module], device: str, enabled: None) -> None:
    """Id num_experts means "held elsewhere": as if another expert had weight zero, and no gradient for that weight.

    Not compared with eager on the same ids: gpt-oss's raises an error on them.
    """
    module = make(cls, device)
    module._is_expert_parallel = True
    x, index, weights = inputs(device)
    elsewhere = torch.zeros_like(index, dtype=torch.bool)
    elsewhere[::2, 1] = True
    elsewhere[3] = True
    theirs = run(module, "eager", x, index.masked_fill(elsewhere, 0), weights.masked_fill(elsewhere, 0))
    theirs[2] = theirs[2].masked_fill(elsewhere, 0)
    ours = run(module, "moe_fused", x, index.masked_fill(elsewhere, EXPERTS), weights)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)
    output, grad_x, *_ = ours
    assert output[3].abs().max() == 0
    assert grad_x[3].abs().max() == 0


class _Doubled(nn.Module):
    """A parametrization that counts how often it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.computed += 1
        return 2 * weight


def test_parametrized_weights_are_computed_once(device: str, calls: Calls) -> None:
    """As PEFT and bitsandbytes attach themselves; ``hasattr`` alone would compute the whole stack again."""
    module = make(Qwen3MoeExperts, device)
    arguments = inputs(device)
    module.config._experts_implementation = "moe_fused"
    with torch.no_grad():
        doubled = copy.deepcopy(module)
        doubled.gate_up_proj.mul_(2)
        expected = doubled(*arguments)
    parametrization = _Doubled()
    parametrize.register_parametrization(module, "gate_up_proj", parametrization)
    parametrization.computed = 0
    torch.testing.assert_close(module(*arguments), expected)
    assert parametrization.computed == 1
    assert calls.count == 2
    parametrize.remove_parametrizations(module, "gate_up_proj", leave_parametrized=False)
    assert_equals_eager(module, *arguments)


def test_leaves_nothing_on_the_module(device: str, enabled: None) -> None:
    module = make(Qwen3MoeExperts, device)
    before = set(vars(module)), list(module.state_dict()), pickle.dumps(module)
    run(module, "moe_fused", *inputs(device))
    module.config._experts_implementation = "eager"
    assert (set(vars(module)), list(module.state_dict()), pickle.dumps(module)) == before


def _with_norm(device: str) -> nn.Module:
    if "MuseSparkExperts" in decorated_classes():
        return make(load_class("MuseSparkExperts"), device)
    module = make(Qwen3MoeExperts, device)
    module.has_post_expert_norm = True
    return module


def _with_buffer(device: str) -> nn.Module:
    module = make(Qwen3MoeExperts, device)
    module.register_buffer("smoothing", torch.ones(HIDDEN, device=device))
    return module


def _with_parameter(device: str) -> nn.Module:
    module = make(Qwen3MoeExperts, device)
    module.register_parameter("input_scale", nn.Parameter(torch.ones(1, device=device)))
    return module


def _with_submodule(device: str) -> nn.Module:
    module = make(Qwen3MoeExperts, device)
    module.adapter = nn.Linear(2, 2, device=device)
    return module


def _contradictory(device: str) -> nn.Module:
    module = make(Qwen3MoeExperts, device)
    module.is_concatenated = False
    return module


class _TensorSubclass(Tensor):
    """Stands for a quantized or distributed tensor: what lies in its storage is its own business."""


def _with_subclass(device: str) -> nn.Module:
    module = make(Qwen3MoeExperts, device)
    module.down_proj = nn.Parameter(module.down_proj.detach().as_subclass(_TensorSubclass), requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("make_module", "reason"),
    [
        (_with_norm, "normalizes the output"),
        (_with_buffer, "buffer of unknown purpose, smoothing"),
        (_with_parameter, "parameter of unknown purpose, input_scale"),
        (_with_submodule, "submodule of unknown purpose, adapter"),
        (_contradictory, "gate and up features alternate"),
        (_with_subclass, "down projection is a _TensorSubclass"),
    ],
)
def test_unservable_keeps_its_own(
    make_module: Callable[[str], nn.Module], reason: str, device: str, calls: Calls
) -> None:
    """It computes what it would without us, and says why: once for its class."""
    module = make_module(device)
    arguments = inputs(device)
    module.config._experts_implementation = "eager"
    expected = module(*arguments)
    module.config._experts_implementation = "moe_fused"
    with pytest.warns(UserWarning, match=reason) as caught:
        output = module(*arguments)
    assert type(module).__name__ in str(caught[0].message)
    torch.testing.assert_close(Tensor(output.cpu()), Tensor(expected.cpu()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*arguments)
    assert calls.count == 0


def test_unservable_dtypes(enabled: None) -> None:
    """Packed and float8 weights, and projections that differ, are named as such."""
    up = torch.zeros(2, 4, 4)
    assert "uint8" in str(weights_refusal(up.to(torch.uint8), up))
    assert "float8_e4m3fn" in str(weights_refusal(up, up.to(torch.float8_e4m3fn)))
    assert "differ in dtype" in str(weights_refusal(up, up.bfloat16()))
    assert "float64" in str(weights_refusal(up.double().to("meta"), up.double().to("meta")))
    assert weights_refusal(up.double(), up.double()) is None


COMPILED = (
    "Qwen3MoeExperts",
    "GptOssExperts",
    "NemotronHExperts",
    "Lfm2MoeExperts",
    "DeepseekV4Experts",
    "OpenAIPrivacyFilterExperts",
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_break(name: str, device: str, enabled: None) -> None:
    """Forward and backward, every kind of gate, then with another number of tokens."""
    module = make(load_class(name), device)
    module.config._experts_implementation = "moe_fused"
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (TOKENS, 5, 8):
        arguments = inputs(device, tokens=tokens)
        expected, ours = run(module, "moe_fused", *arguments), run(compiled, "moe_fused", *arguments)
        for mine, reference in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, reference)


def test_compiles_with_inductor(device: str, enabled: None) -> None:
    if device == "cpu" and shutil.which("g++") is None:
        pytest.skip("inductor needs g++ for CPU code")
    module = make(Qwen3MoeExperts, device)
    arguments = inputs(device)
    expected = run(module, "eager", *arguments)
    torch._dynamo.reset()
    ours = run(torch.compile(module, fullgraph=True), "moe_fused", *arguments)
    for mine, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exports(strict: bool, device: str, enabled: None) -> None:
    if strict and hub.fits(torch.__version__, "<2.10"):
        pytest.skip(f"torch {torch.__version__} cannot run the guards of its own strict exports")
    module = make(Qwen3MoeExperts, device)
    module.config._experts_implementation = "moe_fused"
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(module, inputs(device), dynamic_shapes=[{0: tokens}] * 3, strict=strict)
        for count in (TOKENS, 5):
            arguments = inputs(device, tokens=count)
            torch.testing.assert_close(program.module()(*arguments), module(*arguments))


def test_unservable_compiles_and_warns(device: str, enabled: None) -> None:
    if "MuseSparkExperts" not in decorated_classes():
        pytest.skip(f"transformers {transformers.__version__} has no experts with a norm")
    if device == "cpu" and hub.fits(torch.__version__, "<2.10"):
        pytest.skip(f"torch {torch.__version__} does not trace Transformers' grouped_mm on a CPU")
    # Rows of a multiple of 16 bytes, or torch's grouped_mm refuses them.
    module = make(load_class("MuseSparkExperts"), device, torch.bfloat16, moe_intermediate_size=16)
    module.config._experts_implementation = "moe_fused"
    torch._dynamo.reset()
    arguments = inputs(device, torch.bfloat16)
    with pytest.warns(UserWarning, match="normalizes the output"), torch.no_grad():
        output = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
    module.config._experts_implementation = "eager"
    torch.testing.assert_close(output, module(*arguments), rtol=0.05, atol=0.05)
