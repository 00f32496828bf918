"""The documentation agrees with the project: links, messages, commands, code, and pages that are made from the code."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree as ET

import pytest

from tests.support import REPOSITORY, load_kernel

pytest.importorskip("markdown_it")  # rich brings it

from .markdown import FILES, Block, anchors, blocks, links, lone_spans, name, spans, word_count
from .messages import is_message

DOCS = REPOSITORY / "docs"
TROUBLESHOOTING = DOCS / "troubleshooting.md"
# The pages that people write; scripts/docs.py writes the others.
WRITTEN = [path for path in FILES if path.parent != DOCS / "api"]


# Links.


@pytest.mark.parametrize("path", FILES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    wrong = []
    for link in links(path):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.exists() or (parts.fragment and parts.fragment not in anchors(target)):
            wrong.append(link)
    assert not wrong


def test_every_page_is_in_the_index() -> None:
    listed = {urlsplit(link).path for link in links(DOCS / "README.md")}
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} <= listed


# Length.


def test_the_readme_is_short() -> None:
    path = REPOSITORY / "README.md"
    assert word_count(path) <= 900
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum(len(line.split()) for line in lines if not line.startswith("|")) <= 900  # blocks of code included


def test_words_outside_tables_and_blocks_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "# One two\n\n- three `four five` – [six](seven.md)\n\n| a |\n|---|\n| b |\n\n```\nc\n```\n", "utf-8"
    )
    assert word_count(path) == 6


# Messages.


QUOTATIONS = lone_spans(TROUBLESHOOTING)


def test_troubleshooting_has_messages() -> None:
    assert len(QUOTATIONS) == len(set(QUOTATIONS)) >= 25


@pytest.mark.parametrize("quotation", QUOTATIONS)
def test_quoted_messages_exist(quotation: str) -> None:
    assert is_message(quotation)


@pytest.mark.parametrize(
    "quotation",
    [
        "no kernel in …",
        "needs … is too old",
        "is too old for tensors triton>=3.5",
        "…: …, got …",  # is there, but in too many
        "… is …",
        "…; …",
    ],
)
def test_other_messages_do_not(quotation: str) -> None:
    assert not is_message(quotation)


# Commands.


def command_lines() -> Iterator[tuple[str, str]]:
    """Each ``moe-fused`` command in a block of code or within text, with its place."""
    for path in WRITTEN:
        for block in blocks(path):
            for number, line in enumerate(block.text.splitlines(), block.line + 1):
                if line.startswith("moe-fused "):
                    yield f"{name(path)}:{number}", line
        for span in spans(path):
            if span.startswith("moe-fused "):
                yield name(path), span


def alternatives(words: list[str]) -> Iterator[list[str]]:
    """The commands that a line with alternatives stands for: ``convert model|adapter`` is two."""
    for place, word in enumerate(words):
        if "|" in word:
            for one in word.split("|"):
                yield from alternatives([*words[:place], one, *words[place + 1 :]])
            return
    yield words


@functools.cache
def application() -> Any:
    typer = pytest.importorskip("typer")
    from moe_fused.cli import app

    return typer.main.get_command(app)


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words begin with, and its arguments."""
    command, rest = application(), words[1:]
    while hasattr(command, "commands") and rest:
        assert rest[0] in command.commands, f"there is no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def check_command(line: str) -> None:
    for words in alternatives(shlex.split(line, comments=True)):
        command, arguments = resolve(words)
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
        for argument in arguments:
            if argument.startswith("--"):
                assert argument.partition("=")[0] in known, f"{argument} is no option of {command.name}"
        # Within text a command may be named without what it needs.
        named_only = sum(not word.startswith("--") for word in arguments) < _positional(command)
        if not named_only and "..." not in arguments and "--help" not in arguments:
            command.make_context(command.name, list(arguments))


def _positional(command: Any) -> int:
    """The number of arguments that a command needs."""
    if hasattr(command, "commands"):
        return 1
    return sum(option.param_type_name == "argument" and option.required for option in command.params)


@pytest.mark.parametrize(("place", "line"), sorted(set(command_lines())), ids=lambda value: value)
def test_commands_exist(place: str, line: str) -> None:
    check_command(line)


