"""``moe-fused finetune`` and its output directory: one run at a time, nothing in the way of the next, no silent changes."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moe_fused.checkpoints.adapters import Layout
from moe_fused.checkpoints.adapters.convert import convert_adapter
from moe_fused.finetune.adapters import adapt
from moe_fused.finetune.checkpoints import resumable
from moe_fused.finetune.next_commands import print_next
from moe_fused.finetune.options import Options
from moe_fused.finetune.output import has_begun
from moe_fused.finetune.resolve import set_up
from moe_fused.finetune.results import draw_loss, smoothed, window
from moe_fused.quantized import compressed_content

from .finetuning import (
    OPTIONS,
    Command,
    Run,
    assert_error,
    chats,
    checkpoints,
    finetune,
    losses,
    save_model,
    write_jsonl,
)
from .models import GPT_OSS, MODELS, QWEN3_MOE, ModelCase

SHORT = ("--max-steps", "4")
# One model of each kind suffices; the others differ in what has nothing to do with adapters' layouts.
KINDS = ("qwen3_moe", "mixtral", "granitemoe", "nemotron_h", "gpt_oss")
CASES = [pytest.param(case, id=case.id, marks=[] if case.id in KINDS else pytest.mark.slow) for case in MODELS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of four steps with checkpoints after two and four."""
    return Run(tmp_path_factory.mktemp("whole"), *SHORT)


@pytest.fixture
def again(whole: Run, tmp_path: Path) -> Path:
    """A copy of the model, the data and the finished run, for tests that change them."""
    for name in ("model", "out"):
        shutil.copytree(whole.directory / name, tmp_path / name)
    shutil.copyfile(whole.directory / "chat.jsonl", tmp_path / "chat.jsonl")
    options = yaml.safe_load((tmp_path / "out" / "finetune.yaml").read_text())
    head = [line for line in (tmp_path / "out" / "finetune.yaml").read_text().splitlines() if line.startswith("#")]
    options |= {"model": "model", "dataset": "chat.jsonl"}
    (tmp_path / "out" / "finetune.yaml").write_text("\n".join([*head, yaml.safe_dump(options)]))
    return tmp_path


def files(directory: Path) -> dict[str, bytes]:
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


# One run, one process.


def _waits() -> None:
    from moe_fused.finetune import run

    run.load_model = lambda *_: time.sleep(100)


def test_a_directory_in_use_names_who_uses_it(whole: Run, tmp_path: Path) -> None:
    arguments = (*whole.arguments, "--output", "out")
    holder = Command("finetune", *arguments, cwd=tmp_path, before=_waits)
    config = tmp_path / "out" / "finetune.yaml"
    for _ in range(1200):
        if config.exists():
            break
        time.sleep(0.05)
    process = f"--output out is in use by process {holder.process.pid} on {os.uname().nodename} since 20"
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 1}\n')  # as if it had come so far
    before = files(tmp_path / "out")
    for options in (arguments, (*arguments, "--overwrite"), ("--resume", "--output", "out")):
        assert_error(finetune(*options, cwd=tmp_path), process)
    assert files(tmp_path / "out") == before
    holder.signal(signal.SIGKILL)
    holder.process.join()
    (tmp_path / "out" / "log.jsonl").unlink()
    # The system has released the lock, and a run that never began does not prevent the next.
    ended = finetune(*arguments, cwd=tmp_path)
    assert ended.status == 0, ended
    whole.assert_as_uninterrupted(tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".*"))


# A start that fails.


def _loading_fails() -> None:
    from moe_fused.finetune import run

    def fail(*_: object) -> None:
        raise RuntimeError("the weights are gone")

    run.load_model = fail


def _step_fails() -> None:
    from moe_fused.finetune.trainer import Finetuner

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the step failed")

    Finetuner.training_step = fail  # type: ignore[assignment]


