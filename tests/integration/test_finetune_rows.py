"""``moe-fused finetune`` over the rows that people have: everything about them is known before the model is loaded."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
from transformers import AutoTokenizer

from moe_fused.finetune.data import find
from moe_fused.finetune.options import Options
from moe_fused.finetune.rows import bars

from .finetuning import OPTIONS, Command, Ended, assert_error, chats, finetune, losses, save_model, write_jsonl

QWEN3 = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}{{ messages }}"
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def _no_model() -> None:
    """From here on, loading a model ends the command with a traceback."""
    from moe_fused.finetune import run

    def load_model(*_: Any) -> None:
        raise KeyError("a model was loaded")

    run.load_model = load_model  # type: ignore[assignment]


def command(model: Path, dataset: Path, *arguments: str | Path, output: str = "out") -> Ended:
    options = ("--model", model, "--dataset", dataset, "--output", output, *arguments)
    return finetune(*options, cwd=dataset.parent, before=_no_model)


def spoken(*turns: str, **beside: str) -> dict[str, Any]:
    """A row of from and value, from "speaker: words"."""
    return {"conversations": [dict(zip(("from", "value"), turn.split(": "), strict=True)) for turn in turns], **beside}


def written(*turns: str, **beside: Any) -> dict[str, Any]:
    """A row of role and content, from "role: words"."""
    return {"messages": [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns], **beside}


def calling(arguments: object) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "Look."}, answer], "tools": [LOOK]}


ROWS: dict[str, list[Any]] = {
    "sharegpt": [
        spoken("system: Be brief.", "human: What is 2+2?", "gpt: 4."),
        spoken("human: Name a colour.", "gpt: Blue.", system="In one word."),
    ],
    "roles": [{"conversations": written("user: Hi", "assistant: Hello!")["messages"]}],
    "kwargs": [{**chats(1)[0], "chat_template_kwargs": {"enable_thinking": False}}, chats(2)[1]],
    "tools": [calling({"n": 1}), calling({"n": "one"})],
    "parts": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
            ]
        }
    ],
    "alpaca": [{"instruction": "Translate to French.", "input": "cat", "output": "chat"}],
}
SHOWN = {
    "sharegpt": [
        *("<|im_start|>system\\n", "Be brief.", "<|im_start|>user\\n", "What is 2+2?"),
        *("<|im_start|>assistant\\n", "4.<|im_end|>\\n", "In one word.", "Name a colour.", "Blue."),
    ],
    "roles": ["<|im_start|>user\\n", "Hi<|im_end|>\\n", "Hello!<|im_end|>\\n"],
    "kwargs": ["0 + 0?", "1 + 1?"],
    "tools": ['"arguments": {"n": 1}', '"arguments": {"n": "one"}'],
    "parts": ["Say hi.<|im_end|>"],
    "alpaca": ["masked:  <|im_start|>user\\n", "Translate to French.", "cat<|im_end|>", "learned: ", "chat<|im_end|>"],
}


@pytest.mark.parametrize("name", ROWS)
def test_show_rows(name: str, model: Path, tmp_path: Path) -> None:
    """The command with all its options but an output, which it does not need."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[name])
    before = sorted(tmp_path.iterdir())
    arguments = ("--model", model, "--dataset", path, "--chat-template", QWEN3, "--show-rows", "2")
    ended = finetune(*arguments, "--sequence-length", "128", cwd=tmp_path, before=_no_model)
    assert ended.status == 0, ended
    position = 0
    for words in SHOWN[name]:
        position = ended.stdout.index(words, position)
    assert "rows.jsonl:1: " in ended.stdout
    assert [path for path in sorted(tmp_path.iterdir()) if not path.name.startswith(".std")] == before


def test_show_rows_over_a_run_that_is_there(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "finetune.yaml").write_text("")
    ended = command(model, path, "--show-rows", "1")
    assert ended.status == 0, ended
    assert ended.stdout.startswith(f"{path}:1: ")
    assert ended.stdout.partition("sequence 1")[0].count("rows.jsonl") == 1
    assert_error(command(model, path, "--show-rows", "0"), "--show-rows must be at least 1, got 0")


def test_dry_run_says_what_becomes_of_the_rows(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*chats(7), "{", {"messages": [{"role": "user", "content": "x" * 90}]}])
    arguments = ("--sequence-length", "64", "--gradient-accumulation", "1", "--packing", "none", "--epochs", "2")
    assert_error(command(model, path, *arguments, "--dry-run"), "rows.jsonl:8 is not JSON", "--skip-bad-rows")
    ended = command(model, path, *arguments, "--dry-run", "--skip-bad-rows")
    assert ended.status == 0, ended
    assert f"left out: {path}:8 is not JSON" in ended.stderr
    (data,) = (line for line in ended.stderr.splitlines() if line.startswith("data: "))
    assert data.startswith("data: 8 rows, ")
    assert data.endswith(" to learn from), 8 sequences, 16 steps; 1 row left out")
    (cut,) = (line for line in ended.stderr.splitlines() if line.startswith("cut: "))
    assert cut.startswith("cut: 1 row, which lose ")


