"""scripts/newest.py: what it asks of pip, what it reads from pip and pytest, and its report, all without the network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from scripts import newest, newest_limits
from scripts.newest import Asked, Failure, NewestError, Outcome, Package
from tests.support import REPOSITORY

PROJECT = {
    "name": "moe-fused",
    "dependencies": ["torch>=2.9", "transformers[kernels]>=5.17,<5.23", "kernels>=0.16,<0.18"],
    "optional-dependencies": {
        "train": ["moe-fused[bnb]", "trl>=1.16,<1.17", "kernels>=0.17", "pywin32; sys_platform == 'win32'"],
        "bnb": ["bitsandbytes>=0.50"],
        "test": ["moe-fused[train]", "griffelib==2.4.1", "numpy<2.4"],
        "dev": ["moe-fused[test]", "ruff==0.17.6"],
    },
}
MAKEFILE = "TORCH := torch==2.13.0\n# Only where torch brings none.\nTRITON := triton==3.6.0\n"


def asked(*pins: str) -> dict[str, Asked]:
    return newest.asked_for(newest.from_project(PROJECT), newest.from_makefile(MAKEFILE), pins)


def package(ours: str, installed: str, latest: str | None, *reasons: str, **more: Any) -> Package:
    return Package(Asked(Requirement(ours), ours, **more), installed, latest, reasons)


@pytest.mark.parametrize(
    ("limited", "free"),
    [
        (">=5.17,<5.23", ">=5.17"),
        ("<2.4", ""),
        ("<=2.4", ""),
        ("==2.4.1", ">=2.4.1"),
        ("==2.4.*", ">=2.4"),
        ("~=1.16.2", ">=1.16.2"),
        (">1,!=1.5", ">1,!=1.5"),
        ("", ""),
    ],
)
def test_upper_limits_are_dropped(limited: str, free: str) -> None:
    assert newest.without_upper_limits(SpecifierSet(limited)) == SpecifierSet(free)


def test_everything_the_tests_need_is_asked_for() -> None:
    assert {name: own.pip for name, own in asked().items()} == {
        "bitsandbytes": "bitsandbytes>=0.50",
        "griffelib": "griffelib>=2.4.1",
        "kernels": "kernels>=0.16,>=0.17",  # of two requirements
        "numpy": "numpy",
        "torch": "torch>=2.9",
        "transformers": "transformers[kernels]>=5.17",
        "triton": "triton",
        "trl": "trl>=1.16",
    }


def test_pinned_packages_stay_as_we_have_them() -> None:
    found = asked("TRL", "torch", "triton")
    assert [name for name, own in found.items() if own.pinned] == ["torch", "triton", "trl"]
    assert SpecifierSet(">=1.16,<1.17") == Requirement(found["trl"].pip).specifier
    assert found["torch"].pip == "torch==2.13.0"  # what development uses: pyproject.toml has no upper limit
    assert found["triton"].pip == "triton==3.6.0"
    assert found["transformers"].pip == "transformers[kernels]>=5.17"


def test_this_project_can_be_read() -> None:
    project = newest.tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile = newest.from_makefile((REPOSITORY / "Makefile").read_text(encoding="utf-8"))
    found = newest.asked_for(newest.from_project(project), makefile, [])
    assert {"torch", "triton", "transformers", "kernels", "peft", "bitsandbytes", "trl", "datasets", "accelerate",
            "huggingface-hub", "pytest"} < found.keys()  # fmt: skip
    assert not {"moe-fused", "ruff", "mypy"} & found.keys()
    assert not any(limit in own.pip for own in found.values() for limit in ("<", "=="))


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(NewestError, match="has no extra 'train', only test"):
        newest.from_project({"name": "moe-fused", "optional-dependencies": {"test": ["moe-fused[train]"]}})
    with pytest.raises(NewestError, match="got 'torch>'"):
        newest.from_project({"name": "a", "dependencies": ["torch>"], "optional-dependencies": {"test": []}})
    with pytest.raises(NewestError, match="must set TRITON"):
        newest.from_makefile("TORCH := torch==2.13.0\n")
    with pytest.raises(NewestError, match="got numpyy: bitsandbytes, griffelib"):
        asked("numpyy")


CONFLICT = """\
INFO: pip is looking at multiple versions of transformers[kernels] to determine which version is compatible
The conflict is caused by:
    The user requested kernels>=0.16
    transformers[kernels] 5.24.0 depends on kernels<0.19 and >=0.18.2; extra == "kernels"

Additionally, some packages in these conflicts have no matching distributions available for your environment:
    kernels

