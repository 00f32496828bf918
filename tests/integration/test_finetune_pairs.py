"""Options of ``moe-fused finetune`` two at a time: each pair trains, or is refused before a model is loaded.

``VALUES`` has the values that are tried, and ``NO_PAIRS`` the options that need no pairs, with the reason. A new option must
be in one of them. Each run of two steps has many options, chosen so that every pair is in one of the runs. All runs are in
one process, so that nothing is imported anew.
"""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

from moe_fused.finetune.options import DEFAULTS, Options

from .finetuning import _PRELOADED, chats, evaluations, leftovers, losses, nothing_loads, save_model, write_jsonl
from .test_finetune_preferences import PAIRS, RATED
from .test_finetune_render import MARKED

STEPS = 2
Choice = tuple[str, Any]

# The values of each option that are tried, none of them its default.
VALUES: dict[str, tuple[Any, ...]] = {
    "eval_share": (0.25,),
    "eval_dataset": ("eval.jsonl",),
    "eval_steps": (1,),
    "keep_best": (True,),
    "early_stopping": (2,),
    "report_to": ("tensorboard",),
    "trainer": ({"neftune_noise_alpha": 5},),
    "lora": ({"use_rslora": True},),
    "packing": ("none", "bfd", "bfd_split", "wrapped"),
    "assistant_only_loss": (True,),
    "export": ("per-expert", "original"),
    "quantization": ("none", "fp4", "mxfp4"),
    "expert_rank": (0,),
    "attention_rank": (0,),
    "attention_modules": (["q_proj"],),
    "router_rank": (2,),
    "router_aux_loss": (0.01,),
    "lora_dropout": (0.1,),
    "gradient_checkpointing": (False,),
    "keep_attention": ("device",),
    "attn": ("eager",),
    "batch_size": (2,),
    "skip_bad_rows": (True,),
    "method": ("dpo", "kto"),
    "beta": (0.3,),
    "dataset": (["rows.jsonl=2", "more.jsonl=1"],),
    "streaming": (True,),
    "modules_to_save": (["lm_head"],),
}
# What an option needs beside it, if the run does not have it anyway.
NEEDS_EVALUATION = ("eval_steps", "keep_best", "early_stopping")
NEEDS_PREFERENCES = ("beta",)
# Pairs of options that exclude each other, with words of the error, or None if one has no effect beside the other.
EXCLUDED: dict[frozenset[str], str | None] = {
    frozenset({"eval_share", "eval_dataset"}): "--eval-dataset and --eval-share exclude each other",
    frozenset({"router_rank", "lora_dropout"}): "--lora-dropout is not possible with --router-rank",
    frozenset({"expert_rank", "export"}): "is a layout of adapters on experts, but --expert-rank is 0",
    frozenset({"expert_rank", "attention_rank"}): "there is nothing to train",
    frozenset({"attention_rank", "attention_modules"}): None,
    frozenset({"streaming", "eval_share"}): "--eval-share is not possible with --streaming",
    frozenset(
        {"keep_attention", "gradient_checkpointing"}
    ): "--keep-attention device is not possible with --no-gradient",
    frozenset({"keep_attention", "attn"}): "--keep-attention device is not possible with --attn eager",
    frozenset({"method", "assistant_only_loss"}): "--assistant-only-loss is not for --method",
    frozenset({"method", "lora_dropout"}): "--lora-dropout is not possible with --method",
    frozenset({"method", "modules_to_save"}): "--modules-to-save is not possible with --method",
    frozenset({"method", "streaming"}): "--streaming is not possible with --method",
    # What --method excludes, --beta excludes, too, because it needs a method.
    frozenset({"beta", "assistant_only_loss"}): "--assistant-only-loss is not for --method",
    frozenset({"beta", "lora_dropout"}): "--lora-dropout is not possible with --method",
    frozenset({"beta", "modules_to_save"}): "--modules-to-save is not possible with --method",
    frozenset({"beta", "streaming"}): "--streaming is not possible with --method",
}
# The same for single values.
EXCLUDED_VALUES = {
    (name, packing): "is not possible with --method"
    for name in ("method", "beta")
    for packing in ("bfd", "bfd_split", "wrapped")
}
_NAMES = "it names what is read or written"
_NUMBER = "it is a number that nothing else depends on"
_GPU = "it needs a GPU: tests/integration/test_finetune_gpu.py"
_HUB = "it needs the Hub: test_finetune_hub.py"
_SHARED = "the model of these runs has no shared experts: test_finetune_adapters.py"
NO_PAIRS: dict[str, str] = {
    "model": _NAMES, "adapter": "test_finetune_start.py has its pairs",
    "output": _NAMES, "revision": _NAMES, "dataset_config": _NAMES, "split": _NAMES,
    "text_field": _NAMES, "eval_split": _NAMES, "chat_template": "all runs have one", "device": "all runs are on a CPU",
    "dtype": "on a CPU, others than float32 are slow", "adapter_dtype": "it follows dtype", "liger": _GPU,
    "cuda_graphs": _GPU, "memory_limit": _GPU, "sequence_length": _NUMBER, "gradient_accumulation": _NUMBER,
    "attention_alpha": _NUMBER, "expert_alpha": _NUMBER, "epochs": "all runs have --max-steps", "max_steps": _NUMBER,
    "learning_rate": _NUMBER, "scheduler": "TRL alone reads it", "warmup": _NUMBER, "weight_decay": _NUMBER,
    "max_grad_norm": _NUMBER, "optimizer": "TRL alone reads it", "seed": _NUMBER, "save_steps": _NUMBER,
    "keep_checkpoints": _NUMBER, "log_steps": _NUMBER, "push_to_hub": _HUB, "private": _HUB, "push_checkpoints": _HUB,
    "shard": "all runs have one process", "shared_expert_rank": _SHARED, "shared_expert_alpha": _SHARED,
}  # fmt: skip


