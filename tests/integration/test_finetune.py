"""``moe-fused finetune``: what a run makes of chats and text, what it refuses, and with which words."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_fused.finetune.card import card
from moe_fused.finetune.facts import Facts
from moe_fused.finetune.next_commands import print_next
from moe_fused.finetune.options import HELP, MAPPINGS, Options, flag
from moe_fused.finetune.resolve import ModelSetup, set_up
from moe_fused.integrations.quantizer.packed_experts import get_packed, packed_modules
from tests.support import REPOSITORY, python_path

from .finetuning import (
    OPTIONS,
    STEPS,
    Command,
    Ended,
    assert_error,
    chats,
    finetune,
    leftovers,
    losses,
    save_model,
    write_jsonl,
)
from .models import QWEN3_MOE

RESULTS = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "finetune.yaml", "log.jsonl",
    "loss.png", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip

# What a run chooses for itself here.
DTYPE, OPTIMIZER = ("bfloat16", "paged_adamw_8bit") if torch.cuda.is_available() else ("float32", "adamw_torch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def chat_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A run over chats with everything at its default but sizes."""
    cwd = tmp_path_factory.mktemp("chat")
    write_jsonl(cwd / "chat.jsonl", chats())
    ended = finetune("--model", model, "--dataset", "chat.jsonl", "--output", "out", *OPTIONS, cwd=cwd)
    assert ended.status == 0, ended
    return cwd / "out", ended


def test_leaves_an_adapter_and_what_goes_with_it(chat_run: tuple[Path, Ended]) -> None:
    output, _ = chat_run
    assert {path.name for path in output.iterdir() if path.is_file()} == RESULTS
    assert not leftovers(output)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert sorted(losses(output)) == list(range(1, STEPS + 1))
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "| steps | 8 |" in card
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"} <= records[-1].keys()
    assert records[-1]["tokens"] > records[0]["tokens"] > 0


def test_says_what_it_needs_and_what_comes_next(chat_run: tuple[Path, Ended]) -> None:
    _, ended = chat_run
    for words in (
        "experts",
        "predicted peak",
        "trainable parameters",
        "64 tokens to a step",
        f"step {STEPS}/{STEPS}: loss",
    ):
        assert words in ended.stderr


def test_the_next_commands_run_as_printed(chat_run: tuple[Path, Ended]) -> None:
    output, ended = chat_run
    adapter, following = ended.stdout.split("next:")
    assert adapter == "adapter: out\n"
    commands = [shlex.split(line) for line in following.splitlines()[1:]]
    assert [command[1] for command in commands] == ["generate", "convert", "merge"]
    for program, *arguments in commands:
        assert program == "moe-fused"
        if arguments[0] == "generate":
            arguments += ["--max-new-tokens", "2"]
        following_ended = Command(*arguments, cwd=output.parent).end()
        assert following_ended.status == 0, following_ended
    assert (output.parent / "out-per-expert" / "adapter_config.json").is_file()
    assert (output.parent / "out-merged" / "config.json").is_file()


def setup_of(options: Options, quantization_config: object) -> ModelSetup:
    """The record of a run with a model whose checkpoint is quantized so."""
    config = QWEN3_MOE.build().config
    if quantization_config is not None:
        config.quantization_config = quantization_config
    return set_up(options, config, torch.device("cpu"))


@pytest.mark.parametrize("quantization_config, in_4bit", [(None, True), ({"load_in_4bit": True}, False)])
def test_next_command_quantizes_what_is_not_in_4_bits(
    quantization_config: object, in_4bit: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    print_next(setup_of(Options(model="m", dataset="d.jsonl", output="o"), quantization_config))
    generate = capsys.readouterr().out.splitlines()[2]
    assert generate.split()[:3] == ["moe-fused", "generate", "m"]
    assert ("--load-in-4bit" in generate) is in_4bit


def test_settles_what_was_left_open(chat_run: tuple[Path, Ended]) -> None:
    options = yaml.safe_load((chat_run[0] / "finetune.yaml").read_text())
    assert {name: options[name] for name in ("packing", "dtype", "adapter_dtype", "optimizer")} == {
        "packing": "bfd",
        "dtype": DTYPE,
        "adapter_dtype": DTYPE,
        "optimizer": OPTIMIZER,
    }


def test_learns(chat_run: tuple[Path, Ended]) -> None:
    loss = losses(chat_run[0])
    assert loss[STEPS] < loss[1] - 0.5


@pytest.mark.usefixtures("enabled")
def test_adapter_is_on_attention_and_experts_and_loads(chat_run: tuple[Path, Ended], model: Path) -> None:
    output, _ = chat_run
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="moe_fused")
    tokens = AutoTokenizer.from_pretrained(output)("1 + 1?", return_tensors="pt")
    with torch.no_grad():
        before = base(**tokens).logits
        adapted = PeftModel.from_pretrained(base, output)
        after = adapted(**tokens).logits
    assert (after - before).abs().max() > 0.01
    ranks = {
        name.split(".lora_")[0].rpartition(".")[2]: module.shape
        for name, module in adapted.named_parameters()
        if ".lora_A." in name
    }
    assert ranks["q_proj"][0] == 16
    assert ranks["experts"][0] == 4 * 8  # of four experts
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 32
    assert set(config["alpha_pattern"].values()) == {16}


