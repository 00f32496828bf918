"""The kernel package's imports point one way: kernels ← stages ← ops ← public functions, without a circle.

The graph is read from the sources, imports inside functions and those for annotations alone included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import REPOSITORY

PACKAGE = REPOSITORY / "torch-ext" / "qwen3_moe_fused"

# Modules that hold a public function. Nothing below them imports one.
PUBLIC = frozenset(("", "experts", "experts_module", "linear", "lora", "param_wrappers", "permute", "layers"))

# Imports nothing of the package, so every module may import it.
LEAF = "ops._torch_compat"


def module_of(path: Path) -> str:
    """A file's module within the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_ops.py"}


def imports_of(module: str) -> Iterator[str]:
    """The modules of the package that ``module`` imports anywhere in its file."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Import) or all("qwen3_moe_fused" not in name.name for name in node.names)
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        for name in node.names:
            inner = ".".join((*base, name.name))
            yield inner if inner in MODULES else ".".join(base)


GRAPH = {module: frozenset(imports_of(module)) & MODULES.keys() - {module} for module in MODULES}
EDGES = frozenset((module, imported) for module, targets in GRAPH.items() for imported in targets)


def package_of(module: str) -> str:
    """The folder of the package that a module is in; its own name at the top."""
    return module.partition(".")[0]


def circles(edges: frozenset[tuple[str, str]]) -> list[str]:
    """The modules that reach themselves."""
    targets: dict[str, set[str]] = {}
    for module, imported in edges:
        targets.setdefault(module, set()).add(imported)

    def reaches(module: str) -> set[str]:
        found: set[str] = set()
        waiting = [module]
        while waiting:
            for imported in targets.get(waiting.pop(), ()):
                if imported not in found:
                    found.add(imported)
                    waiting.append(imported)
        return found

    return sorted(module for module in targets if module in reaches(module))


def test_the_graph_is_read() -> None:
    """A reader that found nothing would pass every other test."""
    assert {"ops.experts", "ops.schema", "stages.reference", "kernels.tiles", ""} <= MODULES.keys()
    assert ("experts", "ops.experts") in EDGES
    assert ("ops.experts", "stages") in EDGES
    assert ("", "experts") in EDGES
    assert ("stages.triton.permute", "kernels.permute") in EDGES
    # Inside a function.
    assert ("stages", "stages.triton") in EDGES


def test_there_is_no_circle() -> None:
    assert circles(EDGES) == []


def test_a_circle_would_be_found() -> None:
    assert circles(frozenset((("a", "b"), ("b", "c"), ("c", "a"), ("a", "d")))) == ["a", "b", "c"]


def test_kernels_import_only_device_code_and_constants() -> None:
    allowed = ("kernels", "formats", "activations")
    assert sorted(e for e in EDGES if package_of(e[0]) == "kernels" and package_of(e[1]) not in allowed) == []


def test_stages_import_neither_operators_nor_public_functions() -> None:
    wrong = (
        (module, imported)
        for module, imported in EDGES
        if package_of(module) == "stages" and imported != LEAF and (package_of(imported) == "ops" or imported in PUBLIC)
    )
    assert sorted(wrong) == []


def test_operators_import_no_public_function() -> None:
    assert sorted(e for e in EDGES if package_of(e[0]) == "ops" and e[1] in PUBLIC) == []


@pytest.mark.parametrize("module", sorted(set(MODULES) - PUBLIC))
def test_nothing_imports_a_public_function_but_public_functions(module: str) -> None:
    assert sorted((module, imported) for imported in GRAPH[module] & PUBLIC) == []


def test_checks_need_only_the_leaf() -> None:
    assert GRAPH[LEAF] == frozenset()
    assert GRAPH["checks"] == {LEAF}


KERNELS = [path for folder in ("kernels", "formats") for path in sorted((PACKAGE / folder).glob("*.py"))]


def parameters_of_kernels() -> dict[str, int]:
    """How many parameters each function has that is a kernel, not a device function of one."""
    found = {}
    for path in KERNELS:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found[node.name] = len(node.args.args)
    return found


def test_kernels_take_at_most_twenty_parameters() -> None:
    parameters = parameters_of_kernels()
    assert len(parameters) > 15
    assert {name: number for name, number in parameters.items() if number > 20} == {}


@pytest.mark.parametrize("folder", ["kernels", "stages", "ops", "tuning"])
def test_only_formats_know_a_format(folder: str) -> None:
    """Kernels, launches and operators name neither a format nor the number of absmaxes that share one."""
    words = ("nf4", "fp4", "blocksize", "absmax", "double_quant")
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        code = ast.unparse(without_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
        found = [word for word in words if word in code]
        # What a stack says of itself, whatever its format.
        allowed = {"blocksize"} if path.name in ("reference.py", "operands.py") else set()
        assert set(found) <= allowed, f"{path.name}: {found}"


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return tree
