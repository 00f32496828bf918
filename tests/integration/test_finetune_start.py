"""``moe-fused finetune --adapter``: training goes on from an adapter, in any layout, and a run resumes without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from moe_fused.checkpoints.adapters import Layout, ScalingChoice
from moe_fused.checkpoints.adapters.convert import convert_adapter
from moe_fused.finetune.adapters import adapt, lora_config
from moe_fused.finetune.options import OF_ADAPTERS, Options
from moe_fused.finetune.plan import plan_run
from moe_fused.finetune.precheck import check_said, check_trainable
from moe_fused.finetune.resolve import set_up
from moe_fused.finetune.start import read_start

from .adapters import edit, peft_adapter, per_expert_adapter
from .finetuning import Run, assert_error, finetune, losses, nothing_loads
from .lora import plain, randomize, run
from .models import MODELS, QWEN3_MOE, ModelCase

CPU = torch.device("cpu")
KEEP = ScalingChoice.KEEP
SHARED_EXPERT = next(case for case in MODELS if case.id == "qwen2_moe")


def continued(source: Path, case: ModelCase = QWEN3_MOE, **options: Any) -> Any:
    """PEFT's model with the adapter in ``source``, as a run trains it, and what the plan of memory counts."""
    given = Options(model="m", adapter=str(source), quantization="none", **options)
    model = plain(case)
    setup = set_up(given, model.config, CPU, start=read_start(given, None), allow_other_base=True)
    adapted = adapt(model, setup)
    assert plan_run(setup, plain_text=False).prediction.trainable == adapted.get_nb_trainable_parameters()[0]
    return adapted, setup


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"mlp.experts.down_proj": 5}, "alpha_pattern": {"q_proj": 9}},
        {"target_parameters": ["mlp.experts.down_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_parameters": None, "target_modules": ["q_proj", "o_proj"]},
    ],
    ids=["fused", "rsLoRA and patterns", "modules to save", "attention alone"],
)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_goes_on_from_what_peft_wrote(options: dict[str, Any], tmp_path: Path) -> None:
    source, logits = peft_adapter(tmp_path / "source", **options)
    adapted, setup = continued(source)
    torch.testing.assert_close(run(adapted.eval()).logits.cpu(), logits, atol=1e-4, rtol=1e-4)
    assert setup.ranks.expert == (0 if options.get("target_modules") else 5 if "use_rslora" in options else 3)
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert any("lm_head.modules_to_save" in name for name in trained)
    # It comes out as it went in.
    adapted.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize(
    "layout", [Layout.PER_EXPERT, Layout.ORIGINAL, Layout.PEFT_SWAPPED, Layout.UNSLOTH_GROUPED, Layout.PEFT_FUSED]
)
def test_goes_on_from_every_layout(layout: Layout, tmp_path: Path) -> None:
    """What is trained is the same, bit for bit, whatever layout the files have; shared experts are part of it."""
    options = Options(model="m", attention_rank=2, expert_rank=3, shared_expert_rank=2, quantization="none")
    model = plain(SHARED_EXPERT)
    made = get_peft_model(model, lora_config(set_up(options, model.config, CPU), model))
    randomize(made)
    expected = run(made.eval()).logits
    made.save_pretrained(tmp_path / "fused")
    convert_adapter(tmp_path / "fused", tmp_path / "source", to=layout, given=Layout.PEFT_FUSED, scaling=KEEP)
    adapted, setup = continued(tmp_path / "source", SHARED_EXPERT)
    assert torch.equal(run(adapted.eval()).logits, expected)
    assert (setup.start.layout is None) == (layout is Layout.PEFT_FUSED)
    wanted = {name: value for name, value in made.named_parameters() if value.requires_grad}
    found = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_factors_of_gate_and_up_become_one_of_twice_the_rank(tmp_path: Path) -> None:
    source = per_expert_adapter(tmp_path / "source")
    adapted, setup = continued(source)
    assert (setup.ranks.expert, setup.ranks.attention) == (8, 4)
    from peft import PeftModel

    other = PeftModel.from_pretrained(plain(), source)
    torch.testing.assert_close(run(adapted.eval()).logits, run(other.eval()).logits, atol=1e-4, rtol=1e-4)


# The options that it answers.


@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_options_that_it_answers_are_refused_by_name(name: str) -> None:
    value: Any = {"use_rslora": True} if name == "lora" else ["q_proj"] if name.endswith(("modules", "save")) else 8
    check_said({name: value})
    check_said({"adapter": "a", "lora_dropout": 0.1, name: None})
    with pytest.raises(
        ValueError, match=f"^(--)?{name.replace('_', '.')}(.use_rslora)? cannot be given with --adapter"
    ):
        check_said({"adapter": "a", name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "has use_dora, such adapters cannot be trained here"),
        ({"lora_bias": True}, "has lora_bias"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"peft_type": "IA3"}, "is of type IA3, finetune trains LoRA adapters"),
        ({"init_lora_weights": "pissa_niter_4"}, "began with pissa_niter_4, which changed the base model"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
    ],
)
def test_adapters_that_cannot_be_trained(changes: dict[str, Any], words: str) -> None:
    content = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}
    check_trainable(content, "--adapter a")
    with pytest.raises(ValueError, match=f"^--adapter a {words}"):
        check_trainable(content | changes, "--adapter a")


