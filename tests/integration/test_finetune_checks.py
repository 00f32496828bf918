"""What ``moe-fused finetune`` refuses of its model, its options and its target before it loads, and what it never writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from moe_fused.finetune.options import DEFAULTS, TYPES, Options, flag
from moe_fused.finetune.resolve import ModelSetup, set_up
from moe_fused.finetune.space import bytes_of_run
from tests.support import REPOSITORY, python_path

from .broken import changed, poison
from .finetuning import (
    OPTIONS,
    assert_error,
    chats,
    checkpoints,
    finetune,
    leftovers,
    nothing_loads,
    save_model,
    write_jsonl,
)
from .test_checkpoint_complete import BROKEN

# The names in the model of these tests, which has one layer and four experts.
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.experts.2.up_proj.weight"
FLOATS = [name for name, kind in TYPES.items() if kind in (float, float | None)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and a data set."""
    path = tmp_path_factory.mktemp("checks")
    save_model(path / "model")
    write_jsonl(path / "chat.jsonl", chats())
    return path


def arguments(place: Path, model: Path, *options: str) -> tuple[Any, ...]:
    return ("--model", model, "--dataset", place / "chat.jsonl", *OPTIONS, "--output", "out", *options)


@pytest.mark.parametrize(
    "name",
    ["no projection", "no norm", "no router", "no head", "no expert", "head of another shape", "a tensor too many"],
)
@pytest.mark.parametrize("options", [("--dry-run",), (), ("--quantization", "none")], ids=" ".join)
def test_a_model_that_is_not_whole(name: str, options: tuple[str, ...], place: Path, tmp_path: Path) -> None:
    change, words = BROKEN[name]

    def in_first_layer(tensors: dict[str, torch.Tensor]) -> None:
        """Applies ``change``, which changes the second layer, to the first layer instead."""
        renamed = {key.replace("layers.0", "layers.1"): value for key, value in tensors.items()}
        change(renamed)
        tensors.clear()
        tensors.update({key.replace("layers.1", "layers.0"): value for key, value in renamed.items()})

    broken = changed(place / "model", tmp_path / "model", in_first_layer)
    ended = finetune(*arguments(place, broken, *options), cwd=tmp_path, before=nothing_loads)
    assert_error(ended, f"--model {broken}", words[0].replace("layers.1", "layers.0"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", [Q, UP, "model.norm.weight"])
def test_weights_that_are_not_finite(key: str, place: Path, tmp_path: Path) -> None:
    broken = changed(place / "model", tmp_path / "model", lambda tensors: poison(tensors, key, float("nan")))
    assert_error(finetune(*arguments(place, broken), cwd=tmp_path), key, "NaN or infinite")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_files_that_are_damaged(place: Path, tmp_path: Path) -> None:
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        broken = tmp_path / file
        shutil.copytree(place / "model", broken)
        content = (broken / file).read_bytes()
        (broken / file).write_bytes(content[: len(content) // 2])
        ended = finetune(*arguments(place, broken, "--dry-run"), cwd=tmp_path, before=nothing_loads)
        assert_error(ended, file)
    (broken / "tokenizer_config.json").write_bytes(content)
    (broken / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    assert_error(finetune(*arguments(place, broken), cwd=tmp_path), "has no tokenizer that can be loaded")
    shutil.copyfile(place / "model" / "tokenizer.json", broken / "tokenizer.json")
    (broken / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    keys = load_file(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "../elsewhere.safetensors")}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    ended = finetune(*arguments(place, broken), cwd=tmp_path, before=nothing_loads)
    assert_error(ended, "model.safetensors.index.json", "'../elsewhere.safetensors'", "within")


@pytest.mark.parametrize("name", FLOATS)
def test_every_number_must_be_finite(name: str) -> None:
    given = {"model": "m", "dataset": "d", "output": "o"}
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"^{flag(name)} must be"):
            Options(**given, **{name: value})
    assert {"learning_rate", "warmup", "max_grad_norm", "expert_alpha", "epochs", "memory_limit"} <= set(FLOATS)
    Options(**given, **{name: DEFAULTS[name]})


def test_on_the_command_line_and_in_yaml(tmp_path: Path) -> None:
    """A number that is not finite is refused before anything heavy is imported."""
    (tmp_path / "options.yaml").write_text("model: m\ndataset: d\noutput: o\nlearning_rate: .inf\n", encoding="utf-8")
    given = ("--model", "m", "--dataset", "d", "--output", "o")
    for options in (
        (*given, "--learning-rate", "inf"),
        (*given, "--learning-rate", "nan"),
        ("--config", "options.yaml"),
    ):
        ended = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "moe_fused", "finetune", *options],
            cwd=tmp_path,
            env={"PYTHONPATH": python_path(REPOSITORY), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == 1
        assert "error: --learning-rate must be a finite number, got" in ended.stderr
        assert "| torch\n" not in ended.stderr


def _poisoned(step: int) -> None:
    """Makes an adapter's weight NaN at the end of ``step``, where no loss or gradient shows it."""
    from moe_fused.finetune.trainer import Finetuner

    original = Finetuner.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if self.state.global_step == step - 1:
            optimizer = self.optimizer
            update = optimizer.step

            def poisoned_update(*a: Any, **k: Any) -> Any:
                updated = update(*a, **k)
                self._trained[3].data.view(-1)[0] = float("nan")
                optimizer.step = update
                return updated

            optimizer.step = poisoned_update
        return result

    Finetuner.training_step = training_step  # type: ignore[method-assign]


@pytest.mark.parametrize("step", [2, 8], ids=["at a checkpoint", "at the end"])
def test_an_adapter_that_is_not_finite_is_not_written(step: int, place: Path, tmp_path: Path) -> None:
    save_steps = "2" if step == 2 else "100"
    before: Callable[[], None] = partial(_poisoned, step)
    ended = finetune(*arguments(place, place / "model", "--save-steps", save_steps), cwd=tmp_path, before=before)
    assert_error(ended, "lora_", f"holds NaN or infinite values after step {step}", "no checkpoint was saved yet")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert checkpoints(tmp_path / "out") == []
    assert not leftovers(tmp_path / "out")


def test_a_checkpoint_of_another_adapter(place: Path, tmp_path: Path) -> None:
    """A checkpoint whose tensors are not those of the run is an error; PEFT would go on with new tensors."""
    ended = finetune(*arguments(place, place / "model", "--max-steps", "2"), cwd=tmp_path)
    assert ended.status == 0, ended
    (tmp_path / "out" / "adapter_config.json").unlink()
    file = tmp_path / "out" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors"
    whole, data = load_file(file), file.read_bytes()
    key = min(whole)
    for tensors, words in (
        ({name: value for name, value in whole.items() if name != key}, (key, "missing")),
        (whole | {key: whole[key][:, 1:].clone()}, (key, "must have shape")),
        (whole | {"base_model.model.other.lora_A.weight": torch.ones(1)}, ("base_model.model.other.lora_A.weight",)),
    ):
        save_file(tensors, file, {"format": "pt"})
        ended = finetune("--resume", "--output", "out", "--max-steps", "4", cwd=tmp_path)
        assert_error(ended, "checkpoint-2", *words)
        assert "Traceback" not in ended.stderr
    file.write_bytes(data[:-50])
    ended = finetune("--resume", "--output", "out", "--max-steps", "4", cwd=tmp_path)
    assert_error(ended, "adapter_model.safetensors")
    file.write_bytes(data)
    assert finetune("--resume", "--output", "out", "--max-steps", "4", cwd=tmp_path).status == 0


def _no_room() -> None:
    from moe_fused import staging

    usage = shutil.disk_usage(".")
    staging.shutil.disk_usage = lambda _: usage._replace(free=1000)  # type: ignore[assignment]
    nothing_loads()


def test_no_room(place: Path, tmp_path: Path) -> None:
    for options in (("--dry-run",), ()):
        ended = finetune(*arguments(place, place / "model", *options), cwd=tmp_path, before=_no_room)
        assert_error(ended, "are needed at", "are free")
        assert not list(tmp_path.glob("o*"))


def test_the_room_that_a_run_takes(place: Path, tmp_path: Path) -> None:
    """The predicted disk space is enough for what a run leaves, and exceeds its weights by the small files only."""
    given = ("--save-steps", "1", "--keep-checkpoints", "2", "--max-steps", "3", "--export", "per-expert")
    ended = finetune(*arguments(place, place / "model", *given), cwd=tmp_path)
    assert ended.status == 0, ended
    output = tmp_path / "out"
    options = Options(model="m", dataset="d", output="o", keep_checkpoints=2, export="per-expert")
    trainable = sum(value.numel() for value in load_file(output / "adapter_model.safetensors").values())

    def setup(options: Options) -> ModelSetup:
        return set_up(options, AutoConfig.from_pretrained(place / "model"), torch.device("cpu"))

    predicted = bytes_of_run(setup(options), trainable)
    weights = sum(path.stat().st_size for name in ("*.safetensors", "optimizer.pt") for path in output.rglob(name))
    assert weights < predicted < weights + (64 << 20)
    more = dataclasses.replace(options, keep_checkpoints=4)
    # An adapter and its optimizer's two moments, in fp32.
    assert bytes_of_run(setup(more), trainable) - predicted == 2 * 3 * 4 * trainable