def choices() -> list[Choice]:
    return [(name, value) for name, values in VALUES.items() for value in values]


def pairs() -> Iterator[tuple[int, int]]:
    """The pairs of choices of different options, by their indices."""
    every = choices()
    return ((i, j) for i, j in itertools.combinations(range(len(every)), 2) if every[i][0] != every[j][0])


def compatible(first: Choice, second: Choice) -> bool:
    return first[0] != second[0] and refusal_of(first, second) == ""


def refusal_of(first: Choice, second: Choice) -> str | None:
    """Words of the error of two choices; none if they are compatible, and None if one has no effect beside the other."""
    for one, other in ((first, second), (second, first)):
        if other[0] == "packing" and (one[0], other[1]) in EXCLUDED_VALUES:
            return EXCLUDED_VALUES[one[0], other[1]]
    return EXCLUDED.get(frozenset({first[0], second[0]}), "")


def covering() -> list[dict[str, Any]]:
    """Options of runs, so that each compatible pair is in one of them. Each run takes the choices with most new pairs."""
    every = choices()
    left = {(i, j) for i, j in pairs() if compatible(every[i], every[j])}
    runs = []
    while left:
        chosen = list(min(left))
        while True:
            free = [i for i in range(len(every)) if all(compatible(every[i], every[j]) for j in chosen)]
            news = {i: sum((min(i, j), max(i, j)) in left for j in chosen) for i in free}
            if not any(news.values()):
                break
            chosen.append(max(news, key=lambda i: news[i]))
        left -= {(min(pair), max(pair)) for pair in itertools.combinations(chosen, 2)}
        runs.append(dict(every[i] for i in sorted(chosen)))
    return runs


def test_every_option_is_in_pairs_or_has_a_reason() -> None:
    assert sorted([*VALUES, *NO_PAIRS]) == sorted(DEFAULTS)
    for name, value in choices():
        assert value != DEFAULTS[name]
    assert all(names <= VALUES.keys() for names in EXCLUDED)