# The command.


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two steps, whose adapter others go on from."""
    return Run(tmp_path_factory.mktemp("begun"), "--max-steps", "2", "--lora-dropout", "0")


@pytest.fixture
def place(begun: Run, tmp_path: Path) -> Path:
    shutil.copytree(begun.directory / "out", tmp_path / "first")
    return tmp_path


@pytest.mark.slow
def test_a_run_goes_on_and_resumes_without_the_adapter(begun: Run, place: Path) -> None:
    """It is evaluated and exported, and its resumption needs the adapter until the first checkpoint only."""
    own = ("--adapter", "first", "--max-steps", "4", "--eval-share", "0.25", "--keep-best", "--export", "per-expert")
    ended = finetune(*begun.arguments, *own, "--output", "out", cwd=place)
    assert ended.status == 0, ended
    out, other = place / "out", place / "other"
    assert (out / "per-expert" / "adapter_config.json").is_file()
    assert "went on from the adapter `first`" in (out / "README.md").read_text()
    before, after = (load_file(path / "adapter_model.safetensors") for path in (place / "first", out))
    assert before.keys() == after.keys()
    shutil.copytree(out, other)
    shutil.rmtree(other / "checkpoints" / "checkpoint-4")
    (other / "adapter_config.json").unlink()
    (place / "first").rename(place / "gone")
    ended = finetune("--resume", "--output", "other", cwd=place)
    assert ended.status == 0, ended
    assert losses(other) == losses(out)
    resumed = load_file(other / "adapter_model.safetensors")
    assert all(torch.equal(value, resumed[key]) for key, value in after.items())
    # Without a checkpoint the run begins again, for which it needs the adapter as it was.
    for path in (other / "checkpoints", other / "per-expert"):
        shutil.rmtree(path)
    (other / "adapter_config.json").unlink()
    ended = finetune("--resume", "--output", "other", cwd=place, before=nothing_loads)
    assert_error(ended, "--adapter first", "no checkpoint yet")
    (place / "gone").rename(place / "first")
    tensors = load_file(place / "first" / "adapter_model.safetensors")
    next(iter(tensors.values())).add_(0.5)
    save_file(tensors, place / "first" / "adapter_model.safetensors", {"format": "pt"})
    ended = finetune("--resume", "--output", "other", cwd=place, before=nothing_loads)
    assert_error(ended, "the adapter (sha256:", "changed since the run in other began", "--overwrite")
    ended = finetune("--resume", "--output", "out", "--dry-run", cwd=place)
    assert ended.status == 0, ended
    assert "goes on from its checkpoint, which does not need it" in ended.stderr


def _truncate(path: Path) -> None:
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _nan(path: Path) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})


def _narrower(path: Path) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    save_file(tensors | {key: tensors[key][:, :-1].contiguous()}, path / "adapter_model.safetensors", {"format": "pt"})


def _other_modules(path: Path) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    renamed = {key.replace("q_proj", "query"): value for key, value in tensors.items()}
    save_file(renamed, path / "adapter_model.safetensors", {"format": "pt"})
    modules = json.loads((path / "adapter_config.json").read_text())["target_modules"]
    edit(path, target_modules=[name.replace("q_proj", "query") for name in modules])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_truncate, ["--adapter first", "adapter_model.safetensors"]),
        (_nan, ["--adapter first holds NaN or infinite values"]),
        (_narrower, ["--adapter first does not fit Qwen3MoeForCausalLM", "q_proj"]),
        (_other_modules, ["--adapter first does not fit Qwen3MoeForCausalLM", "query"]),
        (lambda path: edit(path, use_dora=True), ["--adapter first has use_dora"]),
        (lambda path: (path / "adapter_config.json").unlink(), ["--adapter first has no adapter_config.json"]),
        (lambda path: edit(path, base_model_name_or_path="org/other"), []),
    ],
    ids=["truncated", "NaN", "narrower", "other modules", "DoRA", "no config", "moved base"],
)
def test_refused_before_the_model_is_loaded(change: Any, words: list[str], begun: Run, place: Path) -> None:
    change(place / "first")
    given = (*begun.arguments, "--adapter", "first", "--output", "out", "--max-steps", "2")
    ended = finetune(*given, *(() if words else ("--dry-run",)), cwd=place, before=nothing_loads)
    if words:
        assert_error(ended, *words)
    else:  # nothing speaks against a base whose name is another
        assert ended.status == 0, ended
    assert not (place / "out").exists()
    named = finetune(*given, "--expert-rank", "4", cwd=place, before=nothing_loads)
    assert_error(named, "--expert-rank cannot be given with --adapter")