To fix this you could try to:
1. loosen the range of package versions you've specified
ERROR: Cannot install kernels>=0.16 and transformers[kernels]==5.24.0 because of conflicting dependencies.
"""
NOTHING_FITS = """\
ERROR: Could not find a version that satisfies the requirement peft>=0.22 (from versions: 0.1, 0.21.2)
ERROR: No matching distribution found for peft>=0.22
"""


def test_pips_reasons_are_found() -> None:
    assert newest.what_stood_in_the_way(CONFLICT) == [
        "The user requested kernels>=0.16",
        'transformers[kernels] 5.24.0 depends on kernels<0.19 and >=0.18.2; extra == "kernels"',
        "not on the package index in a version that fits: kernels",
    ]
    assert newest.what_stood_in_the_way(NOTHING_FITS) == [
        "Could not find a version that satisfies the requirement peft>=0.22",
        "No matching distribution found for peft>=0.22",
    ]
    assert newest.what_stood_in_the_way("Killed\n") == ["Killed"]


class FakePip:
    """An environment whose pip answers what it is told to, and whose packages are ``installed``."""

    def __init__(self, installed: dict[str, str], answers: dict[str, tuple[int, str]]) -> None:
        self._installed, self.answers, self.calls = installed, answers, list[tuple[str, ...]]()

    def installed(self) -> dict[str, str]:
        return self._installed

    def pip(self, *arguments: str, seconds: float | None = None) -> Any:
        self.calls.append(arguments)
        status, output = next((answer for key, answer in self.answers.items() if key in arguments), (0, ""))
        return SimpleNamespace(returncode=status, stdout=output, stderr="")


def test_pip_is_asked_about_what_is_not_the_newest() -> None:
    own = {name: asked("trl")[name] for name in ("kernels", "numpy", "transformers", "trl")}
    pip = FakePip(
        {"kernels": "0.17.2", "numpy": "2.4.6+local", "transformers": "5.22.2", "trl": "1.16.0"},
        {
            "--dry-run": (1, CONFLICT),
            "kernels": (0, "kernels (0.17.2)\nAvailable versions: 0.17.2, 0.17.1\n"),
            "numpy": (0, "numpy (2.4.6)\n"),
            "transformers": (0, "transformers (5.24.0)\n"),
            "trl": (0, "trl (1.17.0)\n"),
        },
    )
    found = {package.asked.name: package for package in newest.look_up(pip, own, pre=True)}  # type: ignore[arg-type]
    # A pinned package is behind because we want it to be.
    assert {name for name, package in found.items() if package.reasons} == {"transformers"}
    assert found["transformers"].reasons[1].startswith("transformers[kernels] 5.24.0 depends on kernels<0.19")
    assert found["trl"].held_back
    assert not found["numpy"].held_back  # the same release, built here
    (dry,) = [call for call in pip.calls if "--dry-run" in call]
    assert dry[-4:] == ("transformers[kernels]==5.24.0", "kernels>=0.16,>=0.17", "numpy", own["trl"].pip)
    assert all("--pre" in call for call in pip.calls)


def test_a_set_that_cannot_be_resolved_is_an_error() -> None:
    with pytest.raises(NewestError, match=r"so nothing was tested: The user requested kernels>=0\.16; transformers"):
        newest.install(FakePip({}, {"--progress-bar": (1, CONFLICT)}), asked(), pre=False)  # type: ignore[arg-type]


TESTS = """
import os
import pytest

@pytest.mark.parametrize("size", [1, 2])
def test_gone(size, tmp_path):
    raise ImportError(f"cannot import name 'Gone' from 'trl' ({tmp_path}/trl.py), at {hex(id(tmp_path))}")

def test_other():
    assert 1 + 1 == 3

def test_fine():
    pass

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass

@pytest.fixture
def broken():
    raise KeyError("no such option")

