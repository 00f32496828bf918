"""Fields of TRL's and PEFT's configs in ``trainer`` and ``lora``: which are taken, which are refused, and what they do."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from peft import LoraConfig
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from moe_fused.finetune.handed_through import MANAGED, Config, check_handed_through, fields_of, parse, words_of
from moe_fused.finetune.options import DEFAULTS, Method, Options, flag, read_yaml

from .finetuning import (
    Run,
    assert_error,
    evaluations,
    finetune,
    losses,
    nothing_loads,
    save_model,
    write_jsonl,
)
from .test_finetune_preferences import PAIRS

CLASSES: dict[Config, Any] = {"trainer": SFTConfig, "lora": LoraConfig}


# Names and values.


@pytest.mark.parametrize("config", get_args(Config))
def test_fields_are_those_of_the_installed_class(config: Config) -> None:
    """They are read from its source, which takes less time than importing it."""
    declared = {field.name for field in dataclasses.fields(CLASSES[config]) if field.init and field.name[0] != "_"}
    assert set(fields_of(config)) == declared


@pytest.mark.parametrize("config", get_args(Config))
def test_what_is_managed_exists(config: Config) -> None:
    methods: tuple[Method, ...] = get_args(Method)
    assert set(MANAGED[config]) <= {name for method in methods for name in fields_of(config, method)}
    options = {flag(name) for name in DEFAULTS} | {"--resume"}
    for instead in MANAGED[config].values():
        assert set(re.findall(r"--[a-z-]+", instead)) <= options, instead


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer.neftune_noise_alpha=5", ("trainer", "neftune_noise_alpha", 5)),
        ("lora.use_rslora=true", ("lora", "use_rslora", True)),
        ("lora.exclude_modules=[q_proj, k_proj]", ("lora", "exclude_modules", ["q_proj", "k_proj"])),
        ("trainer.optim_args=a=b", ("trainer", "optim_args", "a=b")),
        ("trainer.data_seed=null", ("trainer", "data_seed", None)),
    ],
)
def test_values_are_yaml(text: str, expected: tuple[str, str, Any]) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text", ["use_rslora=true", "lora.use_rslora", "peft.r=1", "lora.=1", "=1", "", "lora.x=[1", "lora.x="]
)
def test_another_form(text: str) -> None:
    with pytest.raises(ValueError, match="--set"):
        parse(text)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"trainer": {"learning_rate": 1e-3}}, r"trainer.learning_rate cannot be set: use --learning-rate"),
        ({"trainer": {"deepspeed": "x.json"}}, r"trainer.deepspeed cannot be set: each GPU has the whole model"),
        ({"lora": {"r": 4}}, r"lora.r cannot be set: use --attention-rank"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, r"lora.modules_to_save cannot be set: use --modules-to-save"),
        ({"lora": {"ensure_weight_tying": True}}, r"lora.ensure_weight_tying cannot be set: use --modules-to-save"),
        (
            {"trainer": {"neftune_alpha": 5}},
            r"SFTConfig has no field neftune_alpha, did you mean neftune_noise_alpha\?",
        ),
        ({"lora": {"nonsense_entirely": 5}}, r"LoraConfig has no field nonsense_entirely$"),
        (
            {"trainer": {"neftune_noise_alpha": "much"}},
            r"trainer.neftune_noise_alpha must be a number or null, got 'much'",
        ),
        ({"trainer": {"adam_beta1": True}}, r"trainer.adam_beta1 must be a number, got true"),
        ({"trainer": {"data_seed": 1.5}}, r"trainer.data_seed must be a whole number or null, got 1.5"),
        ({"lora": {"use_rslora": 1}}, r"lora.use_rslora must be true or false, got 1"),
        ({"trainer": {"adam_beta1": None}}, r"trainer.adam_beta1 must be a number, got null"),
        ({"trainer": {"save_only_model": True}}, r"trainer.save_only_model cannot be set: a run goes on from whole"),
        ({"trainer": {"adam_beta1": 2}}, r"trainer.adam_beta1 must be at least 0 and below 1, got 2"),
        ({"trainer": {"adam_epsilon": float("nan")}}, r"trainer.adam_epsilon must be a finite number, got nan"),
        ({"trainer": {"neftune_noise_alpha": -5}}, r"trainer.neftune_noise_alpha must be at least 0, got -5"),
        (
            {"method": "dpo", "trainer": {"label_smoothing": 5}},
            r"trainer.label_smoothing must be at least 0 and at most 1, got 5",
        ),
        (
            {"method": "dpo", "trainer": {"loss_type": ["hingee"]}},
            r"trainer.loss_type must be a list of some of sigmoid, hinge, .*, got \['hingee'\]: did you mean hinge\?",
        ),
        ({"method": "dpo", "trainer": {"loss_type": []}}, r"trainer.loss_type must be a list of some of .*, got \[\]"),
        ({"trainer": {"loss_type": "hinge"}}, r"trainer.loss_type must be one of nll, dft, .*, got 'hinge'"),
        (
            {"method": "ipo", "trainer": {"f_divergence_type": "kl"}},
            r"trainer.f_divergence_type must be one of reverse_kl, .*, got 'kl'",
        ),
        ({"lora": {"layers_to_transform": [0]}}, r"lora.layers_to_transform cannot be set: adapters are on all layers"),
    ],
)
def test_refusals(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_handed_through(Options(**given))


def test_losses_are_those_of_the_installed_trainers() -> None:
    """Each word is one that TRL compares with, and TRL's default is among them."""
    for method, config in (("sft", SFTConfig), ("dpo", DPOConfig)):
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        known = words_of("loss_type", method)  # type: ignore[arg-type]
        assert len(known) >= 2
        assert {"sft": defaults["loss_type"], "dpo": "sigmoid"}[method] in known
        check_handed_through(Options(method=method, trainer={"loss_type": known[0]}))  # type: ignore[arg-type]
    check_handed_through(Options(method="dpo", trainer={"loss_type": ["sft", "hinge"], "label_smoothing": 0}))
    defaults = {field.name: field.default for field in dataclasses.fields(DPOConfig)}
    assert defaults["f_divergence_type"] in words_of("f_divergence_type", "dpo")


