"""Preferences in ``moe-fused finetune``: rows, losses against TRL's own trainers, and what a run writes and refuses."""

from __future__ import annotations

import json
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import moe_fused
from moe_fused.finetune.data import find, prepare
from moe_fused.finetune.formats import BadRow, parse_preference, parse_rated
from moe_fused.finetune.model import load_model
from moe_fused.finetune.options import Options
from moe_fused.finetune.plan import plan_run
from moe_fused.finetune.resolve import Batching, set_up

from .finetuning import (
    assert_error,
    checkpoints,
    evaluations,
    finetune,
    finetune_signalled,
    leftovers,
    losses,
    nothing_loads,
    records,
    save_model,
    write_jsonl,
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIRS = [
    {"prompt": [user(f"{i} + {i}?")], "chosen": [assistant(f"{2 * i}.")], "rejected": [assistant(f"{i}, I think.")]}
    for i in range(16)
]
RATED = [
    {"prompt": [user(f"{i} + {i}?")], "completion": [assistant(f"{(1 + i % 2) * i}.")], "label": bool(i % 2)}
    for i in range(16)
]
ROWS: dict[str, list[Any]] = {"dpo": PAIRS, "ipo": PAIRS, "kto": RATED}
METHODS = pytest.mark.parametrize("method", ROWS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("preferences") / "model")


def arguments(model: Path, rows: Path, method: str, *others: str) -> tuple[str | Path, ...]:
    return (
        "--model", model, "--dataset", rows, "--method", method, "--batch-size", "2", "--sequence-length", "64",
        "--gradient-accumulation", "1", "--learning-rate", "0.01", "--seed", "3", *others,
    )  # fmt: skip


# Rows.


def test_forms_of_preferences() -> None:
    """The same preference, as data sets on the Hub have it."""
    asked, good, bad = user("2 + 2?"), assistant("4."), assistant("5.")
    system = {"role": "system", "content": "Count."}
    as_chat = [
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "2 + 2?", "chosen": [asked, good], "rejected": [asked, bad], "messages": [asked, good], "score": 1},
        {"prompt": [asked], "chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": [asked], "chosen": "4.", "rejected": "5."},
        {"prompt": "2 + 2?", "chosen": [good], "rejected": [bad]},
        {"prompt": [asked], "chosen": good, "rejected": bad},
        {"question": "2 + 2?", "chosen": "4.", "rejected": "5."},
        {"chosen": json.dumps([asked, good]), "rejected": json.dumps([asked, bad])},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}], "prompt": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4."}, "rejected": {"from": "gpt", "value": "5."},
        },
    ]  # fmt: skip
    for content in as_chat:
        row = parse_preference(content, True)
        assert (row.prompt, row.completion, row.rejected) == ([asked], [good], [bad]), content
        assert row.form == "preference of messages"
    row = parse_preference({"system": "Count.", "question": "2 + 2?", "chosen": "4.", "rejected": "5."}, True)
    assert row.prompt == [system, asked]
    as_text = [
        {"prompt": "2 + 2 =", "chosen": " 4.", "rejected": " 5."},
        {"chosen": "2 + 2 = 4.", "rejected": "2 + 2 = 5."},
    ]
    for content in as_text:
        row = parse_preference(content, True)
        assert (row.prompt, row.completion, row.rejected) == ("2 + 2 =", " 4.", " 5.")
        assert row.form == "preference of text"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"chosen": "a", "rejected": None, "prompt": "b"}, "lacks rejected"),
        ({"messages": [user("a")]}, "lacks chosen: a preference needs chosen and rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same answer as chosen and as rejected"),
        ({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": "c"}, "has one of each"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, "needs a prompt"),
        ({"chosen": "left", "rejected": "right"}, "needs a prompt"),
        (
            {"prompt": "x", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "not the last",
        ),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "has an empty chosen"),
        ({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("")]}, "has an empty rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "d"}, "has system beside a prompt of text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["d"]}, "has images"),
        ("text", "must be an object"),
    ],
)
def test_rows_that_are_no_preferences(content: Any, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        parse_preference(content, True)


def test_labels() -> None:
    for label, wanted in ((True, True), (False, False), ("true", True), ("False", False), (1, True), (0, False)):
        row = parse_rated({"prompt": "a", "completion": "b", "label": label})
        assert (row.prompt, row.completion, row.wanted) == ("a", "b", wanted)
    for label, words in ((None, "lacks label"), (0.5, "must have true or false as label"), ("good", "'good'")):
        with pytest.raises(BadRow, match=words):
            parse_rated({"prompt": "a", "completion": "b", "label": label})
    with pytest.raises(BadRow, match="--method dpo learns from it"):
        parse_rated({"prompt": "a", "chosen": "b", "rejected": "c"})


def prepared(model: Path, rows: Path, method: str, length: int = 64) -> Dataset:
    options = Options(model=str(model), dataset=str(rows), output="out", method=method, batch_size=2, seed=3)  # type: ignore[arg-type]
    found = find(options, AutoTokenizer.from_pretrained(model))
    answers = 1 if method == "kto" else 2
    return prepare(found, options, Batching("none", length, 2, 1, answers), vocabulary=272).dataset


def theirs(model: Path, rows: list[Any], method: str, length: int = 64) -> Dataset:
    """What TRL's own trainer makes of the same rows."""
    kto = method == "kto"
    trainer: Any = object.__new__(KTOTrainer if kto else DPOTrainer)
    trainer._tokenizer = tokenizer = AutoTokenizer.from_pretrained(model)
    trainer.calculate_KL, trainer.desirable_weight, trainer.undesirable_weight = kto, 1.0, 1.0
    config: Any = KTOConfig if kto else DPOConfig
    options = config(output_dir="unused", max_length=length, per_device_train_batch_size=2, use_cpu=True, bf16=False)
    return trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, options, "eval")