@pytest.mark.parametrize("before, words", [(_loading_fails, "the weights are gone"), (_step_fails, "the step failed")])
def test_a_start_that_fails_leaves_nothing(before: Callable[[], None], words: str, whole: Run, tmp_path: Path) -> None:
    arguments = (*whole.arguments, "--output", "out")
    assert_error(finetune(*arguments, cwd=tmp_path, before=before), words)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert_error(finetune(*arguments, cwd=tmp_path, before=before), words)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_start_that_fails_replaces_nothing(again: Path, whole: Run) -> None:
    before = files(again / "out")
    arguments = (*whole.arguments, "--output", "out", "--overwrite", "--seed", "5")
    assert_error(finetune(*arguments, cwd=again, before=_loading_fails), "the weights are gone")
    assert files(again / "out") == before


def test_a_first_step_that_fails_after_overwriting_is_in_nobody_s_way(again: Path, whole: Run) -> None:
    arguments = (*whole.arguments, "--output", "out", "--seed", "5")
    assert_error(finetune(*arguments, "--overwrite", cwd=again, before=_step_fails), "the step failed")
    assert not (again / "out" / "adapter_config.json").exists()
    assert not has_begun(again / "out")
    ended = finetune(*arguments, "--max-steps", "1", cwd=again)
    assert ended.status == 0, ended
    assert sorted(losses(again / "out")) == [1]


