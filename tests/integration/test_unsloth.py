"""``moe_fused`` on models that Unsloth loads.

Without Unsloth and a GPU, a stand-in does what Unsloth 2026.10 was seen to do to Transformers' classes of experts. Where
both are there, the GPU tests run Unsloth itself, each way in a process of its own, because it changes libraries for good.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe

import moe_fused
from moe_fused.integrations.transformers.experts_module import is_under_interface
from moe_fused.integrations.transformers.originals import replaced_experts, restore_experts
from tests.support import REPOSITORY, python_path

from .conftest import DEVICE
from .four_bit import build, config, load, packed
from .lora import adapt, is_ours, wrappers
from .models import MODELS, experts_modules, tokens

BY_ID = {case.id: case for case in MODELS}


class CopiedExperts(nn.Module):
    """Experts as Unsloth's copy of a model's source has them: Transformers' parameters, without its interface."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, *_: Any) -> Any:
        raise AssertionError("the other library's experts ran")


def own_forward(self: Any, *_: Any) -> Any:
    raise AssertionError("the other library's experts ran")


@pytest.fixture(params=["class", "forward"])
def unsloth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Experts of Qwen3-MoE as Unsloth leaves them: a class of its own in Transformers' module, or another forward."""
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    if request.param == "class":
        copied = type("Qwen3MoeExperts", (CopiedExperts,), {"__module__": "unsloth_compiled_module_qwen3_moe"})
        monkeypatch.setattr(modeling_qwen3_moe, "Qwen3MoeExperts", copied)
    else:
        monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeExperts, "forward", own_forward)
    yield request.param
    gc.collect()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The experts modules whose forward the kernel's implementation computes, in the order of the calls."""
    moe_fused.enable()
    seen: list[nn.Module] = []
    implementation = ALL_EXPERTS_FUNCTIONS["moe_fused"]

    def counted(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        seen.append(module)
        return implementation(module, *arguments, **options)

    counted.recompute = implementation.recompute  # type: ignore[attr-defined]  # enable() asks for it
    monkeypatch.setitem(type(ALL_EXPERTS_FUNCTIONS)._global_mapping, "moe_fused", counted)
    return seen


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def losses(model: Any, steps: int = 3) -> list[float]:
    """Returns the losses of a few steps of gradient descent on one batch."""
    ids = tokens(device=str(model.device))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        with torch.no_grad():
            for parameter in trained:
                parameter.sub_(parameter.grad, alpha=0.5)
                parameter.grad = None
        found.append(float(loss.detach()))
    return found


def four_bit(path: Path) -> Any:
    return load(path, quantization_config=config(), dtype=torch.float32, device_map={"": DEVICE})


def adapted(path: Path) -> Any:
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # what Unsloth makes of the names of linear layers
    return adapt(four_bit(path), target_modules=["q_proj"], target_parameters=stacks).train()


def test_losses_and_adapter_are_those_without_it(checkpoint: Path, tmp_path: Path, calls: list[nn.Module]) -> None:
    """The experts are packed and adapted by us, and train to the bit as they do without the other library."""
    without = losses(adapted(checkpoint))
    count = len(calls)
    assert count > 0
    for variant in range(2):  # the second model is loaded after the first has been changed
        patch = pytest.MonkeyPatch()
        patch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
        patch.setattr(modeling_qwen3_moe.Qwen3MoeExperts, "forward", own_forward)
        try:
            model = adapted(checkpoint)
            assert packed(model)
            assert all(is_ours(wrapper) for wrapper in wrappers(model))
            assert losses(model) == without, variant
        finally:
            patch.undo()
        assert len(calls) == (variant + 2) * count
    model.save_pretrained(tmp_path / "adapter")
    moe_fused.disable()
    from peft import PeftModel

    stock = PeftModel.from_pretrained(build().to(DEVICE), tmp_path / "adapter")
    assert not any(is_ours(wrapper) for wrapper in wrappers(stock))
    saved = {name: value for name, value in model.named_parameters() if "lora_" in name}
    loaded = {name: value for name, value in stock.named_parameters() if "lora_" in name}
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name].float(), loaded[name].float()) for name in saved)


def test_a_4bit_model_gets_transformers_class(unsloth: str, checkpoint: Path, calls: list[nn.Module]) -> None:
    model = four_bit(checkpoint)
    experts = experts_modules(model)
    assert len(experts) == 2
    assert packed(model)
    for module in experts:
        assert is_under_interface(type(module)), unsloth
        assert type(module).__module__ == modeling_qwen3_moe.__name__
    with torch.no_grad():
        model(input_ids=tokens(device=str(model.device)))
    assert calls == experts


