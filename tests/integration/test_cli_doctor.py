"""``moe-fused doctor``: what it finds, and that it finds it rather than crashing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import moe_fused
from moe_fused import diagnosis, hub, selftest
from moe_fused.diagnosis import Check, Status
from moe_fused.quantized import PUBLISHED
from tests.support import REPOSITORY

from .cli import Command


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    return moe_fused.get_kernel()


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that seem not to be installed; a test fills it."""
    names: set[str] = set()
    find, version = diagnosis.importlib.util.find_spec, hub.version

    def hidden(name: str) -> Any:
        if name in names:
            raise hub.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(diagnosis.importlib.util, "find_spec", lambda name: None if name in names else find(name))
    monkeypatch.setattr(hub, "version", hidden)
    return names


def found(name: str) -> list[Check]:
    return [check for check in diagnosis.examine() if check.name == name]


def test_all_fits_here(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_FUSED_CHECK", "0")
    ended = command("doctor")
    assert ended.status == 0, ended
    assert "all fits" in ended.stdout
    assert f"torch: {torch.__version__}" in ended.stdout
    assert ended.stdout.count("self-test: ") == len(selftest.CASES)
    as_json = command("doctor", "--json")
    assert as_json.status == 0
    content = json.loads(as_json.stdout)
    assert content["fits"] is True
    assert content["environment"]["MOE_FUSED_CHECK"] == "0"
    names = {check["name"] for check in content["checks"]}
    assert {"python", "torch", "triton", "transformers", "kernels", "peft", "trl", "accelerate", "kernel"} <= names
    assert {"bitsandbytes", "liger-kernel", "path", "4-bit weights", "published formats"} <= names


def test_says_which_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the distribution's version is without it."""
    version = hub.version
    monkeypatch.setattr(hub, "version", lambda name: "2.99.0" if name == "torch" else version(name))
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu130")
    (check,) = found("torch")
    assert (check.status, check.found) == (Status.OK, "2.99.0+cu130")


@pytest.mark.parametrize("package", ["torch", "transformers", "kernels"])
def test_a_needed_package_is_missing(
    package: str, missing: set[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing.add(package)
    monkeypatch.setattr(hub, "get_kernel", hub.get_kernel.__wrapped__)  # without the cache
    ended = command("doctor")
    assert ended.status == 1
    assert f"!!  {package}: not installed" in ended.stdout
    assert f"pip install '{package}" in ended.stdout
    assert "1 problem, marked !!" in ended.stdout
    assert not ended.stderr


def test_optional_packages_are_missing(missing: set[str]) -> None:
    missing |= set(hub.OPTIONAL)
    checks = {check.name: check for check in diagnosis.examine()}
    for package in hub.OPTIONAL:
        assert checks[package].status is Status.ABSENT
        assert f"pip install '{package}" in str(checks[package].advice)
    assert checks["4-bit weights"].found == "not without bitsandbytes and accelerate"
    assert all(check.status is not Status.PROBLEM for check in checks.values())


def test_packages_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    version = hub.version
    olds = {"kernels": "0.1.0", "peft": "0.17.0"}
    monkeypatch.setattr(hub, "version", lambda name: olds.get(name) or version(name))
    checks = {check.name: check for check in diagnosis.examine()}
    assert re.search(r"transformers .* needs kernels>=.*found 0\.1\.0: pip install", str(checks["kernels"].advice))
    assert "adapters needs peft>=0.21.2" in str(checks["peft"].advice)
    assert checks["kernels"].status is checks["peft"].status is Status.PROBLEM
    assert checks["self-test"].found == "left out until the packages fit"


def test_a_transformers_that_is_too_new(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is advised can be installed: not the kernels that such a Transformers asks for."""
    version = hub.version
    monkeypatch.setattr(hub, "version", lambda name: "5.24.0" if name == "transformers" else version(name))
    monkeypatch.setattr(hub, "get_kernel", hub.get_kernel.__wrapped__)  # without the cache
    ended = command("doctor")
    assert ended.status == 1
    assert "!!  transformers: 5.24.0" in ended.stdout
    said = " ".join(ended.stdout.split())
    assert "pip install 'transformers[kernels]>=5.17,<5.23'. Use transformers<5.23 until moe_fused takes" in said
    assert "kernels>=0.18" not in said


def test_what_is_too_new_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    version = hub.version
    monkeypatch.setattr(hub, "version", lambda name: "1.17.0" if name == "trl" else version(name))
    (check,) = found("trl")
    assert check.status is Status.PROBLEM
    assert check.advice == "fine-tuning needs trl>=1.16,<1.17: pip install 'trl>=1.16,<1.17'"


@pytest.mark.parametrize("error", [RuntimeError("libfoo.so: cannot open\nshared object"), ImportError("no symbol")])
def test_a_broken_installation_is_a_finding(
    error: Exception, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[Check]:
        raise error
        yield

    def no_kernel() -> ModuleType:
        raise error

    monkeypatch.setattr(diagnosis, "_four_bit", broken)
    monkeypatch.setattr(hub, "get_kernel", no_kernel)
    ended = command("doctor")
    assert ended.status == 1
    line = " ".join(str(error).split())
    assert f"!!  4-bit weights: {line}" in ended.stdout
    assert f"!!  kernel: {line}" in ended.stdout
    assert "2 problems, marked !!" in ended.stdout


def test_published_formats_need_no_other_package(missing: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    missing |= {"compressed-tensors", "compressed_tensors", "triton_kernels", "bitsandbytes"}
    (check,) = found("published formats")
    assert check.status is Status.OK
    assert "without triton_kernels and compressed-tensors" in check.found
    assert {case.quant_type for case in selftest.CASES} == {None, "nf4", *PUBLISHED}
    name = "moe_fused.integrations.quantizer.published"
    monkeypatch.setitem(sys.modules, name, None)
    (check,) = found("published formats")
    assert check.status is Status.PROBLEM
    assert name in check.found


def test_no_build(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr(hub, "get_kernel", lambda: hub.load(hub.KernelSource("org/k", 0, tmp_path, True)))
    ended = command("doctor")
    assert ended.status == 1
    assert "no kernel build in" in ended.stdout
    assert "make build" in ended.stdout


@pytest.mark.parametrize("value", ["foo", "", "org/other=/path:", "{repository}=/nowhere/at/all"])
def test_local_kernels_that_cannot_be_used(value: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_KERNELS", value.format(repository=hub.KernelSource.find().repo_id))
    monkeypatch.setattr(hub, "get_kernel", hub.get_kernel.__wrapped__)  # without the cache
    ended = command("doctor")
    assert ended.status == 1
    assert "!!  kernel: " in ended.stdout
    assert "unset LOCAL_KERNELS, or correct it" in ended.stdout
    assert "reinstall" not in ended.stdout


# The GPU, which there need not be.


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(diagnosis, "driver_version", lambda: "580.1")
    one, two = diagnosis._gpus()
    assert (one.name, two.name, one.status) == ("GPU 0", "GPU 1", Status.OK)
    assert one.found == "NVIDIA H100, compute capability 9.0, 70.0 of 80.0 GiB free, CUDA 13.0, driver 580.1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "driver_version", lambda: "470.1")
    (check,) = diagnosis._gpus()
    assert check.status is Status.PROBLEM
    assert check.found == f"torch {torch.__version__} sees none, but there is one with driver 470.1"


@pytest.mark.parametrize("output, status, version", [("580.1\n580.1\n", 0, "580.1"), ("failed", 9, "")])
def test_the_driver(output: str, status: int, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: f"/bin/{name}")
    ended = subprocess.CompletedProcess([], status, output, "")
    monkeypatch.setattr(diagnosis.subprocess, "run", lambda *_, **__: ended)
    assert diagnosis.driver_version() == version


def test_a_gpu_that_the_kernels_do_not_run_on(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("T4 has compute capability 7.5: 8.0 (Ampere) or newer is needed")

    monkeypatch.setattr(hub.submodule(kernel, "stages"), "backend_for", refuse)
    (check,) = diagnosis._path(kernel)
    assert (check.status, check.found) == (
        Status.PROBLEM,
        "T4 has compute capability 7.5: 8.0 (Ampere) or newer is needed",
    )


def test_configurations_of_a_gpu(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(diagnosis, "_device", lambda: torch.device("cuda"))
    tuning = hub.submodule(kernel, "tuning")
    monkeypatch.setattr(tuning, "target_of", lambda device: tuning.TARGETS[90])
    (check,) = diagnosis._configurations(kernel)
    assert check.found.startswith("measured: ")
    assert check.found.endswith("sm_90.json")
    monkeypatch.setattr(tuning, "target_of", lambda device: tuning.TARGETS[80])
    (check,) = diagnosis._configurations(kernel)
    assert "MOE_FUSED_CONFIGS" in str(check.advice)
    (tmp_path / "sm_80.json").write_text("[]")
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(tmp_path))
    (check,) = diagnosis._guarded("configurations", lambda: diagnosis._configurations(kernel))
    assert check.status is Status.PROBLEM
    assert "the table must be an object" in check.found


def test_configurations_without_a_gpu(
    kernel: ModuleType, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(diagnosis, "_device", lambda: torch.device("cpu"))
    monkeypatch.delenv("MOE_FUSED_CONFIGS", raising=False)
    assert list(diagnosis._configurations(kernel)) == []
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(tmp_path))
    (check,) = diagnosis._configurations(kernel)
    assert (check.status, check.found) == (Status.OK, f"no tables in {tmp_path}; without a GPU none is used")
    (tmp_path / "sm_90.json").write_text('{"gemv_slots": 8}')
    (check,) = diagnosis._configurations(kernel)
    assert check.found == f"measured: {tmp_path / 'sm_90.json'}; without a GPU none is used"
    (tmp_path / "sm_80.json").write_text("[]")
    ended = command("doctor")
    assert ended.status == 1
    assert f"!!  configurations: {tmp_path / 'sm_80.json'}: the table must be an object" in ended.stdout
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(tmp_path / "nowhere"))
    ended = command("doctor")
    assert ended.status == 1
    assert "!!  configurations: MOE_FUSED_CONFIGS must be a directory with tables" in ended.stdout


@pytest.mark.parametrize("path, cost", [("run", "20 µs"), ("ordinary", "50 µs"), ("direct", "")])
def test_launches_that_take_longer(path: str, cost: str, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    launcher = hub.submodule(kernel, "stages.triton.launcher")
    monkeypatch.setattr(launcher, "launch_path", lambda: launcher.LaunchPath(path, "this Triton is another"))
    monkeypatch.setattr(diagnosis, "_device", lambda: torch.device("cpu"))
    assert list(diagnosis._launches(kernel)) == [], "nothing is launched on a CPU"
    monkeypatch.setattr(diagnosis, "_device", lambda: torch.device("meta"))
    monkeypatch.setattr(hub.submodule(kernel, "stages"), "backend_for", lambda *_: None)
    checks = list(diagnosis._launches(kernel))
    assert [check.status for check in checks] == ([Status.OK] if cost else [])
    for check in checks:
        assert check.found.startswith(f"slower by some {cost} of host time for each ")
        assert check.found.endswith(": this Triton is another")


# The self-test.


def test_selftest_finds_a_wrong_kernel(kernel: ModuleType, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong in the last digits that a dtype has is right; 5 % too much is not."""
    exact = kernel.moe_experts

    def wrong(x: torch.Tensor, *args: Any) -> torch.Tensor:
        y: torch.Tensor = exact(x, *args)
        return y if x.dtype == torch.float64 else y * 1.05

    monkeypatch.setattr(kernel, "moe_experts", wrong)
    results = list(selftest.run(kernel, torch.device("cpu")))
    assert not any(result.passed for result in results)
    assert all(result.errors["output"] == pytest.approx(0.05, rel=0.1) for result in results)
    ended = command("doctor")
    assert ended.status == 1
    assert f"{len(selftest.CASES)} problems" in ended.stdout


def test_selftest_finds_nan_and_wrong_gradients(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = kernel.moe_experts

    def no_gradient_of_tokens(x: torch.Tensor, *args: Any) -> torch.Tensor:
        y: torch.Tensor = exact(x, *args)
        return y if x.dtype == torch.float64 else y + (x - x.detach()) * (1 if x.requires_grad else float("nan"))

    monkeypatch.setattr(kernel, "moe_experts", no_gradient_of_tokens)
    results = list(selftest.run(kernel, torch.device("cpu")))
    for result in results:
        assert not result.passed
        if result.case.backward:
            assert result.errors["hidden_states.grad"] > 0.1
            assert result.errors["output"] <= result.tolerance
            assert len(result.errors) == (3 if result.case.packed else 5)


def test_selftest_takes_seconds() -> None:
    assert sum(result.seconds for result in selftest.run(moe_fused.get_kernel(), torch.device("cpu"))) < 5


def test_help_needs_no_torch() -> None:
    """Neither does any other command's."""
    program = "import sys, moe_fused.cli; sys.exit(bool({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0


def test_version(command: Command) -> None:
    ended = command("--version")
    assert (ended.status, ended.stdout, ended.stderr) == (0, f"moe-fused {moe_fused.__version__}\n", "")


@pytest.mark.parametrize("arguments, names", [((), ("finetune", "doctor")), (("convert",), ("adapter", "optimizer"))])
def test_no_command_shows_the_help(arguments: tuple[str, ...], names: tuple[str, ...], command: Command) -> None:
    ended = command(*arguments)
    assert ended.status in (0, 2)  # typer's version decides, and about the stream
    for name in names:
        assert f"\n  {name} " in ended.stdout + ended.stderr
    assert "error" not in ended.stderr.partition("\n")[0]


def test_every_command_has_help(command: Command) -> None:
    names = ("convert", "generate", "quantize", "merge", "doctor", "tune", "bench")
    overview = command("--help")
    assert overview.status == 0
    for name in names:
        assert f"  {name} " in overview.stdout
        ended = command(name, "--help")
        assert ended.status == 0
        assert f"{name} [OPTIONS]" in ended.stdout
        assert not ended.stderr
    for conversion in ("adapter", "model", "optimizer"):
        shown = " ".join(command("convert", conversion, "--help").stdout.split())
        assert re.search(r"\[OPTIONS\] \{?SOURCE\}? \{?TARGET\}? ", shown)  # typer's version decides about braces
