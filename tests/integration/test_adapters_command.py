"""``moe-fused convert adapter``: which layout it recognises, what it refuses, and what it leaves behind however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moe_fused.__main__ as entry
from moe_fused import console
from moe_fused.checkpoints.adapters import Layout, ScalingChoice
from moe_fused.checkpoints.adapters import convert as conversion
from moe_fused.checkpoints.adapters.convert import WEIGHTS, convert_adapter
from moe_fused.checkpoints.safetensors_file import TensorSpec, as_bytes, safetensors_writer
from tests.integration.adapters import PREFIX, edit, per_expert_adapter, read, same_tensors, write
from tests.integration.commands import command, files
from tests.support import REPOSITORY, python_path

Config = dict[str, Any]
Tensors = dict[str, Tensor]
KEEP = ScalingChoice.KEEP
EXPERTS = f"{PREFIX}.1.mlp.experts"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return per_expert_adapter(tmp_path / "source", shared=True)


def fused(source: Path, layout: Layout = Layout.PEFT_FUSED, **config: Any) -> Path:
    """The adapter in a fused layout, without the mark by which we know what we wrote."""
    marked = source.with_name("marked")
    convert_adapter(source, marked, to=layout)
    tensors, content = read(marked)
    content.pop("lora_B_layout", None)
    return write(source.with_name("fused"), tensors, {**content, **config})


def down_only(tensors: Tensors, config: Config) -> None:
    for key in [key for key in tensors if "gate_proj" in key or "up_proj" in key]:
        del tensors[key]
    config["target_modules"] = ["q_proj", "down_proj"]


def changed(source: Path, change: Callable[[Tensors, Config], object]) -> Path:
    tensors, config = read(source)
    change(tensors, config)
    return write(source.with_name("changed"), tensors, config)


# --- detection


@pytest.mark.parametrize("layout", [layout for layout in Layout if layout is not Layout.GPT_OSS_INVERTED])
def test_knows_what_it_wrote_itself(layout: Layout, source: Path, tmp_path: Path) -> None:
    convert_adapter(source, tmp_path / "there", to=layout, scaling=KEEP)
    assert convert_adapter(tmp_path / "there", tmp_path / "x", to=Layout.PEFT_FUSED, dry_run=True).source is layout


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("mark", ["rank_major", "grouped_by_expert"])
def test_shapes_and_unsloths_mark_tell(swapped: bool, mark: str, source: Path, tmp_path: Path) -> None:
    layouts = {
        (False, "rank_major"): Layout.PEFT_FUSED,
        (True, "rank_major"): Layout.PEFT_SWAPPED,
        (False, "grouped_by_expert"): Layout.UNSLOTH_GROUPED,
        (True, "grouped_by_expert"): Layout.UNSLOTH_SWAPPED,
    }
    details = {"parameters": {"down_proj": {"lora_B_layout": mark, "num_experts": 6}}}
    adapter = fused(source, layouts[swapped, mark], lora_B_layout=mark, unsloth_fused_expert_lora=details)
    plan = convert_adapter(adapter, tmp_path / "out", to=Layout.PER_EXPERT, scaling=KEEP)
    assert plan.source is layouts[swapped, mark]
    assert same_tensors(source, tmp_path / "out")
    # A mark of the source would be wrong about the target.
    assert not {"lora_B_layout", "unsloth_fused_expert_lora"} & plan.config.keys()


@pytest.mark.parametrize(
    "layout, first, second",
    [
        (Layout.PEFT_FUSED, "--from peft-fused", "--from unsloth-grouped"),
        (Layout.PEFT_SWAPPED, "--from peft-swapped", "--from unsloth-swapped"),
    ],
)
def test_order_of_lora_b_must_be_said(layout: Layout, first: str, second: str, source: Path, tmp_path: Path) -> None:
    adapter = fused(source, layout)
    with pytest.raises(ValueError, match="nothing in the adapter tells") as caught:
        convert_adapter(adapter, tmp_path / "out", to=Layout.PER_EXPERT)
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert str(caught.value).count("--from") == 2
    convert_adapter(adapter, tmp_path / "out", to=Layout.PER_EXPERT, given=layout, scaling=KEEP)
    assert same_tensors(source, tmp_path / "out")


@pytest.mark.parametrize(
    "version, layout",
    [("0.18.1", Layout.PEFT_SWAPPED), ("0.19.0", Layout.PEFT_SWAPPED), ("0.19.1", Layout.PEFT_FUSED)],
)
def test_version_tells_if_shapes_do_not(version: str, layout: Layout, source: Path, tmp_path: Path) -> None:
    down = changed(source, down_only)
    adapter = fused(down, layout, peft_version=version, lora_B_layout="rank_major")
    plan = convert_adapter(adapter, tmp_path / "out", to=Layout.PER_EXPERT, scaling=KEEP)
    assert plan.source is layout
    assert same_tensors(down, tmp_path / "out")
    edit(adapter, peft_version=None)
    with pytest.raises(ValueError, match=r"--from peft-fused .* or --from peft-swapped"):
        convert_adapter(adapter, tmp_path / "again", to=Layout.PER_EXPERT)


@pytest.mark.parametrize(
    "version, layout",
    [("0.18.0", Layout.PEFT_FUSED), ("0.19.0", Layout.GPT_OSS_INVERTED), ("0.20.0", Layout.PEFT_FUSED)],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_version_tells_for_gpt_oss(version: str, layout: Layout, by_name: bool, source: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt_oss"}')
    base = "openai/gpt-oss-20b" if by_name else str(tmp_path / "base")
    config = {"peft_version": version, "lora_B_layout": "rank_major", "base_model_name_or_path": base}
    # In the same bytes: of an adapter for gpt-oss there are no experts apart to start from.
    bytes_of = Layout.PEFT_SWAPPED if layout is Layout.GPT_OSS_INVERTED else layout
    adapter = fused(changed(source, down_only), bytes_of, **config)
    assert convert_adapter(adapter, tmp_path / "out", to=Layout.PEFT_FUSED, dry_run=True).source is layout


def test_rank_1_needs_no_word(tmp_path: Path) -> None:
    source = per_expert_adapter(tmp_path / "source", shared=True, r=1)
    adapter = fused(source)
    convert_adapter(adapter, tmp_path / "out", to=Layout.PER_EXPERT, scaling=KEEP)
    assert same_tensors(source, tmp_path / "out")


# --- refusals


@dataclass(frozen=True)
class Wrong:
    """An adapter that must be refused with these words.

    Attributes:
        change: of a per-expert adapter, or of a fused one if ``fused``.
        given: what the user says of the layout.
    """

    id: str
    change: Callable[[Tensors, Config], object]
    words: tuple[str, ...]
    fused: bool = False
    to: Layout = Layout.PEFT_FUSED
    given: Layout | None = None


def _rename(old: str, new: str) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, _: Config) -> None:
        tensors[new] = tensors.pop(old)

    return change


def _replace(key: str, tensor: Tensor) -> Callable[[Tensors, Config], None]:
    return lambda tensors, _: tensors.update({key: tensor})


def _config(**changes: Any) -> Callable[[Tensors, Config], None]:
    return lambda _, config: config.update(changes)


def _without_experts(tensors: Tensors, _: Config) -> None:
    for key in [key for key in tensors if ".experts." in key]:
        del tensors[key]


def _fewer_experts_in_a_layer(tensors: Tensors, _: Config) -> None:
    for key in [key for key in tensors if f"{EXPERTS}.5." in key]:
        del tensors[key]


_DOWN_A = f"{EXPERTS}.3.down_proj.lora_A.weight"
WRONG = [
    Wrong("missing B", lambda t, _: t.pop(f"{EXPERTS}.3.up_proj.lora_B.weight"), ("lora_B", f"{EXPERTS}.3.up_proj")),
    Wrong("missing A", lambda t, _: t.pop(_DOWN_A), ("lora_A", f"{EXPERTS}.3.down_proj")),
    Wrong("fewer experts in a layer", _fewer_experts_in_a_layer, (EXPERTS, "5 experts, 6")),
    Wrong("another rank in an expert", _replace(_DOWN_A, torch.ones(3, 12)), (_DOWN_A, "(3, 12)", "rank 4")),
    Wrong("another size in an expert", _replace(_DOWN_A, torch.ones(4, 13)), (_DOWN_A, "(4, 13)", "(4, 12)")),
    Wrong("another dtype in an expert", _replace(_DOWN_A, torch.ones(4, 12).half()), (_DOWN_A, "float32")),
    Wrong(
        "an expert's rank by pattern",
        _config(rank_pattern={r"experts\.3\.down_proj": 3}),
        ("3.down_proj.lora_A", "another rank or alpha", "0.down_proj"),
    ),
    Wrong("rank of the config", _config(r=8), ("gate_proj.lora_A", "rank 8")),
    Wrong("rank of attention", _config(rank_pattern={"q_proj": 8}), ("q_proj.lora_A", "rank 8")),
    Wrong("alpha of gate", _config(alpha_pattern={"gate_proj": 8}), ("alpha 8", "alpha 6", "one rank and one alpha")),
    Wrong("no experts", _without_experts, ("no LoRA on experts", "q_proj")),
    Wrong("names of Mixtral", _rename(_DOWN_A, f"{EXPERTS}.3.w2.lora_A.weight"), (f"{EXPERTS}.3.w2.lora_A.weight",)),
    Wrong("weights of experts", _replace(f"{EXPERTS}.down_proj", torch.ones(2)), (f"{EXPERTS}.down_proj", "no layout")),
    Wrong(
        "mixed layouts",
        _replace(f"{EXPERTS}.lora_A.weight", torch.ones(24, 12)),
        (f"{EXPERTS}.lora_A.weight", "target_parameters"),
    ),
    Wrong(
        "mixed layouts, with the original's",
        _replace(f"{PREFIX}.0.mlp.down_proj.lora_A.weight", torch.ones(6, 4, 12)),
        (f"{PREFIX}.0.mlp.down_proj.lora_A.weight", "original", "per-expert"),
    ),
    Wrong("layout given wrong", lambda t, c: None, ("per-expert", "not original"), given=Layout.ORIGINAL),
    Wrong("DoRA", _config(use_dora=True), ("use_dora",)),
    Wrong("bias of LoRA", _config(lora_bias=True), ("lora_bias",)),
    Wrong("not LoRA", _config(peft_type="LOHA"), ("LOHA",)),
    Wrong("no rank", _config(r=None), ("r and lora_alpha",)),
    Wrong(
        "shapes of nothing",
        _replace(f"{EXPERTS}.lora_B.weight", torch.ones(41, 24)),
        (f"{EXPERTS}.base_layer.lora_A", "41", "not gate_up_proj and down_proj"),
        fused=True,
    ),
    Wrong(
        "other shapes in a layer",
        lambda t, _: t.update(
            {
                f"{EXPERTS}.base_layer.lora_A.weight": torch.ones(24, 24),
                f"{EXPERTS}.base_layer.lora_B.weight": torch.ones(40, 24),
                f"{EXPERTS}.lora_A.weight": torch.ones(24, 40),
                f"{EXPERTS}.lora_B.weight": torch.ones(12, 24),
            }
        ),
        (EXPERTS, "not gate_up_proj and down_proj"),
        fused=True,
    ),
    Wrong(
        "columns of B",
        _replace(f"{EXPERTS}.lora_B.weight", torch.ones(40, 20)),
        (f"{EXPERTS}.lora_B.weight", "(40, 20)", "24"),
        fused=True,
        given=Layout.PEFT_FUSED,
    ),
    Wrong(
        "rank that does not divide",
        _config(r=5, rank_pattern={"q_proj": 4}),
        ("base_layer.lora_A", "(24, 40)", "E·5"),
        fused=True,
        given=Layout.PEFT_FUSED,
    ),
    Wrong("swapped by word", _config(), ("peft-fused", "not peft-swapped"), fused=True, given=Layout.PEFT_SWAPPED),
    Wrong(
        "mark against word",
        _config(lora_B_layout="grouped_by_expert"),
        ("unsloth-grouped", "not peft-fused"),
        fused=True,
        given=Layout.PEFT_FUSED,
    ),
    Wrong("unknown mark", _config(lora_B_layout="diagonal"), ("lora_B_layout", "diagonal"), fused=True),
    Wrong(
        "marks that differ",
        _config(
            lora_B_layout="rank_major",
            unsloth_fused_expert_lora={"parameters": {"down_proj": {"lora_B_layout": "grouped_by_expert"}}},
        ),
        ("lora_B_layout", "rank_major", "grouped_by_expert"),
        fused=True,
    ),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_wrong_adapter(case: Wrong, source: Path, tmp_path: Path) -> None:
    adapter = changed(fused(source) if case.fused else source, case.change)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=re.escape(case.words[0])) as caught:
            convert_adapter(adapter, tmp_path / "out", to=case.to, given=case.given, dry_run=dry_run)
        message = str(caught.value)
        assert "\n" not in message
        for word in case.words:
            assert word in message
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_original_of_other_ranks(source: Path, tmp_path: Path) -> None:
    convert_adapter(source, tmp_path / "original", to=Layout.ORIGINAL)
    key = f"{PREFIX}.1.mlp.up_proj.lora_B.weight"
    for tensor in (torch.ones(6, 12, 3), torch.ones(5, 12, 4)):
        adapter = changed(tmp_path / "original", _replace(key, tensor))
        with pytest.raises(ValueError, match=r"1\.mlp\.up_proj\.lora_B\.weight .*but needs \(6, out, 4\)"):
            convert_adapter(adapter, tmp_path / "out", to=Layout.PER_EXPERT)
        for path in adapter.iterdir():
            path.unlink()
        adapter.rmdir()


# --- the command


def test_command(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("about")
    (source / "optimizer.pt").write_text("moments of other shapes")
    before = files(tmp_path)
    ended = command("adapter", "source", "out", "--to", "peft-fused", "--dry-run", cwd=tmp_path)
    assert ended.status == 0, ended
    assert ended.stdout.startswith("would convert source (per-expert) to out (peft-fused)\n2 layers of 6 experts")
    assert "optimizer.pt is not copied" in ended.stdout
    assert files(tmp_path) == before

    ended = command("adapter", "source", "out", "--to", "peft-fused", cwd=tmp_path)
    assert ended.stdout.startswith("converted ")
    assert not ended.stderr
    assert files(tmp_path / "out").keys() == {"README.md", "adapter_config.json", WEIGHTS}
    assert files(source).items() <= {name.removeprefix("source/"): data for name, data in before.items()}.items()
    assert (tmp_path / "out").stat().st_mode == source.stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize(
    "options, status, words",
    [
        (("nowhere", "out"), 1, ("SOURCE nowhere is not a directory",)),
        (("source", "other"), 1, ("TARGET", "other exists", "--overwrite")),
        (("source", "other", "--overwrite"), 1, ("other has no adapter_config.json",)),
        (("source", "source", "--overwrite"), 1, ("is SOURCE or holds it",)),
        (("source", ".", "--overwrite"), 1, ("is SOURCE or holds it",)),
        (("source", "outer", "--overwrite"), 1, ("outer holds the directory checkpoint-1",)),
        (("source", "file", "--overwrite"), 1, ("file exists and is not a directory",)),
        (("source", "no/out"), 1, ("No such file", "TARGET")),
        (("source", "out", "--to", "gguf"), 2, ("--to", "gguf", "per-expert")),
        (("source", "out", "--from", "original"), 1, ("is in layout per-expert, not original",)),
        (("source",), 2, ("TARGET",)),
    ],
    ids=str,
)
def test_one_line_and_nothing_done(
    options: tuple[str, ...],
    status: int,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = per_expert_adapter(tmp_path / "source", shared=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    (tmp_path / "outer" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "outer" / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    (tmp_path / "file").write_text("")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moe-fused", "convert", "adapter", *options])
    monkeypatch.setattr(console, "raise_on_signals", lambda: None)
    assert entry.main() == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "other", "outer", "file"}


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda path: (path / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
        (lambda path: (path / WEIGHTS).rename(path / "adapter_model.bin"), "only safetensors are read"),
        (lambda path: (path / WEIGHTS).write_bytes(b"\x00" * 9), WEIGHTS),
        (lambda path: (path / "adapter_config.json").write_text("{"), "must be JSON"),
    ],
    ids=["no weights", "pickled", "broken weights", "broken config"],
)
def test_broken_source(prepare: Callable[[Path], object], words: str, source: Path, tmp_path: Path) -> None:
    prepare(source)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        convert_adapter(source, tmp_path / "out", to=Layout.ORIGINAL)


def test_overwrites_an_adapter(source: Path, tmp_path: Path) -> None:
    earlier = per_expert_adapter(tmp_path / "out")
    (earlier / "README.md").write_text("of the earlier one")
    convert_adapter(source, earlier, to=Layout.PEFT_FUSED, overwrite=True)
    assert files(earlier).keys() == {"adapter_config.json", WEIGHTS}
    assert any("base_layer" in key for key in read(earlier)[0])


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda end: end.name)
def test_killed_while_writing(end: signal.Signals, source: Path, tmp_path: Path) -> None:
    earlier = per_expert_adapter(tmp_path / "out")
    before = files(earlier)
    program = f"""
