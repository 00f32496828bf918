"""The command ``kernels`` on our build: on the local one, and on one that a stand-in for the Hub has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from scripts import build_kernel
from tests.packaging.hub import OWNER, Hub, Repository
from tests.support import REPOSITORY, accelerator, build_config, repo_id

pytest.importorskip("kernels.cli", reason="kernels is installed without the dependencies of its command line")

BACKENDS = sorted(build_config()["backends"])
MODULE = build_config()["name"].replace("-", "_")
VERSION = build_config()["version"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build as kernel-builder leaves it: variants, benchmarks and card."""
    root = tmp_path_factory.mktemp("kernel")
    build_kernel.bundle(REPOSITORY, root / "build")
    return root / "build"


@pytest.fixture(scope="module")
def hub(built: Path) -> Iterator[Hub]:
    """The stand-in with the build on the branch of its version."""
    hub = Hub()
    repository = hub.repositories[repo_id()] = Repository.new()
    variants = (path for path in built.glob("torch-*/**/*") if path.is_file() and "__pycache__" not in path.parts)
    files = {f"build/{path.relative_to(built).as_posix()}": path.read_bytes() for path in variants}
    repository.commit(f"v{VERSION}", files, "build")
    with hub.serving():
        yield hub


def run(*arguments: str | Path, env: dict[str, str] | None = None, code: str = "from kernels.cli import main; main()"):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_KERNELS"} | (env or {})
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


@pytest.fixture
def on_hub(hub: Hub, tmp_path: Path) -> Run:
    def on_hub(*arguments: str | Path, **options: str) -> subprocess.CompletedProcess[str]:
        return run(*arguments, env=hub.environment(str(tmp_path / "home")), **options)

    return on_hub


