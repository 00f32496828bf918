"""scripts/build_kernel.py: the format, the properties of its docstring, and its errors."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import build_kernel
from tests.support import REPOSITORY, build_config, repo_id

BACKENDS = ("cpu", "cuda", "rocm", "xpu")
MODULE = build_config()["name"].replace("-", "_")
SCRIPT = REPOSITORY / "scripts" / "build_kernel.py"
# What a hub kernel may import: https://huggingface.co/docs/kernels/kernel-requirements
ALLOWED_IMPORTS = {"torch", "triton", *sys.stdlib_module_names}


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory`` but bytecode."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False)


def error_of(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr with which the script refuses its arguments."""
    assert build_kernel.main([str(argument) for argument in arguments]) == 1
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith("build_kernel: error: ")
    assert output.err.count("\n") == 1
    return output.err


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kernel") / "build"
    build_kernel.build(REPOSITORY, output)
    return output


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the kernel's sources that a test may change."""
    root = tmp_path / "checkout"
    shutil.copytree(
        REPOSITORY / "torch-ext", root / "torch-ext", ignore=shutil.ignore_patterns("__pycache__", "_ops.py")
    )
    shutil.copy(REPOSITORY / "build.toml", root)
    return root


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_has_the_published_fields(built: Path, backend: str) -> None:
    directory = built / f"torch-{backend}"
    metadata = build_kernel.validate_variant(directory)
    assert (str(metadata.name), metadata.version, metadata.license) == (build_config()["name"], 0, "Apache-2.0")
    assert metadata.python_depends == []
    assert str(metadata.backend.backend_type).lower() == backend
    assert re.fullmatch(rf"_{MODULE}_{backend}_[0-9a-f]{{12}}", metadata.id)
    raw = json.loads((directory / "metadata.json").read_text())
    assert list(raw) == [
        *("name", "id", "version", "kernels-minver", "license", "python-depends", "kernel-depends", "backend", "digest")
    ]
    assert set(raw["digest"]["files"]) == set(tree(directory)) - {"metadata.json"}