def _interrupts() -> None:
    from moe_fused.finetune import run

    def load_model(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    run.load_model = load_model


def test_an_interrupted_start_may_be_corrected(whole: Run, tmp_path: Path) -> None:
    arguments = (*whole.arguments, "--output", "out")
    assert finetune(*arguments, cwd=tmp_path, before=_interrupts).status == 128 + signal.SIGTERM
    ended = finetune(*arguments, "--seed", "7", "--max-steps", "1", cwd=tmp_path)
    assert ended.status == 0, ended
    assert yaml.safe_load((tmp_path / "out" / "finetune.yaml").read_text())["seed"] == 7


def _third_step_fails() -> None:
    from moe_fused.finetune.trainer import Finetuner

    step = Finetuner.training_step

    def fail(self: Finetuner, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 2:
            raise KeyError("text")
        return step(self, *args, **kwargs)  # type: ignore[arg-type]

    Finetuner.training_step = fail  # type: ignore[assignment]


def test_whatever_ends_a_run_it_says_how_to_go_on(whole: Run, tmp_path: Path) -> None:
    ended = finetune(*whole.arguments, "--output", "out", cwd=tmp_path, before=_third_step_fails)
    words = ("stopped after step 2: KeyError: 'text'", "the last checkpoint is out/checkpoints/checkpoint-2")
    assert_error(ended, *words, "go on with: moe-fused finetune --resume --output out")
    assert checkpoints(tmp_path / "out") == [2]


# Data and template.


def _other_rows(directory: Path) -> None:
    write_jsonl(directory / "chat.jsonl", [*chats()[:-1], chats(30)[-1]])


def _other_template(directory: Path) -> None:
    path = directory / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|>the "))


@pytest.mark.parametrize(
    "change, words",
    [
        (_other_rows, "error: the rows (sha256:"),
        (_other_template, "and the chat template (sha256:"),  # by which the rows become others, too
    ],
)
def test_other_data_are_not_gone_on_with(change: Callable[[Path], None], words: str, again: Path) -> None:
    change(again)
    before = files(again / "out")
    arguments = ("--resume", "--output", "out", "--max-steps", "6")
    for options in (arguments, (*arguments, "--dry-run")):
        ended = finetune(*options, cwd=again)
        assert_error(ended, words, "changed since the run in out began", "--allow-changed-data")
        assert ("chat template" in ended.stderr.splitlines()[-1]) is (change is _other_template)
    assert files(again / "out") == before
    ended = finetune(*arguments, "--allow-changed-data", cwd=again)
    assert ended.status == 0, ended
    assert "the run goes on with the data of today" in ended.stderr
    assert sorted(losses(again / "out")) == [1, 2, 3, 4, 5, 6]
    # From now on these are the data of the run.
    ended = finetune("--resume", "--output", "out", "--max-steps", "7", "--dry-run", cwd=again)
    assert ended.status == 0, ended


def test_the_same_rows_in_another_file_are_the_same(again: Path) -> None:
    lines = (again / "chat.jsonl").read_text().splitlines()
    (again / "chat.jsonl").write_text("\n\n".join(json.dumps(json.loads(line), indent=None) for line in lines))
    ended = finetune("--resume", "--output", "out", "--max-steps", "5", "--dry-run", cwd=again)
    assert ended.status == 0, ended
    assert "changed" not in ended.stderr


# Checkpoints.


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    **{
        f"no {name}": (name, Path.unlink, f"lacks {name}")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors")
    },
    "cut adapter": ("adapter_model.safetensors", _truncate, "is damaged: adapter_model.safetensors has"),
    "empty adapter": ("adapter_model.safetensors", lambda path: path.write_bytes(b""), "not a whole safetensors file"),
    "garbage for an adapter": (
        "adapter_model.safetensors",
        lambda path: path.write_bytes(b"x" * 999),
        "not a whole safe",
    ),
    "cut optimizer": ("optimizer.pt", _truncate, "is damaged: optimizer.pt cannot be read"),
    "a bit of the optimizer": ("optimizer.pt", _flip, "is damaged: optimizer.pt has a wrong checksum"),
    "empty scheduler": ("scheduler.pt", lambda path: path.write_bytes(b""), "is damaged: scheduler.pt cannot be read"),
    "cut state": ("trainer_state.json", _truncate, "is damaged: trainer_state.json must be JSON"),
    "another step": ("trainer_state.json", lambda path: path.write_text('{"global_step": 9}'), "belongs to step 9"),
    "a list": ("adapter_config.json", lambda path: path.write_text("[]"), "must be a JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_to_which_something_happened(damage: str, again: Path) -> None:
    name, happens, words = DAMAGES[damage]
    output = again / "out"
    assert resumable(output) == output / "checkpoints" / "checkpoint-4"
    happens(output / "checkpoints" / "checkpoint-4" / name)
    with pytest.raises(ValueError, match="checkpoint-4") as caught:
        resumable(output)
    assert words in str(caught.value)
    assert "checkpoint-2 before it is whole, go on from there with: moe-fused finetune --resume" in str(caught.value)
    assert resumable(output, drop_broken=True, dry_run=True) == output / "checkpoints" / "checkpoint-2"
    assert (output / "checkpoints" / "checkpoint-4").is_dir()
    happens(output / "checkpoints" / "checkpoint-2" / name)
    with pytest.raises(
        ValueError, match=r"checkpoint-4 .*; no checkpoint before it is whole, start again with --overw"
    ):
        resumable(output, drop_broken=True)
    assert len(list((output / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("kind", ["ended", "converted", "cut"])
def test_what_is_no_run_to_go_on_with(kind: str, again: Path) -> None:
    """``--resume`` is refused for an ended run without checkpoints, for a converted adapter and for damaged options."""
    output, words = again / "out", ["has an adapter and no checkpoint", "that run has ended", "--overwrite"]
    if kind == "cut":
        (output / "finetune.yaml").write_text((output / "finetune.yaml").read_text()[:40])
        words = ["out/finetune.yaml is not whole", "--overwrite"]
    elif kind == "ended":
        shutil.rmtree(output / "checkpoints")
    else:
        convert_adapter(output, again / "apart", to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED)
        shutil.rmtree(output)
        (again / "apart").rename(output)
        words = ["out/finetune.yaml is missing, there is no run to go on with"]
    before = files(output)
    assert_error(finetune("--resume", "--output", "out", cwd=again), *words)
    assert files(output) == before


def test_goes_on_from_the_one_before_as_it_says(again: Path, whole: Run) -> None:
    (again / "out" / "checkpoints" / "checkpoint-4" / "optimizer.pt").unlink()
    before = files(again / "out")
    ended = finetune("--resume", "--output", "out", cwd=again)
    assert_error(ended, "out/checkpoints/checkpoint-4 lacks optimizer.pt", "checkpoint-2 before it is whole")
    assert files(again / "out") == before
    program, *arguments = shlex.split(ended.stderr.splitlines()[-1].partition("go on from there with: ")[2])
    assert program == "moe-fused"
    ended = Command(*arguments, cwd=again).end()
    assert ended.status == 0, ended
    assert checkpoints(again / "out") == [2, 4]
    whole.assert_as_uninterrupted(again / "out")


@pytest.mark.parametrize("kind", ["missing", "not finite"])
def test_weights_of_a_checkpoint(kind: str, again: Path) -> None:
    path = again / "out" / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    if kind == "missing":
        del tensors[name]
    else:
        tensors[name][0, 0] = torch.inf
    save_file(tensors, path, {"format": "pt"})
    ended = finetune("--resume", "--output", "out", "--max-steps", "6", cwd=again)
    words = (
        ("checkpoint-4 is not one of this adapter", f"{name} is missing") if kind == "missing" else (name, "not finite")
    )
    assert_error(ended, *words)
    assert checkpoints(again / "out") == [2, 4]


# --export and what comes next.


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_layouts_is_what_conversions_do(case: ModelCase, tmp_path: Path) -> None:
    built = case.build()
    built.save_pretrained(tmp_path / "model")
    model = type(built).from_pretrained(tmp_path / "model", experts_implementation="moe_fused")
    options = Options(model=str(tmp_path / "model"), attention_rank=0, expert_rank=2)
    setup = set_up(options, built.config, torch.device("cpu"))
    adapt(model, setup).save_pretrained(tmp_path / "adapter")
    for layout in (Layout.PER_EXPERT, Layout.ORIGINAL):
        refusal = setup.layout_refusals[layout.value]
        with contextlib.nullcontext() if refusal is None else pytest.raises(ValueError):  # noqa: PT011 - of many kinds
            convert_adapter(tmp_path / "adapter", tmp_path / layout.value, to=layout, given=Layout.PEFT_FUSED)


def test_a_directory_may_be_called_as_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fused.checkpoints.adapters.config import AdapterConfig

    monkeypatch.chdir(tmp_path)
    QWEN3_MOE.build().config.save_pretrained("gpt-oss-tests")
    GPT_OSS.build().config.save_pretrained("qwen")
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    assert not AdapterConfig({**base, "base_model_name_or_path": "gpt-oss-tests"}).interleaved
    assert AdapterConfig({**base, "base_model_name_or_path": "qwen"}).interleaved
    assert AdapterConfig({**base, "base_model_name_or_path": "openai/gpt-oss-20b"}).interleaved


def test_an_export_that_cannot_be_is_refused_before_loading(tmp_path: Path) -> None:
    """An export that the model's experts rule out is refused before loading, even if the model's name tells nothing."""
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "chat.jsonl", chats(2))
    arguments = ("--model", "model", "--dataset", "chat.jsonl", "--output", "out", *OPTIONS, "--export", "original")
    ended = finetune(*arguments, cwd=tmp_path, before=_interleave)
    assert_error(
        ended, "--export original: the gate and up features", "alternate in the tensor gate_up_proj", "moe-fused merge"
    )
    assert "predicted peak" not in ended.stderr
    assert not (tmp_path / "out").exists()


def _interleave() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    original = Qwen3MoeExperts.__init__

    def build(self: Qwen3MoeExperts, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        self.is_concatenated = False

    Qwen3MoeExperts.__init__ = build


def next_commands(capsys: pytest.CaptureFixture[str], options: Options) -> list[list[str]]:
    print_next(set_up(options, QWEN3_MOE.build().config, torch.device("cpu")))
    return [shlex.split(line) for line in capsys.readouterr().out.partition("next:\n")[2].splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_next_has_no_conversion_that_would_be_refused(case: ModelCase, capsys: pytest.CaptureFixture[str]) -> None:
    config, options = case.build().config, Options(model="m", output="o")
    setup = set_up(options, config, torch.device("cpu"))
    refused = setup.layout_refusals["per-expert"] is not None
    assert refused or case.id not in ("gpt_oss", "mixtral", "nemotron_h")
    print_next(setup)
    programs = [line.split()[1] for line in capsys.readouterr().out.partition("next:\n")[2].splitlines()]
    assert programs == ["generate", *([] if refused else ["convert"]), "merge"]
    print_next(set_up(replace(options, expert_rank=0), config, torch.device("cpu")))
    assert "convert" not in capsys.readouterr().out


def test_next_of_names_that_a_shell_takes_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-my run-per-expert").mkdir()
    generate, convert, merge = next_commands(capsys, Options(model="my model; ls", output="-my run/"))
    assert generate[2:5] == ["my model; ls", "--adapter", "./-my run"]
    assert convert[-2:] == ["./-my run", "./-my run-per-expert-2"]  # the other is there already
    assert merge[2:] == ["my model; ls", "./-my run", "./-my run-merged"]


def test_next_of_what_generate_does_not_quantize_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantize, generate, *_ = next_commands(capsys, Options(model="org/m", output="o", quantization="fp4"))
    assert quantize[1:] == ["quantize", "org/m", "m-fp4", "--format", "fp4"]
    assert generate[1:5] == ["generate", "m-fp4", "--adapter", "o"]
    assert "--load-in-4bit" not in generate
    (generate, *_) = next_commands(capsys, Options(model="org/m", output="o", quantization="none"))
    assert "--load-in-4bit" not in generate


def test_next_keeps_the_format_of_a_checkpoint_in_4_bits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = QWEN3_MOE.build(hidden_size=64, moe_intermediate_size=64).config
    config.quantization_config = compressed_content("nvfp4")
    print_next(set_up(Options(model="org/m", output="o"), config, torch.device("cpu")))
    printed = capsys.readouterr().out
    assert "  moe-fused merge org/m o o-merged\n  moe-fused merge org/m o o-merged-nvfp4 --keep-format\n" in printed
    assert all("--keep-format" not in words for words in next_commands(capsys, Options(model="org/m", output="o")))


def test_next_of_a_revision(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = next_commands(capsys, Options(model="org/m", output="o", revision="refs/pr/1"))
    assert commands[0] == ["hf", "download", "org/m", "--revision", "refs/pr/1", "--local-dir", "m-refs-pr-1"]
    assert commands[1][1:3] == ["generate", "m-refs-pr-1"]
    assert commands[-1][1:3] == ["merge", "m-refs-pr-1"]


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"router_rank": 4}, {"export": "per-expert"}])
def test_next_has_no_conversion_that_is_of_no_use(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    commands = next_commands(capsys, Options(model="m", output="o", **options))
    assert [command[1] for command in commands] == ["generate", "merge"]


# The plot.


def test_the_mean_of_the_plot_neither_lags_nor_leads() -> None:
    falling = [float(-step) for step in range(200)]
    assert window(200) == 21
    assert smoothed(falling, window(200)) == pytest.approx(falling)
    noisy = [5.0 + (-1) ** step for step in range(200)]
    assert all(abs(mean - 5) < 0.06 for mean in smoothed(noisy, window(200))[10:-10])


def test_a_short_run_is_drawn_without_a_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    labels: list[str] = []
    plot = Axes.plot

    def noted(self: Axes, *args: Any, **kwargs: Any) -> Any:
        labels.append(kwargs["label"])
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", noted)
    for count, words in (
        (49, ["training", "evaluation"]),
        (50, ["training", "training, mean of 5 records", "evaluation"]),
    ):
        records: list[dict[str, Any]] = [{"step": step, "loss": 1 / step} for step in range(1, count + 1)]
        draw_loss([*records, {"step": count, "eval_loss": 0.5}], tmp_path / "loss.png")
        assert labels == words
        labels.clear()