def python_of(card: str) -> str:
    """What a card says how to load, from beside the directory of the adapter."""
    return card.partition("```python\n")[2].partition("```")[0]


@pytest.mark.usefixtures("enabled")
def test_card_loads_what_was_trained(chat_run: tuple[Path, Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    output, _ = chat_run
    monkeypatch.chdir(output.parent)
    loaded: dict[str, Any] = {}
    exec(python_of((output / "README.md").read_text()), loaded)
    assert isinstance(loaded["model"], PeftModel)
    (experts,) = (module for _, module in packed_modules(loaded["model"]))
    form = get_packed(experts, "down_proj").format
    assert (form.quant_type, form.double_quant, form.dtype) == ("nf4", True, getattr(torch, DTYPE))


@pytest.mark.parametrize("quantizes", [False, True])
def test_card_quantizes_what_the_run_did(quantizes: bool) -> None:
    options = Options(model="org/m", dataset="d", dtype="bfloat16", quantization="fp4", revision="v2")
    text = card(setup_of(options, None if quantizes else {"load_in_4bit": True}), Facts({}, {}, {}, {}))
    (call,) = (
        node
        for node in ast.walk(ast.parse(python_of(text)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "AutoModelForCausalLM.from_pretrained"
    )
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    expected = {"revision": "'v2'", "dtype": "torch.bfloat16", "experts_implementation": "'moe_fused'"}
    assert given == expected | ({"quantization_config": "quantization"} if quantizes else {})
    assert ('bnb_4bit_quant_type="fp4"' in text) is ("BitsAndBytesConfig" in text) is quantizes


def test_text_and_yaml_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\ndataset: some.txt\noutput: elsewhere\nsequence-length: 64\nlearning_rate: 1e-2\n"
        "gradient_accumulation: 2\nexpert_rank: 0\nattention_modules: [q_proj, v_proj]\nmax_steps: 9\nquantization: none\n"
    )
    ended = finetune("--config", "run.yaml", "--output", "out", "--max-steps", "2", cwd=tmp_path)
    assert ended.status == 0, ended
    assert not (tmp_path / "elsewhere").exists()
    assert "packing bfd_split" in ended.stderr
    assert sorted(losses(tmp_path / "out")) == [1, 2]
    options = yaml.safe_load((tmp_path / "out" / "finetune.yaml").read_text())
    assert (options["max_steps"], options["learning_rate"], options["attention_modules"]) == (
        2,
        0.01,
        ["q_proj", "v_proj"],
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert not config["target_parameters"]


def test_prompts_and_completions_without_packing(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(4)]
    write_jsonl(tmp_path / "sums.jsonl", rows)
    ended = finetune(
        "--model", model, "--dataset", "sums.jsonl", "--output", "out", "--packing", "none", "--batch-size", "2",
        "--gradient-accumulation", "1", "--no-gradient-checkpointing", "--export", "per-expert", cwd=tmp_path,
    )  # fmt: skip
    assert ended.status == 0, ended
    assert sorted(losses(tmp_path / "out")) == [1, 2]
    exported = load_file(tmp_path / "out" / "per-expert" / "adapter_model.safetensors")
    assert any(".experts.3.gate_proj.lora_A" in name for name in exported)


def test_routers_are_trained_if_asked_for(chat_run: tuple[Path, Ended], model: Path, tmp_path: Path) -> None:
    def trained(output: Path) -> set[str]:
        return {
            name.split(".lora_")[0].partition("layers.0.")[2]
            for name in load_file(output / "adapter_model.safetensors")
        }

    write_jsonl(tmp_path / "chat.jsonl", chats())
    arguments = ("--model", model, "--dataset", "chat.jsonl", "--output", "out", *OPTIONS, "--max-steps", "2")
    arguments += ("--lora-dropout", "0")
    arguments += ("--router-rank", "2", "--router-aux-loss", "0.01", "--export", "original")
    ended = finetune(*arguments, cwd=tmp_path)
    assert ended.status == 0, ended
    assert trained(tmp_path / "out") - trained(chat_run[0]) == {"mlp.gate"}
    exported = load_file(tmp_path / "out" / "original" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in exported.items() if ".gate.lora_A" in name} == {2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is here")
def test_a_gpu_that_is_not_here_can_be_planned_for(model: Path, tmp_path: Path) -> None:
    """A dry run plans for it, as the tables of the documentation do. A real run is refused."""
    arguments = ("--model", model, "--dataset", write_jsonl(tmp_path / "chats.jsonl", chats(6)), "--output", "out")
    planned = finetune(*arguments, "--dry-run", "--device", "cuda", cwd=tmp_path)
    assert planned.status == 0, planned
    assert "CUDA context" in planned.stderr
    assert "time: unknown on a GPU that is not here" in planned.stderr
    ours = finetune(*arguments, "--dry-run", cwd=tmp_path)
    assert "note: this is the plan for the CPU; --device cuda plans for an NVIDIA GPU" in ours.stderr
    assert "CUDA context" not in ours.stderr
    limited = finetune(*arguments, "--dry-run", "--device", "cuda", "--memory-limit", "0.65", cwd=tmp_path)
    assert limited.status == 1
    assert "GiB of GPU memory" in limited.stderr
    real = finetune(*arguments, "--device", "cuda", cwd=tmp_path)
    assert real.status == 1
    assert "--device cuda cannot be used here" in real.stderr


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", chats())
    ended = finetune("--model", model, "--dataset", "chat.jsonl", "--output", "out", "--dry-run", cwd=tmp_path)
    assert ended.status == 0, ended
    assert "predicted peak" in ended.stderr
    assert "128 tokens" not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_named_and_can_be_left_out(model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", [*chats(4), "{not json", *chats(4)])
    arguments = ("--model", model, "--dataset", "chat.jsonl", "--output", "out", *OPTIONS, "--max-steps", "1")
    assert_error(finetune(*arguments, cwd=tmp_path), "chat.jsonl:5 is not JSON", "--skip-bad-rows")
    assert not (tmp_path / "out").exists()
    ended = finetune(*arguments, "--skip-bad-rows", cwd=tmp_path)
    assert ended.status == 0, ended
    assert "left out: chat.jsonl:5 is not JSON" in ended.stderr


# --- refusals


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", ""], ["--model is missing"]),
        (["--model", "./nowhere"], ["--model ./nowhere is neither a directory nor a name"]),
        (["--dataset", "nowhere.jsonl"], ["--dataset nowhere.jsonl is missing"]),
        (["--dataset", "chat.docx"], ["--dataset", ".jsonl", "chat.docx"]),
        (["--dataset", "empty.jsonl"], ["empty.jsonl has no row"]),
        (["--output", "no/such/place"], ["--output", "no directory", "no/such"]),
        (["--output", "chat.jsonl"], ["--output chat.jsonl exists"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--config", "broken.yaml"], ["broken.yaml must be YAML"]),
        (["--config", "list.yaml"], ["list.yaml must map options"]),
        (["--config", "unknown.yaml"], ["unknown option learnin_rate", "did you mean learning_rate?"]),
        (["--config", "type.yaml"], ["epochs must be a number", "'many'"]),
        (["--config", "choice.yaml"], ["quantization must be one of auto, nf4, fp4, mxfp4, nvfp4, none", "int4"]),
        (["--learning-rate", "0"], ["--learning-rate must be above 0"]),
        (["--batch-size", "0"], ["--batch-size must be at least 1"]),
        (["--lora-dropout", "1"], ["--lora-dropout must be in [0, 1)"]),
        (["--adapter-dtype", "float16"], ["--adapter-dtype cannot be float16"]),
        (["--attention-rank", "0", "--expert-rank", "0"], ["--attention-rank", "nothing to train"]),
        (["--attention-modules", "query"], ["--attention-modules", "no linear layer query", "q_proj"]),
        (["--sequence-length", "500"], ["--sequence-length must be at most 128"]),
        (["--memory-limit", "0.0001"], ["GPU memory", "--memory-limit", "0.10 MiB"]),
        (["--device", "cuda"], ["--device cuda"]),
        (["--liger"], ["--liger", "GPU"]),
        (["--router-rank", "2", "--lora-dropout", "0.1"], ["--lora-dropout", "--router-rank"]),
        (["--export", "original", "--expert-rank", "0"], ["--export original", "--expert-rank is 0"]),
        (["--chat-template", "nowhere.jinja"], ["nowhere.jinja"]),
        (["--resume"], ["--resume", "no run to go on with"]),
        (["--resume", "--overwrite"], ["--resume and --overwrite exclude each other"]),
        (["--assistant-only-loss", "--dataset", "text.txt"], ["--assistant-only-loss", "is plain text"]),
    ],
    ids=" ".join,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="refusals of a machine without a GPU")
def test_refuses(arguments: list[str], words: list[str], model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", chats(2))
    for name, content in {
        "empty.jsonl": "\n",
        "chat.docx": "x",
        "text.txt": "text",
        "broken.yaml": "a: [",
        "list.yaml": "- a",
        "unknown.yaml": "learnin_rate: 1",
        "type.yaml": "epochs: many",
        "choice.yaml": "quantization: int4",
    }.items():
        (tmp_path / name).write_text(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    ended = finetune("--model", model, "--dataset", "chat.jsonl", "--output", "out", *arguments, cwd=tmp_path)
    assert_error(ended, *words)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".std")) == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lerning-rate", "1"], ["--lerning-rate", "--learning-rate"]),
        (["--scheduler", "zigzag"], ["--scheduler", "zigzag", "cosine"]),
        (["--batch-size", "many"], ["--batch-size", "must be a whole number, got many"]),
    ],
    ids=" ".join,
)
def test_wrong_words_on_the_command_line(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    assert_error(finetune(*arguments, cwd=tmp_path), *words, status=2)


def test_memory_that_is_too_little_is_refused_with_advice(model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", chats(2))
    arguments = ("--model", model, "--dataset", "chat.jsonl", "--output", "out")
    arguments += ("--batch-size", "64", "--device", "cpu")
    limit = 0.30  # GiB, of which 0.25 are kept free
    ended = finetune(*arguments, "--memory-limit", str(limit), cwd=tmp_path)
    assert_error(ended, "0.30 GiB is the --memory-limit", "with --batch-size 1 it would need 0.2")
    ended = finetune(*arguments, "--batch-size", "1", "--memory-limit", str(limit), "--dry-run", cwd=tmp_path)
    assert ended.status == 0, ended


def test_a_run_is_not_written_over(chat_run: tuple[Path, Ended], model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", chats())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    arguments = ("--model", model, "--dataset", "chat.jsonl", *OPTIONS, "--max-steps", "1")
    for overwrite in ((), ("--overwrite",)):
        ended = finetune(*arguments, "--output", "mine", *overwrite, cwd=tmp_path)
        assert_error(ended, "--output mine exists and is not the directory of a run")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert finetune(*arguments, "--output", "out", cwd=tmp_path).status == 0
    assert_error(
        finetune(*arguments, "--output", "out", cwd=tmp_path), "--output out holds a run", "--resume", "--overwrite"
    )
    assert finetune(*arguments, "--output", "out", "--overwrite", "--seed", "5", cwd=tmp_path).status == 0
    assert yaml.safe_load((tmp_path / "out" / "finetune.yaml").read_text())["seed"] == 5


# --- the command line itself


def _without_trl() -> None:
    sys.modules["trl"] = None  # type: ignore[assignment]  # what find_spec takes for "not installed"


def test_without_the_extra(tmp_path: Path) -> None:
    ended = finetune("--model", "m", "--dataset", "d", "--output", "o", cwd=tmp_path, before=_without_trl)
    assert_error(ended, "finetune needs trl, which is not installed: pip install 'moe-fused[train]'")


def test_help_names_every_option_and_imports_nothing_heavy() -> None:
    program = """
import sys
from moe_fused.__main__ import main
sys.argv = ["moe-fused", "finetune", "--help"]
status = main()
heavy = {"torch", "trl", "transformers", "datasets", "peft"} & sys.modules.keys()
sys.exit(str(heavy) if heavy else status)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": python_path(REPOSITORY), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    words = "".join(ended.stdout.split())  # lines also break at a hyphen
    for name, entry in HELP.items():
        if name in MAPPINGS:  # --set sets their entries
            continue
        assert flag(name) in words
        assert "".join(entry.text.split()) in words