import os, signal, sys
from pathlib import Path
from moe_fused import console
from moe_fused.checkpoints.adapters import Layout
from moe_fused.checkpoints.adapters.convert import convert_adapter

def kill(step, done, total):
    if (step, done) == ("writing", 1):
        partial = [path for path in Path().iterdir() if path.suffix == ".partial"]
        assert (partial[0] / "{WEIGHTS}").stat().st_size > 1000
        os.kill(os.getpid(), {int(end)})

def app(standalone_mode):
    convert_adapter(Path("source"), Path("out"), to=Layout.PEFT_FUSED, overwrite=True, progress=kill)

sys.exit(console.run(lambda: app))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert files(earlier) == before
    if end is signal.SIGKILL:
        assert ended.returncode == -end
        # What is left is hidden and in nobody's way.
        convert_adapter(source, earlier, to=Layout.PEFT_FUSED, overwrite=True)
        assert any("base_layer" in key for key in read(earlier)[0])
    else:
        assert ended.returncode == 128 + end
        assert ended.stderr == f"error: interrupted by {end.name}\n"
        assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_failed_write_leaves_the_earlier_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = per_expert_adapter(tmp_path / "out")
    before = files(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion.shutil, "copyfile", full)
    (source / "README.md").write_text("about")
    before = files(tmp_path)
    with pytest.raises(OSError, match="No space"):
        convert_adapter(source, earlier, to=Layout.PEFT_FUSED, overwrite=True)
    assert files(tmp_path) == before