def test_a_dense_model_by_kernelize(unsloth: str, checkpoint: Path) -> None:
    model = modeling_qwen3_moe.Qwen3MoeForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad(), pytest.raises(AssertionError, match="the other library's experts ran"):
        model(input_ids=tokens())
    moe_fused.kernelize(model, device="cpu")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens()).logits).all(), unsloth


def test_adapters_on_experts_that_were_loaded_before_warn(checkpoint: Path, unsloth: str) -> None:
    model = modeling_qwen3_moe.Qwen3MoeForCausalLM.from_pretrained(checkpoint)
    moe_fused.enable()
    if unsloth == "forward":
        model.set_experts_implementation("eager")
    with pytest.warns(UserWarning, match=r"model\.layers\.0\.mlp\.experts .* Call moe_fused\.enable\(\) before"):
        adapt(model, target_parameters=["mlp.experts.down_proj"])


def test_what_another_library_has_packed_stays(unsloth: str) -> None:
    model = build()
    for _, module, _, _ in list(replaced_experts(model)):
        module.down_proj = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    classes = [type(module) for module in model.modules()]
    restore_experts(model)
    assert [type(module) for module in model.modules()] == classes, unsloth


def test_flags_of_other_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags that the class of Transformers sets come back with it: gpt-oss has biases and transposed weights."""
    model = BY_ID["gpt_oss"].build() if "gpt_oss" in BY_ID else next(c for c in MODELS if "GptOss" in c.model).build()
    flags = [
        {name: value for name, value in vars(module).items() if name[0] != "_"} for module in experts_modules(model)
    ]
    assert flags[0]["has_bias"]
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    other = type("GptOssExperts", (nn.Module,), {"__module__": "unsloth_compiled_module_gpt_oss"})
    experts = [module for module in model.modules() if isinstance(module, modeling_gpt_oss.GptOssExperts)]
    for module in experts:
        module.__class__ = other
        for name in ("config", "has_gate", "has_bias", "is_transposed", "is_concatenated"):
            delattr(module, name)
    restore_experts(model)
    for module, expected in zip(experts, flags, strict=True):
        assert is_under_interface(type(module))
        assert {name: value for name, value in vars(module).items() if name[0] != "_"} == expected


def test_nothing_happens_where_nobody_has_imported_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeExperts, "forward", own_forward)
    model: PreTrainedModel = build()
    assert list(replaced_experts(model)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore_experts(model)


# With Unsloth itself.

needs_unsloth = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("unsloth") is None, reason="needs a GPU and unsloth"
)
SMALL = ["--tokens", "256", "--steps", "12", "--rate", "3e-3"]
SIZES = ["--layers", "2", "--experts", "16", "--hidden", "256", "--intermediate", "128", "--vocabulary", "512"]


def measured(*arguments: str, directory: Path) -> dict[str, Any]:
    """What a way of ``benchmarks.unsloth_qlora`` prints, in a process of its own that works in ``directory``."""
    from benchmarks.unsloth_qlora import in_process

    assert directory.is_dir()
    result = in_process(arguments[0], [*arguments[1:]], 200)
    shown = {key: value for key, value in result.items() if key != "kernels"}
    assert "error" not in result, f"{result['error']}\n{result.get('output', '')}"
    print(json.dumps(shown, indent=1))
    return result


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unsloth")
    program = (
        "import sys; from pathlib import Path; from benchmarks.unsloth_qlora import parser, save_model; "
        f"save_model(parser().parse_args(sys.argv[1:]), Path({str(directory / 'model')!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": python_path(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program, *SIZES, *SMALL], env=environment, check=True, timeout=120)
    return directory


@pytest.fixture(scope="module")
def plain(small: Path) -> dict[str, Any]:
    return measured("plain", "--model", str(small / "model"), *SMALL, directory=small)


@pytest.mark.gpu
@needs_unsloth
@pytest.mark.parametrize("way", ["unsloth", "unsloth-eager"])
def test_unsloth_itself(way: str, small: Path, plain: dict[str, Any]) -> None:
    adapter = small / way
    arguments = ["--model", str(small / "model"), *SMALL, "--adapter", str(adapter)]
    with_unsloth = measured(way, *arguments, directory=small)
    *trained, last = with_unsloth["losses"]
    # Our kernels run, each one that runs without Unsloth.
    assert plain["kernels"]
    assert with_unsloth["kernels"].keys() >= plain["kernels"].keys()
    # The losses fall, and are the same up to the rounding of bf16.
    assert trained[-1] < trained[0] - 0.5
    for ours, theirs in zip(plain["losses"], trained, strict=True):
        assert abs(ours - theirs) < 0.01 * ours, (plain["losses"], trained)
    # PEFT alone reads the adapter, onto the dense model.
    without_adapter, with_adapter = measured("stock", *arguments, directory=small)["losses"]
    assert with_adapter < without_adapter - 0.5
    assert abs(with_adapter - last) < 0.05 * last
