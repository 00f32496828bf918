"""The trees that patches of ``docs/upstream`` are applied to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .harness import Library, sections, tree

# A package that is always installed, is small and is plain Python.
LIBRARY = Library("iniconfig", "src", "")
PATCH = """\
diff --git a/src/iniconfig/exceptions.py b/src/iniconfig/exceptions.py
--- a/src/iniconfig/exceptions.py
+++ b/src/iniconfig/exceptions.py
@@ -{line},1 +{line},2 @@
 {context}
+PATCHED = True
diff --git a/tests/test_patched.py b/tests/test_patched.py
new file mode 100644
--- /dev/null
+++ b/tests/test_patched.py
@@ -0,0 +1,3 @@
+def test_patched():
+    import iniconfig.exceptions
+    assert iniconfig.exceptions.PATCHED
"""


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    """A patch of the library that puts a line below the last one of a file, and a test of that line."""
    lines = (LIBRARY.installed() / "exceptions.py").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "subject.patch"
    path.write_text(PATCH.format(line=len(lines), context=lines[-1]), encoding="utf-8")
    return path


@pytest.fixture(params=["git", "patch"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only program that is there to apply patches with."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setattr(shutil, "which", lambda name: name == request.param)


def test_sections(patch: Path) -> None:
    assert [name for name, _ in sections(patch)] == ["src/iniconfig/exceptions.py", "tests/test_patched.py"]


@pytest.mark.usefixtures("program")
def test_patches_reach_the_copy_alone(patch: Path, tmp_path: Path) -> None:
    before = (LIBRARY.installed() / "exceptions.py").read_bytes()
    patched = tree(LIBRARY, tmp_path / "tree", [patch])
    result = patched.python("""
        import iniconfig.exceptions
        assert iniconfig.exceptions.PATCHED
        print(iniconfig.__file__)
    """)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "tree" / "src" / "iniconfig" / "__init__.py")
    assert (LIBRARY.installed() / "exceptions.py").read_bytes() == before
    assert (patched.source / "iniconfig" / "__init__.py").is_symlink()
    compiled = (patched.source / "iniconfig" / "__pycache__").glob("exceptions.*")
    assert not any(path.is_symlink() for path in compiled)


def test_own_tests_fail_without_the_patch(patch: Path, tmp_path: Path) -> None:
    assert tree(LIBRARY, tmp_path / "with", [patch]).own_tests().returncode == 0
    without = tree(LIBRARY, tmp_path / "without", tests_of=[patch]).own_tests()
    assert without.returncode == 1
    assert "has no attribute 'PATCHED'" in without.stdout


@pytest.mark.usefixtures("program")
def test_a_patch_with_other_context_is_refused(patch: Path, tmp_path: Path) -> None:
    patch.write_text(patch.read_text(encoding="utf-8").replace("\n ", "\n x", 1), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"subject\.patch does not apply"):
        tree(LIBRARY, tmp_path / "tree", [patch])


def test_a_library_from_elsewhere_is_refused(patch: Path, tmp_path: Path) -> None:
    patched = tree(LIBRARY, tmp_path / "tree", [patch])
    (patched.source / "iniconfig").rename(patched.source / "other")
    result = patched.python("pass")
    assert result.returncode == 1
    assert "imported from" in result.stderr
