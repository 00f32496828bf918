"""The examples run as their docstrings say, print what they claim, and leave what they say they write.

The first command of each runs as it stands, and others with small models and files in place of those from elsewhere: not the
one that takes the kernel from the Hub, the one of a large dense model, and the one for eight GPUs.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from tests.support import REPOSITORY, python_path, repo_id

EXAMPLES = REPOSITORY / "examples"
HELPERS = {"tiny"}
OUTPUT = "examples-output"
ABORTED_AT_EXIT = "terminate called without an active exception\n"


def commands(example: str) -> list[str]:
    """The command lines in an example's docstring: what is indented and names it."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{example}.py").read_text(encoding="utf-8"))) or ""
    return [line.strip() for line in docstring.splitlines() if re.match(rf" {{4}}\S.*examples/{example}\.py", line)]


def ended(command: str, directory: Path, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    """A command line, run in ``directory``, with ``examples`` in it, by this Python, with ``path`` before all else."""
    examples = directory / "examples"
    if not examples.exists():
        examples.symlink_to(EXAMPLES)
    words = shlex.split(command)
    environment = {**os.environ, "PYTHONPATH": python_path(*path, REPOSITORY), "OMP_NUM_THREADS": "1"}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value.replace("$PWD", str(REPOSITORY))
    if words[:2] == ["accelerate", "launch"]:  # its script may belong to another Python
        words[:2] = ["python", "-m", "accelerate.commands.launch"]
    assert words[0] == "python", command
    return subprocess.run(
        [sys.executable, *words[1:]],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def run(command: str, directory: Path, path: Sequence[Path] = ()) -> str:
    """What a command line prints that ends well."""
    process = ended(command, directory, path)
    # Torch on a busy machine, also without us: a thread of autograd, if the interpreter ends right after a backward.
    if process.returncode and ABORTED_AT_EXIT.strip() in process.stderr and "launch" in command:
        process = ended(command, directory, path)  # the launcher has ended the other process, too
    aborted = process.returncode == -signal.SIGABRT and process.stderr.endswith(ABORTED_AT_EXIT)
    assert process.returncode == 0 or (aborted and torch.cuda.is_available()), process.stderr
    return process.stdout


def number(pattern: str, output: str) -> float:
    """The one number in the only line that matches."""
    (found,) = re.findall(pattern + r"\D*?(-?\d[\d,.]*(?:e[+-]\d+)?)", output)
    return float(found.replace(",", ""))


def same_tensors(a: Path, b: Path) -> float:
    """The largest difference of two files of tensors, which have the same names."""
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    return max((left[name].float() - right[name].float()).abs().max().item() for name in left)


def distance(a: Path, b: Path) -> float:
    """How far the tensors of two files are apart, all together, as a share of their norm."""
    left, right = (
        torch.cat([value.double().flatten() for _, value in sorted(load_file(file).items())]) for file in (a, b)
    )
    return ((left - right).norm() / left.norm()).item()


def experts_of(adapter: Path) -> dict[str, Tensor]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if re.search(r"\.experts\.\d+\.", name)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the first command of export.py ran, and what it printed."""
    for package in ("peft", "accelerate"):
        pytest.importorskip(package)
    directory = tmp_path_factory.mktemp("export")
    return directory, run(commands("export")[0], directory)


def test_every_example_is_tested_and_listed() -> None:
    examples = {path.stem for path in EXAMPLES.glob("*.py")} - HELPERS
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for example in examples:
        first = commands(example)[0]
        assert f"`{first}`" in readme, f"examples/README.md lacks {first}"
        assert f"def test_{example}(" in Path(__file__).read_text(encoding="utf-8"), example


def test_kernel_only(tmp_path: Path) -> None:
    first, second = commands("kernel_only")
    assert first.endswith(second)
    assert first.startswith(f"LOCAL_KERNELS={repo_id()}=$PWD ")
    output = run(first, tmp_path)
    differences = [float(found) for found in re.findall(r"from plain torch (\S+)", output)]
    assert len(differences) == 9
    limit = 2e-2 if "bfloat16" in output else 1e-5
    assert all(0 <= difference < limit for difference in differences), output
    assert 0 < number("in 4 bits.*\n", output) < 0.3


def test_without_moe_fused(tmp_path: Path) -> None:
    """Where nothing but torch, transformers and kernels is installed: every import of another package of ours fails."""
    first, second = commands("without_moe_fused")
    assert first.endswith(second)
    others = ["moe_fused", "peft", "accelerate", "bitsandbytes", "trl", "datasets", "liger_kernel"]
    program = "import sys\nsys.modules.update(dict.fromkeys(" + repr(others) + "))\n"
    (tmp_path / "sitecustomize.py").write_text(program, encoding="utf-8")
    output = run(first, tmp_path, [tmp_path])
    found = re.findall(r"^(\w+) +(\w+) +largest relative difference from Transformers (\S+)$", output, re.MULTILINE)
    assert [(way, how) for way, how, _ in found] == [
        ("by_layer", "eager"), ("by_layer", "compiled"), ("by_function", "eager"), ("by_function", "compiled")
    ]  # fmt: skip
    assert all(float(difference) < 1e-5 for *_, difference in found), output
    # Were the kernel not used, the differences would be zero.
    assert all(float(difference) > 0 for *_, difference in found), output


@pytest.mark.slow
def test_transformers_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # for device_map
    output = run(commands("transformers_model")[0], tmp_path)
    assert number("from eager experts", output) < (1e-2 if torch.cuda.is_available() else 1e-5)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", output)]
    assert losses[-1] < losses[0] - 0.1, output


@pytest.mark.slow
def test_inference_4bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    first, second = commands("inference_4bit")
    output = run(first, tmp_path)
    packed, dense = re.findall(r"memory: (\S+) MB in 4 bits, (\S+) MB", output)[0]
    assert float(packed) < 0.5 * float(dense)
    assert "largest logit difference 0.0e+00, same tokens: True" in output
    checkpoint = tmp_path / OUTPUT / "inference_4bit" / "model-4bit"
    tensors = load_file(checkpoint / "model.safetensors")
    assert tensors["model.layers.1.mlp.experts.7.down_proj.weight"].dtype == torch.uint8
    assert AutoConfig.from_pretrained(checkpoint).quantization_config["load_in_4bit"]
    # The second with a model at hand in place of the one on the Hub.
    model = checkpoint.parent / "model"
    assert "same tokens: True" in run(second.replace("Qwen/Qwen3-30B-A3B", str(model)), tmp_path)
    assert (tmp_path / "qwen3-4bit" / "model-4bit" / "config.json").is_file()


def test_qlora_trl(tmp_path: Path) -> None:
    for package in ("trl", "bitsandbytes", "peft", "datasets"):
        pytest.importorskip(package)
    output = run(commands("qlora_trl")[0], tmp_path)
    first, last = re.findall(r"loss (\S+) in the first step, (\S+) in the last", output)[0]
    assert float(last) < 0.7 * float(first)
    assert number("reloaded from trained:", output) == 0.0
    assert number("adapter from none:", output) > 0.5
    # Experts have a matrix each, and all of them learned.
    factors = experts_of(tmp_path / OUTPUT / "qlora_trl" / "adapter")
    assert len(factors) == 2 * 8 * 3 * 2
    assert all(factor.any() for name, factor in factors.items() if "lora_B" in name)
    # The second with that model, and with a dataset of two rows.
    rows = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(2)]
    text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (tmp_path / "chats.jsonl").write_text(text, encoding="utf-8")
    second = commands("qlora_trl")[1].replace("Qwen/Qwen3-30B-A3B", f"{OUTPUT}/qlora_trl/model")
    output = run(second.replace("--steps 500", "--steps 1"), tmp_path)
    assert "parameters trained, saved in my-adapter/adapter" in output
    assert len(experts_of(tmp_path / "my-adapter" / "adapter")) == 96


@pytest.mark.slow
def test_export(exported: tuple[Path, str]) -> None:
    directory, output = exported
    assert "exported adapter: 96 tensors" in output
    assert "experts of the merged model: 48 tensors" in output
    differences = re.findall(r"relative logit difference (\S+)", output)
    assert len(differences) == 2
    assert all(float(difference) < 1e-5 for difference in differences), output
    commands_of_tools = [line.strip() for line in output.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in commands_of_tools] == [
        "vllm", "vllm", "python", "python", "python", "llama-quantize", "llama-server", "python", "llama-server",
    ]  # fmt: skip
    for path in re.findall(rf"\S*{OUTPUT}/\S*", "\n".join(commands_of_tools)):
        assert (
            directory / path.removeprefix("tuned=") / ("adapter_config.json" if "adapter" in path else "config.json")
        ).is_file()


@pytest.mark.slow
def test_export_of_a_given_adapter(exported: tuple[Path, str], tmp_path: Path) -> None:
    directory, _ = exported
    made = directory / OUTPUT / "export"
    command = commands("export")[1].replace("Qwen/Qwen3-30B-A3B", str(made / "model"))
    untold = command.replace("--adapter-layout peft-fused ", "")
    # As finetune leaves it; what is per expert already is recognised.
    for line, name in ((command, "adapter"), (untold, "adapter-per-expert")):
        cwd = tmp_path / name
        cwd.mkdir()
        run(line.replace("my-adapter", str(made / name)), cwd)
        exported_again = cwd / "my-export" / "adapter-per-expert" / "adapter_model.safetensors"
        assert same_tensors(exported_again, made / "adapter-per-expert" / "adapter_model.safetensors") == 0.0
        merged_again = cwd / "my-export" / "merged" / "model.safetensors"
        assert same_tensors(merged_again, made / "merged" / "model.safetensors") < 1e-5
    refused = ended(untold.replace("my-adapter", str(made / "adapter")), tmp_path)
    assert refused.returncode == 2
    assert "nothing in the adapter tells its layout, say --adapter-layout peft-fused" in refused.stderr


@pytest.mark.slow
def test_export_is_what_gguf_knows(exported: tuple[Path, str]) -> None:
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 2)
    made = exported[0] / OUTPUT / "export"
    base = "base_model.model."
    for path in ("merged/model.safetensors", "adapter-per-expert/adapter_model.safetensors"):
        for name in load_file(made / path):
            # llama.cpp's converters take the experts of a layer together, and an adapter by the names of its model.
            plain = re.sub(r"\.lora_[AB]\.weight$", ".weight", name.removeprefix(base))
            stacked = re.sub(r"\.experts\.\d+\.", ".experts.", plain)
            assert names.get_name(stacked, try_suffixes=(".weight",)) is not None, name


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the first command of qlora_ddp.py ran, and what it printed."""
    for package in ("trl", "bitsandbytes", "peft", "datasets"):
        pytest.importorskip(package)
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two processes need two GPUs, or none")
    directory = tmp_path_factory.mktemp("ddp")
    return directory, run(commands("qlora_ddp")[0], directory)


@pytest.mark.slow
def test_grpo(tmp_path: Path) -> None:
    """The adapters learn what is rewarded, and are saved so that PEFT reads them."""
    pytest.importorskip("trl")
    output = run(commands("grpo")[0], tmp_path)
    (first, last) = re.findall(r"reward (\S+) in the first third of the steps, (\S+) in the last", output)[0]
    assert float(last) > 2 * float(first) > 0, output
    tensors = load_file(tmp_path / OUTPUT / "grpo" / "adapter" / "adapter_model.safetensors")
    assert any(".experts." in name and "lora_B" in name and tensor.any() for name, tensor in tensors.items())


@pytest.mark.slow
def test_qlora_ddp(ddp: tuple[Path, str]) -> None:
    directory, output = ddp
    assert "2 processes on " in output
    assert "adapters of all processes are equal, bit for bit" in output
    alone = run(commands("qlora_ddp")[2], directory)
    assert "1 processes on " in alone
    lines = [re.findall(r"^losses: (.*)$", text, re.MULTILINE) for text in (output, alone)]
    losses, losses_alone = ([float(loss) for loss in line.split()] for (line,) in lines)
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5
    on_gpu = torch.cuda.is_available()
    assert losses == pytest.approx(losses_alone, abs=0.05 if on_gpu else 2e-4)
    file = Path("adapter", "adapter_model.safetensors")
    both = [directory / OUTPUT / name / file for name in ("qlora_ddp", "one_process")]
    # Adam turns the rounding of gradients that are nearly zero into steps, so single elements differ by up to two of them.
    assert distance(*both) < (0.05 if on_gpu else 1e-3)
    factors = experts_of(both[0].parent)
    assert len(factors) == 96
    assert all(factor.any() for factor in factors.values())


@pytest.mark.gpu
def test_unsloth_qlora(tmp_path: Path) -> None:
    if not torch.cuda.is_available() or find_spec("unsloth") is None:
        pytest.skip("needs a GPU and unsloth")
    output = run(commands("unsloth_qlora")[0], tmp_path)
    first, last = re.findall(r"loss (\S+) in the first step, (\S+) in the last", output)[0]
    assert float(last) < float(first) - 0.1, output
    assert number("in the first step.*\n", output) == 4  # two stacks in each of two layers
    assert (tmp_path / OUTPUT / "unsloth_qlora" / "adapter" / "adapter_model.safetensors").is_file()
