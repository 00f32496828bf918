"""``moe-fused convert optimizer``: what it refuses, in one line, and what it leaves behind however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_fused.__main__ as entry
from moe_fused import console
from moe_fused.checkpoints.adapters import Layout, ScalingChoice
from moe_fused.checkpoints.adapters.convert import convert_adapter
from moe_fused.checkpoints.optimizers.convert import convert_optimizer

from .adapters import PREFIX, edit, per_expert_adapter, read
from .commands import command, files, python
from .models import QWEN3_MOE
from .optimizers import adamw, groups, load_state, same, save_state, separate, train, write_names

DOWN = "model.layers.0.mlp.experts.{}.down_proj.weight"
Content = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Content, list[list[str]]]:
    """The state of a model with separate experts, and its names."""
    model = separate(QWEN3_MOE.build()).train()
    optimizer = adamw(model)
    train(model, optimizer, 0, 1)
    return load_state(save_state(tmp_path_factory.mktemp("trained"), optimizer)), groups(model)


@pytest.fixture
def source(trained: tuple[Content, list[list[str]]], tmp_path: Path) -> Path:
    """A checkpoint with the state of ``trained``; beside it there is a directory "out"."""
    directory = tmp_path / "source"
    QWEN3_MOE.build().config.save_pretrained(directory)
    torch.save(trained[0], directory / "optimizer.pt")
    (tmp_path / "out").mkdir()
    return directory


def number(names: list[list[str]], name: str) -> int:
    return [one for group in names for one in group].index(name)


def refuse(message: str, source: Path, error: type[Exception] = ValueError, **options: Any) -> None:
    """Must raise ``error`` with one line that matches, and leave nothing behind."""
    before = files(source.parent)
    with pytest.raises(error, match=message) as caught:
        convert_optimizer(source, source.parent / "out", **{"to": "fused", **options})
    assert "\n" not in str(caught.value).strip()
    assert files(source.parent) == before


def test_what_is_there(source: Path) -> None:
    convert_optimizer(source, source.parent / "out", to="fused")
    refuse(r"TARGET has an optimizer\.pt, .*: give --overwrite", source, FileExistsError)
    convert_optimizer(source, source.parent / "out", to="fused", overwrite=True)
    (source / "optimizer.pt").rename(source / "optimizer.bin")
    plan = convert_optimizer(source, source.parent / "out", to="fused")
    assert plan.target == source.parent / "out" / "optimizer.bin"


STATES: dict[str, tuple[Callable[[Content, list[list[str]]], object], str]] = {
    "steps": (
        lambda content, names: content["state"][number(names, DOWN.format(4))].update(step=torch.tensor(9.0)),
        r"^model\.layers\.0\.mlp\.experts\.4\.down_proj\.weight was updated 9 times, .*\.0\.down_proj\.weight 1 times",
    ),
    "no state of one": (
        lambda content, names: content["state"].pop(number(names, DOWN.format(4))),
        r"experts\.4\.down_proj\.weight was updated 0 times, .*\.0\.down_proj\.weight 1 times",
    ),
    "dtype": (
        lambda content, names: content["state"][number(names, DOWN.format(4))].update(
            exp_avg=torch.zeros(40, 12, dtype=torch.bfloat16)
        ),
        r"the state of .*experts\.4\.down_proj\.weight is exp_avg in bfloat16, .*, that of .*experts\.0.* in float32",
    ),
    "shape": (
        lambda content, names: content["state"][number(names, DOWN.format(4))].update(exp_avg=torch.zeros(12, 40)),
        r"per-expert: .*experts\.4\.down_proj\.weight has shape \(40, 12\), number \d+ of the state has \(12, 40\)",
    ),
    "shape of the squares": (
        lambda content, names: content["state"][number(names, DOWN.format(4))].update(exp_avg_sq=torch.zeros(12, 40)),
        r"exp_avg_sq in the state of .*experts\.4\.down_proj\.weight has another shape or dtype than exp_avg",
    ),
    "not finite": (
        lambda content, names: content["state"][number(names, DOWN.format(4))]["exp_avg_sq"][3].fill_(float("inf")),
        r"exp_avg_sq in the state of .*experts\.4\.down_proj\.weight holds NaN or infinite values",
    ),
    "another optimizer": (
        lambda content, names: content["state"][number(names, DOWN.format(4))].pop("exp_avg_sq"),
        r"the state of .*experts\.4\.down_proj\.weight has no exp_avg_sq, so that it is not AdamW's",
    ),
    "no step": (
        lambda content, names: content["state"][0].pop("step"),
        r"the state of model\.embed_tokens\.weight has no step, so that it is not AdamW's",
    ),
    "something else": (
        lambda content, names: content["state"][number(names, DOWN.format(4))].update(unorm_vec=torch.zeros(1)),
        r"the state of .*experts\.4\.down_proj\.weight has unorm_vec, which AdamW's state does not have",
    ),
    "integers": (
        lambda content, names: content["state"][0].update(exp_avg=torch.zeros(64, 40, dtype=torch.int64)),
        r"exp_avg in the state of model\.embed_tokens\.weight is torch\.int64, but must be a floating-point dtype",
    ),
    "one too few": (
        lambda content, names: content["param_groups"][0]["params"].pop(),
        r"optimizer\.pt has a state of \d+, which its groups do not have so",
    ),
    "one twice": (
        lambda content, names: content["param_groups"][1]["params"].append(0),
        r"optimizer\.pt has parameters twice",
    ),
    "three groups": (
        lambda content, names: content["param_groups"].append(
            {**content["param_groups"][0], "params": [content["param_groups"][0]["params"].pop()]}
        ),
        r"has several groups, and not those of Trainer: --parameters must say the names",
    ),
    "names of some": (
        lambda content, names: content["param_groups"][0].update(param_names=["a"]),
        r"group 0 has \d+ parameters, but 1 param_names",
    ),
    "no groups": (
        lambda content, names: content.pop("param_groups"),
        r"is not the state of an optimizer, which has state",
    ),
    "groups without parameters": (
        lambda content, names: content["param_groups"][0].pop("params"),
        r"is not the state of an optimizer, with a list of parameters in each group",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_states(name: str, source: Path, trained: tuple[Content, list[list[str]]]) -> None:
    change, message = STATES[name]
    content = load_state(source)
    change(content, trained[1])
    torch.save(content, source / "optimizer.pt")
    refuse(message, source)


def test_damaged_files(source: Path) -> None:
    whole = (source / "optimizer.pt").read_bytes()
    for data in (whole[: len(whole) // 2], whole[:100], b"", b"moments"):
        (source / "optimizer.pt").write_bytes(data)
        refuse(r"optimizer\.pt is not a whole file of torch\.save", source)
    torch.save(nn.Linear(1, 1), source / "optimizer.pt")  # code, which is not run
    with pytest.raises(ValueError, match=r"optimizer\.pt is not a whole file of torch\.save"):
        convert_optimizer(source, source.parent / "out", to="fused")
    (source / "optimizer.pt").unlink()
    refuse(r"has no optimizer\.pt or optimizer\.bin", source, FileNotFoundError)


def test_groups_of_what_becomes_one(source: Path, trained: tuple[Content, list[list[str]]]) -> None:
    content = load_state(source)
    first, second = content["param_groups"]
    name = DOWN.format(4)
    moved = first["params"].pop(number(trained[1], name))
    second["params"].append(moved)
    torch.save(content, source / "optimizer.pt")
    names = [[one for one in trained[1][0] if one != name], [*trained[1][1], name]]
    given = write_names(source.parent / "names.json", names)
    refuse(
        r"experts\.4\.down_proj\.weight is in group 1, .*experts\.0\.down_proj\.weight in group 0, whose hyper-parameters",
        source,
        parameters=given,
    )
    # If both groups have the same hyper-parameters, it does not matter.
    second["weight_decay"] = first["weight_decay"]
    torch.save(content, source / "optimizer.pt")
    convert_optimizer(source, source.parent / "out", to="fused", parameters=given)


def test_names(source: Path, trained: tuple[Content, list[list[str]]]) -> None:
    names = [name for group in trained[1] for name in group]
    file = source.parent / "names.json"

    def refuse_names(message: str, content: object, **options: Any) -> None:
        file.write_text(json.dumps(content))
        refuse(message, source, **{"parameters": file, **options})

    refuse_names(r"^lm_head\.bias is no parameter in layout per-expert", [*names[:-1], "lm_head.bias"])
    refuse_names(r"^model\.embed_tokens\.weight is listed twice", [*names[:-1], names[0]])
    refuse_names(r"there are \d+ parameters, but the state has \d+", names[:-1])
    refuse_names(r"q_proj\.weight has shape \(32, 40\), number 0 of the state", [names[1], names[0], *names[2:]])
    refuse_names(r"names\.json must hold a list of names", {"names": names})
    target = write_names(source.parent / "target.json", [["model.embed_tokens.weight"]])
    refuse_names(r"lm_head\.weight is not listed, but has a state", names, target_parameters=target)
    file.write_text("[")
    refuse(r"names\.json is not JSON", source, parameters=file)
    refuse("No such file", source, FileNotFoundError, parameters=source / "nothing.txt")
    # One expert is missing from the parameters.
    content = load_state(source)
    place = names.index(DOWN.format(4))
    content["state"].pop(content["param_groups"][0]["params"].pop(place))
    torch.save(content, source / "optimizer.pt")
    refuse_names(
        r"experts\.4\.down_proj\.weight is missing from the parameters, which have .*experts\.0\.down_proj\.weight",
        [name for name in names if name != names[place]],
    )


def test_layouts(source: Path) -> None:
    refuse("--to must say how the run to be resumed has its experts: per-expert, fused, original", source, to=None)
    refuse("--to peft-fused is no layout of a model", source, to="peft-fused")
    refuse("--from peft-fused is no layout of a model", source, given="peft-fused")
    refuse(r"optimizer\.pt are in layout per-expert already", source, to="per-expert")
    refuse(r"fits no order of the parameters: fused: there are", source, to="per-expert", given="fused")
    # In other layouts than that of today's Transformers, the place of experts depends on the version of Transformers.
    refuse(r"--target-parameters must say the names in layout original", source, to="original")


def test_orders_that_shapes_do_not_tell(tmp_path: Path) -> None:
    """A router with the shape of the experts' matrices may stand before or behind them, so the names must be given."""
    options = {"hidden_size": 8, "moe_intermediate_size": 8, "num_experts": 8}
    model = separate(QWEN3_MOE.build(**options))
    optimizer = adamw(model)
    train(model, optimizer, 0, 1)
    source = save_state(tmp_path / "source", optimizer)
    QWEN3_MOE.build(**options).config.save_pretrained(source)
    (tmp_path / "out").mkdir()
    refuse(
        r"fits several orders of the parameters, with model\.layers\.0\.mlp\.\S+ in two places: --parameters", source
    )
    names = write_names(tmp_path / "names.json", groups(model))
    convert_optimizer(source, tmp_path / "out", to="fused", parameters=names)