def test_the_cuda_variant_is_for_every_gpu_that_the_kernels_run_on(built: Path) -> None:
    """``get_kernel`` refuses the others, by the loader's own rule; a GPU to come is compiled for when it is there."""
    archs = pytest.importorskip("kernels.archs")
    capabilities = build_kernel.validate_variant(built / "torch-cuda").backend.archs
    targets = ast.parse((REPOSITORY / "torch-ext" / MODULE / "tuning" / "targets.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(targets) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Target"]
    known = [ast.literal_eval(call.args[1]) for call in calls if call.args and ast.unparse(call.args[0]) == "'cuda'"]
    assert len(known) > 5
    for capability in (*known, 130):
        assert archs._supports_cuda_capability(capabilities, divmod(capability, 10)), capability
    assert not archs._supports_cuda_capability(capabilities, (7, 5))
    for backend in ("cpu", "rocm", "xpu"):
        assert not build_kernel.validate_variant(built / f"torch-{backend}").backend.archs


def test_variants_have_every_source_file_and_differ_only_in_their_id(built: Path) -> None:
    package = REPOSITORY / "torch-ext" / MODULE
    sources = {name: content for name, content in tree(package).items() if name != "_ops.py"}
    for backend in BACKENDS:
        variant = tree(built / f"torch-{backend}")
        assert {name: variant[name] for name in sources} == sources
        assert set(variant) - set(sources) == {"_ops.py", "metadata.json"}
        kernel_id = json.loads(variant["metadata.json"])["id"]
        assert f'"{kernel_id}"' in variant["_ops.py"].decode()


def test_configurations_in_json_are_packaged(checkout: Path, tmp_path: Path) -> None:
    configs = checkout / "torch-ext" / MODULE / "configs"
    configs.mkdir(exist_ok=True)
    (configs / "some-gpu.json").write_text("{}")
    build_kernel.build(checkout, tmp_path / "out", ["cpu"])
    assert (tmp_path / "out" / "torch-cpu" / "configs" / "some-gpu.json").read_text() == "{}"


def test_same_sources_give_the_same_bytes_anywhere(built: Path, checkout: Path, tmp_path: Path) -> None:
    for path in checkout.rglob("*.py"):
        os.utime(path, (0, 0))
    build_kernel.build(checkout, tmp_path / "elsewhere")
    assert {name: content for name, content in tree(tmp_path / "elsewhere").items() if name != ".lock"} == {
        name: content for name, content in tree(built).items() if name != ".lock"
    }


def test_other_sources_give_another_id(built: Path, checkout: Path, tmp_path: Path) -> None:
    with (checkout / "torch-ext" / MODULE / "stages" / "reference.py").open("a") as file:
        file.write("# changed\n")
    (directory,) = build_kernel.build(checkout, tmp_path / "out", ["cpu"])
    assert build_kernel.validate_variant(directory).id != build_kernel.validate_variant(built / "torch-cpu").id


def _append(directory: Path) -> None:
    with (directory / "stages" / "reference.py").open("ab") as file:
        file.write(b" ")


@pytest.mark.parametrize(
    ("tamper", "violation"),
    [
        (_append, "mismatch for stages/reference.py"),
        (lambda directory: (directory / "stages" / "reference.py").unlink(), "Missing file: stages/reference.py"),
        (lambda directory: (directory / "extra.py").touch(), "Unknown file: extra.py"),
    ],
    ids=["changed", "removed", "added"],
)
def test_tampering_is_found_and_repaired(tmp_path: Path, tamper: Callable[[Path], None], violation: str) -> None:
    (directory,) = build_kernel.build(REPOSITORY, tmp_path, ["cpu"])
    before = tree(directory)
    tamper(directory)
    with pytest.raises(build_kernel.BuildError, match=violation):
        build_kernel.validate_variant(directory)
    build_kernel.build(REPOSITORY, tmp_path, ["cpu"])
    assert tree(directory) == before


def test_a_current_build_is_not_touched(tmp_path: Path) -> None:
    (directory,) = build_kernel.build(REPOSITORY, tmp_path, ["cpu"])
    inode = directory.stat().st_ino
    build_kernel.build(REPOSITORY, tmp_path, ["cpu"])
    assert directory.stat().st_ino == inode


@pytest.mark.parametrize("interrupted_rename", [1, 2, 3, 4])
def test_an_interrupted_build_leaves_whole_variants(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_rename: int
) -> None:
    """Two variants are two pairs of renames (old away, new in place); Ctrl-C before each of the four."""
    output = tmp_path / "build"
    build_kernel.build(checkout, output, ["cpu", "cuda"])
    with (checkout / "torch-ext" / MODULE / "stages" / "reference.py").open("a") as file:
        file.write("# changed\n")
    calls = 0
    replace = os.replace

    def interrupt(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == interrupted_rename:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_kernel.build(checkout, output, ["cpu", "cuda"])
    for backend in ("cpu", "cuda"):
        build_kernel.validate_variant(output / f"torch-{backend}")
    assert {path.name for path in output.iterdir()} == {".lock", "torch-cpu", "torch-cuda"}


def test_a_killed_build_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".partial" / "torch-cpu").mkdir(parents=True)
    build_kernel.build(REPOSITORY, tmp_path, ["cpu"])
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "torch-cpu"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('license = "Apache-2.0"', "", "license"),
        ("edition = 5", "edition = 4", "edition"),
        ("edition = 5", "", "edition"),
        ("version = 0", 'version = "zero"', 'Invalid type string "zero"'),
        ('"xpu"]', '"abacus"]', "abacus"),
        ("[torch-noarch]", "[torch-noarch]\nsurprise = 1", "surprise"),
        ("[general]", "[general", "not valid TOML"),
        (f'repo-id = "{repo_id()}"', "", "repo-id"),
        ('name = "qwen3-moe-fused"', 'name = "Qwen3_MoE"', "name"),
        ('name = "qwen3-moe-fused"', 'name = "another-kernel"', "another_kernel/__init__.py does not exist"),
        ('"json", ', "", ".json"),
    ],
)
def test_a_broken_build_toml_ends_in_one_line(
    checkout: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    (checkout / "torch-ext" / MODULE / "data.json").write_text("{}")
    path = checkout / "build.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert message in error_of(capfd, "--root", checkout, "--output", tmp_path / "out")
    assert not list((tmp_path / "out").glob("torch-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "metal"], "--backend metal: build.toml has cpu, cuda, rocm, xpu"),
        (["--root", "/nonexistent"], "cannot read /nonexistent/build.toml: No such file or directory"),
        (["--output", "/dev/null/out"], "cannot write"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in error_of(capfd, "--output", tmp_path, *arguments)


SOURCE, UPSTREAM = "https://example.com/source.git", "https://example.com/upstream.git"


def test_a_bundle_has_benchmarks_and_card_beside_the_variants(checkout: Path) -> None:
    """As kernel-builder leaves it; what a source no longer has is not in the next bundle."""
    output = checkout / "build"
    shutil.copy(REPOSITORY / "CARD.md", checkout)
    shutil.copytree(REPOSITORY / "benchmarks", checkout / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    build_kernel.bundle(checkout, output, ["cpu"])
    assert {path.name for path in output.iterdir()} == {".lock", "torch-cpu", "benchmarks", "CARD.md"}
    assert tree(output / "benchmarks") == tree(checkout / "benchmarks")
    inode = (output / "CARD.md").stat().st_ino
    build_kernel.bundle(checkout, output, ["cpu"])
    assert (output / "CARD.md").stat().st_ino == inode
    (checkout / "benchmarks" / "benchmark.py").write_text("# another\n")
    build_kernel.bundle(checkout, output, ["cpu"])
    assert tree(output / "benchmarks") == tree(checkout / "benchmarks")
    shutil.rmtree(checkout / "benchmarks")
    (checkout / "CARD.md").unlink()
    build_kernel.bundle(checkout, output, ["cpu"])
    assert {path.name for path in output.iterdir()} == {".lock", "torch-cpu"}


def test_the_card_has_what_build_toml_and_the_sources_say(checkout: Path) -> None:
    shutil.copy(REPOSITORY / "CARD.md", checkout)
    path = checkout / "build.toml"
    path.write_text(path.read_text().replace("version = 0", "version = 3"))
    plain = build_kernel.render_card(checkout, build_kernel.read_config(checkout))
    assert plain.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert f'get_kernel("{repo_id()}", version=3, trust_remote_code=True)' in plain
    listed = re.findall(r"^- `(\w+)`$", plain, re.MULTILINE)
    assert {"moe_experts", "moe_fused_linear", "Qwen3MoeExperts", "LoraMoeFusedLinear"} <= set(listed)
    assert "layers" not in listed
    assert "No benchmark is available." in plain
    assert "## Source" not in plain
    assert "## Upstream" not in plain

    (checkout / "benchmarks").mkdir()
    (checkout / "benchmarks" / "benchmark.py").touch()
    known = f'license = "Apache-2.0"\nsource = "{SOURCE}"\nupstream = "{UPSTREAM}"'
    path.write_text(path.read_text().replace('license = "Apache-2.0"', known))
    full = build_kernel.render_card(checkout, build_kernel.read_config(checkout))
    assert f"Run `kernels benchmark {repo_id()} --version 3`" in full
    assert f"The source of this kernel is at {SOURCE}." in full
    assert UPSTREAM in full
    (directory,) = build_kernel.build(checkout, checkout / "build", ["cpu"])
    metadata = build_kernel.validate_variant(directory)
    assert (metadata.source, metadata.upstream) == (SOURCE, UPSTREAM)


@pytest.mark.parametrize(
    ("card", "message"),
    [("{{ name }}", "'name' is undefined"), ("{% if %}", "Expected an expression"), ("\xff", "can't decode")],
)
def test_a_broken_card_ends_in_one_line(
    checkout: Path, capfd: pytest.CaptureFixture[str], card: str, message: str
) -> None:
    (checkout / "CARD.md").write_bytes(card.encode("latin-1"))
    assert message in error_of(capfd, "--root", checkout, "--output", checkout / "build")
    assert not (checkout / "build").exists()


def test_the_hub_finds_the_benchmark_by_its_name() -> None:
    """kernel-builder's card says that there is a benchmark if there is a file of this name."""
    assert (REPOSITORY / "benchmarks" / "benchmark.py").is_file()


def test_the_command_prints_what_it_built(tmp_path: Path) -> None:
    result = run(SCRIPT, "--output", tmp_path, "--backend", "cpu", "--backend", "rocm")
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        str(tmp_path / "torch-cpu"),
        str(tmp_path / "torch-rocm"),
    ]


def test_kernels_info_accepts_the_build(built: Path) -> None:
    result = run("-m", "kernels.cli", "info", built.parent, "--json")
    if "No module named kernels.cli.__main__" in result.stderr:
        result = run("-c", "from kernels.cli import main; main()", "info", built.parent, "--json")
    if "invalid choice: 'info'" in result.stderr:
        pytest.skip("this version of kernels has no info command")
    if "No module named 'cryptography'" in result.stderr:
        pytest.skip("kernels is installed without the dependencies of its command line")
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert (info["name"], info["backends"]) == (build_config()["name"], sorted(BACKENDS))


def test_the_kernel_imports_only_what_hub_kernels_may() -> None:
    found = {}
    for path in (REPOSITORY / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            found.update({name: path.name for name in names if name.partition(".")[0] not in ALLOWED_IMPORTS})
    assert found == {}


def test_all_is_a_literal() -> None:
    """kernel-builder reads the functions for the hub's card out of the syntax tree."""
    module = ast.parse((REPOSITORY / "torch-ext" / MODULE / "__init__.py").read_text(encoding="utf-8"))
    (value,) = [
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    ]
    assert isinstance(value, ast.List)
    assert ast.literal_eval(value)


def test_operators_are_named_where_the_namespace_check_finds_them() -> None:
    """Every operator is registered under ``add_op_namespace_prefix(...)``, and has a literal name that is one word."""
    registered = named = 0
    for path in (REPOSITORY / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            if function.startswith("torch.library."):
                assert re.match(r"add_op_namespace_prefix\(.+\)$", ast.unparse(node.args[0])), path
                registered += 1
            if function in ("add_op_namespace_prefix", "Operator"):
                name = node.args[0]
                # The one place that registers takes the name that Operator was given.
                assert path.name == "schema.py" or re.match(r"'\w+'$", ast.unparse(name)), path
                named += function == "Operator"
    assert registered > 0
    assert named > 0


def test_cpu_variant_runs_where_triton_is_absent(built: Path) -> None:
    """A finder that refuses triton stands in for a machine without it."""
    code = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch, kernels, os
kernel = kernels.get_kernel(os.environ["LOCAL_KERNELS"].partition("=")[0], version=0, backend="cpu")
x, weight = torch.tensor([[1.0, -2.0]]), torch.eye(2)[None]
y = kernel.moe_experts(x, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), weight, weight, activation="relu",
                       gated=False)
print(kernel.__name__, y.tolist(), "triton" in sys.modules)
"""
    env = {"LOCAL_KERNELS": f"{build_config()['hub']['repo-id']}={built}", "TRITON_INTERPRET": "0"}
    result = run("-c", code, env=env)
    assert re.match(rf"_{MODULE}_cpu_\w+ \[\[1.0, 0.0\]\] False$", result.stdout.strip()), result.stderr