@METHODS
@pytest.mark.parametrize("text", [False, True], ids=["chats", "text"])
def test_tokens_are_those_of_trl(method: str, text: bool, model: Path, tmp_path: Path) -> None:
    rows = ROWS[method]
    if text:
        rows = [
            {name: value if name == "label" else value[0]["content"] for name, value in row.items()} for row in rows
        ]
    ours = prepared(model, write_jsonl(tmp_path / "rows.jsonl", rows), method)
    columns = [name for name in ours.column_names if name != "KL_completion_ids"]
    want = sorted(map(repr, theirs(model, rows, method).select_columns(columns)))
    got = sorted(map(repr, ours.select_columns(columns)))
    assert got == want
    assert len(got) == 16


def test_the_same_file_by_several_methods(model: Path, tmp_path: Path) -> None:
    """What one method has made of a file is kept, but not taken for what another makes of it."""
    rows = [{"prompt": "2 + 2 =", "completion": " 4.", "label": True, "chosen": " 4.", "rejected": " 5."}] * 2
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = {method: set(prepared(model, file, method).column_names) for method in ("kto", "dpo")}
    assert columns["kto"] == {"prompt_ids", "completion_ids", "label"}
    assert columns["dpo"] == {"prompt_ids", "chosen_ids", "rejected_ids"}


def test_rated_rows_are_mixed_by_the_seed(model: Path, tmp_path: Path) -> None:
    """TRL goes through them in their order, which may be by label in the file."""
    rows = write_jsonl(tmp_path / "rows.jsonl", sorted(RATED, key=lambda row: row["label"]))
    labels = prepared(model, rows, "kto")["label"][:]
    assert labels != sorted(labels)
    assert labels == prepared(model, rows, "kto")["label"][:]


# Training.