# --- 8 bits


def test_blocks_of_another_size(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    options = {"hidden_size": 64, "moe_intermediate_size": 64}
    model = separate(QWEN3_MOE.build(**options))
    optimizer = adamw(model, bnb.optim.AdamW8bit)
    train(model, optimizer, 0, 1)
    source = save_state(tmp_path / "source", optimizer)
    QWEN3_MOE.build(**options).config.save_pretrained(source)
    (tmp_path / "out").mkdir()
    whole = load_state(source)
    place = number(groups(model), DOWN.format(4))

    def change(**parts: torch.Tensor) -> None:
        content = load_state(source)
        quant_state = content["state"][place]["__bnb_optimizer_quant_state__"]
        quant_state.update(parts)
        torch.save(content, source / "optimizer.pt")

    change(absmax2=torch.ones(2))
    refuse(
        r"absmax2 in the state of .*experts\.4\.down_proj\.weight has shape \(2,\), but needs \(16,\) for blocks",
        source,
    )
    torch.save(whole, source / "optimizer.pt")
    change(qmap1=torch.linspace(-1, 1, 256))
    refuse(r"qmap1 in the state of .*experts\.4\.down_proj\.weight is not that of .*experts\.0\.down_proj", source)
    torch.save(whole, source / "optimizer.pt")
    change(state1=torch.zeros(64, 64), state2=torch.zeros(64, 64))
    refuse(
        r"the state of .*experts\.4\.\S+ is state1 in float32, .*, that of .*experts\.0\.\S+ is state1 in 8 bits",
        source,
    )


# --- adapters


def adapter(directory: Path, **options: Any) -> Path:
    """An adapter with the state of an optimizer whose moments equal the adapter's tensors."""
    source = per_expert_adapter(directory, **options)
    base = directory.parent / "base"
    QWEN3_MOE.build().config.save_pretrained(base)
    edit(source, base_model_name_or_path=str(base))
    parameters = [nn.Parameter(value) for value in read(source)[0].values()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": parameter.data,
            "exp_avg_sq": parameter.data,
        }
    save_state(source, optimizer)
    return source


def names_of(directory: Path) -> Path:
    return write_names(directory.parent / f"{directory.name}.json", [list(read(directory)[0])])


def test_common_factors(tmp_path: Path) -> None:
    """Moments of a lora_A that gate and up share cannot become moments of separate ones, nor the other way around."""
    source = adapter(tmp_path / "source", shared=True)
    convert_adapter(source, tmp_path / "out", to=Layout.PEFT_FUSED, scaling=ScalingChoice.KEEP)
    common, single = (
        rf"{PREFIX}.0.mlp.experts.base_layer.lora_A.weight",
        rf"{PREFIX}.0.mlp.experts.0.gate_proj.lora_A.weight",
    )
    message = rf"^{re.escape(common)} is one lora_A for gate_proj and up_proj, {re.escape(single)} is for one of them"
    refuse(message, source, to=None, parameters=names_of(source))
    back = tmp_path / "fused"
    (tmp_path / "out").rename(back)
    save_state(back, torch.optim.AdamW([nn.Parameter(value) for value in read(back)[0].values()]))
    convert_adapter(back, tmp_path / "out", to=Layout.PER_EXPERT, scaling=ScalingChoice.KEEP)
    refuse(message, back, to=None, parameters=names_of(back))


def test_adapters(tmp_path: Path, source: Path) -> None:
    down = adapter(tmp_path / "down", ranks={"down": 4})
    out = tmp_path / "out"
    refuse(
        r"TARGET .*out has no adapter_config\.json: first `moe-fused convert adapter", down, FileNotFoundError, to=None
    )
    out.rmdir()
    convert_adapter(down, out, to=Layout.PEFT_FUSED, scaling=ScalingChoice.FOLD)
    refuse(
        rf"{re.escape(PREFIX)}\.0\.mlp\.experts: down_proj has scaling 1\.5 in SOURCE, 1\.0 in TARGET: .*--scaling keep",
        down,
        to=None,
        parameters=names_of(down),
    )
    edit(out, lora_alpha=6)
    tensors = names_of(out)
    refuse("--to fused is no layout of an adapter", down)
    refuse("--from fused is no layout of an adapter", down, to=None, given="fused")
    refuse("fits no order of the parameters: per-expert: ", down, to=None)  # listed as a file has them
    edit(out, r=8, lora_alpha=12)
    refuse(
        "down_proj has rank 4 in SOURCE, 8 in TARGET: the moments are for 4", down, to=None, parameters=names_of(down)
    )
    edit(out, r=4, lora_alpha=6)
    plan = convert_optimizer(down, out, parameters=names_of(down), target_parameters=tensors)
    assert plan.layouts == ("per-expert", "peft-fused")
    edit(down, base_model_name_or_path=str(tmp_path / "nowhere"))
    (out / "optimizer.pt").unlink()
    refuse(r"the base model .*nowhere does not show the order of the parameters", down, to=None)
    refuse(r"SOURCE .*nowhere is not a directory", tmp_path / "nowhere", FileNotFoundError)
    (source / "config.json").unlink()
    refuse(r"has neither adapter_config\.json nor config\.json", source, FileNotFoundError)


# --- the command


def test_command(source: Path, tmp_path: Path) -> None:
    (source / "scheduler.pt").write_text("of the learning rate")
    before = files(tmp_path)
    ended = command("optimizer", "source", "out", "--to", "fused", "--dry-run", cwd=tmp_path)
    assert ended.status == 0, ended
    line, *plan = ended.stdout.splitlines()
    assert line == "would convert"
    assert plan[0] == "from source/optimizer.pt: 57 parameters, per-expert"
    assert plan[1] == "to   out/optimizer.pt: 25 parameters, fused"
    assert "copied: scheduler.pt" in ended.stdout
    assert files(tmp_path) == before
    ended = command("optimizer", "source", "out", "--to", "fused", cwd=tmp_path)
    assert ended.stdout.startswith("converted\n")
    assert not ended.stderr
    assert files(tmp_path / "out").keys() == {"optimizer.pt", "scheduler.pt"}
    assert files(source) == {name.removeprefix("source/"): data for name, data in before.items()}


@pytest.mark.parametrize(
    "options, status, words",
    [
        (("nowhere", "out"), 1, ("SOURCE nowhere is not a directory",)),
        (("source", "nowhere", "--to", "fused"), 1, ("TARGET nowhere is not a directory",)),
        (("source", "source", "--to", "fused"), 1, ("TARGET has an optimizer.pt", "--overwrite")),
        (("source", "out", "--to", "gguf"), 1, ("--to gguf is no layout of a model",)),
        (("source", "out", "--parameters", "no.txt", "--to", "fused"), 1, ("No such file", "no.txt")),
        (("source",), 2, ("TARGET",)),
    ],
    ids=str,
)
def test_one_line_and_nothing_done(
    options: tuple[str, ...],
    status: int,
    words: tuple[str, ...],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moe-fused", "convert", "optimizer", *options])
    monkeypatch.setattr(console, "raise_on_signals", lambda: None)
    assert entry.main() == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert files(tmp_path) == before


def test_in_place(source: Path) -> None:
    """The target may be the source's directory, because a model's weights are the same files in both layouts."""
    convert_optimizer(source, source.parent / "out", to="fused")
    convert_optimizer(source, source, to="fused", overwrite=True)
    assert same(load_state(source), load_state(source.parent / "out"))


_KILLED = """
import os, sys
from pathlib import Path
from moe_fused import console

def kill(step, done, total):
    if step == "writing" and 2 * done > total:
        (partial,) = Path("out").glob(".*.partial")
        assert (partial / "optimizer.pt").exists()
        os.kill(os.getpid(), int(sys.argv[1]))

def app(standalone_mode):
    from moe_fused.checkpoints.optimizers.convert import convert_optimizer

    convert_optimizer(Path("source"), Path("out"), to="fused", overwrite=True, progress=kill)

sys.exit(console.run(lambda: app))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=lambda end: end.name)
def test_killed_while_writing(end: signal.Signals, source: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "out" / "optimizer.pt"
    earlier.write_bytes(b"of another run")
    ended = python("-c", _KILLED, str(int(end)), cwd=tmp_path)
    assert earlier.read_bytes() == b"of another run"
    if end is signal.SIGKILL:
        assert ended.status == -end, ended
        # What is left behind is hidden and does not prevent the next conversion.
        convert_optimizer(source, tmp_path / "out", to="fused", overwrite=True)
        assert load_state(tmp_path / "out")["state"]
    else:
        assert ended.status == 128 + end
        assert ended.stderr == f"error: interrupted by {end.name}\n"
        assert os.listdir(tmp_path / "out") == ["optimizer.pt"]


def test_failed_write_leaves_the_earlier_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "optimizer.pt").write_bytes(b"of another run")
    before = files(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        convert_optimizer(source, tmp_path / "out", to="fused", overwrite=True)
    assert files(tmp_path) == before
    assert os.listdir(tmp_path / "out") == ["optimizer.pt"]
