"""Mistakes that need no library to be seen are answered before torch or Transformers is imported, by every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_fused import console
from tests.support import REPOSITORY, python_path

FINETUNE = ("finetune", "--model", "model", "--dataset", "chat.jsonl", "--output", "new")
QUANTIZE = ("quantize", "model", "new")
MERGE = ("merge", "model", "adapter", "new")
CONVERT_MODEL = ("convert", "model", "model", "new", "--to", "fused")
CONVERT_ADAPTER = ("convert", "adapter", "adapter", "new")
CONVERT_OPTIMIZER = ("convert", "optimizer", "state", "other", "--to", "fused")
GENERATE = ("generate", "model", "--prompt", "Hi")


@dataclass(frozen=True)
class Mistake:
    """Arguments of a command, and words of the line that it ends with."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]


def mistake(*arguments: str, says: str | tuple[str, ...]) -> Mistake:
    return Mistake(arguments, (says,) if isinstance(says, str) else says)


MISTAKES = [
    # finetune
    mistake("finetune", says="--model is missing"),
    mistake(*FINETUNE, "--output", "run", says=("--output run holds a run", "--resume", "--overwrite")),
    mistake(*FINETUNE, "--output", "taken", says="--output taken exists and is not the directory of a run"),
    mistake(*FINETUNE, "--output", "taken", "--overwrite", says="is not the directory of a run"),
    mistake(*FINETUNE, "--output", "chat.jsonl", says="--output chat.jsonl exists"),
    mistake(*FINETUNE, "--output", "no/new", says="there is no directory no"),
    mistake(*FINETUNE, "--dry-run", "--output", "run", says="--output run holds a run"),
    mistake(*FINETUNE, "--model", "./nowhere", says="--model ./nowhere is neither a directory nor a name"),
    mistake(*FINETUNE, "--model", "a/b/c", says="--model a/b/c is neither a directory nor a name"),
    mistake(*FINETUNE, "--model", "nowhere", says="--model nowhere is neither a directory nor a name"),
    mistake(*FINETUNE, "--model", "taken", says="taken/config.json is missing"),
    mistake(*FINETUNE, "--model", "broken", says="broken/config.json must be JSON"),
    mistake(*FINETUNE, "--model", "bare", says="--model bare has no weights"),
    mistake(*FINETUNE, "--model", "untyped", says="must be a JSON object with a model_type"),
    mistake(*FINETUNE, "--model", "gptoss", "--export", "per-expert", says=("--export per-expert", "moe-fused merge")),
    mistake(*FINETUNE, "--dataset", "nowhere.jsonl", says="--dataset nowhere.jsonl is missing"),
    mistake(*FINETUNE, "--dataset", "data/nowhere.parquet", says="--dataset data/nowhere.parquet is missing"),
    mistake(*FINETUNE, "--chat-template", "nowhere.jinja", says="--chat-template nowhere.jinja is missing"),
    mistake(*FINETUNE, "--config", "nowhere.yaml", says="--config nowhere.yaml is missing"),
    mistake(*FINETUNE, "--config", "gpus.yaml", says="gpus.yaml: gpus cannot be in a file of options, give --gpus on"),
    mistake(*FINETUNE, "--shard", says="--shard divides a model among several GPUs: add --gpus"),
    mistake(*FINETUNE, "--gpus", "2", "--show-rows", "1", says="--show-rows is for one process"),
    mistake("finetune", "--init", "new.yaml", "--gpus", "2", says="--init and --gpus exclude each other"),
    mistake(*FINETUNE, "--device", "gpu", says="--device gpu cannot be used here"),
    mistake(*FINETUNE, "--device", "cpu", "--cuda-graphs", says="--cuda-graphs: it needs a GPU"),
    mistake(*FINETUNE, "--device", "cpu", "--liger", says="--liger: Liger's kernels need a GPU"),
    mistake(*FINETUNE, "--learning-rate", "inf", says="--learning-rate must be a finite number, got inf"),
    mistake(*FINETUNE, "--memory-limit", "0", says="--memory-limit must be above 0, got 0"),
    mistake(*FINETUNE, "--weight-decay", "nan", says="--weight-decay must be a finite number, got nan"),
    mistake(*FINETUNE, "--sequence-length", "65", says="--sequence-length must be at most 64 for model, got 65"),
    mistake(*FINETUNE, "--seed", str(2**32), says="--seed must be below 2**32"),
    mistake(*FINETUNE, "--resume", says="new/finetune.yaml is missing, there is no run to go on with"),
    mistake(*FINETUNE, "--resume", "--overwrite", says="exclude each other"),
    mistake(*FINETUNE, "--allow-changed-data", says="--allow-changed-data is for a run that goes on"),
    mistake(*FINETUNE, "--allow-other-base", says="--allow-other-base is for a run that goes on"),
    mistake(*FINETUNE, "--drop-broken-checkpoints", says="--drop-broken-checkpoints is for a run that goes on"),
    mistake("finetune", "--resume", "--output", "run", "--seed", "4", says="--seed is 0 in run/finetune.yaml"),
    mistake("finetune", "--resume", "--output", "run", says=("checkpoint-4 lacks", "optimizer.pt", "--overwrite")),
    mistake(*FINETUNE, "--scheduler", "zigzag", says="--scheduler must be one of linear, cosine, "),
    mistake(
        *FINETUNE, "--packing", "tight", says="--packing must be one of auto, bfd, bfd_split, wrapped, none, got tight"
    ),
    mistake(*FINETUNE, "--epochs", "abc", says="--epochs must be a number, got abc"),
    mistake(*FINETUNE, "--batch-size", "1.5", says="--batch-size must be a whole number, got 1.5"),
    # generate
    mistake("generate", "--prompt", "Hi", says="MODEL"),
    mistake("generate", "nowhere", "--prompt", "Hi", says="MODEL nowhere is neither a directory nor a name"),
    mistake("generate", "taken", "--prompt", "Hi", says="MODEL taken has no config.json"),
    mistake("generate", "broken", "--prompt", "Hi", says="broken/config.json must be JSON"),
    mistake("generate", "bare", "--prompt", "Hi", says="MODEL bare has no weights"),
    mistake("generate", "packed", "--prompt", "Hi", "--load-in-4bit", says="MODEL packed is quantized already"),
    mistake(*GENERATE, "--prompt", " ", says="--prompt must not be empty"),
    mistake(*GENERATE, "--adapter", "nowhere", says="--adapter nowhere is neither"),
    mistake(*GENERATE, "--adapter", "model", says="--adapter model has no adapter_config.json"),
    mistake(*GENERATE, "--adapter", "broken-adapter", says="adapter_config.json must be JSON"),
    mistake(*GENERATE, "--adapter", "empty-adapter", says="--adapter empty-adapter has no weights"),
    mistake(*GENERATE, "--adapter", "no-adapter", says="adapter_config.json must hold a peft_type"),
    mistake(*GENERATE, "--chat", says="--chat needs a chat template, which the tokenizer of model does not have"),
    mistake(*GENERATE, "--device", "tpu9", says="--device tpu9 cannot be used here"),
    mistake(*GENERATE, "--device", "mps", says="--device mps is not served by the kernels"),
    mistake(*GENERATE, "--temperature", "inf", says="--temperature must be a finite number"),
    mistake(*GENERATE, "--top-p", "nan", says="--top-p"),
    mistake(*GENERATE, "--dtype", "int8", says="--dtype must be one of bfloat16, float16, float32, got int8"),
    mistake(*GENERATE, "--seed", str(2**64), says="--seed"),
    # quantize
    mistake("quantize", "nowhere", "new", says="MODEL nowhere is neither"),
    mistake("quantize", "model", "taken", says="taken exists: choose another path"),
    mistake("quantize", "model", "taken", "--overwrite", says="taken exists and has no config.json"),
    mistake("quantize", "model", "chat.jsonl", says="chat.jsonl exists and is not a directory"),
    mistake("quantize", "model", "no/new", says=("cannot create OUTPUT", "No such file")),
    mistake("quantize", "model", "model/new", says="source and target must be apart"),
    mistake("quantize", "packed", "new", says="MODEL packed is quantized already"),
    mistake("quantize", "broken", "new", says="broken/config.json must be JSON"),
    mistake("quantize", "bare", "new", says="MODEL bare has no weights"),
    mistake(*QUANTIZE, "--dry-run", "--device", "gpu", says="--device gpu cannot be used here"),
    mistake(
        *QUANTIZE,
        "--max-shard-size",
        "banana",
        says="--max-shard-size must be a number and KB, MB, GB or TB, such as 500MB or 5GB, got banana",
    ),
    mistake(*QUANTIZE, "--max-shard-size", "0GB", says=("--max-shard-size", "0GB")),
    mistake(
        *QUANTIZE,
        "--quant-type",
        "int4",
        says="--format must be one of nf4, fp4, mxfp4, nvfp4, per-expert, fused, got int4",
    ),
    # merge
    mistake("merge", "model", "adapter", "taken", says="taken exists: choose another path"),
    mistake("merge", "model", "adapter", "packed", says="packed exists: choose another path"),
    mistake("merge", "model", "nowhere", "new", says="ADAPTER nowhere is neither"),
    mistake("merge", "model", "broken-adapter", "new", says="adapter_config.json must be JSON"),
    mistake("merge", "model", "empty-adapter", "new", says="ADAPTER empty-adapter has no weights"),
    mistake("merge", "broken", "adapter", "new", says="broken/config.json must be JSON"),
    mistake("merge", "bare", "adapter", "new", says="MODEL bare has no weights"),
    mistake(*MERGE, "--keep-format", says="--keep-format is for models in 4 bits, and MODEL model is dense"),
    mistake(*MERGE, "--keep-format", "--dtype", "float16", says="--dtype is for dense results, and --keep-format"),
    mistake(*MERGE, "--max-shard-size", "5GiB", says="--max-shard-size"),
    mistake(*MERGE, "--device", "gpu", says="--device gpu"),
    mistake("merge", "model", "adapter", "no/new", says="cannot create OUTPUT"),
    # convert
    mistake("convert", "model", "model", "taken", "--to", "fused", says="taken exists: choose another path"),
    mistake("convert", "model", "nowhere", "new", "--to", "fused", says="SOURCE nowhere is not a directory"),
    mistake("convert", "model", "broken", "new", "--to", "fused", says="broken/config.json must be JSON"),
    mistake("convert", "model", "bare", "new", "--to", "fused", says="SOURCE bare has no weights"),
    mistake("convert", "model", "packed", "new", "--to", "fused", "--dtype", "float16", says="must be dequantized"),
    mistake(*CONVERT_MODEL, "--dequantize", says="has no 4-bit tensors that could be dequantized"),
    mistake(*CONVERT_MODEL, "--max-shard-size", "-1GB", says="--max-shard-size"),
    mistake(*CONVERT_MODEL[:2], "model", "no/new", "--to", "fused", says="cannot create TARGET"),
    mistake("convert", "model", "model", "new", says="--to"),
    mistake("convert", "adapter", "nowhere", "new", says="SOURCE nowhere is not a directory"),
    mistake("convert", "adapter", "model", "new", says="SOURCE model has no adapter_config.json"),
    mistake("convert", "adapter", "empty-adapter", "new", says="has no adapter_model.safetensors"),
    mistake("convert", "adapter", "adapter", "taken", says=("TARGET taken exists", "--overwrite")),
    mistake("convert", "adapter", "adapter", "adapter", "--overwrite", says="is SOURCE or holds it"),
    mistake("convert", "adapter", "adapter", "no/new", says="cannot create TARGET"),
    mistake(*CONVERT_ADAPTER, "--to", "gguf", says=("--to", "gguf")),
    mistake("convert", "optimizer", "nowhere", "other", says="SOURCE nowhere is not a directory"),
    mistake("convert", "optimizer", "model", "other", says="SOURCE model has no optimizer.pt or optimizer.bin"),
    mistake("convert", "optimizer", "state", "nowhere", "--to", "fused", says="TARGET nowhere is not a directory"),
    mistake(
        "convert", "optimizer", "state", "state", "--to", "fused", says=("TARGET has an optimizer.pt", "--overwrite")
    ),
    mistake("convert", "optimizer", "state", "other", says="--to must say how the run to be resumed has its experts"),
    mistake("convert", "optimizer", "state", "other", "--to", "gguf", says="--to gguf is no layout of a model"),
    mistake(*CONVERT_OPTIMIZER, "--parameters", "no.txt", says=("No such file", "no.txt")),
    # the rest
    mistake("push", "nowhere", "org/name", says="DIRECTORY nowhere is missing"),
    mistake("push", "chat.jsonl", "org/name", says="DIRECTORY chat.jsonl is not a directory"),
    mistake("push", "run", "org/name", says=("run has no adapter_config.json", "--checkpoints")),
    mistake("push", "taken", "org/name", "--checkpoints", says="taken has no checkpoints"),
    mistake("push", "adapter", "name", says="ID must be an organization or user and a name, as org/name, got 'name'"),
    mistake("tune", "--hidden", "64", says="--hidden does not make a layer alone"),
    mistake("tune", "--model", "nowhere", says="--model nowhere is neither"),
    mistake("tune", "--model", "broken", says="broken/config.json must be JSON"),
    mistake("tune", "--seconds", "inf", says="--seconds must be a finite number"),
    mistake("tune", "--output", "chat.jsonl", says="--output chat.jsonl exists"),
    mistake("bench", "--layer", "huge", says="--layer must be one of"),
    mistake("bench", "--model", "nowhere", says="--model nowhere is neither"),
    mistake("bench", "--device", "gpu", says="--device gpu cannot be used here"),
    mistake("bench", "--device", "xpu", says="--device xpu cannot be timed yet"),
    mistake("bench", "--device", "cpu", says="--device cpu takes minutes for qwen3-30b-a3b"),
    mistake("bench", "--seconds", "nan", says="--seconds"),
    mistake("bench", "--seconds", "0", says="--seconds must be "),
    mistake("bench", "--tokens", "1", "--tokens", "0", says=("--tokens must be at least 1, got 0")),
    mistake("bench", "--tokens", "many", says="--tokens must be a whole number, got many"),
    mistake("doctor", "--jsn", says="--jsn"),
    mistake("demo", "--output", "taken", says="taken exists and was not written by this demo"),
    mistake("demo", "--output", "no/new", says="cannot create --output"),
    mistake("demo", "--device", "gpu", says="--device gpu cannot be used here"),
    mistake("demo", "--steps", "0", says="--steps"),
    mistake("unheard-of", says="unheard-of"),
]

