"""Applies the patches of ``docs/upstream`` to copies of installed libraries, and runs Python with such a copy.

A ``Tree`` looks like a checkout of the library's repository, as far as the patches see it: the package, and the tests
that a patch adds. All files that no patch touches are links to the installed package, so a tree costs milliseconds and
the installed package stays as it is.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import REPOSITORY, python_path

UPSTREAM = REPOSITORY / "docs" / "upstream"


@dataclass(frozen=True)
class Library:
    """A library that patches are for.

    Attributes:
        name: of its package and of its folder in ``docs/upstream``.
        source: the folder of its repository that holds the package, ``"."`` for the top.
        version: the release that the patches are made for.
    """

    name: str
    source: str
    version: str

    def installed(self) -> Path:
        """The folder of the installed package."""
        spec = importlib.util.find_spec(self.name)
        assert spec is not None, f"{self.name} is not installed"
        assert spec.origin is not None, f"{self.name} has no files"
        return Path(spec.origin).parent

    def required(self) -> pytest.MarkDecorator:
        """A mark that skips where another release of the library is installed, or none."""
        try:
            found = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        reason = f"the patches are for {self.name} {self.version}, installed is {found}"
        return pytest.mark.skipif(found != self.version, reason=reason)

    def patch(self, subject: str) -> Path:
        """The patch of that name."""
        return UPSTREAM / self.name / f"{subject}.patch"

    def patches(self) -> list[Path]:
        """All patches for the library, by name."""
        return sorted((UPSTREAM / self.name).glob("*.patch"))

    def example(self, subject: str) -> str:
        """The Python in the text of that patch."""
        text = self.patch(subject).with_suffix(".md").read_text(encoding="utf-8")
        (found,) = re.findall(r"(?s)^```python\n(.*?)^```", text, re.MULTILINE)
        return str(found)

    def patched(self, root: Path, *subjects: str) -> Tree:
        """A tree below ``root`` with these patches."""
        return tree(self, root / "patched", [self.patch(subject) for subject in subjects])

    def unpatched(self, root: Path, *subjects: str) -> Tree:
        """A tree below ``root`` of the library as it is, with the tests of these patches."""
        return tree(self, root / "unpatched", tests_of=[self.patch(subject) for subject in subjects])


TRANSFORMERS = Library("transformers", "src", "5.22.2")
PEFT = Library("peft", "src", "0.21.2")
BITSANDBYTES = Library("bitsandbytes", ".", "0.50.2")


def sections(patch: Path) -> Iterator[tuple[str, str]]:
    """Yields the file names that ``patch`` changes in the repository, each with its part of the patch."""
    for part in re.split(r"(?m)^(?=diff --git )", patch.read_text(encoding="utf-8")):
        if part.startswith("diff --git "):
            name = re.match(r"diff --git a/(\S+) b/\1\n", part)
            assert name is not None, (
                f"{patch.name}: a file is renamed or has a space in its name: {part.splitlines()[0]}"
            )
            yield name[1], part


def is_test(name: str) -> bool:
    """Whether a file of a library's repository belongs to its tests."""
    return name.startswith("tests/")