def stock_losses(model: Path, dataset: Dataset, method: str, run: Any, adapter: dict[str, Any]) -> list[float]:
    """The losses of TRL's own trainer, over stock experts and stock PEFT, from the same adapters and rows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options: dict[str, Any] = {
        "output_dir": "unused", "max_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "max_steps": 4, "learning_rate": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "seed": 3,
        "use_cpu": True, "bf16": False, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "max_grad_norm": 1.0, "gradient_checkpointing": False, "router_aux_loss_coef": 0.0, "optim": "adamw_torch",
        "disable_tqdm": True,
    }  # fmt: skip
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=list(run.attention_modules),
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"mlp.experts.gate_up_proj": 8, "mlp.experts.down_proj": 8},
        alpha_pattern={"mlp.experts.gate_up_proj": 16, "mlp.experts.down_proj": 16}, task_type="CAUSAL_LM",
    )  # fmt: skip
    arguments = {"train_dataset": dataset, "processing_class": tokenizer, "peft_config": config}
    if method == "kto":
        trainer: Any = _Kto(base, args=KTOConfig(**options), **arguments)
    else:
        kind = "ipo" if method == "ipo" else "sigmoid"
        trainer = _Dpo(base, args=DPOConfig(loss_type=[kind], **options), **arguments)
    set_peft_model_state_dict(trainer.model, adapter)
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


class _Dpo(DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class _Kto(KTOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


@METHODS
def test_losses_are_those_of_trl(method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over stock experts and stock PEFT, from the same adapters; and nothing is held twice."""
    from moe_fused.finetune.trainer import make_trainer

    monkeypatch.chdir(tmp_path)
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS[method])
    options = Options(
        model=str(model), dataset=str(rows), output="out", method=method, batch_size=2, sequence_length=64,  # type: ignore[arg-type]
        gradient_accumulation=1, max_steps=4, learning_rate=0.01, seed=3, quantization="none", device="cpu",
    )  # fmt: skip
    run = plan_run(set_up(options, AutoConfig.from_pretrained(model), torch.device("cpu")), plain_text=False).run
    dataset = prepared(model, rows, method)
    try:
        trainer = make_trainer(load_model(run), AutoTokenizer.from_pretrained(model), dataset, run)
        assert trainer.ref_model is None
        assert list(trainer.model.peft_config) == ["default"]
        adapter = {name: value.clone() for name, value in get_peft_model_state_dict(trainer.model).items()}
        trainer.train_from(None)
        ours = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        dataset = trainer.train_dataset
    finally:
        moe_fused.disable()
    assert len(ours) == 4
    assert ours[-1] < ours[0]
    assert stock_losses(model, dataset, method, run, adapter) == pytest.approx(ours, rel=1e-4)


