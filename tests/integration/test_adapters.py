"""Adapters with LoRA on experts keep their function, and come back bit for bit, in every layout."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moe_fused.checkpoints.adapters import Layout, ScalingChoice
from moe_fused.checkpoints.adapters import convert as conversion
from moe_fused.checkpoints.adapters.convert import convert_adapter
from tests.integration.adapters import (
    PREFIX,
    deltas,
    edit,
    peft_adapter,
    peft_logits,
    per_expert_adapter,
    read,
    same_tensors,
    write,
)
from tests.integration.lora import randomize
from tests.integration.models import EXPERTS, HIDDEN, INTERMEDIATE, MODELS, QWEN3_MOE, tokens

Made = Callable[[str], tuple[Path, torch.Tensor]]
KEEP = ScalingChoice.KEEP
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FUSED = [Layout.PEFT_FUSED, Layout.PEFT_SWAPPED, Layout.UNSLOTH_GROUPED, Layout.UNSLOTH_SWAPPED]
SEPARATE = [Layout.PER_EXPERT, Layout.ORIGINAL]
# What PEFT users choose, and what could go wrong with it.
OPTIONS: dict[str, dict[str, Any]] = {
    "alpha is not r": {},
    "rsLoRA": {"use_rslora": True},
    "rank 1": {"r": 1, "lora_alpha": 2},
    "rank 16, scaling a power of two": {"r": 16, "lora_alpha": 8},
    "gate_up only": {"target_parameters": BOTH[:1]},
    "down only": {"target_parameters": BOTH[1:]},
    "experts only": {"target_modules": [], "modules_to_save": None},
    "all linear layers": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*self_attn\.(q|v)_proj"},
    "ranks by module": {
        "rank_pattern": {"q_proj": 5, r"experts\.gate_up_proj": 2},
        "alpha_pattern": {"v_proj": 7, r"1\.mlp\.experts\.down_proj": 11},
    },
    "routers, with a rank of their own": {
        "target_parameters": [*BOTH, "mlp.gate.weight"],
        "rank_pattern": {"mlp.gate.weight": 2},
        "alpha_pattern": {"mlp.gate.weight": 3},
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes an adapter of ``OPTIONS``, once."""

    @functools.cache
    def make(name: str) -> tuple[Path, torch.Tensor]:
        return peft_adapter(tmp_path_factory.mktemp("peft") / "source", **OPTIONS[name])

    return make