BAD: dict[str, tuple[list[Any], tuple[str, ...], tuple[str, ...]]] = {
    "role": (
        [*chats(1), {"messages": [{"role": "human", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}],
        ("--chat-template", str(QWEN3)),
        ("rows.jsonl:2 has turn 1 of the role 'human', which the chat template ignores",),
    ),
    "no assistant": (
        [*chats(1), {"messages": [{"role": "user", "content": "nobody answers"}]}],
        ("--chat-template", str(QWEN3), "--assistant-only-loss"),
        ("rows.jsonl:2 has no turn of the assistant", "--skip-bad-rows"),
    ),
    "long": (
        [{"prompt": "word " * 400, "completion": "end"}] * 2,
        ("--sequence-length", "128"),
        (
            "rows.jsonl has no row to train on: ",
            "rows.jsonl:1-2 has nothing left to learn from",
            "but a sequence has 128",
        ),
    ),
    "surrogate": (['{"text": "a \\ud83d"}'], (), ("rows.jsonl:1 has half of a surrogate pair, '\\ud83d'",)),
    "template raises": (
        [*chats(1), {"messages": chats(1)[0]["messages"][::-1]}],
        ("--chat-template", "strict.jinja"),
        ("rows.jsonl:2 cannot be rendered by the chat template: roles must alternate",),
    ),
    "syntax": (
        chats(1),
        ("--chat-template", "syntax.jinja"),
        ("--chat-template syntax.jinja is not a template: ", "line 2"),
    ),
    "no template": (chats(1), ("--chat-template", "none.jinja"), ("--chat-template none.jinja is missing",)),
    "empty": ([{"messages": [{"role": "user", "content": ""}]}], (), ("rows.jsonl:1 has no text in messages",)),
    "image": (
        [{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}],
        (),
        ("rows.jsonl:1 has a part of the type image in the content of messages[0]: only text can be trained on",),
    ),
    "marks": (chats(1), ("--assistant-only-loss",), ("--assistant-only-loss needs a chat template that marks",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_before_anything_is_loaded(name: str, model: Path, tmp_path: Path) -> None:
    rows, arguments, words = BAD[name]
    (tmp_path / "strict.jinja").write_text(STRICT)
    (tmp_path / "syntax.jinja").write_text("{% for m in messages %}\n{{ m.content")
    ended = command(model, write_jsonl(tmp_path / "rows.jsonl", rows), *arguments)
    assert_error(ended, *words)
    assert not (tmp_path / "out").exists()
    assert "predicted peak" not in ended.stdout


def test_bad_rows_of_a_directory_are_named_by_their_file(model: Path, tmp_path: Path) -> None:
    """A line that is no row, a row that the template refuses and a row of another form than the first one's."""
    (tmp_path / "rows" / "more").mkdir(parents=True)
    write_jsonl(tmp_path / "rows" / "a.jsonl", chats(2))
    turned = {"messages": chats(1)[0]["messages"][::-1]}
    write_jsonl(tmp_path / "rows" / "b.jsonl", [*chats(1), "{", turned])
    write_jsonl(tmp_path / "rows" / "more" / "c.jsonl", [{"text": "words"}])
    (tmp_path / "strict.jinja").write_text(STRICT)
    arguments = ("--model", model, "--dataset", "rows", "--chat-template", "strict.jinja", "--output", "out")
    ended = finetune(*arguments, cwd=tmp_path, before=_no_model)
    assert_error(
        ended,
        "error: rows/b.jsonl:2 is not JSON",
        "; rows/b.jsonl:3 cannot be rendered by the chat template: roles must alternate",
        "; rows/more/c.jsonl:1 is plain text, but rows/a.jsonl:1 is a chat: all rows",
        "--skip-bad-rows",
    )
    ended = finetune(*arguments, "--skip-bad-rows", "--dry-run", cwd=tmp_path, before=_no_model)
    assert ended.status == 0, ended
    assert "left out: rows/b.jsonl:2 is not JSON" in ended.stderr
    assert "data: 3 rows, " in ended.stderr
    ended = finetune(*arguments[:4], "--show-rows", "3", cwd=tmp_path, before=_no_model)
    assert "\nrows/b.jsonl:1: " in ended.stdout


def test_a_directory_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    ended = command(tmp_path / "model", write_jsonl(tmp_path / "rows.jsonl", [{"text": "words"}]))
    assert_error(ended, f"--model {tmp_path / 'model'} has no tokenizer")
    shutil.copytree(model, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    assert_error(command(tmp_path / "damaged", tmp_path / "rows.jsonl"), "damaged has ", "tokenizer")


def test_templates_that_editors_wrote(model: Path, tmp_path: Path) -> None:
    """A byte order mark is none of the template's text."""
    path = write_jsonl(tmp_path / "rows.jsonl", chats(1))
    (tmp_path / "marked.jinja").write_text("\ufeff{% for m in messages %}{{ m.content }}{% endfor %}")
    ended = command(model, path, "--chat-template", "marked.jinja", "--show-rows", "1")
    assert ended.status == 0, ended
    assert "\nlearned: 0 + 0?0.\n" in ended.stdout
    for name, content in {"latin.jinja": b"\xff", "blank.jinja": b" \n"}.items():
        (tmp_path / name).write_bytes(content)
        assert_error(command(model, path, "--chat-template", name), f"--chat-template {name}")


def test_files_of_other_kinds_are_trained_on(model: Path, tmp_path: Path) -> None:
    """The whole way, with rows whose keys differ: gzip, a table of text, and what save_to_disk wrote."""
    rows = [{**row, "chat_template_kwargs": {"a": i}} if i % 2 else row for i, row in enumerate(chats(6))]
    (tmp_path / "rows.JSONL.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    ended = finetune(
        "--model", model, "--dataset", "rows.JSONL.gz", "--output", "out", *OPTIONS, "--max-steps", "1", cwd=tmp_path
    )
    assert ended.status == 0, ended
    assert "data: 6 rows, " in ended.stderr
    assert len(losses(tmp_path / "out")) == 1
    (tmp_path / "rows.tsv").write_text("question\tanswer\n1 + 1?\t2\n2 + 2?\t4\n")
    datasets.Dataset.from_list(chats(3)).save_to_disk(tmp_path / "saved")
    for dataset, count in (("rows.tsv", 2), ("saved", 3)):
        ended = command(model, tmp_path / dataset, "--dry-run", output="other")
        assert ended.status == 0, ended
        assert f"data: {count} rows, " in ended.stderr


def test_rows_a_second(tmp_path: Path) -> None:
    """200 rows of 400 tokens a second and core, of the processor's own time: other programs are no reason to fail."""
    tokenizer: Any = AutoTokenizer.from_pretrained(save_model(tmp_path / "model"))
    tokenizer.chat_template = QWEN3.read_text()
    turns = [{"role": "user", "content": "why? " * 20}, {"role": "assistant", "content": "because " * 12}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns * 2}] * 200)
    (data,) = find(Options(model="m", dataset=str(path), assistant_only_loss=True), tokenizer)
    contents = data.rows.contents(data.rows.table[:])
    render = data.renderer
    assert len(render(render.parse(contents[0]())).ids) >= 400
    begin = time.process_time()
    for content in contents:
        render(render.parse(content()))
    assert time.process_time() - begin < 1


def _slow_workers() -> None:
    """Rows take long, in two processes, and the first to begin says so. All are a group, as on a terminal."""
    from moe_fused.finetune import tokenizing
    from moe_fused.finetune.render import Renderer

    os.setpgid(0, 0)
    tokenizing._cores = lambda: 2  # type: ignore[assignment]
    tokenizing._ROWS_OF_A_PROCESS = 1
    render = Renderer.__call__

    def slow(self: Renderer, row: Any) -> Any:
        Path("began").touch()
        time.sleep(0.2)
        return render(self, row)

    Renderer.__call__ = slow  # type: ignore[method-assign]


@pytest.mark.parametrize("signum, send", [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_a_signal_while_rows_are_tokenized(
    signum: signal.Signals, send: Callable[[int, int], None], model: Path, tmp_path: Path
) -> None:
    """Ctrl-C reaches all processes, SIGTERM one."""
    rows = [{"text": f"{tmp_path} {i}"} for i in range(2000)]  # not in any cache
    write_jsonl(tmp_path / "rows.jsonl", rows)
    arguments = ("--model", model, "--dataset", "rows.jsonl", "--output", "out", "--dry-run")
    running = Command("finetune", *arguments, cwd=tmp_path, before=_slow_workers)
    for _ in range(600):
        if (tmp_path / "began").exists():
            break
        time.sleep(0.1)
    send(running.process.pid, signum)
    assert_error(running.end(), f"interrupted by {signum.name}", status=128 + signum)


def test_bars_are_for_people() -> None:
    for shown in (True, False):
        with bars(shown):
            assert datasets.are_progress_bars_disabled() is not shown
        assert datasets.are_progress_bars_disabled()