@METHODS
def test_a_run_in_4_bits(method: str, model: Path, tmp_path: Path) -> None:
    """It learns, evaluates, keeps the best adapter, and a run that is interrupted ends as one that is not."""
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS[method] * 2)
    options = arguments(
        model, rows, method, "--max-steps", "8", "--save-steps", "2", "--eval-share", "0.25", "--eval-steps", "4",
        "--keep-best",
    )  # fmt: skip
    ended = finetune(*options, "--output", "whole", cwd=tmp_path)
    assert ended.status == 0, ended
    answers = "" if method == "kto" else "x 2 "
    assert f"2 {answers}x 64 x 1 (batch {'x answers ' * (method != 'kto')}x length x accumulation)" in ended.stderr
    assert ", margin " in ended.stderr
    assert "perplexity" not in ended.stderr
    whole = losses(tmp_path / "whole")
    assert whole[8] < whole[1]
    assert list(evaluations(tmp_path / "whole")) == [4, 8]
    assert records(tmp_path / "whole", "eval_reward_margin")[-1]["eval_reward_margin"] > 0
    assert f"| method | {method}" in (tmp_path / "whole" / "README.md").read_text()

    interrupted = finetune_signalled(signal.SIGTERM, 6, *options, "--output", "cut", cwd=tmp_path)
    assert interrupted.status == 128 + signal.SIGTERM
    assert max(checkpoints(tmp_path / "cut")) == 6
    assert finetune("--resume", "--output", "cut", cwd=tmp_path).status == 0
    assert losses(tmp_path / "cut") == whole
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "whole")
    assert not leftovers(tmp_path / "cut")
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    assert (tmp_path / "cut" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    # PEFT writes sets as lists, in an order that another process may not have.
    cut, whole_run = (json.loads((tmp_path / name / config).read_text()) for name in ("cut", "whole"))
    assert sorted(cut.pop("target_modules")) == sorted(whole_run.pop("target_modules"))
    assert cut == whole_run


# What is refused.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--method", "dpo", "--packing", "bfd"], ["--packing bfd", "--method dpo"]),
        (["--method", "ipo", "--assistant-only-loss"], ["--assistant-only-loss", "--method ipo"]),
        (["--method", "dpo", "--lora-dropout", "0.1"], ["--lora-dropout", "--method dpo"]),
        (["--method", "kto", "--batch-size", "1"], ["--method kto", "--batch-size of at least 2"]),
        (["--beta", "0.2"], ["--beta is for --method dpo, ipo and kto"]),
        (["--method", "dpo", "--beta", "0"], ["--beta must be above 0"]),
        (["--method", "dpo", "--set", "trainer.beta=0.2"], ["trainer.beta", "--beta"]),
        (["--method", "ipo", "--set", "trainer.loss_type=[hinge]"], ["trainer.loss_type", "--method"]),
        (["--method", "dpo", "--set", "trainer.desirable_weight=2"], ["desirable_weight", "DPOConfig"]),
        (
            ["--method", "kto", "--batch-size", "2", "--set", "trainer.train_sampling_strategy=random"],
            ["train_sampling_strategy"],
        ),
        (["--method", "dpo", "--set", "trainer.precompute_ref_log_probs=true"], ["precompute_ref_log_probs"]),
    ],
)
def test_options_that_do_not_go_together(given: list[str], words: list[str], model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    ended = finetune("--model", model, "--dataset", rows, "--output", "out", *given, cwd=tmp_path, before=nothing_loads)
    assert_error(ended, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "rows", "words"),
    [
        ("dpo", [*PAIRS, {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}], ["rows.jsonl:17", "nothing to prefer"]),
        ("dpo", RATED, ["rows.jsonl:1", "lacks chosen"]),
        ("kto", PAIRS, ["rows.jsonl:1", "--method dpo learns from it"]),
        ("sft", PAIRS, ["rows.jsonl:1", "--method dpo learns from it"]),
        ("sft", RATED, ["rows.jsonl:1", "--method kto"]),
        (
            "dpo",
            [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "c"}],
            ["is a preference as text, but ", "rows.jsonl:1 is a preference as messages"],
        ),
        (
            "dpo",
            [*PAIRS, {**PAIRS[0], "prompt": [user("long " * 20)]}],
            ["rows.jsonl:17", "has nothing left to learn from"],
        ),
    ],
)
def test_rows_are_named(method: str, rows: list[Any], words: list[str], model: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = arguments(model, file, method, "--output", "out")
    ended = finetune(*given, cwd=tmp_path, before=nothing_loads)
    assert_error(ended, *words)
    assert not (tmp_path / "out").exists()


def test_the_rows_are_shown(model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    ended = finetune(*arguments(model, rows, "dpo", "--show-rows", "1"), cwd=tmp_path, before=nothing_loads)
    assert ended.status == 0, ended
    assert "chosen:" in ended.stdout
    assert "rejected:" in ended.stdout
    assert "0, I think." in ended.stdout
    shown = ended.stdout.partition("\n\n")[0]
    assert shown.count("0 + 0?") == 1  # the prompt is that of both answers
    assert re.match(r".*:1: chosen \d+ tokens, \d+ to learn from; rejected \d+ tokens, \d+ to learn from\n", shown)


def test_fields_of_the_method_are_handed_through(model: Path, tmp_path: Path) -> None:
    """TRL's other losses, by the field that DPOConfig has for them."""
    rows = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    run = partial(finetune, *arguments(model, rows, "dpo", "--max-steps", "2"), cwd=tmp_path)
    for name, given in (("plain", ()), ("hinge", ("--set", "trainer.loss_type=[hinge]"))):
        ended = run("--output", name, *given)
        assert ended.status == 0, ended
    assert losses(tmp_path / "plain")[1] == pytest.approx(0.6931, abs=1e-3)
    assert losses(tmp_path / "hinge")[1] == pytest.approx(1.0, abs=1e-3)