@pytest.mark.parametrize(
    "line", ["moe-fused train", "moe-fused convert model A B --layout fused", "moe-fused convert model A B --to other"]
)
def test_other_commands_do_not(line: str) -> None:
    with pytest.raises(Exception, match=r"train|--layout|other"):
        check_command(line)


def test_finetuning_names_every_option() -> None:
    command, _ = resolve(["moe-fused", "finetune"])
    written = set(re.findall(r"--[a-z][a-z-]+", (DOCS / "finetuning.md").read_text(encoding="utf-8")))
    assert {option.opts[0] for option in command.params} - {"--help"} <= written


def test_finetuning_explains_every_part_of_the_memory() -> None:
    from moe_fused.finetune.plan import PARTS

    text = (DOCS / "finetuning.md").read_text(encoding="utf-8").partition("| part | what it is |")[2]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]*\|$", text.partition("\n\n")[0], re.MULTILINE)
    assert sorted(rows) == sorted(PARTS)


# Code.

ALL_BLOCKS = [block for path in WRITTEN for block in blocks(path)]
# Blocks with these imports need more than themselves: a model, or a package of the Hub.
_OUTSIDE = re.compile(r"^\s*(?:from|import) (?:moe_fused|transformers|peft|trl|kernels|datasets)\b", re.MULTILINE)


def of(language: str) -> list[Block]:
    return [block for block in ALL_BLOCKS if block.language == language]