def same_function(first: tuple[Path, Layout], second: tuple[Path, Layout]) -> None:
    one, other = deltas(*first), deltas(*second)
    assert one.keys() == other.keys()
    for name, delta in one.items():
        assert delta.abs().max() > 0.01
        torch.testing.assert_close(other[name], delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_exports_of_pefts_adapters_have_their_logits(name: str, made: Made, tmp_path: Path) -> None:
    (source, logits), options = made(name), OPTIONS[name]
    plan = convert_adapter(
        source, tmp_path / "export", to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED, widen=widened(options)
    )
    # ``deltas`` is our own formula. PEFT reads this layout, so PEFT's logits below check the formula, too.
    truth, exported = deltas(source, Layout.PEFT_FUSED), deltas(tmp_path / "export", Layout.PER_EXPERT)
    for layer, projection in itertools.product(range(2), ("gate_proj", "up_proj", "down_proj")):
        delta = exported.pop(f"{layer}.{projection}")
        # Other tools read the three only together, so what is not adapted has factors of zeros.
        torch.testing.assert_close(delta, truth.pop(f"{layer}.{projection}", torch.zeros_like(delta)))
    assert not exported
    assert not truth
    partial = len(options.get("target_parameters", BOTH)) == 1
    assert any("get factors of zeros" in note for note in plan.notes) == partial
    assert any("lm_head.weight is no LoRA" in note for note in plan.notes) == ("modules_to_save" not in options)
    torch.testing.assert_close(peft_logits(tmp_path / "export"), logits, rtol=1e-4, atol=1e-4)
    config = read(tmp_path / "export")[1]
    assert config["lora_alpha"] == config["r"] == max(tensor.shape[0] for tensor in lora_a(tmp_path / "export"))
    assert not config["use_rslora"]
    # All tensors have one rank, because some readers divide alpha by the rank of each tensor.
    assert {tensor.shape[0] for tensor in lora_a(tmp_path / "export")} == {config["r"]}
    convert_adapter(tmp_path / "export", tmp_path / "back", to=Layout.PEFT_FUSED)
    torch.testing.assert_close(peft_logits(tmp_path / "back"), logits, rtol=1e-4, atol=1e-4)


def widened(options: dict[str, Any]) -> bool:
    """Whether PEFT takes gate and up for separate targets under these options, and doubles their rank."""
    return options.get("target_modules") == "all-linear"


def lora_a(directory: Path) -> list[torch.Tensor]:
    return [tensor for key, tensor in read(directory)[0].items() if "lora_A" in key]


@pytest.mark.parametrize("to", [*SEPARATE, *FUSED], ids=lambda layout: layout.value)
@pytest.mark.parametrize("name", OPTIONS)
def test_there_and_back_from_pefts(name: str, to: Layout, made: Made, tmp_path: Path) -> None:
    (source, logits), options = made(name), OPTIONS[name]
    convert_adapter(source, tmp_path / "there", to=to, given=Layout.PEFT_FUSED, scaling=KEEP, widen=widened(options))
    same_function((source, Layout.PEFT_FUSED), (tmp_path / "there", to))
    convert_adapter(tmp_path / "there", tmp_path / "back", to=Layout.PEFT_FUSED)
    assert same_tensors(source, tmp_path / "back")
    same_function((source, Layout.PEFT_FUSED), (tmp_path / "back", Layout.PEFT_FUSED))
    if to is Layout.ORIGINAL:  # the config went the farthest way
        assert torch.equal(peft_logits(tmp_path / "back"), logits)


@pytest.mark.parametrize("to", [*SEPARATE, *FUSED], ids=lambda layout: layout.value)
@pytest.mark.parametrize("name", ["rsLoRA", "down only", "alpha is not r"])
def test_logits_with_each_layouts_own_formula(name: str, to: Layout, tmp_path: Path) -> None:
    options = {**OPTIONS[name], "target_modules": [], "modules_to_save": None}
    source, logits = peft_adapter(tmp_path / "source", **options)
    convert_adapter(source, tmp_path / "there", to=to, given=Layout.PEFT_FUSED)
    found = deltas(tmp_path / "there", to)
    model = QWEN3_MOE.build()
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            experts = layer.mlp.experts
            experts.down_proj += found[f"{number}.down_proj"]
            if name != "down only":
                experts.gate_up_proj += torch.cat([found[f"{number}.gate_proj"], found[f"{number}.up_proj"]], 1)
        torch.testing.assert_close(model(tokens()).logits, logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(QWEN3_MOE.build()(tokens()).logits, logits, atol=0.1)


@pytest.mark.parametrize("to", [Layout.ORIGINAL, *FUSED], ids=lambda layout: layout.value)
@pytest.mark.parametrize("shared", [True, False], ids=["shared A", "own A"])
def test_there_and_back_from_per_expert(shared: bool, to: Layout, tmp_path: Path) -> None:
    source = per_expert_adapter(tmp_path / "source", shared)
    convert_adapter(source, tmp_path / "there", to=to, widen=not shared)
    same_function((source, Layout.PER_EXPERT), (tmp_path / "there", to))
    convert_adapter(tmp_path / "there", tmp_path / "back", to=Layout.PER_EXPERT, scaling=KEEP)
    assert same_tensors(source, tmp_path / "back")
    same_function((source, Layout.PER_EXPERT), (tmp_path / "back", Layout.PER_EXPERT))


@pytest.mark.parametrize("rslora", [False, True], ids=["LoRA", "rsLoRA"])
def test_widened_as_peft_does_it(rslora: bool, tmp_path: Path) -> None:
    """``widen`` makes the tensors that PEFT makes when it loads a per-expert adapter.

    With rsLoRA, PEFT's scaling is off by √2.
    """
    source = per_expert_adapter(tmp_path / "source", use_rslora=rslora)
    convert_adapter(source, tmp_path / "fused", to=Layout.PEFT_FUSED, widen=True)
    same_function((source, Layout.PER_EXPERT), (tmp_path / "fused", Layout.PEFT_FUSED))
    loaded = conversion_of_peft(source, tmp_path / "pefts")
    assert same_tensors(tmp_path / "fused", loaded)
    if not rslora:
        torch.testing.assert_close(peft_logits(tmp_path / "fused"), peft_logits(source), rtol=1e-5, atol=1e-5)
    convert_adapter(loaded, tmp_path / "back", to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED, scaling=KEEP)
    assert same_tensors(source, tmp_path / "back")
    # Converting back keeps what PEFT's file computes, with the factor of √2.
    same_function((loaded, Layout.PEFT_FUSED), (tmp_path / "back", Layout.PER_EXPERT))


def conversion_of_peft(source: Path, directory: Path) -> Path:
    from peft import PeftModel

    PeftModel.from_pretrained(QWEN3_MOE.build(), source).save_pretrained(directory)
    return directory


def test_trained_off_diagonal_blocks(tmp_path: Path) -> None:
    loaded = conversion_of_peft(per_expert_adapter(tmp_path / "source"), tmp_path / "loaded")
    tensors, config = read(loaded)
    key = f"{PREFIX}.1.mlp.experts.base_layer.lora_B.weight"
    tensors[key] = tensors[key] + 0.01
    trained = write(tmp_path / "trained", tensors, config)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: .* rank 8, .* off the diagonal .* rank 4 each"):
        convert_adapter(trained, tmp_path / "out", to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED)
    assert not (tmp_path / "out").exists()
    convert_adapter(trained, tmp_path / "out", to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED, widen=True)
    same_function((trained, Layout.PEFT_FUSED), (tmp_path / "out", Layout.PER_EXPERT))


def test_adapter_trained_after_its_conversion(tmp_path: Path) -> None:
    source = per_expert_adapter(tmp_path / "source", shared=True)
    convert_adapter(source, tmp_path / "fused", to=Layout.PEFT_FUSED)
    from peft import PeftModel

    model = PeftModel.from_pretrained(QWEN3_MOE.build(), tmp_path / "fused", is_trainable=True)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    before = model(tokens(), labels=tokens()).loss
    before.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        logits = model.eval()(tokens()).logits
    convert_adapter(tmp_path / "trained", tmp_path / "out", to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED)
    torch.testing.assert_close(peft_logits(tmp_path / "out"), logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(peft_logits(source), logits, atol=1e-3)


@pytest.mark.parametrize("only", ["gate", "up"])
def test_one_of_gate_and_up(only: str, tmp_path: Path) -> None:
    source = per_expert_adapter(tmp_path / "source", ranks={only: 4})
    with pytest.raises(ValueError, match=f"only {only}_proj is adapted"):
        convert_adapter(source, tmp_path / "fused", to=Layout.PEFT_FUSED)
    convert_adapter(source, tmp_path / "fused", to=Layout.PEFT_FUSED, widen=True)
    truth, fused = deltas(source, Layout.PER_EXPERT), deltas(tmp_path / "fused", Layout.PEFT_FUSED)
    assert len(fused) == 2 * len(truth)
    for name, delta in fused.items():
        torch.testing.assert_close(delta, truth.get(name, torch.zeros_like(delta)))


@pytest.mark.parametrize("widened", [False, True])
def test_examples_of_the_original(widened: bool, tmp_path: Path) -> None:
    """Adapters like those in the original project's README convert.

    Under rsLoRA, experts have a smaller rank than attention.
    """
    source = per_expert_adapter(
        tmp_path / "source",
        not widened,
        {"gate": 2, "up": 2, "down": 2},
        r=8,
        use_rslora=True,
        lora_alpha=1,
        rank_pattern={"q_proj": 8, "gate_proj": 2, "up_proj": 2, "down_proj": 2},
    )
    convert_adapter(source, tmp_path / "original", to=Layout.ORIGINAL)
    same_function((source, Layout.PER_EXPERT), (tmp_path / "original", Layout.ORIGINAL))
    convert_adapter(tmp_path / "original", tmp_path / "fused", to=Layout.PEFT_FUSED, widen=widened)
    same_function((source, Layout.PER_EXPERT), (tmp_path / "fused", Layout.PEFT_FUSED))
    assert read(tmp_path / "fused")[1]["rank_pattern"]["q_proj"] == 8
    peft_logits(tmp_path / "fused")
    convert_adapter(tmp_path / "fused", tmp_path / "back", to=Layout.PER_EXPERT, scaling=KEEP)
    assert same_tensors(source, tmp_path / "back")
    plan = convert_adapter(source, tmp_path / "folded", to=Layout.PER_EXPERT)
    same_function((source, Layout.PER_EXPERT), (tmp_path / "folded", Layout.PER_EXPERT))
    assert set(plan.ranks.values()) == {8}
    assert any("ranks 2, 8 all get rank 8" in note for note in plan.notes)


def test_gpt_oss(tmp_path: Path) -> None:
    """Inverted adapters of gpt-oss become PEFT's and come back. No layout with separate gate and up can hold them."""
    torch.manual_seed(4)
    experts = f"{PREFIX}.0.mlp.experts"
    tensors = {
        f"{experts}.base_layer.lora_A.weight": torch.randn(EXPERTS * 3, 2 * INTERMEDIATE),
        f"{experts}.base_layer.lora_B.weight": torch.randn(HIDDEN, EXPERTS * 3),
        f"{experts}.lora_A.weight": torch.randn(EXPERTS * 3, HIDDEN),
        f"{experts}.lora_B.weight": torch.randn(INTERMEDIATE, EXPERTS * 3),
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "base_model_name_or_path": "openai/gpt-oss-20b"}
    config["target_parameters"] = BOTH
    source = write(tmp_path / "source", tensors, config)
    edit(source, lora_B_layout="rank_major")
    plan = convert_adapter(source, tmp_path / "straight", to=Layout.PEFT_FUSED)
    assert plan.source is Layout.GPT_OSS_INVERTED
    same_function((source, Layout.GPT_OSS_INVERTED), (tmp_path / "straight", Layout.PEFT_FUSED))
    convert_adapter(tmp_path / "straight", tmp_path / "back", to=Layout.GPT_OSS_INVERTED)
    assert same_tensors(source, tmp_path / "back")
    for directory in ("source", "straight"):
        with pytest.raises(ValueError, match="alternate in the tensor"):
            convert_adapter(tmp_path / directory, tmp_path / "out", to=Layout.PER_EXPERT)


def test_shared_expert_stays_and_is_targeted_by_its_own_name(tmp_path: Path) -> None:
    source = per_expert_adapter(tmp_path / "source", shared=True)
    tensors, config = read(source)
    shared_expert = {
        f"{PREFIX}.0.mlp.shared_expert.down_proj.lora_A.weight": torch.randn(4, INTERMEDIATE),
        f"{PREFIX}.0.mlp.shared_expert.down_proj.lora_B.weight": torch.randn(HIDDEN, 4),
    }
    source = write(tmp_path / "more", tensors | shared_expert, config)
    convert_adapter(source, tmp_path / "fused", to=Layout.PEFT_FUSED)
    tensors, config = read(tmp_path / "fused")
    assert all(torch.equal(tensors[key], tensor) for key, tensor in shared_expert.items())
    assert config["target_modules"] == ["q_proj"]
    assert config["target_parameters"] == sorted([*BOTH, "shared_expert.down_proj.weight"])
    convert_adapter(tmp_path / "fused", tmp_path / "back", to=Layout.PER_EXPERT, scaling=KEEP)
    assert same_tensors(source, tmp_path / "back")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_a_shared_expert_keeps_its_function(tmp_path: Path) -> None:
    """Stock PEFT reads the shared expert beside fused experts, before and after a conversion there and back."""
    (case,) = (case for case in MODELS if case.id == "qwen2_moe")
    weights = [f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")]
    options = {"rank_pattern": {"shared_expert.*": 5}, "alpha_pattern": {weights[2]: 7}}
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=[*BOTH, *weights], **options)
    model = get_peft_model(case.build(), config)
    randomize(model)
    expected = model.eval()(tokens()).logits
    model.save_pretrained(tmp_path / "first")
    first, apart, second = (tmp_path / name for name in ("first", "apart", "second"))
    convert_adapter(first, apart, to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED, scaling=KEEP)
    convert_adapter(apart, second, to=Layout.PEFT_FUSED, scaling=KEEP)
    loaded = PeftModel.from_pretrained(case.build(), second).eval()
    torch.testing.assert_close(loaded(tokens()).logits, expected)
    assert not [name for name, _ in loaded.named_parameters() if "shared_expert_gate.lora" in name]


def test_some_layers_only(tmp_path: Path) -> None:
    tensors, config = read(per_expert_adapter(tmp_path / "all", shared=True))
    second = {key: tensor for key, tensor in tensors.items() if ".layers.1." in key}
    source = write(tmp_path / "second", second, {**config, "layers_to_transform": [1]})
    convert_adapter(source, tmp_path / "fused", to=Layout.PEFT_FUSED)
    assert read(tmp_path / "fused")[1]["target_parameters"] == [
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    ]
    model = get_peft_model(QWEN3_MOE.build(), LoraConfig.from_pretrained(tmp_path / "fused"))
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {name.replace(".default", "") for name in adapted} == read(tmp_path / "fused")[0].keys()


def test_dropout_is_none_where_peft_has_none(tmp_path: Path) -> None:
    source = per_expert_adapter(tmp_path / "source", shared=True, lora_dropout=0.1)
    plan = convert_adapter(source, tmp_path / "fused", to=Layout.PEFT_FUSED)
    assert any("lora_dropout" in note for note in plan.notes)
    with pytest.raises(ValueError, match="lora_dropout"):
        peft_logits(source)
    edit(source, lora_dropout=0.0)
    torch.testing.assert_close(peft_logits(tmp_path / "fused"), peft_logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha, exact", [(8, True), (6, False)])
def test_folding_bfloat16(alpha: int, exact: bool, tmp_path: Path) -> None:
    source = per_expert_adapter(tmp_path / "source", dtype=torch.bfloat16, lora_alpha=alpha)
    plan = convert_adapter(source, tmp_path / "folded", to=Layout.PER_EXPERT)
    assert [("which is exact" in note) for note in plan.notes] == [exact]
    one, other = deltas(source, Layout.PER_EXPERT), deltas(tmp_path / "folded", Layout.PER_EXPERT)
    assert all(torch.equal(one[name], other[name]) for name in one) == exact
    tensors, folded = read(source)[0], read(tmp_path / "folded")[0]
    for key, tensor in tensors.items():
        expected = tensor * (alpha / 4) if "lora_B" in key else tensor
        assert torch.equal(folded[key], expected)


def test_mixed_dtypes_are_written_where_readers_can_view_them(tmp_path: Path) -> None:
    tensors, config = read(per_expert_adapter(tmp_path / "first", shared=True, dtype=torch.bfloat16))
    # An odd number of bytes, and the widest type last by name.
    more = {"base_model.model.a": torch.ones(3, dtype=torch.uint8), "base_model.model.z": torch.rand(5).double()}
    source = write(tmp_path / "source", tensors | more | {"base_model.model.s": torch.tensor(2.5)}, config)
    convert_adapter(source, tmp_path / "there", to=Layout.PEFT_FUSED)
    convert_adapter(tmp_path / "there", tmp_path / "back", to=Layout.PER_EXPERT, scaling=KEEP)
    assert same_tensors(source, tmp_path / "back")


def test_one_layer_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = per_expert_adapter(tmp_path / "source", shared=True)
    convert = conversion._Conversion.convert
    alive: list[weakref.ref[torch.Tensor]] = []

    def watched(self: Any, group: Any) -> Any:
        assert not any(reference() is not None for reference in alive), "the layer before is still there"
        block = convert(self, group)
        alive.extend(weakref.ref(tensor) for factors in block.projections.values() for tensor in (factors.a, factors.b))
        return block

    monkeypatch.setattr(conversion._Conversion, "convert", watched)
    convert_adapter(source, tmp_path / "out", to=Layout.PEFT_FUSED)
    assert len(alive) == 2 * 2 * 4  # read twice, two layers, four tensors


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is mapped")
def test_mapped_file_does_not_stay_in_memory(tmp_path: Path) -> None:
    layer, layers = 2 << 20, 8
    tensors = {}
    for number in range(layers):
        for factor, shape in (("A", (8 * 16, 2048)), ("B", (2048, 8 * 16))):
            tensors[f"{PREFIX}.{number}.mlp.experts.lora_{factor}.weight"] = torch.randn(shape)
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_parameters": ["mlp.experts.down_proj"]}
    source = write(tmp_path / "source", tensors, config)
    seen = []

    def watch(*_: object) -> None:
        mapped = Path("/proc/self/smaps").read_text().split(str(source / conversion.WEIGHTS))[1:]
        seen.append(sum(int(region.split("Rss:")[1].split()[0]) << 10 for region in mapped))

    convert_adapter(source, tmp_path / "out", to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED, progress=watch)
    assert len(seen) == 2 * (layers + 1)
    assert max(seen) < 2 * layer