@dataclass(frozen=True)
class Tree:
    """A copy of a library as its repository has it."""

    library: Library
    root: Path

    @property
    def source(self) -> Path:
        """What has to stand first on ``PYTHONPATH``."""
        return self.root / self.library.source

    def python(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs ``code``, which may be indented, in a new process that imports the library from this tree."""
        return self._run([sys.executable, "-c", self._guard() + textwrap.dedent(code)], environment)

    def pytest(
        self, *arguments: str, plugins: Iterable[str] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs this repository's own tests in a new process that imports the library from this tree.

        Args:
            plugins: modules that pytest loads before it collects, such as ``"tests.upstream.plugins.name"``.
        """
        loaded = [word for plugin in plugins for word in ("-p", plugin)]
        command = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *loaded, *arguments]
        code = f"{self._guard()}import sys, pytest; sys.exit(pytest.main({command!r}))"
        return self._run([sys.executable, "-c", code], environment)

    def own_tests(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the tests that patches have put into this tree, as the library's maintainers would."""
        (self.root / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        command = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(self.root)]
        command += ["-c", str(self.root / "pytest.ini"), *arguments, str(self.root / "tests")]
        code = f"{self._guard()}import sys, pytest; sys.exit(pytest.main({command!r}))"
        return self._run([sys.executable, "-c", code], environment)

    def _guard(self) -> str:
        """Python that fails unless the library comes from this tree."""
        name, folder = self.library.name, str(self.source / self.library.name)
        return (
            f"import importlib.util as _u, os as _o; _f = _o.path.dirname(_u.find_spec({name!r}).origin)\n"
            f"assert _f == {folder!r}, 'imported from ' + _f\n"
        )

    def _run(self, command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        # A worker of xdist must not look like one to the pytest that it starts.
        # With CI set, pytest prints every message twice.
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name != "CI"
        }
        env = {**inherited, "HF_HUB_OFFLINE": "1", **environment, "PYTHONPATH": python_path(self.source)}
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)


def tree(library: Library, root: Path, patches: Iterable[Path] = (), tests_of: Iterable[Path] = ()) -> Tree:
    """Makes a tree of the installed ``library`` below ``root``.

    Args:
        patches: are applied whole, one after the other.
        tests_of: patches that only the tests are taken from, to see them fail.

    Raises:
        AssertionError: a patch does not apply exactly, apart from moved lines.
    """
    patches, tests_of = list(patches), list(tests_of)
    prefix = f"{library.source}/" if library.source != "." else ""
    touched = {name.removeprefix(prefix) for patch in patches for name, _ in sections(patch) if not is_test(name)}
    for name in touched:
        assert name.startswith(f"{library.name}/"), f"{name} is neither in {prefix}{library.name}/ nor in tests/"
    package = library.installed()
    _link(package, root / library.source / library.name, {Path(name).relative_to(library.name) for name in touched})
    for patch in patches:
        _apply(root, "".join(part for _, part in sections(patch)), patch.name)
    for patch in tests_of:
        _apply(root, "".join(part for name, part in sections(patch) if is_test(name)), patch.name)
    return Tree(library, root)


def _link(package: Path, copy: Path, touched: set[Path]) -> None:
    """Makes ``copy`` a folder with the entries of ``package``: links, and copies of the files in ``touched``."""
    copy.mkdir(parents=True)
    folders = {path.parts[0] for path in touched if len(path.parts) > 1}
    files = {path.parts[0] for path in touched if len(path.parts) == 1}
    for entry in package.iterdir():
        if entry.name in folders:
            below = {path.relative_to(entry.name) for path in touched if path.parts[0] == entry.name}
            _link(entry, copy / entry.name, below)
        elif entry.name == "__pycache__":
            # Python writes here, and what it compiles of copies must not reach the installed package.
            (copy / entry.name).mkdir()
            for compiled in entry.iterdir():
                if f"{compiled.name.partition('.')[0]}.py" not in files:
                    (copy / entry.name / compiled.name).symlink_to(compiled)
        elif entry.name in files:
            shutil.copy(entry, copy / entry.name)
        else:
            (copy / entry.name).symlink_to(entry)


def _apply(root: Path, text: str, name: str) -> None:
    """Applies the patch ``text`` at ``root``; lines may have moved, but none may differ."""
    if shutil.which("git"):
        command = ["git", "apply", "--whitespace=error-all", "-p1", "-"]
    elif shutil.which("patch"):
        command = ["patch", "--batch", "--forward", "--fuzz=0", "--no-backup-if-mismatch", "-p1"]
    else:
        pytest.skip("neither git nor patch is installed")
    # Inside another repository, git would take the names as relative to that one's top.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"):
        env.pop(variable, None)
    result = subprocess.run(command, cwd=root, env=env, input=text, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{name} does not apply: {result.stderr or result.stdout}"
