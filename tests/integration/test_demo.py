"""The demo as a user runs it: a process of its own, and what it leaves behind however it ends."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_fused
from tests.bits import dequantize_4bit
from tests.support import REPOSITORY, python_path

STEPS, STEPS_4BIT = "30", "5"
DENSE = "--no-load-in-4bit"  # the first half of the demo
COMMAND = [sys.executable, "-m", "moe_fused.demo", "--device", "cpu"]
ADAPTERS = ("adapter", "adapter/per-expert")
FILES = {
    "loss.png",
    "results.json",
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
}
FILES_4BIT = (
    FILES
    | {name.replace("model/", f"{model}/") for name in FILES for model in ("model-4bit", "model-dequantized")}
    | {f"adapter/{name}" for name in ("README.md", "finetune.yaml", "log.jsonl", "loss.png")}
    | {f"adapter/{name}" for name in ("tokenizer.json", "tokenizer_config.json")}
    | {f"{path}/adapter_{name}" for path in ADAPTERS for name in ("config.json", "model.safetensors")}
    | {"adapter/per-expert/README.md", "probe.safetensors", "source-code.txt", "held-out-code.txt", "stock.py"}
)


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str


def start(
    *options: str | Path, cwd: Path, under: Sequence[str] = (), path: Sequence[Path] = ()
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*under, *COMMAND, *map(str, options)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": python_path(*path, REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    stdout, stderr = process.communicate(timeout=290)
    return Ended(process.returncode, stdout, stderr)


def run(*options: str | Path, cwd: Path, under: Sequence[str] = (), path: Sequence[Path] = ()) -> Ended:
    return end(start(*options, cwd=cwd, under=under, path=path))


def assert_one_line(ended: Ended, status: int, *words: str) -> None:
    assert ended.status == status, ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def files(directory: Path) -> dict[str, bytes]:
    """Everything in ``directory``, hidden files and leftovers included."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def require_4bit() -> None:
    """Skips where packages are missing without which the demo does its first half only."""
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes", minversion="0.50")
    pytest.importorskip("trl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """A short run of the first half, in a directory that holds nothing else."""
    directory = tmp_path_factory.mktemp("finished")
    return run("--steps", STEPS, DENSE, cwd=directory), directory / "demo-output"


@pytest.fixture(scope="module")
def finished_4bit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """A very short run from start to end."""
    require_4bit()
    directory = tmp_path_factory.mktemp("finished-4bit")
    return run("--steps", STEPS_4BIT, "--load-in-4bit", cwd=directory), directory / "demo-output"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """What an earlier run left: the least that makes it the demo's own."""
    output = tmp_path / "demo-output"
    output.mkdir()
    (output / "results.json").write_text(json.dumps({"written_by": "moe_fused.demo", "files": ["results.json", "a"]}))
    (output / "a").write_text("earlier")
    return output


def test_leaves_all_files_and_nothing_else(finished: tuple[Ended, Path]) -> None:
    ended, output = finished
    assert (ended.status, ended.stderr) == (0, "")
    assert files(output).keys() == FILES
    assert list(output.parent.iterdir()) == [output]


def test_learns_and_says_so(finished: tuple[Ended, Path]) -> None:
    ended, output = finished
    results = json.loads((output / "results.json").read_text())
    loss = results["held_out_loss"]
    assert abs(loss["before"] - math.log(257)) < 0.5  # knows nothing: every byte about equally likely
    assert loss["after"] < 3.5  # knows at least which bytes are frequent
    assert len(results["history"]["train"]) == int(STEPS)
    assert results["largest_logit_difference"] < 1e-4
    assert all(ms > 0 for ms in results["step_ms"].values())
    assert len(results["sample"]) > 100
    for shown in (
        f"{loss['before']:.3f} nats",
        f"{loss['after'] / math.log(2):.3f} bits per byte",
        "demo-output/model",
    ):
        assert shown in ended.stdout
    assert results["sample"].splitlines()[0][:40].rstrip() in ended.stdout


def test_model_loads_in_stock_transformers(finished: tuple[Ended, Path]) -> None:
    output = finished[1]
    results = json.loads((output / "results.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(output / "model", experts_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    text = 'The "with" statement – and “quotes”'
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokens.shape[1] == len(text.encode())
    assert tokenizer.decode(tokens[0]) == text
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    # Other text of the same language: close to the held-out loss, far from the random model's.
    assert loss < (results["held_out_loss"]["before"] + results["held_out_loss"]["after"]) / 2


@pytest.mark.slow
def test_replaces_an_earlier_output_and_repeats_itself(finished: tuple[Ended, Path], earlier: Path) -> None:
    assert run("--steps", STEPS, DENSE, cwd=earlier.parent).status == 0
    assert files(earlier).keys() == FILES
    assert list(earlier.parent.iterdir()) == [earlier]
    first, second = (json.loads((path / "results.json").read_text()) for path in (finished[1], earlier))
    for key in ("history", "sample", "largest_logit_difference"):
        assert first[key] == second[key]


def test_4bit_numbers(finished_4bit: tuple[Ended, Path]) -> None:
    ended, output = finished_4bit
    assert (ended.status, ended.stderr) == (0, "")
    written = files(output).keys()
    assert {name for name in written if not name.startswith("adapter/checkpoints/")} == FILES_4BIT
    results = json.loads((output / "results.json").read_text())
    numbers, loss = results["four_bit"], results["held_out_loss"]["after"]
    assert 0 < abs(numbers["held_out_loss"] - loss) < 0.1  # 4 bits show, and cost little
    assert numbers["largest_logit_difference"] < 1e-4
    size = results["size"]
    matrix = size["hidden_size"] * size["intermediate_size"]
    matrices = 3 * size["num_experts"] * size["num_layers"]
    experts = numbers["experts"]
    assert experts["parameters"] == matrices * matrix
    assert experts["dense_bytes"] == matrices * matrix * 4
    # Two weights to a byte, a byte for every 64, a scale for 256 of those, and an offset.
    assert experts["bytes"] == matrices * (matrix // 2 + matrix // 64 + 4 * math.ceil(matrix / 64 / 256) + 4)
    assert len(numbers["sample"]) > 100
    assert set(results["files"]) == written  # or the next run would not replace them
    for shown in (
        f"{numbers['held_out_loss']:.3f} nats",
        f"{experts['bytes'] / experts['parameters']:.3f} bytes per parameter",
        "4.000 bytes per parameter",
        f"{numbers['largest_logit_difference']:.1e}",
        "demo-output/model-4bit",
        "sample in 4 bits",
    ):
        assert shown in ended.stdout


def test_4bit_model_is_the_dense_one_quantized(finished_4bit: tuple[Ended, Path], enabled: None) -> None:
    from bitsandbytes import functional as bnb

    from moe_fused.demo.data import Corpus
    from moe_fused.demo.train import held_out_loss

    output = finished_4bit[1]
    results = json.loads((output / "results.json").read_text())
    dense, packed = (load_file(output / name / "model.safetensors") for name in ("model", "model-4bit"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert packed[f"{name}.absmax"].dtype == torch.uint8  # of one expert's matrix, as Transformers 4 wrote it
    model = AutoModelForCausalLM.from_pretrained(
        output / "model-4bit", device_map="cpu", experts_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(output / "model-4bit")
    model.dequantize()
    gate_up = model.get_submodule("model.layers.1.mlp.experts").gate_up_proj
    quantized = bnb.quantize_4bit(dense[name], quant_type="nf4", compress_statistics=True, blocksize=64)
    assert torch.equal(gate_up[3].chunk(2)[1], dequantize_4bit(*quantized))
    corpus = Corpus.load(tokenizer, results["size"]["sequence_length"], torch.device("cpu"))
    loss = held_out_loss(model, corpus.held_out, results["size"]["batch_size"])
    assert loss == pytest.approx(results["four_bit"]["held_out_loss"], abs=1e-4)


def logits_of(output: Path, base: str, adapter: str | None, tokens: torch.Tensor) -> torch.Tensor:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(output / base, device_map="cpu", dtype=torch.float32)
    adapted = model if adapter is None else PeftModel.from_pretrained(model, output / adapter)
    with torch.no_grad():
        return adapted(tokens, use_cache=False).logits


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_fine_tunes_on_other_text(finished_4bit: tuple[Ended, Path], enabled: None) -> None:
    from moe_fused.demo.data import byte_tokenizer, reference_text, source_text, windows

    ended, output = finished_4bit
    results = json.loads((output / "results.json").read_text())
    train, held_out = source_text()
    assert (output / "source-code.txt").read_text(encoding="utf-8") == train
    assert (output / "held-out-code.txt").read_text(encoding="utf-8") == held_out
    paragraphs = {text: set(text.split("\n\n")) for text in (train, held_out, *reference_text())}
    assert len(paragraphs[held_out]) > 100
    assert len(paragraphs[held_out] & paragraphs[train]) <= 1  # the empty one after the last
    assert len(paragraphs[train] & paragraphs[reference_text()[0]]) < 5

    tokens = windows(held_out, byte_tokenizer(), results["size"]["sequence_length"], torch.device("cpu"))
    loss = results["finetune"]["held_out_loss"]
    for when, adapter in (("before", None), ("after", "adapter")):
        logits = logits_of(output, "model-4bit", adapter, tokens)
        computed = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert computed.item() == pytest.approx(loss[when], abs=1e-4)
        assert f"{loss[when]:.3f} nats" in ended.stdout
    assert loss["after"] < loss["before"] - 0.02
    log = [json.loads(line) for line in (output / "adapter/log.jsonl").read_text().splitlines()]
    steps = [record for record in log if "loss" in record]
    assert results["finetune"]["history"] == {str(record["step"]): record["loss"] for record in steps}
    evaluated = {str(record["step"]): record["eval_loss"] for record in log if "eval_loss" in record}
    assert results["finetune"]["evaluations"] == evaluated
    assert list(evaluated) == ["1", "2", "3", "4", "5"]
    # The command cuts the text into the same windows, but for what is left over at its end.
    assert evaluated["5"] == pytest.approx(loss["after"], rel=0.01)
    assert "step 5/5: evaluation: loss " in ended.stdout
    assert f"{loss['before']:.3f} to {evaluated['5']:.3f} nats, after steps 0, 1, 2, 3, 4, 5" in ended.stdout
    assert max(record["step"] for record in log) == int(STEPS_4BIT)
    for name, nbytes in results["bytes"].items():
        assert nbytes == sum(path.stat().st_size for path in (output / name).glob("*.safetensors")) > 0


def test_the_curve_of_the_evaluation() -> None:
    from moe_fused.demo.report import curve

    assert curve({0: 3.0, 10: 2.0, 20: 1.0}) == "█▅▁  3.000 to 1.000 nats, after steps 0, 10, 20"
    assert curve({0: 2.0, 1: 2.0}).startswith("▁▁  2.000 to 2.000")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_adapters_give_the_same_logits_in_stock_peft(finished_4bit: tuple[Ended, Path]) -> None:
    output = finished_4bit[1]
    results = json.loads((output / "results.json").read_text())
    tokens = load_file(output / "probe.safetensors")["tokens"]
    moe_fused.enable()
    try:
        fused = logits_of(output, "model-4bit", "adapter", tokens)
    finally:
        moe_fused.disable()
    assert (
        logits_of(output, "model-dequantized", None, tokens) - fused
    ).abs().max() > 0.05  # the adapter does something
    for layout, adapter in zip(("peft-fused", "per-expert"), ADAPTERS, strict=True):
        difference = (logits_of(output, "model-dequantized", adapter, tokens) - fused).abs().max()
        assert difference < 1e-4
        assert results["stock"]["largest_logit_difference"][layout] < 1e-4


def test_stock_script_needs_no_moe_fused(finished_4bit: tuple[Ended, Path], tmp_path: Path) -> None:
    output = finished_4bit[1]
    (tmp_path / "sitecustomize.py").write_text('import sys\nsys.modules["moe_fused"] = None\n')
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(tmp_path),
        "OMP_NUM_THREADS": "1",
        # On a processor with avx512_bf16, stock bitsandbytes asks the Hub for a kernel, and kernels 0.16 warns offline.
        "PYTHONWARNINGS": "ignore::UserWarning:bitsandbytes.backends.cpu.ops",
    }
    command = [sys.executable, str(output / "stock.py")]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["peft-fused", "per-expert"]
    assert all(float(line.split()[-1]) < 1e-4 for line in lines)


def test_next_command_runs_as_printed(finished_4bit: tuple[Ended, Path]) -> None:
    ended, output = finished_4bit
    commands = [line.strip() for line in ended.stdout.partition("\nnext\n")[2].splitlines()]
    words = ("generate", "merge", "stock.py", "finetune")
    assert all(word in line for word, line in zip(words, commands, strict=True))
    environment = {**os.environ, "PYTHONPATH": python_path(REPOSITORY), "OMP_NUM_THREADS": "1"}
    following = subprocess.run(
        shlex.split(commands[0]), cwd=output.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert following.returncode == 0, following
    assert "tokens in" in following.stderr
    assert "Warning" not in following.stderr


def test_other_bits_after_the_round_trip_are_noticed(finished_4bit: tuple[Ended, Path], tmp_path: Path) -> None:
    from moe_fused.demo.finetune import check_round_trip

    shutil.copytree(finished_4bit[1] / "adapter", tmp_path / "adapter")
    check_round_trip(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    path = tmp_path / "adapter/per-expert/adapter_model.safetensors"
    tensors = load_file(path)
    changed = next(name for name in tensors if "experts.3.down_proj.lora_B" in name)
    tensors[changed][0, 0] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"mlp\.experts\.lora_B\S* has other bits"):
        check_round_trip(tmp_path)


def test_a_command_that_fails_ends_the_demo(tmp_path: Path) -> None:
    from moe_fused.demo.finetune import run_python

    with pytest.raises(RuntimeError, match="the thing ended with status 3"):
        run_python("the thing", ["-c", "raise SystemExit(3)"], tmp_path, torch.device("cpu"))


@pytest.mark.slow
def test_fine_tuning_is_interrupted(earlier: Path) -> None:
    require_4bit()
    before = files(earlier.parent)
    process = start("--steps", "8", cwd=earlier.parent)
    while process.poll() is None and not list(earlier.parent.glob(".demo-output-*.partial/adapter/log.jsonl")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)  # to the demo alone, which has to end the command it started
    assert_one_line(end(process), 128 + signal.SIGTERM, "interrupted by SIGTERM")
    assert files(earlier.parent) == before
    assert list(earlier.parent.iterdir()) == [earlier]


@pytest.mark.parametrize("package", ["bitsandbytes", "trl"])
def test_missing_package(package: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "sitecustomize.py").write_text(f'import sys\nsys.modules["{package}"] = None\n')
    ended = run(cwd=tmp_path / "work", path=[tmp_path])
    assert_one_line(ended, 1, f"needs {package}", DENSE, "pip install 'moe-fused[train]'")
    assert ended.stdout == ""  # the first line comes before training
    assert not list((tmp_path / "work").iterdir())


def test_4bit_of_sizes_that_cannot_be_packed(enabled: None) -> None:
    require_4bit()
    from moe_fused.demo.data import byte_tokenizer
    from moe_fused.demo.four_bit import check_usable
    from moe_fused.demo.model import CPU_SIZE, new_model

    device = torch.device("cpu")
    check_usable(new_model(CPU_SIZE, byte_tokenizer(), device))
    odd = replace(CPU_SIZE, hidden_size=96, intermediate_size=3)
    with pytest.raises(typer.BadParameter, match=r"3 x 96 weights must be a multiple of the blocksize 64") as caught:
        check_usable(new_model(odd, byte_tokenizer(), device))
    assert caught.value.exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("signum, phase", [(signal.SIGTERM, "starting"), (signal.SIGINT, "training")])
def test_interrupted(earlier: Path, signum: signal.Signals, phase: str) -> None:
    before = files(earlier.parent)
    process = start("--steps", "100000", cwd=earlier.parent)
    if phase == "starting":
        time.sleep(1.0)  # torch takes longer than that to import
    else:
        assert process.stdout is not None
        assert "experts" in process.stdout.readline()
        time.sleep(1.0)
        assert len(list(earlier.parent.iterdir())) == 2  # what is to be cleaned up
    process.send_signal(signum)
    assert_one_line(end(process), 128 + signum, f"interrupted by {signum.name}")
    assert files(earlier.parent) == before
    assert list(earlier.parent.iterdir()) == [earlier]


@pytest.mark.slow
def test_no_space_for_the_model(earlier: Path) -> None:
    before = files(earlier.parent)

    one_mebibyte_a_file = ("sh", "-c", 'ulimit -f 2048; exec "$@"', "sh")
    ended = run("--steps", "1", cwd=earlier.parent, under=one_mebibyte_a_file)
    assert_one_line(ended, 1, "File too large")
    assert files(earlier.parent) == before
    assert list(earlier.parent.iterdir()) == [earlier]


def test_failed_move_puts_the_earlier_output_back(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fused.demo.output import staged_output

    before = files(earlier.parent)
    rename = Path.rename

    def fail_for_the_new(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no"), staged_output(earlier, 0) as staging:
        (staging / "b").write_text("new")
    assert files(earlier.parent) == before
    assert list(earlier.parent.iterdir()) == [earlier]


def test_too_little_free_space_is_noticed_first(tmp_path: Path) -> None:
    from moe_fused.demo.output import staged_output

    with pytest.raises(OSError, match="MiB are needed"), staged_output(tmp_path / "out", 1 << 60):
        pytest.fail("started the work")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Refused:
    """Options that must be refused before any work, with these words, in a directory that ``prepare`` filled."""

    id: str
    options: tuple[str, ...]
    status: int
    words: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda _: None


def _foreign_directory(directory: Path) -> None:
    (directory / "mine").mkdir()
    (directory / "mine" / "thesis.txt").write_text("years of work")


def _extended_output(directory: Path) -> None:
    (directory / "mine").mkdir()
    (directory / "mine" / "results.json").write_text('{"written_by": "moe_fused.demo", "files": ["results.json"]}')
    (directory / "mine" / "notes.txt").write_text("kept beside the results")


REFUSED = [
    Refused("foreign directory", ("--output", "mine"), 1, ("mine", "not written by this demo"), _foreign_directory),
    Refused("file added to an output", ("--output", "mine"), 1, ("notes.txt",), _extended_output),
    Refused("a file", ("--output", "f"), 1, ("f exists", "not a directory"), lambda d: (d / "f").write_text("")),
    Refused("below a file", ("--output", "f/x"), 1, ("Not a directory", "f/x"), lambda d: (d / "f").write_text("")),
    Refused("missing parent", ("--output", "no/x"), 1, ("No such file", "no/x")),
    Refused("not writable, even for root", ("--output", "/proc/x"), 1, ("--output", "/proc/x")),
    Refused("root directory", ("--output", "/"), 1, ("not written by this demo",)),
    Refused("no steps", ("--steps", "0"), 2, ("--steps",)),
    Refused("unknown option", ("--stepz", "1"), 2, ("--stepz",)),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_refused(case: Refused, tmp_path: Path) -> None:
    case.prepare(tmp_path)
    before = files(tmp_path)
    assert_one_line(run(*case.options, cwd=tmp_path), case.status, *case.words)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name, why", [("abacus", "cannot be used here"), ("meta", "not served by the kernels")])
def test_device_that_cannot_serve(name: str, why: str) -> None:
    from moe_fused.devices import choose_device

    with pytest.raises(ValueError, match=f"--device {name} .*{why}"):
        choose_device(name)
