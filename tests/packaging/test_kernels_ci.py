"""What kernel-builder's CI does with the tests: ``pytest tests -m kernels_ci`` where nothing but the kernel is.

The run here is on a CPU in plain torch. It shows that the tests collect and pass in that place, and that together they run
every public function of the kernel, forward and backward.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import build_kernel
from tests.support import REPOSITORY, python_path, repo_id

# A plugin of pytest for the run: it refuses what is not installed where kernel-builder runs the tests, and notes which
# functions of the kernel were entered.
PLUGIN = '''
import inspect, json, os, sys
import pytest

REFUSED = {"moe_fused", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "datasets", "scripts", "benchmarks"}
entered = set()

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())

def note(frame, event, argument):
    if event == "call":
        entered.add(frame.f_code)

@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    sys.setprofile(note)
    try:
        return (yield)
    finally:
        sys.setprofile(None)

def functions(name, value, package):
    """The functions of the package that the public name stands for: itself, those of a module, those of a class."""
    if inspect.ismodule(value):
        names = getattr(value, "__all__", None) or [
            key for key, member in vars(value).items()
            if not key.startswith("_") and getattr(member, "__module__", "") == value.__name__
        ]
        for key in names:
            yield from functions(f"{name}.{key}", getattr(value, key), package)
    elif inspect.isclass(value):
        for key, member in vars(value).items():
            if not key.startswith("_"):
                member = getattr(member, "__func__", getattr(member, "fget", member))
                yield from functions(f"{name}.{key}", member, package)
    else:
        value = inspect.unwrap(value) if callable(value) else value
        if inspect.isfunction(value) and value.__module__.startswith(package):
            # What a subclass must define is no function that could be called.
            if "NotImplementedError" not in value.__code__.co_names:
                yield name, value

def pytest_sessionfinish(session):
    from tests.support import load_kernel
    kernel = load_kernel()
    public = {n: f for key in kernel.__all__ for n, f in functions(key, getattr(kernel, key), kernel.__name__)}
    missing = sorted(name for name, function in public.items() if function.__code__ not in entered)
    with open(os.environ["CI_REPORT"], "w") as file:
        json.dump({"public": sorted(public), "missing": missing}, file)
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that kernel-builder's source set has: build.toml, and the Python files of torch-ext/ and of tests/."""
    root = tmp_path_factory.mktemp("source")
    shutil.copy(REPOSITORY / "build.toml", root)
    for folder in ("torch-ext", "tests"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            target = root / path.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return root


@pytest.mark.slow
def test_marked_tests_pass_where_only_the_kernel_is_and_cover_its_public_api(checkout: Path, tmp_path: Path) -> None:
    build_kernel.build(REPOSITORY, tmp_path / "build")
    (tmp_path / "only_the_kernel.py").write_text(PLUGIN)
    report = tmp_path / "report.json"
    environment = {
        **os.environ,
        "LOCAL_KERNELS": f"{repo_id()}={tmp_path / 'build'}",
        "PYTHONPATH": python_path(tmp_path),
        "CI_REPORT": str(report),
        "TRITON_INTERPRET": "0",
        **dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), ""),
    }
    command = [
        "-m",
        "pytest",
        checkout / "tests",
        "-m",
        "kernels_ci",
        "-p",
        "no:cacheprovider",
        "-p",
        "only_the_kernel",
    ]
    result = subprocess.run(
        [sys.executable, *map(str, command), "-q", "-W", "error::pytest.PytestUnknownMarkWarning"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(report.read_text())
    # That the search finds the functions at all.
    assert {"moe_experts", "moe_fused_linear", "route", "layers.Qwen3MoeExperts.forward"} <= set(found["public"])
    assert "Packed4bitWeights.dequantize" in found["public"]
    assert not found["missing"], f"no test marked kernels_ci runs {found['missing']}"