def test_a_mapping_of_the_file_and_set_go_together(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora:\n  use_rslora: false\n  use_dora: false\nmodel: m\n")
    assert read_yaml(tmp_path / "run.yaml")["lora"] == {"use_rslora": False, "use_dora": False}
    for text in ("lora: 5", "lora: [a]", "lora: {1: 2}"):
        (tmp_path / "bad.yaml").write_text(text + "\n")
        with pytest.raises(ValueError, match="lora must be a mapping of names to values"):
            read_yaml(tmp_path / "bad.yaml")


# What they do.


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("plain"), "--lora-dropout", "0")


def test_fields_of_pefts_config(plain: Run, tmp_path: Path) -> None:
    """The file has one field, the command line another, and a resumed run keeps both."""
    (tmp_path / "run.yaml").write_text("lora:\n  use_rslora: false\n  init_lora_weights: gaussian\n")
    arguments = (*plain.arguments, "--config", "run.yaml", "--set", "lora.use_rslora=true", "--output", "out")
    ended = finetune(*arguments, "--max-steps", "4", cwd=tmp_path)
    assert ended.status == 0, ended
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["init_lora_weights"]) == (True, "gaussian")
    assert losses(tmp_path / "out")[1] == pytest.approx(plain.losses[1])  # B is zero at the beginning
    assert losses(tmp_path / "out")[3] != pytest.approx(plain.losses[3])
    assert read_yaml(tmp_path / "out" / "finetune.yaml")["lora"] == {
        "use_rslora": True,
        "init_lora_weights": "gaussian",
    }
    again = ("--resume", "--output", "out", "--max-steps", "6")
    assert finetune(*again, cwd=tmp_path).status == 0
    assert_error(
        finetune(*again, "--set", "lora.use_rslora=false", cwd=tmp_path),
        "error: lora.use_rslora is true in",
        "cannot become false",
    )