def is_self_contained(block: Block) -> bool:
    return block.text.lstrip().startswith(("import ", "from ")) and not _OUTSIDE.search(block.text)


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", list(filter(is_self_contained, of("python"))), ids=str)
def test_self_contained_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {"__name__": "block"})


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_is_taken(block: Block, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    from moe_fused.finetune.options import Options, read_yaml

    path = tmp_path / "run.yaml"
    path.write_text(block.text, encoding="utf-8")
    Options(**read_yaml(path)).require()


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_tables_are_valid(block: Block, tmp_path: Path) -> None:
    from moe_fused.hub import submodule

    path = tmp_path / "sm_90.json"
    path.write_text(block.text, encoding="utf-8")
    assert submodule(load_kernel(), "tuning").read_table(path) == json.loads(block.text)


# Tables, pages and figures that are made from the code and from the rows of benchmarks.


TABLES = [path for path in WRITTEN if "<!-- rows: " in path.read_text(encoding="utf-8")]


def test_readme_and_benchmarks_have_tables() -> None:
    assert {"README.md", "docs/benchmarks.md"} <= set(map(name, TABLES))


@pytest.mark.parametrize("path", TABLES, ids=name)
def test_tables_are_of_their_rows(path: Path) -> None:
    pytest.importorskip("typer")
    from benchmarks.table import renewed

    text = path.read_text(encoding="utf-8")
    files = re.findall(r"<!-- rows: (\S+)", text)
    assert not [file for file in files if not (path.parent / file).is_file()], "a table without rows says nothing"
    assert renewed(text, path.parent) == text


def test_memory_in_the_readme_is_predicted() -> None:
    pytest.importorskip("typer")
    from scripts.docs import plan_table

    numbers = re.findall(r"\b\d+\.\d\d(?= GiB)", (REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert numbers
    assert set(numbers) <= set(re.findall(r"\d+\.\d\d", plan_table(parts=False)))


def test_generated_pages_are_current() -> None:
    for package in ("griffe", "peft", "liger_kernel", "typer"):
        pytest.importorskip(package)
    from scripts.docs import generated, outdated

    assert not outdated(generated()), "run make docs"


def test_the_reference_has_every_public_function_and_class() -> None:
    pytest.importorskip("griffe")
    import moe_fused
    from scripts.docs import KERNEL, PACKAGE, PAGES

    listed = {path for page in PAGES for path in page.objects.split()}
    kernel = load_kernel()
    documented = [
        getattr(kernel, path.removeprefix(f"{KERNEL}.")) for path in listed if path.count(".") == 1 and KERNEL in path
    ]
    for package, module in ((KERNEL, kernel), (PACKAGE, moe_fused)):
        for each in module.__all__:
            value = getattr(module, each)
            is_alias = any(value is one for one in documented)
            if callable(value) and not is_alias:
                assert f"{package}.{each}" in listed, "add it to PAGES in scripts/docs.py"


@pytest.mark.slow
def test_tables_of_models_are_current() -> None:
    for package in ("peft", "liger_kernel", "typer"):
        pytest.importorskip(package)
    from scripts.docs import generated_models

    for path, text in generated_models().items():
        assert path.read_text(encoding="utf-8") == text, "run make docs"


def test_tables_of_several_gpus_are_current() -> None:
    for package in ("peft", "trl", "liger_kernel", "typer"):
        pytest.importorskip(package)
    from scripts.docs import generated_gpus

    for path, text in generated_gpus().items():
        assert path.read_text(encoding="utf-8") == text, "run make docs"


def test_predictions_are_current() -> None:
    """Also fails if a kernel was given a configuration that ``benchmarks/results/compiled.json`` does not have."""
    for package in ("triton", "typer"):
        pytest.importorskip(package)
    from scripts.docs import generated_predictions

    for path, text in generated_predictions().items():
        assert path.read_text(encoding="utf-8") == text, "run python -m benchmarks.compiled and make docs"


def test_rows_of_a_model_are_current() -> None:
    """As above for one model, and for what does not depend on predictions."""
    for package in ("peft", "liger_kernel", "typer"):
        pytest.importorskip(package)
    from benchmarks.models import BY_NAME, MODELS
    from scripts import models_tables

    text = (DOCS / "models.md").read_text(encoding="utf-8")
    model = BY_NAME["olmoe-1b-7b"]
    for table in (models_tables.memory_table, models_tables.cards_table):
        assert table([model]).splitlines()[2] in text.splitlines()
    assert models_tables.recurrent_table([BY_NAME["granite-4.0-h-tiny"]]).splitlines()[2] in text.splitlines()
    assert len(models_tables.recurrent_table([model]).splitlines()) == 2
    assert models_tables.runs_table(MODELS) in text
    # Longer than its positions: no prediction.
    assert models_tables.memory_table([model]).splitlines()[2].endswith("| – | – |")


def test_what_was_run_comes_from_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    from benchmarks.models import BY_NAME
    from benchmarks.rows import read_rows, write_rows
    from scripts import models_tables

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(models_tables, "REPOSITORY", tmp_path)
    monkeypatch.setattr(models_tables, "RESULTS", results)
    model, rows = BY_NAME["gpt-oss-20b"], read_rows(REPOSITORY / "benchmarks/results/finetune-30b_h200.json")
    ours = [row for row in rows if row.implementation == "moe_fused"]
    assert models_tables.runs_table([model]).splitlines()[2].endswith("| a tiny model in the tests |")
    changed = [dataclasses.replace(row, layer=model.name) for row in ours[:2]]
    changed += [
        dataclasses.replace(changed[0], ms=None, tokens=4096),  # out of memory
        dataclasses.replace(changed[0], implementation="composed", tokens=8192),
        dataclasses.replace(changed[0], layer="gpt-oss-20b-2-layers", tokens=16384),
    ]
    write_rows(results / "finetune-gpt-oss-20b_h200.json", changed)
    assert (
        models_tables.runs_table([model])
        .splitlines()[2]
        .endswith(
            "| full size on NVIDIA H200 with 1024, 2048 tokens "
            "([rows](../benchmarks/results/finetune-gpt-oss-20b_h200.json)); a tiny model in the tests |"
        )
    )


def _texts(path: Path) -> list[str]:
    return sorted("".join(element.itertext()) for element in ET.parse(path).iter("{http://www.w3.org/2000/svg}text"))


def test_figures_are_current(tmp_path: Path) -> None:
    """Compares words and numbers; lines may differ between versions of matplotlib."""
    pytest.importorskip("matplotlib")
    from scripts import figures

    committed = sorted((DOCS / "figures").glob("*.svg"))
    assert committed
    figures.draw_all(tmp_path)
    assert {path.name: _texts(path) for path in committed} == {path.name: _texts(path) for path in tmp_path.iterdir()}
    assert all(_texts(path) for path in committed)