def output(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_info_of_the_hubs_version(on_hub: Run) -> None:
    info = json.loads(output(on_hub("info", repo_id(), "--json")))
    assert (info["name"], info["version"], info["backends"]) == (build_config()["name"], VERSION, BACKENDS)
    assert (info["revision"], info["license"], info["python_depends"]) == (f"v{VERSION}", build_config()["license"], [])


def test_versions(on_hub: Run) -> None:
    printed = output(on_hub("versions", repo_id()))
    assert f"Version {VERSION}:" in printed
    for backend in BACKENDS:
        assert f"torch-{backend}" in printed


UNTRUSTED = f"Kernel repository '{repo_id()}' is not from a trusted publisher"


@pytest.fixture
def trusted(hub: Hub) -> Iterator[None]:
    """The Hub calls our publisher a trusted one, as it does kernels-community."""
    hub.trusted.add(OWNER)
    yield
    hub.trusted.clear()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that depends on the kernel."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(f'[tool.kernels.dependencies]\n"{repo_id()}" = {VERSION}\n')
    return project


@pytest.mark.slow
@pytest.mark.usefixtures("trusted")
def test_lock_and_download(on_hub: Run, hub: Hub, project: Path) -> None:
    """The lock has the commit that the branch is at, and the variant for this machine is downloaded from it."""
    output(on_hub("lock", project))
    commit = hub.repositories[repo_id()].branches[f"v{VERSION}"]
    assert commit in (project / "kernels.lock").read_text()
    hub.requests.clear()
    output(on_hub("download", project))
    assert [request for request in hub.requests if f"/resolve/{commit}/build/torch-" in request]


def test_lock_wants_a_trusted_publisher(on_hub: Run, project: Path) -> None:
    result = on_hub("lock", project)
    assert result.returncode == 1
    assert UNTRUSTED in result.stderr
    assert not (project / "kernels.lock").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("trusted")
def test_verify_signature_says_that_nobody_has_signed(on_hub: Run) -> None:
    """kernels-community's CI signs; a build of our own has digests only."""
    arguments = ("verify-signature", "--all-variants", repo_id(), str(VERSION))
    result = on_hub(*arguments)
    assert result.returncode == 1, result.stderr
    for backend in BACKENDS:
        assert f"torch-{backend}: cannot verify kernel integrity, signature not found" in result.stdout
    assert output(on_hub(*arguments, "--filter-unsigned")) == ""


def test_check_has_moved_to_kernel_builder() -> None:
    result = run("check")
    assert result.returncode == 1
    assert "kernel-builder check-abi" in result.stderr


LOAD = """
import sys
import kernels
repository, version = sys.argv[1], int(sys.argv[2])
for options in ({"version": version}, {"version": version + 1, "trust_remote_code": True}):
    try:
        kernels.get_kernel(repository, **options)
    except ValueError as error:
        print(error)
kernel = kernels.get_kernel(repository, version=version, trust_remote_code=True)
print(kernel.__name__)
"""


def test_the_hubs_version_loads_for_who_trusts_it(on_hub: Run) -> None:
    untrusted, unknown, loaded = output(on_hub(repo_id(), str(VERSION), code=LOAD)).splitlines()
    assert untrusted.startswith(UNTRUSTED)
    assert unknown == f"Version {VERSION + 1} not found, available versions: {VERSION}"
    assert loaded.startswith(f"_{MODULE}_")


# The benchmarks that the Hub runs.

WORKLOADS = {
    f"{name}.{workload}"
    for name in ("MoeExperts", "MoeExperts4bit", "MoeExpertsLora", "MoeFusedLinear", "MoeFusedLinear4bit")
    for workload in ("forward", "generation", "training")
}
# `kernels benchmark` takes the device that torch was built for, whether or not it is there.
needs_device = pytest.mark.skipif(
    accelerator() is None and (torch.version.cuda or torch.version.hip) is not None,
    reason="kernels benchmark wants the GPU that torch was built for",
)


def benchmark(directory: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("tabulate", reason="kernels benchmark needs tabulate")
    return run("benchmark", directory, "--iterations", "1", "--warmup", "0", "--json")


@needs_device
@pytest.mark.slow
def test_benchmarks_agree_with_plain_torch(built: Path) -> None:
    results = json.loads(output(benchmark(built)))["results"]
    assert {result["workload"] for result in results} == WORKLOADS
    assert all(result["verified"] for result in results)


WRONG = {
    "a result": ("y = right(*arguments, **options)", "return 1.1 * y", "Verification failed for forward"),
    "a gradient of weights": (
        "up = arguments[3].clone(); up.requires_grad and up.register_hook(lambda gradient: 2 * gradient)",
        "return right(*arguments[:3], up, *arguments[4:], **options)",
        "Verification failed for gradients [1] of the weights",
    ),
}


@needs_device
@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_benchmarks_find_a_wrong_kernel(wrong: str, tmp_path: Path) -> None:
    first, second, message = WRONG[wrong]
    root = tmp_path / "checkout"
    for name in ("build.toml", "benchmarks/benchmark.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((REPOSITORY / name).read_bytes())
    sources = REPOSITORY / "torch-ext" / MODULE
    for path in sources.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.name != "_ops.py":
            target = root / "torch-ext" / MODULE / path.relative_to(sources)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    with (root / "torch-ext" / MODULE / "__init__.py").open("a") as file:
        file.write(f"\nright = moe_experts\n\n\ndef moe_experts(*arguments, **options):\n    {first}\n    {second}\n")
    build_kernel.bundle(root, root / "build")
    result = benchmark(root)
    assert result.returncode == 1
    assert message in result.stderr


@pytest.mark.slow
def test_benchmarks_import_what_the_hub_has() -> None:
    """The Hub gets benchmark*.py alone, and installs torch and kernels."""
    for path in (REPOSITORY / "benchmarks").glob("benchmark*.py"):
        code = (
            "import runpy, sys; sys.path[:] = [p for p in sys.path if p != sys.argv[2]]; "
            "names = runpy.run_path(sys.argv[1]); "
            "ours = ('moe_fused', 'benchmarks', 'transformers', 'peft', 'scripts', 'tests'); "
            "print([name for name in sys.modules if name.partition('.')[0] in ours])"
        )
        assert output(run(path, REPOSITORY, code=code)).strip() == "[]"
