"""Which part of ``moe_fused`` imports which, as ARCHITECTURE.md says it. Reads the sources and imports none of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support import REPOSITORY

PACKAGE, KERNEL = "moe_fused", "qwen3_moe_fused"

# What these parts import of the package, and they import nothing else. The integrations build on what an experts module of
# Transformers is, and the layers for PEFT merge adapters into experts that the quantizer has packed. The other parts are
# those that everything builds on.
DEPENDENCIES: dict[str, set[str]] = {
    "integrations.transformers": {"hub"},
    "integrations.quantizer": {"hub", "imports", "checkpoints", "integrations.transformers", "quantized"},
    "integrations.peft": {"hub", "imports", "checkpoints", "integrations.transformers", "integrations.quantizer"},
    "integrations.kernelize": {"hub", "imports", "integrations.transformers", "integrations.peft"},
    "benchmark": set(),
    "devices": set(),
    "hub": set(),
    "imports": set(),
    "locks": set(),
    "quantized": set(),
    "signals": set(),
    "staging": {"locks", "signals"},
}
# The parts that may import modules of ``commands``: the command line itself, the demo, which runs commands, and the command
# ``finetune``, which has a package of its own and shares the options of all commands.
OF_COMMANDS = {"cli": None, "demo": None, "finetune": {"moe_fused.commands.options"}}


@dataclass(frozen=True)
class Import:
    """An import statement of a module.

    Attributes:
        importer, imported: the modules.
        names: what it takes from ``imported``; empty for a plain ``import``.
        for_types: whether only type checkers see it.
        at_top: whether it runs when the module is imported, and not when a function is called.
    """

    importer: str
    imported: str
    names: tuple[str, ...]
    for_types: bool
    at_top: bool


@cache
def sources() -> dict[str, Path]:
    """The files of the package, by the names of their modules."""
    found = {}
    for path in sorted((REPOSITORY / PACKAGE).rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        if "_kernel" not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _nodes(node: ast.AST, for_types: bool = False, at_top: bool = True) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Every node below ``node``, whether only type checkers see it, and whether it runs on import."""
    for child in ast.iter_child_nodes(node):
        types, top = for_types, at_top
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            top = False
        yield child, types, top
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield statement, True, top
                yield from _nodes(statement, True, top)
            for statement in child.orelse:
                yield statement, types, top
                yield from _nodes(statement, types, top)
        else:
            yield from _nodes(child, types, top)


def _package(module: str) -> str:
    return module if sources()[module].name == "__init__.py" else module.rpartition(".")[0]


def _imports_of(module: str, tree: ast.AST) -> Iterator[Import]:
    for node, for_types, at_top in _nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, (), for_types, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = _package(module).split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            names = [alias.name for alias in node.names]
            modules = [name for name in names if f"{base}.{name}" in sources()]
            for name in modules:
                yield Import(module, f"{base}.{name}", (), for_types, at_top)
            if rest := tuple(name for name in names if name not in modules):
                yield Import(module, base, rest, for_types, at_top)


@cache
def trees() -> dict[str, ast.Module]:
    return {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in sources().items()}


@cache
def imports() -> tuple[Import, ...]:
    """All import statements of the package."""
    return tuple(found for module, tree in trees().items() for found in _imports_of(module, tree))


def part_of(module: str) -> str:
    """The part of the package that a module belongs to, such as ``checkpoints`` or ``integrations.peft``."""
    names = module.split(".")[1:]
    if not names:
        return PACKAGE
    return ".".join(names[:2]) if names[0] == "integrations" else names[0]


def between_parts() -> Iterator[Import]:
    for found in imports():
        if found.imported.split(".")[0] == PACKAGE and part_of(found.imported) != part_of(found.importer):
            yield found


def test_imports_are_found() -> None:
    """The tests below would pass on an empty list."""
    seen = {(found.importer, found.imported) for found in imports()}
    assert ("moe_fused.cli", "moe_fused.commands.merge") in seen
    assert ("moe_fused", "moe_fused.integrations.transformers.forward") in seen  # relative, and within a function
    assert ("moe_fused.integrations.peft.tuner", "moe_fused.integrations.peft.files") in seen
    assert {part_of(found.importer) for found in imports()} >= {*DEPENDENCIES, "commands", "checkpoints", "finetune"}


def test_kernel_is_loaded_through_kernels_alone() -> None:
    """Types are taken from the kernel's top level; nothing else of it is imported by name, and no source is read by path."""
    for found in imports():
        if found.imported.split(".")[0] == KERNEL:
            assert found.for_types, f"{found.importer} imports {KERNEL} itself: use moe_fused.hub.get_kernel"
            assert found.imported == KERNEL, f"{found.importer} needs types from the top level of {KERNEL}"
    loads = {"get_kernel", "get_local_kernel"}
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "torch-ext" not in node.value, f"{module} names the directory of the kernel's sources"
                assert node.value.partition(".")[0] != KERNEL, f"{module} names the kernel's package"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"kernels.{name}" for name in loads}:
                assert module == "moe_fused.hub", f"{module} loads a kernel: use moe_fused.hub.get_kernel"
        for found in _imports_of(module, tree):
            assert found.imported != "kernels" or not loads.intersection(found.names), f"{module} loads a kernel itself"


def test_every_integration_is_in_the_table() -> None:
    assert {
        part for module in sources() if (part := part_of(module)).startswith("integrations.")
    } <= DEPENDENCIES.keys()


@pytest.mark.parametrize("part", DEPENDENCIES)
def test_part_imports_what_is_declared(part: str) -> None:
    assert {part_of(found.imported) for found in between_parts() if part_of(found.importer) == part} == DEPENDENCIES[
        part
    ]


def test_commands_are_imported_by_the_command_line_alone() -> None:
    for found in between_parts():
        if part_of(found.imported) == "commands":
            part = part_of(found.importer)
            assert part in OF_COMMANDS, f"{found.importer} imports {found.imported}, of the command line"
            allowed = OF_COMMANDS[part]
            assert allowed is None or found.imported in allowed, f"{found.importer} imports {found.imported}"


def test_no_import_circle() -> None:
    """Among the imports that run when a module is imported."""
    known = sources()
    waiting: dict[str, set[str]] = {module: set() for module in known}
    for found in imports():
        if found.at_top and not found.for_types and found.imported in known and found.imported != found.importer:
            waiting[found.importer].add(found.imported)
    while free := [module for module, needed in waiting.items() if not needed]:
        for module in free:
            del waiting[module]
        for needed in waiting.values():
            needed.difference_update(free)
    assert not waiting, f"import circle among {', '.join(sorted(waiting))}"
