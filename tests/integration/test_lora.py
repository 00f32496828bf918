"""LoRA on experts in the kernel computes, trains and merges as PEFT's own does on Transformers' experts."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel, ParamWrapper
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, VeloraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import transformers_weight_conversion as conversion
from torch import Tensor

import moe_fused

from .compare import Pass, assert_near, assert_passes_as_good, forward_backward
from .conftest import DEVICE, Calls
from .lora import (
    BOTH,
    LINEAR,
    OPTIONS,
    RANK,
    adapt,
    block_diagonal,
    disabled,
    fix_routes,
    is_ours,
    ours,
    own_blocks,
    plain,
    randomize,
    run,
    theirs,
    wrappers,
)
from .models import EXPERTS, GPT_OSS, MODELS, QWEN3_MOE, STACKED, ModelCase, tokens

pytestmark = pytest.mark.usefixtures("enabled")

MIXTRAL = next(case for case in MODELS if case.id == "mixtral")
SHARED_EXPERT = next(case for case in MODELS if case.id == "qwen2_moe")
# float32, and sums in another order.
TOLERANCE = 1e-5

FEATURES: dict[str, dict[str, Any]] = {
    "both": {},
    "gate_up only": {"target_parameters": BOTH[:1], "target_modules": []},
    "down only": {"target_parameters": BOTH[1:], "target_modules": []},
    "names without a path": {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": []},
    "one layer only": {"target_parameters": [f"layers.1.{name}" for name in BOTH], "target_modules": []},
    "attention, too": {"target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH},
    "router, too": {"target_modules": [], "target_parameters": [*BOTH, "mlp.gate.weight"]},
    "rank 1": {"r": 1},
    "rank 19": {"r": 19},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"gate_up_proj": 2},
        "alpha_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 11},
    },
    "modules to save": {"modules_to_save": ["lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize(
    ("case", "feature"),
    [pytest.param(QWEN3_MOE, feature, id=feature) for feature in FEATURES]
    + [
        pytest.param(MIXTRAL, "both", id="mixtral"),
        pytest.param(GPT_OSS, "both", id="gpt_oss: transposed, interleaved, biases"),
        pytest.param(SHARED_EXPERT, "both", id="qwen2_moe: shared expert"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:The following .* keys did not match any targeted module"
)  # PEFT counts no parameters
def test_computes_what_peft_does(case: ModelCase, feature: str, calls: Calls) -> None:
    options = FEATURES[feature]
    one, other = ours(case, **options), theirs(case, **options)
    assert all(map(is_ours, wrappers(one)))
    assert not any(map(is_ours, wrappers(other)))
    expected = forward_backward(other, tokens())
    assert calls.count == 0
    assert_near(forward_backward(one, tokens()), expected, TOLERANCE)
    assert calls.count == 2
    assert any(used["gate_up_lora"] or used["down_lora"] for used in calls.options)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_every_model(case: ModelCase) -> None:
    up = "up_proj" if case.id == "nemotron_h" else "gate_up_proj"
    options = {"target_parameters": [f"experts.{up}", "experts.down_proj"], "target_modules": []}
    one, other = ours(case, **options), theirs(case, **options)
    assert len(wrappers(one)) == 2 * case.moe_layers
    assert all(map(is_ours, wrappers(one)))
    expected = run(other).logits
    torch.testing.assert_close(run(one).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("feature", ["both", "down only", "attention, too", "modules to save"])
def test_has_the_keys_and_shapes_of_peft(feature: str) -> None:
    one, other = (peft.get_peft_model_state_dict(make(**FEATURES[feature])) for make in (ours, theirs))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_initial_values_are_those_of_peft() -> None:
    states = []
    for model in (plain(), QWEN3_MOE.build().to(DEVICE)):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(**OPTIONS, target_parameters=BOTH, target_modules=[]))
        states.append(peft.get_peft_model_state_dict(adapted))
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


# Gate and up apart.


def test_linear_layers_get_factors_of_their_own() -> None:
    """PEFT gives gate and up one A of twice the rank and a block-diagonal B, which is the same before training."""
    one = ours(target_modules=["q_proj", *LINEAR])
    other = theirs(target_modules=["q_proj", *LINEAR])
    shapes = {wrapper.parameter_name: wrapper.lora_B["default"].weight.shape[1] for wrapper in wrappers(one)}
    assert shapes == {"gate_up_proj": RANK * EXPERTS, "down_proj": RANK * EXPERTS}
    values = {name: p.detach() for name, p in one.named_parameters()}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".lora_" in name:
                value = values[name]
                parameter.copy_(value if value.shape == parameter.shape else block_diagonal(value))
    result, expected = forward_backward(one, tokens()), forward_backward(other, tokens())
    gradients = {
        name: value if value.shape == values[name].shape else own_blocks(value)
        for name, value in expected.gradients.items()
    }
    assert_near(result, Pass(expected.logits, gradients), TOLERANCE)


def _merged_by_hand(model: PeftModel, scaling: float) -> Tensor:
    """Logits with the matrices of the adapter's file added to every expert's."""
    plain_model = QWEN3_MOE.build().to(DEVICE)
    weights = dict(plain_model.named_parameters())
    files = peft.get_peft_model_state_dict(model)
    with torch.no_grad():
        for key, a in files.items():
            if ".lora_A" not in key:
                continue
            _, _, layer, _, _, expert, leaf = (
                key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").split(".")
            )
            delta = scaling * files[key.replace("lora_A", "lora_B")] @ a
            stack = weights[
                f"model.layers.{layer}.mlp.experts.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"
            ]
            rows = {
                "gate_proj": slice(delta.shape[0]),
                "up_proj": slice(delta.shape[0], None),
                "down_proj": slice(None),
            }
            stack[int(expert), rows[leaf]] += delta
    logits: Tensor = run(plain_model).logits
    return logits.detach()


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_by_the_rank_of_each_linear_layer(rslora: bool) -> None:
    model = ours(target_modules=LINEAR, use_rslora=rslora)
    scaling = OPTIONS["lora_alpha"] / (RANK**0.5 if rslora else RANK)
    expected = _merged_by_hand(model, scaling)
    torch.testing.assert_close(run(model).logits, expected, atol=1e-5, rtol=1e-5)


def test_ranks_of_linear_layers_by_pattern() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = ours(
            target_modules=["q_proj", *LINEAR],
            rank_pattern={"gate_proj": 5, r"experts\.\d+\.up_proj": 5, "q_proj": 7},
            alpha_pattern={"down_proj": 2},
        )
    got = {wrapper.parameter_name: (wrapper.r["default"], wrapper.scaling["default"]) for wrapper in wrappers(model)}
    assert got == {"gate_up_proj": (5, 5 / 5), "down_proj": (RANK, 2 / RANK)}
    assert model.base_model.model.model.layers[0].self_attn.q_proj.r["default"] == 7
    assert model.peft_config["default"].rank_pattern.keys() == {"gate_proj", r"experts\.\d+\.up_proj", "q_proj"}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("more", [[], BOTH], ids=["alone", "beside experts"])
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next", "deepseek_v3", "glm4_moe"])
def test_linear_layers_that_are_named_by_their_weight(name: str, more: list[str]) -> None:
    """PEFT takes their names as modules for the experts'. Here they are modules, in 4 bits as well, with PEFT's result."""
    case = next(case for case in MODELS if case.id == name)
    shared = "shared_expert" if name.startswith("qwen") else "shared_experts"
    weights = [f"{shared}.{leaf}.weight" for leaf in LINEAR]
    options: dict[str, Any] = {
        "target_modules": ["o_proj"],
        "target_parameters": [*weights, *more],
        "rank_pattern": {f"{shared}.up_proj.weight": 5},
        "alpha_pattern": dict.fromkeys(weights, 20),
    }
    model, expected = ours(case, **options), theirs(case, **options)
    layers = [module for path, module in model.named_modules() if f".{shared}." in path and path.endswith("_proj")]
    assert layers
    assert all(isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper) for layer in layers)
    result, wanted = (forward_backward(each, tokens()) for each in (model, expected))
    assert any(f".{shared}.up_proj.lora_A" in key for key in result.gradients)
    assert_near(result, wanted, TOLERANCE)
    assert model.peft_config["default"].target_parameters == [*weights, *more]


@pytest.mark.parametrize(
    ("case", "targets", "adapted"),
    [
        pytest.param(QWEN3_MOE, "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj"}, id="all linear layers"),
        pytest.param(QWEN3_MOE, r".*\.(q_proj|experts\.\d+\.\w+_proj)", {"q_proj"}, id="regular expression"),
        pytest.param(QWEN3_MOE, [*LINEAR, "gate"], {"gate"}, id="router"),
        pytest.param(MIXTRAL, ["w1", "w2", "w3", "k_proj"], {"k_proj"}, id="mixtral"),
        pytest.param(SHARED_EXPERT, LINEAR, set(LINEAR), id="shared expert"),
    ],
)
def test_linear_layers_beside_experts_are_adapted(case: ModelCase, targets: Any, adapted: set[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = ours(case, target_modules=targets)
    assert len(wrappers(model)) == 4
    assert all(wrapper.linears["default"] for wrapper in wrappers(model))
    others = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and module not in wrappers(model)
    }
    assert others == adapted
    # The config keeps the targets as the user gave them, so that the file says what it holds.
    config = model.peft_config["default"]
    wanted = adapted | set(LINEAR) if targets == "all-linear" else targets
    assert config.target_modules == (wanted if isinstance(wanted, str) else set(wanted))
    assert config.target_parameters is None


@pytest.mark.parametrize(
    "options",
    [{"layers_to_transform": [1]}, {"exclude_modules": r".*layers\.0\..*"}],
    ids=["layers_to_transform", "exclude_modules"],
)
def test_some_layers(options: dict[str, Any]) -> None:
    model = ours(target_modules=["q_proj", *LINEAR], **options)
    first, second = model.base_model.model.model.layers
    assert not any(isinstance(module, BaseTunerLayer) for module in first.modules())
    assert len(wrappers(second)) == 2
    assert isinstance(second.self_attn.q_proj, BaseTunerLayer)


@pytest.mark.parametrize("case", [case for case in MODELS if case.id in STACKED], ids=lambda case: case.id)
def test_all_linear_reaches_experts_that_never_were_linear_layers(case: ModelCase) -> None:
    model = ours(case, target_modules="all-linear")
    config, block = model.peft_config["default"], "mlp" if case is GPT_OSS else "block_sparse_moe"
    named = [f"{block}.experts.down_proj", f"{block}.experts.gate_up_proj"]
    assert config.target_parameters == named
    assert len(wrappers(model)) == 2 * case.moe_layers
    assert all(map(is_ours, wrappers(model)))
    layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert sum(name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) for name in layers) == 2 * 4
    # PEFT computes the same when it is told the names.
    other = theirs(case, target_modules=sorted(config.target_modules), target_parameters=named)
    torch.testing.assert_close(run(model).logits, run(other).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (["experts"], None),
        (r".*\.experts", None),
        (["down_proj"], ["mlp.experts.gate_up_proj"]),
        (
            r".*layers\.0\..*",
            ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"],
        ),
    ],
)
def test_all_linear_but_some(excluded: Any, left: list[str] | None) -> None:
    model = ours(GPT_OSS, target_modules="all-linear", exclude_modules=excluded)
    assert model.peft_config["default"].target_parameters == left
    assert len(wrappers(model)) == (0 if left is None else 2)


def test_all_linear_leaves_out_linear_layers_of_the_models_own() -> None:
    """PhiMoE's router returns more than a product, which PEFT's layer cannot wrap."""
    model = ours(next(case for case in MODELS if case.id == "phimoe"), target_modules="all-linear")
    assert model.peft_config["default"].target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}
    assert run(model).logits.isfinite().all()


# Adapters come and go.


def test_several_adapters() -> None:
    models = []
    for make in (ours, theirs):
        model = make()
        second = LoraConfig(r=5, lora_alpha=4, target_parameters=BOTH, target_modules=[])
        if make is ours:
            model.add_adapter("second", second)
        else:
            with disabled():
                model.add_adapter("second", second)
        randomize(model, "second", seed=4)
        models.append(model)
    one, other = models

    def same() -> Tensor:
        result, expected = (forward_backward(model, tokens()) for model in models)
        assert_near(result, expected, TOLERANCE)
        return result.logits

    seen = [same()]
    for change in (
        lambda model: model.set_adapter("second"),
        lambda model: model.base_model.set_adapter(["default", "second"]),
    ):
        for model in models:
            change(model)
        seen.append(same())
    with one.disable_adapter(), other.disable_adapter():
        base = run(one).logits
        torch.testing.assert_close(base, run(other).logits)
        seen.append(base)
    for model in models:
        model.set_adapter("default")
        model.delete_adapter("second")
    assert torch.equal(same(), seen[0])
    assert all((seen[i] - seen[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))


def test_a_second_adapter_beside_biases() -> None:
    """Biases are adapted by PEFT's own layers, which stand among ours, also for a second adapter."""
    targets = [*BOTH, "mlp.experts.down_proj_bias"]
    model = ours(GPT_OSS, target_parameters=targets, target_modules=[])
    assert sum(map(is_ours, wrappers(model))) == 4
    assert len(wrappers(model)) == 6
    expected = forward_backward(theirs(GPT_OSS, target_parameters=targets, target_modules=[]), tokens())
    assert_near(forward_backward(model, tokens()), expected, TOLERANCE)
    model.add_adapter("second", LoraConfig(r=2, target_parameters=targets, target_modules=[]))
    assert all("second" in wrapper.lora_A for wrapper in wrappers(model))