def test_fields_of_trls_config(plain: Run, tmp_path: Path) -> None:
    """NEFTune adds noise while it trains, and none to an evaluation."""
    noise = ("--set", "trainer.neftune_noise_alpha=50", "--set", "trainer.adam_beta1=0.8")
    arguments = (*plain.arguments, "--eval-share", "0.25", "--eval-steps", "1", "--learning-rate", "1e-30")
    for name, more in (("with", noise), ("without", ())):
        ended = finetune(*arguments, *more, "--max-steps", "2", "--output", name, cwd=tmp_path)
        assert ended.status == 0, ended
    assert losses(tmp_path / "with") != losses(tmp_path / "without")
    assert evaluations(tmp_path / "with") == evaluations(tmp_path / "without")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("lora.use_dora=true", "--expert-rank 0 leaves them out"),
        ("trainer.adam_beta1=2", "trainer.adam_beta1 must be"),
        ("trainer.lr_scheduler_kwargs=foo", "trainer.lr_scheduler_kwargs: "),
        ("trainer.lr_scheduler_kwargs={foo: 1}", "trainer.lr_scheduler_kwargs: "),
        ("trainer.loss_type=hinge", "trainer.loss_type must be one of"),
        ("lora.init_lora_weights=pissa", "lora.init_lora_weights: init_lora_weights='pissa' is not supported"),
        ("lora.init_lora_weights=nonsense", "lora.init_lora_weights: "),
        ("lora.bias=all", "lora.bias cannot be set: finetune trains adapters alone"),
        ("trainer.dataloader_prefetch_factor=2", "trainer.dataloader_prefetch_factor: "),
        ("trainer.max_length=5", "use --sequence-length"),
        ("lora.x", "--set must be"),
    ],
)
def test_refused_before_a_model_is_loaded(given: str, words: str, plain: Run, tmp_path: Path) -> None:
    for more in ((), ("--dry-run",)):
        arguments = (*plain.arguments, "--set", given, *more, "--output", "out")
        ended = finetune(*arguments, cwd=tmp_path, before=nothing_loads)
        assert_error(ended, words)
        assert "data:" not in ended.stderr
        assert ".;" not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_what_trl_refuses_when_its_trainer_is_made(tmp_path: Path) -> None:
    """It names the fields, in one line."""
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    arguments = ("--model", "model", "--dataset", "pairs.jsonl", "--method", "dpo", "--max-steps", "1", "--output", "o")
    ended = finetune(*arguments, "--set", "trainer.loss_type=[exo_pair]", cwd=tmp_path)
    assert_error(ended, "trainer.loss_type: Label smoothing must be greater than 0.0")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "o" / "finetune.yaml").exists()


def _raising() -> None:
    """The first step raises an error in TRL's code."""
    from trl.trainer.dpo_trainer import DPOTrainer

    def compute_loss(*_: Any, **__: Any) -> None:
        from trl.trainer import utils

        exec("raise ValueError('Unknown value.')", vars(utils))

    DPOTrainer._compute_loss = compute_loss


def test_what_trl_refuses_at_the_first_step(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    arguments = ("--model", "model", "--dataset", "pairs.jsonl", "--method", "dpo", "--max-steps", "1", "--output", "o")
    ended = finetune(*arguments, "--set", "trainer.label_smoothing=0.1", cwd=tmp_path, before=_raising)
    assert_error(ended, "error: trainer.label_smoothing: Unknown value")
    assert "Traceback" not in ended.stderr


def test_a_field_that_is_given_twice(plain: Run, tmp_path: Path) -> None:
    twice = ("--set", "lora.use_rslora=true", "--set", "lora.use_rslora=false")
    assert_error(finetune(*plain.arguments, *twice, "--output", "out", cwd=tmp_path), "lora.use_rslora is given twice")
