"""The model card of ``moe-fused finetune``: its metadata, what it tells, and what names cannot break."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from moe_fused.cli import app
from moe_fused.finetune.card import card, metadata
from moe_fused.finetune.facts import Facts, choices, learned
from moe_fused.finetune.formats import Kind
from moe_fused.finetune.next_commands import print_next
from moe_fused.finetune.options import Options
from moe_fused.finetune.resolve import ModelSetup, ResolvedRun, candidates, set_up
from moe_fused.finetune.start import read_start
from moe_fused.finetune.usage import export_note
from moe_fused.quantized import compressed_content

from .adapters import peft_adapter
from .finetuning import chats, finetune, save_model, write_jsonl
from .models import QWEN3_MOE

NOTHING = Facts({}, {"steps": "1"}, {}, {})
# Names of files and models, with all that means something to YAML, Markdown, HTML, Python or a shell.
HOSTILE = [
    'a: "b" # c', "---", "a|b", "`code` ``` end", "[link](http://x.y)", "<b>bold</b> & more", "*stars* _lines_",
    "it's; $(date) \\ $HOME", "- dash", "{{ x }} %}", "line\nbreak ---\n", "naïve 模型",
]  # fmt: skip


def setup_of(quantization_config: object = None, **options: Any) -> ModelSetup:
    config = QWEN3_MOE.build(hidden_size=64, moe_intermediate_size=64).config
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
    assert "because it has rsLoRA" in text
    assert command(text, "moe-fused", "merge")[2:] == ["org/m", "out", "out-merged"]


def test_an_adapter_that_no_tool_reads() -> None:
    refused = dataclasses.replace(setup_of(), layout_refusals={"per-expert": "it takes turns", "original": None})
    for setup, reason in ((setup_of(router_rank=4), "it adapts routers, too"), (refused, "it takes turns")):
        text = card(setup, NOTHING)
        assert f"cannot load this adapter beside a model, because {reason}." in text
        assert command(text, "moe-fused", "merge")[2:] == ["org/m", "out", "out-merged"]
        assert command(text, "vllm", "serve")[2:] == ["out-merged"]
        assert not [words for words in commands(text) if "--lora-paths" in " ".join(words)]


@pytest.mark.parametrize("change", [{}, {"modules_to_save": ["lm_head"]}, {"router_rank": 4}])
def test_an_export_that_no_tool_loads_is_noted(change: dict[str, Any]) -> None:
    note = export_note(setup_of(export="per-expert", **change))
    assert (note is not None) == bool(change)
    assert note is None or "merge it" in note
    assert export_note(setup_of(**change)) is None


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("name", ["plain", "patterns", "attention", "routers"])
def test_next_and_the_card_agree_on_what_goes_on_from_an_adapter(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {
        "plain": {"target_modules": ["q_proj"]},
        "patterns": {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"mlp.experts.down_proj": 5},
                     "alpha_pattern": {"o_proj": 9}},
        "attention": {"target_modules": ["q_proj"], "target_parameters": None, "alpha_pattern": {"q_proj": 9}},
        "routers": {"target_modules": ["q_proj", "gate"]},
    }[name]  # fmt: skip
    peft_adapter(tmp_path / "first", modules_to_save=None, **made)
    options = Options(model="org/m", dataset="org/d", output="out", adapter="first", quantization="none")
    start = read_start(options, None)
    setup = set_up(options, QWEN3_MOE.build().config, torch.device("cpu"), start=start, allow_other_base=True)
    print_next(setup)
    printed = [shlex.split(line) for line in capsys.readouterr().out.partition("next:\n")[2].splitlines()]
    converted = [
        [words for words in found if words[1] == "convert"] for found in (printed, commands(card(setup, NOTHING)))
    ]
    assert converted[0] == [words for words in converted[1] if words[0] == "moe-fused"]
    assert len(converted[0]) == (0 if name in ("routers", "attention") else 1)
    for words in converted[0]:  # it does what it says
        peft_adapter(tmp_path / "out", modules_to_save=None, **made)
        ended = CliRunner().invoke(app, words[1:])
        assert ended.exit_code == 0, ended.output
    tells = {
        "plain": ("rank 3, alpha 5: q_proj", "rank 3, alpha 5: down_proj, gate_up_proj"),
        "patterns": ("rank 3, alpha 5 and 9: o_proj, q_proj", "rank 3 and 5, alpha 5: down_proj, gate_up_proj"),
        "attention": ("rank 3, alpha 9: q_proj", "none"),
        "routers": ("rank 3, alpha 5: gate, q_proj", "rank 3, alpha 5: down_proj, gate_up_proj"),
    }
    (run,) = candidates_of(setup)
    table = choices(run, ["chat"])
    assert (table["adapters on linear layers"], table["adapters on experts"]) == tells[name]


def candidates_of(setup: ModelSetup) -> list[ResolvedRun]:
    return list(candidates(setup, plain_text=False))[:1]


@pytest.mark.parametrize(
    ("kinds", "assistant_only", "words"),
    [
        (["chat"], False, "all tokens of the chats, the words of the user included"),
        (["chat"], True, "what the assistant says in the chats"),
        (["chat", "text"], False, "all tokens of the chats, the words of the user included; all tokens of the texts"),
        (["completion"], False, "the completions, without their prompts"),
        (["preference"], False, "pairs of answers, without their prompts"),
        (["rated completion"], False, "answers with a label, without their prompts"),
    ],
)
def test_the_card_says_what_is_learned_from(kinds: list[Kind], assistant_only: bool, words: str) -> None:
    assert learned(kinds, assistant_only=assistant_only) == words


def test_every_kind_of_rows_has_words() -> None:
    assert all(learned([kind], assistant_only=False) for kind in get_args(Kind))


def test_a_base_in_4_bits_is_not_what_the_tools_load() -> None:
    text = card(setup_of({"load_in_4bit": True}), NOTHING)
    assert "`DENSE-MODEL` stands for the dense model from which `m` was quantized" in text
    assert "`moe-fused convert model m DENSE-MODEL --to per-expert --dequantize` makes one" in text
    assert "This command converts it:\n\n```" in text
    assert command(text, "vllm", "serve")[2] == "DENSE-MODEL"
    assert command(text, "python", "convert_lora_to_gguf.py")[3:5] == ["--base", "DENSE-MODEL"]


def test_merge_takes_the_checkpoint_in_4_bits_itself() -> None:
    text = card(setup_of({"load_in_4bit": True}, router_rank=2), NOTHING)
    assert command(text, "moe-fused", "merge")[2] == "org/m"
    assert "DENSE-MODEL" not in text


@pytest.mark.parametrize(
    ("quantization_config", "options", "words"),
    [
        (compressed_content("mxfp4"), {}, "experts in mxfp4, as in the checkpoint"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {}, "nf4, as in the checkpoint"),
        (None, {"quantization": "none"}, "dense"),
        (None, {"quantization": "nvfp4"}, "experts in nvfp4"),
        (None, {"quantization": "nf4"}, "nf4, double quantization"),
    ],
)
def test_the_card_names_the_format_of_the_weights(
    quantization_config: object, options: dict[str, Any], words: str
) -> None:
    (run,) = candidates_of(setup_of(quantization_config, **options))
    assert choices(run, ["chat"])["weights"] == words


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
        r"\| learned from \| all tokens of the chats, the words of the user included \|",
        r"\| step \| \d+ batches of 1 sequence each, at most [\d,]+ tokens \|",
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
