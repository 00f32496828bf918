#!/usr/bin/env python
"""Build ``build/torch-<backend>/`` from ``torch-ext/`` in the format that the Kernels hub publishes.

``kernel-builder`` (Rust and Nix) makes the published builds. This script makes the same layout with nothing but Python
and the ``kernels`` library, so that a checkout, a wheel and the tests load the kernel exactly as a hub user does::

    build/torch-cpu/
        __init__.py, ...    every file of torch-ext/<module>/ whose extension is in [torch-noarch] pyext
        _ops.py             generated: the torch.ops namespace of this variant
        metadata.json       name, id, version, licence, backend and the SHA-256 of every other file
    build/benchmarks/       a copy of benchmarks/, whose benchmark*.py `kernels benchmark` runs
    build/CARD.md           CARD.md with its variables filled in, which becomes the README.md of the Hub repository

Three properties matter and are tested:

* The same sources give the same bytes: the id ``_<module>_<backend>_<uid>`` takes its uid from the sources, where
  kernel-builder takes it from git, and nothing else that varies is written (no provenance, no time).
* Different sources give different ids, so two versions can be loaded into one process.
* A variant is complete or absent. It is written and checked beside its place, with the parser and the digest of the
  ``kernels`` library itself, and then renamed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent

# What kernel-builder requires for a kernel without dependencies on other kernels.
KERNELS_MINVER = "0.14.0"
# kernel-builder's default for [torch-noarch] pyext.
DEFAULT_EXTENSIONS = ("py", "pyi")
UID_LENGTH = 12

# kernel-builder's template asks torch for the backend at import time. Here the backend of a variant is known, and the
# fixed name keeps the CPU variant apart from the CUDA variant when a CUDA build of torch loads both.
OPS_TEMPLATE = '''\
import torch

_OPS_NAME = "{id}"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """
    Prefix op by namespace.
    """
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


class BuildError(Exception):
    """The kernel cannot be built; the message is one line for the user."""


@dataclass(frozen=True)
class KernelConfig:
    """What the build needs of ``build.toml``."""

    name: str
    version: int
    license: str
    repo_id: str
    backends: tuple[str, ...]
    extensions: tuple[str, ...]
    python_depends: dict[str, list[str]]
    archs: dict[str, list[str]]
    upstream: str | None
    source: str | None

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")


def read_config(root: Path) -> KernelConfig:
    """Parse ``root/build.toml``, strictly: the kernels library's own parser must accept it as well.

    Raises:
        BuildError: The file is missing, is not TOML, or is not an edition 5 torch-noarch kernel with a hub repository.
    """
    path = root / "build.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BuildError(f"{path} is not valid TOML: {error}") from error
    # Before the library's parser sees it: that one takes a missing edition for edition 4 and converts it.
    edition = content.get("general", {}).get("edition")
    if edition != 5:
        raise BuildError(f"{path}: edition is {'missing' if edition is None else edition}, need 5")
    _parse_strictly(root)

    try:
        general = content["general"]
        noarch = content["torch-noarch"]
        if "kernel-depends" in general:
            raise BuildError(f"{path}: kernel-depends is not supported by this script, build with kernel-builder")
        common = general.get("python-depends", [])
        backends = tuple(general["backends"])
        return KernelConfig(
            name=general["name"],
            version=general["version"],
            license=general["license"],
            repo_id=general["hub"]["repo-id"],
            backends=backends,
            extensions=tuple(noarch.get("pyext", DEFAULT_EXTENSIONS)),
            python_depends={b: [*common, *general.get(b, {}).get("python-depends", [])] for b in backends},
            archs={
                backend: noarch[key]
                for backend, key in (("cuda", "cuda_capabilities"), ("rocm", "rocm_archs"))
                if key in noarch
            },
            upstream=general.get("upstream"),
            source=general.get("source"),
        )
    except KeyError as error:
        raise BuildError(f"{path}: {error.args[0]!r} is missing") from error
    except (TypeError, AttributeError) as error:
        raise BuildError(f"{path}: a value has the wrong type: {error}") from error


def _native() -> Any:
    """The native half of the kernels library: ``kernels._rust`` from 0.17 on, ``kernels_data`` before."""
    try:
        from kernels import _rust
    except ImportError:
        try:
            import kernels_data
        except ImportError as error:
            raise BuildError("the 'kernels' library is missing: pip install 'kernels>=0.16,<0.18'") from error
        return kernels_data
    return _rust


def _parse_strictly(root: Path) -> None:
    """Let the kernels library parse build.toml; the 0.16 series has no parser to ask."""
    build = getattr(_native(), "Build", None)
    if build is None:
        return
    try:
        build.open(root)
    except ValueError as error:
        raise BuildError(f"{root / 'build.toml'}: {one_line(error)}") from error


def read_sources(root: Path, config: KernelConfig) -> dict[str, bytes]:
    """The files of the kernel, ``{posix path relative to the package: content}``, sorted by path.

    Raises:
        BuildError: There is no package, or it has a file that kernel-builder would leave out.
    """
    package = root / "torch-ext" / config.module
    if not (package / "__init__.py").is_file():
        raise BuildError(f"{package / '__init__.py'} does not exist; name = {config.name!r} in build.toml asks for it")
    sources = {}
    for path in sorted(package.rglob("*")):
        relative = path.relative_to(package)
        if not path.is_file() or "__pycache__" in relative.parts or path.name.startswith("."):
            continue
        if relative.as_posix() in ("_ops.py", "metadata.json"):
            continue  # generated; a stale one is left by `kernel-builder create-pyproject`
        if path.suffix.lstrip(".") not in config.extensions:
            raise BuildError(f"{path}: {path.suffix!r} is not in [torch-noarch] pyext, {list(config.extensions)}")
        sources[relative.as_posix()] = path.read_bytes()
    return dict(sorted(sources.items()))


def unique_id(config: KernelConfig, sources: dict[str, bytes]) -> str:
    """A short name for exactly these sources: hexadecimal, the same on every machine."""
    hasher = hashlib.sha256(f"{config.name}\0{config.version}\0{OPS_TEMPLATE}".encode())
    for path, content in sources.items():
        hasher.update(f"\0{path}\0{len(content)}\0".encode() + content)
    return hasher.hexdigest()[:UID_LENGTH]


def _write_variant(directory: Path, config: KernelConfig, backend: str, sources: dict[str, bytes], uid: str) -> None:
    native = _native()
    kernel_id = f"_{config.module}_{backend}_{uid}"
    for name, content in {**sources, "_ops.py": OPS_TEMPLATE.format(id=kernel_id).encode()}.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    digest = native.Digest.hash_variant(native.DigestAlgorithm.SHA256, directory)
    metadata: dict[str, Any] = {
        "name": config.name,
        "id": kernel_id,
        "version": config.version,
        "kernels-minver": KERNELS_MINVER,
        "license": config.license,
        "upstream": config.upstream,
        "source": config.source,
        "python-depends": config.python_depends[backend],
        "kernel-depends": [],
        "backend": {"type": backend, **({"archs": config.archs[backend]} if backend in config.archs else {})},
        "digest": {"algorithm": "sha256", "files": dict(sorted(digest.files.items()))},
    }
    metadata = {key: value for key, value in metadata.items() if value is not None}
    (directory / "metadata.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")


def validate_variant(directory: Path) -> Any:
    """Check a variant with the kernels library and return its parsed metadata.

    Raises:
        BuildError: metadata.json is missing or wrong, or a file differs from the digest in it.
    """
    native = _native()
    try:
        metadata = native.Metadata.read_from_file(directory / "metadata.json")
    except ValueError as error:
        raise BuildError(f"{directory / 'metadata.json'}: {one_line(error)}") from error
    if metadata.digest is None:
        raise BuildError(f"{directory / 'metadata.json'}: 'digest' is missing")
    try:
        metadata.digest.validate(native.Digest.hash_variant(metadata.digest.algorithm, directory))
    except native.DigestValidationError as error:
        raise BuildError(f"{directory}: {one_line(error)}") from error
    return metadata


def _literal_names(module: ast.Module) -> list[str]:
    """The strings of the literal list ``__all__``, which is all that kernel-builder reads of a kernel's API."""
    for node in module.body:
        named = isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets)
        if named and isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            elements = (element.value for element in node.value.elts if isinstance(element, ast.Constant))
            return [name for name in elements if isinstance(name, str) and not name.startswith("_")]
    return []