def test_with_fixture(broken):
    pass
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the script reads from a real report of pytest, with failures of every kind."""
    directory = tmp_path_factory.mktemp("suite")
    (directory / "test_some.py").write_text(TESTS, encoding="utf-8")
    (directory / "test_broken.py").write_text("import a_module_that_is_gone\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors",
               "--rootdir", str(directory), "--junitxml", str(directory / "report.xml"), str(directory)]  # fmt: skip
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    assert subprocess.run(command, capture_output=True, cwd=directory, env=env, check=False).returncode == 1
    return newest.read_junit("integration", directory / "report.xml")


def test_failures_are_read_and_grouped(outcome: Outcome) -> None:
    assert (outcome.tests, outcome.skipped, len(outcome.failures)) == (7, 1, 5)
    groups = newest.grouped(outcome.failures)
    assert [len(tests) for _, tests in groups] == [2, 1, 1, 1]
    error, tests = groups[0]
    assert error.startswith("ImportError: cannot import name 'Gone' from 'trl'")
    assert tests == ["test_some::test_gone[1]", "test_some::test_gone[2]"]
    others = {error for error, _ in groups[1:]}
    assert "ModuleNotFoundError: No module named 'a_module_that_is_gone'" in others
    assert "KeyError: 'no such option'" in others
    assert any(error.startswith("assert (1 + 1) == 3") or "assert 2 == 3" in error for error in others)


def test_a_report_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    with pytest.raises(NewestError, match=r"report\.xml is not a report of pytest"):
        newest.read_junit("kernel", path)
    path.write_text("<testsuites>", encoding="utf-8")
    with pytest.raises(NewestError, match=r"report\.xml is not a report of pytest"):
        newest.read_junit("kernel", path)
    path.write_text("<testsuites></testsuites>", encoding="utf-8")
    assert newest.read_junit("kernel", path).problem == "no test was run"


def test_the_report_says_what_broke_and_what_pip_refused() -> None:
    packages = [
        package("numpy<2.4", "2.4.6", "2.4.6"),
        package("peft>=0.21.2", "0.21.2", "0.21.2"),
        package("torch>=2.9", "2.13.0+cpu", "2.15.0", pinned=True),
        package("transformers<5.23,>=5.17", "5.22.2", "5.24.0", "5.24.0 depends on kernels>=0.18.2"),
        package("triton==3.6.0", "3.9.0", "3.9.0", ranged=False),
    ]
    failures = [Failure(f"test_a::test_{i}", f"ValueError: {i} at 0x7f{i} in /usr/lib/a{i}") for i in range(5)]
    outcomes = [Outcome("integration", 12, 2, failures), Outcome("kernel", problem="pytest ended with status 139")]
    text = newest.report(packages, outcomes, lifted=True).splitlines()
    assert [line for line in text if not line.startswith(" ")] == [
        "Newer than we allow:",
        "Left at our pin:",
        "Not the newest:",
        "The newest, within our ranges:",
        "The upper limits in moe_fused.hub were lifted for the tests.",
        "",
        "integration: 5 of 10 tests failed, 2 skipped",
        "",
        "kernel: pytest ended with status 139",
    ]
    assert text[1].split() == ["numpy", "2.4.6", "we", "ask", "for", "<2.4"]
    (held,) = [i for i, line in enumerate(text) if "the index has 5.24.0, which pip refuses:" in line]
    assert text[held + 1].strip() == "5.24.0 depends on kernels>=0.18.2"
    assert any(line.split() == ["triton", "3.9.0", "we", "develop", "with", "==3.6.0"] for line in text)
    broken = text.index("  5 × ValueError: 0 at 0x7f0 in /usr/lib/a0")
    assert [line.strip() for line in text[broken + 1 : broken + 5]] == [
        "test_a::test_0", "test_a::test_1", "test_a::test_2", "and 2 more",
    ]  # fmt: skip


def test_wrong_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    occupied = tmp_path / "mine"
    occupied.mkdir()
    (occupied / "thesis.txt").touch()
    assert newest.main(["--environment", str(occupied)]) == 2
    assert newest.main(["--pin", "nothing"]) == 2
    (tmp_path / "file").touch()
    assert newest.main(["--environment", str(tmp_path / "file" / "below")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert [line.partition(" error: ")[0] for line in lines] == ["newest:"] * 3
    assert "this script has not made it" in lines[0]
    assert "--pin must name packages of pyproject.toml, got nothing" in lines[1]
    assert (occupied / "thesis.txt").is_file()


def test_an_environment_is_replaced_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newest, "VENV", (*newest.VENV, "--without-pip"))  # which takes most of the time
    directory = tmp_path / "environment"
    directory.mkdir()
    (directory / newest.MARK).touch()
    (directory / "left-over").touch()
    with newest.environment(directory, keep=False) as made:
        assert not (directory / "left-over").exists()
        assert made.installed() == {}
        information = made.packages / "Some_Package-1.2.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: Some_Package\nVersion: 1.2\n", encoding="utf-8"
        )
        assert made.installed() == {"some-package": "1.2"}
        assert {"torch", "transformers", "kernels", "liger-kernel"} < made.checked()
        made.lift_limits()
        program = "import moe_fused.hub as hub; print(hub.REQUIRED['transformers'], hub.OPTIONAL['trl'][0])"
        run = subprocess.run([made.python, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert run.stdout.split() == [">=5.17", ">=1.16"], run.stderr
    assert not directory.exists()


def test_lower_limits_stay() -> None:
    hub = SimpleNamespace(
        REQUIRED={"torch": ">=2.9", "transformers": ">=5.17,<5.23"}, OPTIONAL={"trl": (">=1.16,<1.17", "training")}
    )
    newest_limits.lift(hub)
    assert hub.REQUIRED == {"torch": ">=2.9", "transformers": ">=5.17"}
    assert hub.OPTIONAL == {"trl": (">=1.16", "training")}
