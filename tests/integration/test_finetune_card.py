"""The model card of ``moe-fused finetune``: its metadata, what it tells, and what names cannot break."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from moe_fused.finetune.card import card, metadata
from moe_fused.finetune.facts import Facts
from moe_fused.finetune.options import Options
from moe_fused.finetune.resolve import ModelSetup, set_up

from .finetuning import chats, finetune, save_model, write_jsonl
from .models import QWEN3_MOE

NOTHING = Facts({}, {"steps": "1"}, {}, {})
# Names of files and models, with all that means something to YAML, Markdown, HTML, Python or a shell.
HOSTILE = [
    'a: "b" # c', "---", "a|b", "`code` ``` end", "[link](http://x.y)", "<b>bold</b> & more", "*stars* _lines_",
    "it's; $(date) \\ $HOME", "- dash", "{{ x }} %}", "line\nbreak ---\n", "naïve 模型",
]  # fmt: skip


def setup_of(quantization_config: object = None, **options: Any) -> ModelSetup:
    config = QWEN3_MOE.build().config
    if quantization_config is not None:
        config.quantization_config = quantization_config
    given = {"model": "org/m", "dataset": "org/d", "output": "out", **options}
    return set_up(Options(**given), config, torch.device("cpu"))


def blocks(text: str) -> list[tuple[str, str]]:
    """The blocks of code of a card, with their languages."""
    return [(found[2], found[3]) for found in re.finditer(r"^(`{3,})(\w*)\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)]


def commands(text: str) -> list[list[str]]:
    """The commands of a card, each as its words."""
    return [shlex.split(line) for language, block in blocks(text) if not language for line in block.splitlines()]


def command(text: str, *begin: str) -> list[str]:
    (found,) = (words for words in commands(text) if words[: len(begin)] == list(begin))
    return found


# Metadata.


def test_metadata_of_names_on_the_hub() -> None:
    data = ModelCard(card(setup_of(revision="v2"), NOTHING)).data.to_dict()
    assert data == {
        "library_name": "peft",
        "base_model": "org/m",
        "base_model_relation": "adapter",
        "datasets": ["org/d"],
        "pipeline_tag": "text-generation",
        "tags": ["lora", "moe", "moe-fused"],
    }


def test_metadata_names_nothing_that_is_not_on_the_hub(tmp_path: Path) -> None:
    model, rows = save_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", chats())
    text = metadata(setup_of(model=str(model), dataset=str(rows)))
    assert not re.search("base_model|datasets", text)
    assert str(tmp_path) not in text


# What users have chosen.


@pytest.mark.parametrize("name", HOSTILE)
def test_names_break_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = Facts({"trained on": name}, {name: name}, {}, {"device": name})
    plain = card(setup_of(), Facts({"trained on": "d"}, {"n": "n"}, {}, {"device": "d"}))
    text = card(setup_of(model=f"./{name}", dataset=name, output=f"./{name}", revision=name), facts)
    data = ModelCard(text).data.to_dict()
    assert data.keys() <= {"library_name", "pipeline_tag", "tags", "datasets"}
    headings = re.compile(r"^#{2,} .*$", re.MULTILINE)
    assert headings.findall(text) == headings.findall(plain)
    assert len(blocks(text)) == len(blocks(plain))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == len([line for line in plain.splitlines() if line.startswith("|")])
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows), rows
    assert not re.search(r"<b>|[^`]\[link\]\(", "\n".join(rows))
    (python,) = (block for language, block in blocks(text) if language == "python")
    constants = {node.value for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Constant)}
    assert {f"./{name}", name} <= constants
    # What a line break in a name does to the lines of a shell, quotes undo.
    shell = "\n".join(block for language, block in blocks(text) if not language)
    assert f"--revision={name}" not in shell
    assert f"./{name}" in shlex.split(shell)


# Which layout which tool is told to read.


def test_an_adapter_that_must_be_converted() -> None:
    text = card(setup_of(attention_rank=64), NOTHING)
    converted = command(text, "moe-fused", "convert")
    assert converted[3:] == ["--from", "peft-fused", "--to", "per-expert", "out", "out-per-expert"]
    serve = command(text, "vllm", "serve")
    assert serve[2] == "org/m"
    assert serve[serve.index("--max-lora-rank") + 1] == "64"
    assert "tuned=out-per-expert" in serve
    assert "tuned=out-per-expert" in command(text, "python", "-m", "sglang.launch_server")
    assert command(text, "python", "convert_lora_to_gguf.py")[2:5] == ["out-per-expert", "--base-model-id", "org/m"]


def test_an_adapter_that_was_exported() -> None:
    text = card(setup_of(export="per-expert", attention_rank=4, expert_rank=9), NOTHING)
    assert not [words for words in commands(text) if words[0] == "moe-fused"]
    serve = command(text, "vllm", "serve")
    assert "tuned=out/per-expert" in serve
    assert serve[serve.index("--max-lora-rank") + 1] == "16"
    text = card(setup_of(export="original"), NOTHING)  # which none of these tools reads
    assert "tuned=out-per-expert" in command(text, "vllm", "serve")


def test_an_adapter_without_experts() -> None:
    text = card(setup_of(expert_rank=0), NOTHING)
    assert "These tools read the adapter as it is." in text
    assert "tuned=out" in command(text, "vllm", "serve")
    text = card(setup_of(expert_rank=0, lora={"use_rslora": True}), NOTHING)
    assert command(text, "moe-fused", "convert")[3:] == ["--to", "per-expert", "out", "out-per-expert"]


def test_an_adapter_that_no_tool_reads() -> None:
    refused = dataclasses.replace(setup_of(), layout_refusals={"per-expert": "it takes turns", "original": None})
    for setup, reason in ((setup_of(router_rank=4), "it adapts routers, too"), (refused, "it takes turns")):
        text = card(setup, NOTHING)
        assert f"cannot load this adapter apart: {reason}." in text
        assert command(text, "moe-fused", "merge")[2:] == ["org/m", "out", "out-merged"]
        assert command(text, "vllm", "serve")[2:] == ["out-merged"]
        assert not [words for words in commands(text) if "--lora-paths" in " ".join(words)]


def test_a_base_in_4_bits_is_not_what_the_tools_load() -> None:
    text = card(setup_of({"load_in_4bit": True}), NOTHING)
    assert "`DENSE-MODEL` stands for the dense model from which `m` was quantized" in text
    assert command(text, "vllm", "serve")[2] == "DENSE-MODEL"
    assert command(text, "python", "convert_lora_to_gguf.py")[3:5] == ["--base", "DENSE-MODEL"]


def test_a_revision_is_that_of_the_run() -> None:
    text = card(setup_of(revision="v2"), NOTHING)
    assert "--revision" in command(text, "vllm", "serve")
    assert 'revision="v2"' in text


# What a run tells.


@pytest.mark.usefixtures("enabled")
def test_a_run_tells_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention alone, with an evaluation, and a directory with a quote in its name; its code is run as it stands."""
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "some_rows.jsonl", chats())
    arguments = ("--model", "model", "--dataset", "some_rows.jsonl", "--output", 'my "out"', "--sequence-length", "64")
    options = (
        "--max-steps",
        "1",
        "--warmup",
        "0",
        "--expert-rank",
        "0",
        "--eval-share",
        "0.25",
        "--set",
        "trainer.adam_beta2=0.9",
    )
    ended = finetune(*arguments, *options, cwd=tmp_path)
    assert ended.status == 0, ended
    text = (tmp_path / 'my "out"' / "README.md").read_text()
    for line in (
        r"\| trained on \| some\\_rows\.jsonl: 18 rows, [\d,]+ tokens, [\d,]+ to learn from \|",
        r"\| evaluated on \| 0\.25 of these rows, set aside: 6 rows, .* \|",
        r"\| adapters on attention \| rank 16, alpha 32: q\\_proj, k\\_proj, v\\_proj, o\\_proj \|",
        r"\| adapters on experts \| none \|",
        r"\| trainer\.adam\\_beta2 \| 0\.9 \|",
        r"\| evaluation \| loss [\d.]+, perplexity [\d.]+, of the adapter of step 1 \|",
        rf"\| torch \| {re.escape(torch.__version__)} \|",
        r"\| moe-fused \| [\d.]+\S* \|",
        r"\| time since the last start \| \d+ s \|",
    ):
        assert re.search(rf"^{line}$", text, re.MULTILINE), line
    assert str(tmp_path) not in text
    monkeypatch.chdir(tmp_path)
    loaded: dict[str, Any] = {}
    (python,) = (block for language, block in blocks(text) if language == "python")
    exec(python, loaded)
    assert loaded["tokenizer"].chat_template
    trained = loaded["model"].state_dict()
    assert any(".q_proj.lora_B" in name and value.abs().sum() > 0 for name, value in trained.items())