def test_the_runs_have_every_pair() -> None:
    every, runs = choices(), covering()
    for i, j in pairs():
        together = [run for run in runs if all(run.get(name) == value for name, value in (every[i], every[j]))]
        assert bool(together) == compatible(every[i], every[j]), (every[i], every[j])


# What runs in the process of its own.


def _start(given: dict[str, Any], output: str) -> None:
    from moe_fused.finetune.precheck import precheck
    from moe_fused.finetune.run import run

    if any(name in given for name in NEEDS_EVALUATION) and not {"eval_share", "eval_dataset"} & given.keys():
        given = {**given, "eval_dataset": "eval.jsonl"}
    if any(name in given for name in NEEDS_PREFERENCES):
        given = {"method": "dpo", **given}
    if given.get("method") == "kto":
        given = {**given, "batch_size": 2}
    # Each method has rows of its own.
    of_method = {"dpo": "pairs-", "kto": "rated-"}.get(given.get("method", ""), "")
    given = {"dataset": "rows.jsonl", **given}
    names = given["dataset"]
    given["dataset"] = [of_method + name for name in names] if isinstance(names, list) else of_method + names
    if "eval_dataset" in given:
        given["eval_dataset"] = of_method + given["eval_dataset"]
    options = Options(
        model="model", output=output, chat_template="marked.jinja", device="cpu", max_steps=STEPS,
        sequence_length=64, gradient_accumulation=1, **given,
    )  # fmt: skip
    run(options, precheck(options))


def _problem(given: dict[str, Any], output: Path) -> str | None:
    try:
        _start(given, output.name)
    except Exception:  # noqa: BLE001 - any is a problem, and the next run comes
        return traceback.format_exc()
    evaluated = bool({"eval_share", "eval_dataset", *NEEDS_EVALUATION} & given.keys())
    if list(losses(output)) != [1, STEPS] or bool(evaluations(output)) != evaluated or leftovers(output):
        return f"losses {losses(output)}, evaluations {evaluations(output)}, left over {leftovers(output)}"
    if not (output / "adapter_model.safetensors").is_file():
        return "there is no adapter"
    return None


def _refusal(given: dict[str, Any], output: Path) -> str:
    try:
        _start(given, output.name)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def _all(directory: Path, runs: list[dict[str, Any]], refused: list[dict[str, Any]]) -> None:
    gc.freeze()
    os.chdir(directory)
    sys.stdout = sys.stderr = open("log", "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    from moe_fused.finetune import results

    results.draw_loss = lambda *_, **__: None  # half of the time of so short a run, and no option changes it
    found = [_problem(given, directory / f"out-{number}") for number, given in enumerate(runs)]
    nothing_loads()
    words = [_refusal(given, directory / f"refused-{number}") for number, given in enumerate(refused)]
    (directory / "found.json").write_text(json.dumps([found, words]))


@pytest.mark.slow
def test_pairs_train_or_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    for name, number in {"rows": 8, "more": 6, "eval": 3}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", chats(number))
        write_jsonl(tmp_path / f"pairs-{name}.jsonl", PAIRS[:number])
        write_jsonl(tmp_path / f"rated-{name}.jsonl", RATED[:number])
    (tmp_path / "marked.jinja").write_text(MARKED)
    every, runs = choices(), covering()
    apart = [dict((every[i], every[j])) for i, j in pairs() if not compatible(every[i], every[j])]
    words_of = [refusal_of(*given.items()) for given in apart]
    refused = [given for given, expected in zip(apart, words_of, strict=True) if expected is not None]
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_all, args=(tmp_path, runs, refused))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    found, words = json.loads((tmp_path / "found.json").read_text())
    problems = [f"{given}: {problem}" for given, problem in zip(runs, found, strict=True) if problem is not None]
    assert not problems, "\n".join(problems)
    for given, said in zip(refused, words, strict=True):
        assert str(refusal_of(*given.items())) in said, given
    assert not list(tmp_path.glob("refused-*"))