def test_options_are_refused_under_another_implementation_too() -> None:
    model = ours()
    model.base_model.model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="use_dora"):
        model.add_adapter("second", LoraConfig(use_dora=True, target_parameters=BOTH, target_modules=[]))


def test_adapters_of_both_kinds_at_once() -> None:
    model = ours()
    model.add_adapter("apart", LoraConfig(**OPTIONS, target_modules=LINEAR))
    randomize(model, "apart", seed=4)
    model.base_model.set_adapter(["default", "apart"])
    together = run(model).logits
    merged = model.merge_and_unload(adapter_names=["default", "apart"])
    torch.testing.assert_close(run(merged).logits, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [{}, {"target_modules": LINEAR}], ids=["shared", "apart"])
def test_dropout_acts_in_training_only(targets: dict[str, Any], calls: Calls) -> None:
    with_dropout, without = ours(lora_dropout=0.4, **targets), ours(**targets)
    expected = forward_backward(without, tokens())
    assert_near(forward_backward(with_dropout, tokens()), expected, 0.0)
    with_dropout.train()
    torch.manual_seed(0)
    first = forward_backward(with_dropout, tokens())
    assert [lora.dropout for lora in calls.options[-1]["gate_up_lora"]] == [0.4]
    torch.manual_seed(0)
    assert_near(forward_backward(with_dropout, tokens()), first, 0.0)
    assert (first.logits - expected.logits).abs().max() > 1e-3
    with_dropout.base_model.model.set_experts_implementation("eager")
    peft_says = r"lora\.ParamWrapper does not work with lora_dropout != 0\."
    with pytest.raises(
        ValueError, match=rf"^{peft_says} lora_dropout on down_proj needs experts_implementation='moe_f"
    ):
        run(with_dropout)