# All of them in one process: what one of them imports is held against that one.
_PROGRAM = """
import contextlib, io, json, os, sys
from moe_fused.__main__ import main
from moe_fused.demo.__main__ import main as demo

HEAVY = {
    "accelerate", "bitsandbytes", "datasets", "huggingface_hub", "matplotlib", "numpy", "peft", "safetensors", "tokenizers",
    "torch", "transformers", "triton", "trl",
}

def tree():
    return sorted(os.path.join(place, name) for place, *names in os.walk(".") for name in sum(names, []))

results = []
for arguments in json.load(sys.stdin):
    before, files = HEAVY & sys.modules.keys(), tree()
    command, *rest = arguments
    sys.argv = ["moe-fused", *(rest if command == "demo" else arguments)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = demo() if command == "demo" else main()
    heavy = sorted(HEAVY & sys.modules.keys() - before)
    results.append([status, out.getvalue(), err.getvalue(), heavy, sorted(set(tree()) ^ set(files))])
json.dump(results, sys.__stdout__)
"""


def _prepare(directory: Path) -> None:
    def write(path: str, content: object) -> None:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / path).write_text(text, encoding="utf-8")

    for name, config in {
        "model": {"model_type": "qwen3_moe", "max_position_embeddings": 64},
        "packed": {"model_type": "qwen3_moe", "quantization_config": {"load_in_4bit": True}},
        "gptoss": {"model_type": "gpt_oss"},
        "broken": "{",
        "untyped": {},
        "bare": {"model_type": "qwen3_moe"},
    }.items():
        write(f"{name}/config.json", config)
        if name != "bare":
            write(f"{name}/model.safetensors", "")
    for name, config in {
        "adapter": {"peft_type": "LORA"},
        "broken-adapter": "{",
        "empty-adapter": {"peft_type": "LORA"},
        "no-adapter": {},
    }.items():
        write(f"{name}/adapter_config.json", config)
        if name != "empty-adapter":
            write(f"{name}/adapter_model.safetensors", "")
    write("state/config.json", {"model_type": "qwen3_moe"})
    write("state/optimizer.pt", "")
    (directory / "other").mkdir()
    write("taken/thesis.txt", "years of work")
    write("chat.jsonl", {"text": "words"})
    write("gpus.yaml", {"gpus": 2})
    write("run/finetune.yaml", {"model": "model", "dataset": "chat.jsonl", "output": "run"})
    write("run/checkpoints/checkpoint-4/trainer_state.json", {"global_step": 4})


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    return {**kept, "PYTHONPATH": python_path(REPOSITORY)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[Mistake, list[object]]:
    directory = tmp_path_factory.mktemp("startup")
    _prepare(directory)
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        cwd=directory,
        env=_environment(),
        input=json.dumps([mistake.arguments for mistake in MISTAKES]),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(zip(MISTAKES, json.loads(ended.stdout), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: " ".join(mistake.arguments))
def test_answered_at_once(mistake: Mistake, answers: dict[Mistake, list[object]]) -> None:
    status, out, err, heavy, changed = answers[mistake]
    assert status in (1, 2), err
    line = str(err).splitlines()[-1]
    assert line.startswith("error: "), err
    for word in mistake.words:
        assert word in line
    assert out == ""
    assert not heavy
    assert not changed


def test_errors_that_nobody_wrote_for_users(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors whose message alone says nothing are named by their kind, too."""

    def fail(**_: object) -> None:
        raise KeyError("text")

    monkeypatch.setattr(console, "raise_on_signals", lambda: None)
    assert console.run(lambda: fail) == 1
    assert capsys.readouterr().err == "error: unexpected KeyError: 'text' (--traceback shows where)\n"


def test_takes_no_time(tmp_path: Path) -> None:
    """In a process of its own, as a user sees it; the time is that of the processor, whatever else the machine does."""
    _prepare(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_fused", "merge", "model", "adapter", "taken"],
        cwd=tmp_path,
        env=_environment(),
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert b"taken exists" in process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 1
    assert usage.ru_utime + usage.ru_stime < 2


@pytest.mark.parametrize(
    "message, line",
    [
        ("Invalid value for '--epochs': 'abc' is not a valid float.", "--epochs must be a number, got abc"),
        ("Invalid value for '--seed': 'x' is not a valid integer.", "--seed must be a whole number, got x"),
        (
            "Invalid value for '--chat' / '--no-chat': 'x' is not a valid boolean.",
            "--chat must be true or false, got x",
        ),
        (
            "Invalid value for '--to': 'c' is not one of 'fused', 'original'.",
            "--to must be one of fused, original, got c",
        ),
        ("Invalid value for '--tokens': 0 is not in the range x>=1.", "--tokens must be at least 1, got 0"),
        (
            "Invalid value for '--top-p': 2.0 is not in the range 0<=x<=1.",
            "--top-p must be in the range 0<=x<=1, got 2.0",
        ),
        ("Missing argument 'MODEL'.", "Missing argument 'MODEL'. (see --help)"),
    ],
)
def test_words_of_a_typer_without_pydantic(message: str, line: str) -> None:
    assert console._describe_usage(message, ValueError()) == line