def test_missing_typer_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "moe_fused.cli", raising=False)
    monkeypatch.setattr(console, "raise_on_signals", lambda: None)
    assert entry.main() == 1
    assert (
        capsys.readouterr().err
        == "error: moe-fused needs typer, which is not installed: pip install 'moe-fused[cli]'\n"
    )


def test_options_are_read_without_torch() -> None:
    program = "import sys, moe_fused.cli; sys.exit(bool({'torch', 'transformers', 'safetensors'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0


# --- the file


def test_writer_keeps_to_what_was_announced(tmp_path: Path) -> None:
    a, b = torch.ones(2), torch.ones(3, dtype=torch.int8)
    specs = {"b": TensorSpec.of("b", b), "a": TensorSpec.of("a", a)}

    def make(name: str, *tensors: tuple[str, Tensor]) -> None:
        with safetensors_writer(tmp_path / name, specs, {"format": "pt"}) as put:
            for key, tensor in tensors:
                put(key, [as_bytes(tensor)])

    make("right", ("b", b), ("a", a))
    found = load_file(tmp_path / "right")
    assert torch.equal(found["a"], a)
    assert torch.equal(found["b"], b)
    # Readers view the bytes where they are: the wide tensor comes first, however they were announced.
    data = (tmp_path / "right").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["a"]["data_offsets"] == [0, 8]
    assert (len(data) - len(a) * 4 - len(b)) % 8 == 0
    with pytest.raises(FileExistsError):
        make("right", ("b", b), ("a", a))
    with pytest.raises(ValueError, match="b was announced and not written"):
        make("one missing", ("a", a))
    with pytest.raises(ValueError, match="a must have the 8 bytes announced, got 12"):
        make("too long", ("a", torch.ones(3)), ("b", b))
    with pytest.raises(ValueError, match="a must have the 8 bytes announced, got 4"):
        make("another dtype", ("a", a.half()), ("b", b))
    with pytest.raises(ValueError, match="a must be announced, and written once"):
        make("twice", ("a", a), ("a", a))
    with pytest.raises(ValueError, match="c must be announced, and written once"):
        make("one too many", ("c", a))
    with pytest.raises(TypeError, match=r"c is torch\.complex64, which safetensors cannot hold"):
        TensorSpec.of("c", torch.ones(1, dtype=torch.complex64))


def test_mark_is_in_the_header_only(source: Path, tmp_path: Path) -> None:
    convert_adapter(source, tmp_path / "out", to=Layout.UNSLOTH_GROUPED)
    data = (tmp_path / "out" / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt", "moe_fused.layout": "unsloth-grouped"}
    # Which today's Unsloth reads; PEFT would warn of it.
    assert read(tmp_path / "out")[1]["lora_B_layout"] == "grouped_by_expert"
    convert_adapter(tmp_path / "out", tmp_path / "peft", to=Layout.PEFT_FUSED)
    assert "lora_B_layout" not in read(tmp_path / "peft")[1]