@pytest.mark.parametrize("safe", [False, True])
def test_merges_bit_for_bit_as_peft(safe: bool) -> None:
    one, other = ours(), theirs()
    one.merge_adapter(safe_merge=safe)
    other.merge_adapter(safe_merge=safe)
    assert torch.equal(wrappers(one)[0].weight, wrappers(other)[0].get_param())
    one.unmerge_adapter()
    other.unmerge_adapter()
    merged, expected = (model.merge_and_unload(safe_merge=safe).state_dict() for model in (one, other))
    assert merged.keys() == expected.keys()
    for key, value in merged.items():
        assert torch.equal(value, expected[key]), key


def test_merging_factors_of_gate_and_up() -> None:
    model = ours(target_modules=LINEAR)
    logits = run(model).logits
    model.merge_adapter()
    torch.testing.assert_close(run(model).logits, logits, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(run(model).logits, run(plain()).logits, atol=1e-5, rtol=1e-5)


def test_safe_merge_refuses_broken_adapters() -> None:
    model = ours()
    with torch.no_grad():
        wrappers(model)[0].lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)


# Training.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["q_proj", *LINEAR]}, {"lora_dropout": 0.3}],
    ids=["shared", "apart", "dropout"],
)
def test_gradient_checkpointing(reentrant: bool, options: dict[str, Any]) -> None:
    model = ours(**options)
    model.train()
    torch.manual_seed(0)
    expected = forward_backward(model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(0)
    assert_near(forward_backward(model, tokens()), expected, 0.0)


def test_recompute(calls: Calls) -> None:
    model = ours()
    expected = forward_backward(model, tokens())
    assert not calls.options[-1]["recompute"]
    moe_fused.enable(recompute=True)
    assert_near(forward_backward(model, tokens()), expected, 1e-6)
    assert calls.options[-1]["recompute"]
    moe_fused.enable()
    forward_backward(model, tokens())
    assert not calls.options[-1]["recompute"]


@pytest.mark.parametrize("fp32_adapter", [True, False])
def test_dtypes_of_adapters(fp32_adapter: bool) -> None:
    passes = []
    for implementation in ("moe_fused", "eager"):
        model = QWEN3_MOE.build().to(DEVICE, torch.bfloat16)
        model.set_experts_implementation(implementation)
        config = LoraConfig(**OPTIONS, target_parameters=BOTH, target_modules=["q_proj"])
        adapted = get_peft_model(model, config, autocast_adapter_dtype=fp32_adapter)
        randomize(adapted)
        fix_routes(adapted)
        dtype = torch.float32 if fp32_adapter else torch.bfloat16
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {dtype}
        passes.append(forward_backward(adapted, tokens()))
    truth = adapted.double()
    truth.base_model.model.set_experts_implementation("eager")
    assert_passes_as_good(*passes, forward_backward(truth, tokens()), computed_in=torch.bfloat16)


def test_autocast() -> None:
    one, other = (
        ours(target_modules=["q_proj"], target_parameters=BOTH),
        theirs(target_modules=["q_proj"], target_parameters=BOTH),
    )
    for model in (one, other):
        fix_routes(model)
    truth = forward_backward(other, tokens())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        result, expected = forward_backward(one, tokens()), forward_backward(other, tokens())
    assert_passes_as_good(result, expected, truth, computed_in=torch.bfloat16)


@pytest.mark.parametrize("targets", [{}, {"target_modules": LINEAR}], ids=["shared", "apart"])
def test_compiles_without_a_break(targets: dict[str, Any]) -> None:
    experts = ours(**targets).base_model.model.model.layers[0].mlp.experts
    hidden = torch.randn(7, 40, device=DEVICE, requires_grad=True)
    index, weights = torch.randint(0, EXPERTS, (7, 3), device=DEVICE), torch.rand(7, 3, device=DEVICE)
    expected = experts(hidden, index, weights)
    expected.sum().backward()
    gradient = experts.lora_A["default"].weight.grad.clone()
    experts.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    result = compiled(hidden, index, weights)
    result.sum().backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(experts.lora_A["default"].weight.grad, gradient)


def losses(model: PeftModel, steps: int = 100) -> list[float]:
    """The loss of each step of training on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    curve = []
    for _ in range(steps):
        ids = tokens(device=str(model.device))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def test_trains_as_peft() -> None:
    options = {"target_modules": ["q_proj"], "target_parameters": BOTH}
    curve, expected = losses(ours(**options)), losses(theirs(**options))
    assert curve == pytest.approx(expected, rel=1e-3)
    assert curve[-1] < 0.9 * curve[0]


# What is refused.


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "orthogonal"),
        ("alora_invocation_tokens", [1]),
    ],
)
@pytest.mark.parametrize("targets", [{"target_parameters": BOTH}, {"target_modules": LINEAR}], ids=["shared", "apart"])
def test_unsupported_options(option: str, value: Any, targets: dict[str, Any]) -> None:
    model = plain()
    message = f"{option}=.* is not supported for LoRA on experts: .*leave"
    with pytest.raises((NotImplementedError, ValueError), match=message):
        get_peft_model(model, LoraConfig(**{option: value}, **targets))
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def raised(call: Callable[[], object]) -> tuple[type[Exception], str]:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - which one is the question
        return type(error), str(error)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"alora_invocation_tokens": [1]},
        {"velora_config": VeloraConfig()},
        {"kasa_config": KasaConfig()},
        {"use_bdlora": BdLoraConfig()},
        {"arrow_config": ArrowConfig()},
        {"r": 0},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_peft_refuses_is_refused_in_its_words(option: dict[str, Any]) -> None:
    """What PEFT refuses is the same exception here.

    Its message begins with PEFT's, so that code written for PEFT finds it.
    """
    config = LoraConfig(target_parameters=BOTH, target_modules=[], **option)
    error, message = raised(lambda: get_peft_model(plain(), config))
    expected, words = raised(lambda: get_peft_model(QWEN3_MOE.build(), config))
    assert error is expected
    assert message.startswith(words)


def test_options_are_free_where_experts_are_not_adapted() -> None:
    model = get_peft_model(plain(), LoraConfig(use_dora=True, target_modules=["q_proj"]))
    assert not wrappers(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["gate_proj"]}, ValueError, "target_modules must name up_proj with gate_proj"),
        (
            {"target_modules": r".*experts\.[0-2]\.\w+_proj"},
            NotImplementedError,
            "all experts of a layer or none, got 3 of 6 gate_proj of model.layers.0.mlp.experts",
        ),
        (
            {"target_modules": LINEAR, "rank_pattern": {"up_proj": 2}},
            NotImplementedError,
            "rank_pattern must be the same for gate_proj and up_proj",
        ),
        (
            {"target_modules": LINEAR, "alpha_pattern": {r"experts\.1\.down_proj": 2}},
            NotImplementedError,
            "alpha_pattern must be the same for down_proj",
        ),
    ],
)
def test_impossible_targets(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = plain()
    with pytest.raises(error, match=message):
        get_peft_model(model, LoraConfig(**options))
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


def test_adapters_of_a_layer_adapt_the_same() -> None:
    model = ours(target_modules=["down_proj"])
    peft_says = (
        "^When using multiple adapters with `target_parameters`, all adapters must target the same set of parameters"
    )
    with pytest.raises(ValueError, match=peft_says):
        model.add_adapter("second", LoraConfig(target_modules=LINEAR))
    assert model.peft_config.keys() == {"default"}


@pytest.mark.parametrize("targets", [{"target_parameters": BOTH}, {"target_modules": LINEAR}], ids=["shared", "apart"])
def test_mixing_adapters_is_refused(targets: dict[str, Any]) -> None:
    def mixing(model: Any, *names: str) -> tuple[type[Exception], str]:
        return raised(lambda: model.add_weighted_adapter([*names], [1.0] * len(names), "mixed"))

    model, stock = ours(**targets), theirs()
    for names in (("default",), ("default", "unknown")):
        error, message = mixing(model, *names)
        expected, words = mixing(stock, *names)
        assert error is expected is ValueError
        assert message.startswith(words)
    assert model.peft_config.keys() == {"default"}


# With and without us.


def test_other_implementations_stay_with_peft() -> None:
    model = adapt(QWEN3_MOE.build(), target_modules=["q_proj", *LINEAR])
    assert len(wrappers(model)) == 4
    assert not any(map(is_ours, wrappers(model)))
    assert {wrapper.r["default"] for wrapper in wrappers(model)} == {RANK, 2 * RANK}


@pytest.mark.parametrize("targets", [{}, {"target_modules": LINEAR}], ids=["shared", "apart"])
def test_another_implementation_later(targets: dict[str, Any], calls: Calls) -> None:
    model = ours(**targets)
    expected = forward_backward(model, tokens())
    count = calls.count
    model.base_model.model.set_experts_implementation("eager")
    assert_near(forward_backward(model, tokens()), expected, TOLERANCE)
    assert calls.count == count


def test_kernelized_models(calls: Calls) -> None:
    model = ours()
    expected = forward_backward(model, tokens())
    model.base_model.model.set_experts_implementation("eager")
    moe_fused.kernelize(model)
    count = calls.count
    assert_near(forward_backward(model, tokens()), expected, 0.0)
    assert calls.count == count + 2


def test_copies() -> None:
    model = ours(target_modules=LINEAR)
    assert_near(forward_backward(copy.deepcopy(model), tokens()), forward_backward(model, tokens()), 0.0)


def test_disable_gives_peft_back() -> None:
    functions = ("convert_peft_config_for_transformers", "build_peft_weight_mapping")
    table = peft.PEFT_TYPE_TO_TUNER_MAPPING
    assert table[peft.PeftType.LORA] is not LoraModel
    moe_fused.enable()  # twice is once
    with disabled():
        assert table[peft.PeftType.LORA] is LoraModel
        assert all(getattr(conversion, name).__module__ == conversion.__name__ for name in functions)
    assert table[peft.PeftType.LORA] is not LoraModel


def test_waits_for_peft() -> None:
    """``enable`` imports no PEFT, and hooks in when somebody does."""
    script = """
import importlib.util, sys, moe_fused
moe_fused.enable()
assert importlib.util.find_spec("peft") is not None
assert "peft" not in sys.modules
import peft
tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA]
assert tuner.__module__ == "moe_fused.integrations.peft.tuner", tuner
moe_fused.disable()
assert peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] is peft.LoraModel
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