def card_variables(root: Path, config: KernelConfig) -> dict[str, Any]:
    """What kernel-builder's ``fill-card`` gives to the template ``CARD.md``, read from the sources as it does."""
    package = root / "torch-ext" / config.module
    names = _literal_names(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    layers: list[str] = []
    if "layers" in names:
        path = next(path for path in (package / "layers" / "__init__.py", package / "layers.py") if path.is_file())
        classes = (node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
        layers = [node.name for node in classes if not node.name.startswith("_")]
    return {
        "repo_id": config.repo_id,
        "version": config.version,
        "functions": [name for name in names if name != "layers"] or None,
        "layers": layers or None,
        "has_benchmark": (root / "benchmarks" / "benchmark.py").is_file(),
        "upstream": config.upstream,
        "source": config.source,
        "license": config.license.lower(),
    }


def render_card(root: Path, config: KernelConfig) -> str:
    """``root/CARD.md`` with its variables filled in.

    Raises:
        BuildError: CARD.md cannot be read, is no template, or asks for a variable that kernel-builder does not have.
    """
    try:
        import jinja2  # torch brings it; a wheel, which has no card, is built without
    except ImportError as error:
        raise BuildError("the 'jinja2' library is missing, which fills in CARD.md: pip install jinja2") from error

    path = root / "CARD.md"
    try:
        template = path.read_text(encoding="utf-8")
        environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
        return environment.from_string(template).render(card_variables(root, config))
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error.strerror}") from error
    except (jinja2.TemplateError, UnicodeDecodeError) as error:
        raise BuildError(f"{path}: {one_line(error)}") from error


def _contents(path: Path) -> dict[str, bytes]:
    """Every file at or below ``path`` by its relative path."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files if file.is_file()}


def _is_current(directory: Path, staged: Path) -> bool:
    """Whether the variant in place is what was just staged. Equal metadata means equal digests, so equal files."""
    try:
        same = (directory / "metadata.json").read_bytes() == (staged / "metadata.json").read_bytes()
        if same:
            validate_variant(directory)
    except (OSError, BuildError):
        return False
    return same


def _swap(staged: Path, target: Path, old: Path) -> None:
    """Put ``staged`` at ``target``; what was there goes to ``old``, and comes back if this is interrupted half-way."""
    moved = False
    try:
        if os.path.lexists(target):
            os.replace(target, old)
            moved = True
        os.replace(staged, target)
    except BaseException:
        if moved and not os.path.lexists(target):
            os.replace(old, target)
        raise


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """An empty directory inside ``output`` for the one builder that holds the lock, removed whatever happens."""
    from filelock import FileLock, Timeout

    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=120):
            staging = output / ".partial"
            shutil.rmtree(staging, ignore_errors=True)  # of a builder that was killed
            staging.mkdir()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except Timeout as error:
        raise BuildError(f"{output / '.lock'} is held by another build for more than 120 s") from error


def build(root: Path, output: Path, backends: Sequence[str] | None = None) -> list[Path]:
    """Build the variants of ``backends`` (default: all of build.toml) into ``output`` and return their directories.

    A variant that is there already, and whole, is left untouched. Safe to run from several processes at once.

    Raises:
        BuildError: A backend that build.toml does not name, a wrong build.toml or torch-ext, or a directory that cannot
            be written. Variants that were in ``output`` before are then still there, whole.
    """
    config = read_config(root)
    wanted = list(dict.fromkeys(backends or config.backends))
    for backend in wanted:
        if backend not in config.backends:
            raise BuildError(f"--backend {backend}: build.toml has {', '.join(config.backends)}")
    sources = read_sources(root, config)
    uid = unique_id(config, sources)
    targets = [output / f"torch-{backend}" for backend in wanted]
    try:
        with _staging(output) as staging:
            for backend, target in zip(wanted, targets, strict=True):
                staged = staging / target.name
                staged.mkdir()
                _write_variant(staged, config, backend, sources, uid)
                validate_variant(staged)
            # Only once all of them are right does the first one move.
            for target in targets:
                staged = staging / target.name
                if not _is_current(target, staged):
                    _swap(staged, target, staging / f"old-{target.name}")
    except OSError as error:
        raise BuildError(f"cannot write {error.filename or output}: {error.strerror or error}") from error
    return targets


def bundle(root: Path, output: Path, backends: Sequence[str] | None = None) -> list[Path]:
    """``build``, and beside the variants what kernel-builder puts there: ``benchmarks/`` and ``CARD.md``.

    Each of the two is there if ``root`` has it.

    Raises:
        BuildError: as ``build`` does, and for a wrong CARD.md. Whatever was in ``output`` before is then still there, whole.
    """
    config = read_config(root)
    card = render_card(root, config) if (root / "CARD.md").is_file() else None
    targets = build(root, output, backends)
    try:
        with _staging(output) as staging:
            if (root / "benchmarks").is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(root / "benchmarks", staging / "benchmarks", ignore=ignored)
            if card is not None:
                (staging / "CARD.md").write_text(card, encoding="utf-8")
            for name in ("benchmarks", "CARD.md"):
                staged, target = staging / name, output / name
                if not staged.exists():
                    if os.path.lexists(target):
                        os.replace(target, staging / f"old-{name}")
                elif not target.exists() or _contents(staged) != _contents(target):
                    _swap(staged, target, staging / f"old-{name}")
    except OSError as error:
        raise BuildError(f"cannot write {error.filename or output}: {error.strerror or error}") from error
    return targets


def one_line(error: object) -> str:
    """What ``error`` says, without line breaks."""
    return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "build", help="directory of torch-* (build)")
    parser.add_argument("--backend", action="append", dest="backends", help="only this backend; may be repeated")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="directory of build.toml (this checkout)")
    parser.add_argument("--quiet", action="store_true", help="print nothing unless it fails")
    arguments = parser.parse_args(argv)
    try:
        for directory in bundle(arguments.root, arguments.output, arguments.backends):
            if not arguments.quiet:
                print(f"{directory}  {validate_variant(directory).id}")
    except BuildError as error:
        print(f"build_kernel: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build_kernel: interrupted, the previous build is unchanged", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
