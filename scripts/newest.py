#!/usr/bin/env python
"""Install the newest releases of everything into an environment of their own, run the tests there, and say what broke.

    .venv/bin/python scripts/newest.py                                the integration and the kernel tests
    .venv/bin/python scripts/newest.py --tests kernel                 the kernel tests alone
    .venv/bin/python scripts/newest.py --pin torch -- -k quantizer    torch as we have it, and a selection of the tests

The packages are those of pyproject.toml, those of the extra ``test`` included, and torch and Triton as the Makefile names
them. Upper limits are dropped, so pip takes the newest set that resolves. For each package that is not the newest on the
index, pip is then asked for the newest one, and the report repeats which requirement stood in the way.

``moe_fused`` refuses Transformers and other libraries outside its ranges. If one of these is newer in the set, the
environment lifts the upper limits in ``moe_fused.hub`` (``scripts/newest_limits.py``), so that the tests show what breaks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

try:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ImportError:
    sys.exit(
        f"newest: error: {sys.executable} lacks the package packaging: make setup, then .venv/bin/python {sys.argv[0]}"
    )

REPOSITORY = Path(__file__).resolve().parent.parent
LIMITS = Path(__file__).resolve().parent / "newest_limits.py"
EXTRA = "test"
MARK = ".made-by-newest"  # in an environment that this script made, and may therefore remove
SUITES = {
    "integration": ("tests/integration",),
    "kernel": ("tests/kernel",),
}
# As in the Makefile.
TEST_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PYTEST = ("-p", "no:cacheprovider", "-q", "--disable-warnings", "--timeout", "300", "-m", "not slow")
VENV = ("-m", "venv")
PIP_SECONDS = 900  # to find out why a package is not the newest
MOST_TESTS = 3  # names of tests that the report gives for each error
MOST_CHARACTERS = 200  # of an error's first line


class NewestError(Exception):
    """Something that ends the script; its message is one line."""


# What we ask for.


def without_upper_limits(asked: SpecifierSet) -> SpecifierSet:
    """Returns ``asked`` without what keeps newer versions out: an exact version becomes the oldest that fits."""
    kept = []
    for part in asked:
        if part.operator in (">=", ">", "!="):
            kept.append(str(part))
        elif part.operator in ("==", "~=", "==="):
            kept.append(f">={part.version.removesuffix('.*')}")
    return SpecifierSet(",".join(kept))


def parse(text: str, where: str) -> Requirement:
    try:
        return Requirement(text)
    except InvalidRequirement as error:
        raise NewestError(f"{where} must hold requirements as pip writes them, got {text!r}: {error}") from error


def from_project(project: Mapping[str, Any]) -> dict[str, Requirement]:
    """Returns what the table ``[project]`` of pyproject.toml asks for, by name.

    These are its dependencies and those of its extra "test". An extra of ours that asks for further extras of ours is
    followed. Requirements of one package are merged.

    Raises:
        NewestError: an extra that is asked for does not exist, or a requirement cannot be read.
    """
    extras = project.get("optional-dependencies", {})
    ours = canonicalize_name(project["name"])
    found: dict[str, Requirement] = {}
    waiting, seen = [EXTRA], set()
    texts = list(project.get("dependencies", []))
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        if extra not in extras:
            raise NewestError(f"pyproject.toml has no extra {extra!r}, only {', '.join(extras) or 'none'}")
        seen.add(extra)
        texts += extras[extra]
        waiting += [name for text in extras[extra] for name in _extras_of(parse(text, "pyproject.toml"), ours)]
    for text in texts:
        requirement = parse(text, "pyproject.toml")
        name = canonicalize_name(requirement.name)
        if name == ours or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        if (before := found.get(name)) is not None:
            requirement.specifier &= before.specifier
            requirement.extras |= before.extras
        found[name] = requirement
    return found


def _extras_of(requirement: Requirement, ours: str) -> Iterable[str]:
    return requirement.extras if canonicalize_name(requirement.name) == ours else ()


def from_makefile(text: str) -> dict[str, Requirement]:
    """Returns the versions of torch and Triton that development uses, by name.

    Raises:
        NewestError: the Makefile does not set TORCH and TRITON.
    """
    found: dict[str, Requirement] = {}
    for variable in ("TORCH", "TRITON"):
        match = re.search(rf"^{variable} :?= *(\S+)$", text, re.MULTILINE)
        if match is None:
            raise NewestError(f"the Makefile must set {variable} to a requirement, as in {variable} := torch==2.13.0")
        requirement = parse(match[1], "the Makefile")
        found[canonicalize_name(requirement.name)] = requirement
    return found


@dataclass(frozen=True)
class Asked:
    """What is asked of one package.

    Attributes:
        ours: what we ask for, as pyproject.toml has it.
        pip: what pip is asked for.
        pinned: whether the package stays as we have it.
        ranged: whether pyproject.toml names it. If not, ``ours`` is the version in the Makefile, which is no limit.
    """

    ours: Requirement
    pip: str
    pinned: bool = False
    ranged: bool = True

    @property
    def name(self) -> str:
        return canonicalize_name(self.ours.name)


def asked_for(
    project: Mapping[str, Requirement], makefile: Mapping[str, Requirement], pins: Iterable[str]
) -> dict[str, Asked]:
    """Returns what pip is to be asked for, by name: the newest of everything but of ``pins``.

    Raises:
        NewestError: one of ``pins`` is not among the packages.
    """
    ours = {**makefile, **project}
    pinned = {canonicalize_name(pin) for pin in pins}
    if unknown := pinned - ours.keys():
        raise NewestError(
            f"--pin must name packages of pyproject.toml, got {', '.join(sorted(unknown))}: {', '.join(sorted(ours))}"
        )
    asked = {}
    for name, requirement in sorted(ours.items()):
        wanted = Requirement(str(requirement))
        wanted.marker = None
        if name in pinned:
            # The version that development uses, where there is one: pyproject.toml alone would admit newer ones.
            wanted.specifier = makefile.get(name, requirement).specifier
        else:
            wanted.specifier = without_upper_limits(requirement.specifier) if name in project else SpecifierSet()
        asked[name] = Asked(requirement, str(wanted), name in pinned, name in project)
    return asked


# The environment.


@contextlib.contextmanager
def environment(directory: Path, keep: bool) -> Iterator[Environment]:
    """Makes a new virtual environment, and removes it at the end unless ``keep``.

    Raises:
        NewestError: something that this script has not made is in its place, or the environment cannot be made.
    """
    if directory.exists() or directory.is_symlink():
        if not (directory / MARK).is_file() or directory.is_symlink():
            raise NewestError(f"{directory} exists, and this script has not made it: name another --environment")
        shutil.rmtree(directory)
    try:
        directory.mkdir(parents=True)
        (directory / MARK).touch()
    except OSError as error:
        raise NewestError(f"{directory} cannot be made: {error.strerror or error}") from error
    try:
        run = subprocess.run([sys.executable, *VENV, str(directory)], capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise NewestError(f"python -m venv failed: {last_line(run.stdout + run.stderr)}")
        yield Environment(directory)
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / ("Scripts" if os.name == "nt" else "bin") / "python"

    @property
    def packages(self) -> Path:
        (path,) = [*self.directory.glob("lib/python*/site-packages"), *self.directory.glob("Lib/site-packages")]
        return path

    def pip(self, *arguments: str, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
        """Runs the environment's pip.

        Raises:
            subprocess.TimeoutExpired: pip takes longer than ``seconds``.
        """
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)

    def installed(self) -> dict[str, str]:
        """The versions in the environment, by name."""
        return {
            canonicalize_name(found.metadata["Name"]): found.version
            for found in distributions(path=[str(self.packages)])
        }

    def checked(self) -> set[str]:
        """The packages whose versions ``moe_fused.hub`` checks.

        Raises:
            NewestError: the environment cannot import it.
        """
        program = "import moe_fused.hub as hub; print(*hub.REQUIRED, *hub.OPTIONAL)"
        run = subprocess.run(
            [str(self.python), "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            raise NewestError(f"moe_fused.hub cannot be imported in {self.directory}: {last_line(run.stderr)}")
        return {canonicalize_name(name) for name in run.stdout.split()}

    def lift_limits(self) -> None:
        """Makes every process of the environment take versions that are newer than ``moe_fused.hub`` allows."""
        shutil.copyfile(LIMITS, self.packages / LIMITS.name)
        (self.packages / f"{LIMITS.stem}.pth").write_text(
            f"import {LIMITS.stem}; {LIMITS.stem}.begin()\n", encoding="utf-8"
        )


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def what_stood_in_the_way(output: str) -> list[str]:
    """The lines of pip's ``output`` that say which requirements exclude each other, or which one nothing satisfies."""
    lines = output.splitlines()
    found: list[str] = []
    for i, line in enumerate(lines):
        if line.startswith("The conflict is caused by:"):
            found += _indented(lines[i + 1 :])
        elif line.startswith("Additionally, some packages in these conflicts have no matching distributions"):
            found.append(f"not on the package index in a version that fits: {', '.join(_indented(lines[i + 1 :]))}")
    if not found:
        # The lists of versions that pip adds are hundreds long.
        found = [
            re.sub(r" \(from versions: .*\)", "", line.removeprefix("ERROR: "))
            for line in lines
            if line.startswith("ERROR: ")
        ]
    return list(dict.fromkeys(found)) or [last_line(output)]


def _indented(lines: Sequence[str]) -> list[str]:
    found = []
    for line in lines:
        if not line.startswith("    "):
            break
        found.append(line.strip())
    return found


def install(made: Environment, asked: Mapping[str, Asked], pre: bool) -> None:
    """Installs what is asked for.

    Raises:
        NewestError: pip cannot; the message says why.
    """
    options = ["--pre"] if pre else []
    # An old pip cannot read every new package, and says less about conflicts.
    upgraded = made.pip("install", "--quiet", "--upgrade", "pip")
    if upgraded.returncode != 0:
        raise NewestError(f"pip cannot be upgraded: {what_stood_in_the_way(upgraded.stderr)[0]}")
    run = made.pip("install", "--progress-bar", "off", *options, *(own.pip for own in asked.values()))
    if run.returncode != 0:
        reasons = what_stood_in_the_way(f"{run.stderr}\n{run.stdout}")
        raise NewestError(f"pip could not resolve the newest set, so nothing was tested: {'; '.join(reasons)}")


def newest_on_index(made: Environment, name: str, pre: bool) -> str | None:
    """The newest version of a package that the index has for this Python, or None if it does not say."""
    run = made.pip("index", "versions", name, *(["--pre"] if pre else []))
    match = re.search(r"^\S+ \((\S+)\)$", run.stdout, re.MULTILINE)
    return match[1] if match else None


@dataclass(frozen=True)
class Package:
    """What became of one package.

    Attributes:
        newest: the newest version on the index for this Python, None if the index did not say.
        reasons: why the installed version is not the newest.
    """

    asked: Asked
    installed: str
    newest: str | None
    reasons: tuple[str, ...] = ()

    @property
    def held_back(self) -> bool:
        return self.newest is not None and Version(Version(self.installed).public) < Version(self.newest)

    @property
    def outside(self) -> bool:
        """Whether the installed version is outside our range."""
        ours = self.asked.ours.specifier
        return self.asked.ranged and not ours.contains(Version(self.installed).base_version, prereleases=True)


def look_up(made: Environment, asked: Mapping[str, Asked], pre: bool) -> list[Package]:
    """Compares what is installed with the index, and asks pip about each package that is not the newest."""
    installed = made.installed()
    packages = []
    for name, own in asked.items():
        package = Package(own, installed[name], newest_on_index(made, name, pre))
        if package.held_back and not own.pinned:
            assert package.newest is not None
            package = Package(
                own, package.installed, package.newest, reasons_of(made, asked, name, package.newest, pre)
            )
        packages.append(package)
    return packages


def reasons_of(made: Environment, asked: Mapping[str, Asked], name: str, newest: str, pre: bool) -> tuple[str, ...]:
    """What pip says when the newest version of a package is asked for beside everything else."""
    wanted = parse(asked[name].pip, "pip's arguments")
    wanted.specifier = SpecifierSet(f"=={newest}")
    others = [own.pip for other, own in asked.items() if other != name]
    options = ["--pre"] if pre else []
    try:
        # Not against what is installed, or pip would only say that the environment has something else.
        run = made.pip(
            "install", "--dry-run", "--ignore-installed", *options, str(wanted), *others, seconds=PIP_SECONDS
        )
    except subprocess.TimeoutExpired:
        return (f"pip found no answer within {PIP_SECONDS} s",)
    if run.returncode == 0:
        return ("pip can resolve it, but prefers another set",)
    return tuple(what_stood_in_the_way(f"{run.stderr}\n{run.stdout}"))


# The tests.


@dataclass(frozen=True)
class Failure:
    """A test that failed, or a file that could not be collected."""

    test: str
    error: str


@dataclass
class Outcome:
    """What the tests of one suite gave.

    Attributes:
        suite: its name.
        tests, skipped: how many ran, the skipped ones included, and how many of these were skipped.
        problem: why there is no result, or None.
    """

    suite: str
    tests: int = 0
    skipped: int = 0
    failures: list[Failure] = field(default_factory=list)
    problem: str | None = None


def first_line_of(element: ET.Element) -> str:
    """The error of a test in one line. For a file that cannot be collected, the message alone says nothing."""
    errors = [line[1:].strip() for line in (element.text or "").splitlines() if re.match(r"E\s", line)]
    message = (element.get("message") or "").strip()
    if (not message or message == "collection failure" or message.startswith("failed on ")) and errors:
        message = errors[0]
    return message.splitlines()[0].strip() if message else "no message"


def read_junit(suite: str, path: Path) -> Outcome:
    """Reads the report that pytest wrote with ``--junitxml``.

    Raises:
        NewestError: the file is missing or is not such a report.
    """
    try:
        root = ET.parse(path).getroot()
    except (OSError, ET.ParseError) as error:
        raise NewestError(f"{path} is not a report of pytest: {error}") from error
    outcome = Outcome(suite)
    for case in root.iter("testcase"):
        outcome.tests += 1
        name = "::".join(part for part in (case.get("classname", ""), case.get("name", "")) if part)
        if case.find("skipped") is not None:
            outcome.skipped += 1
        for element in (*case.findall("failure"), *case.findall("error")):
            outcome.failures.append(Failure(name, first_line_of(element)))
    if not outcome.tests:
        outcome.problem = "no test was run"
    return outcome


def run_suite(made: Environment, suite: str, arguments: Sequence[str], jobs: int) -> Outcome:
    """Runs the tests of a suite in the environment. Its output goes to the terminal."""
    report = made.directory / f"{suite}.xml"
    command = [str(made.python), "-m", "pytest", *SUITES[suite], *PYTEST, f"--junitxml={report}"]
    if jobs > 1:
        command += ["-n", str(jobs)]
    try:
        run = subprocess.run(
            [*command, *arguments], cwd=REPOSITORY, env={**os.environ, **TEST_ENVIRONMENT}, check=False
        )
    except OSError as error:
        return Outcome(suite, problem=f"pytest did not start: {error}")
    # 0 passed, 1 failed, 2 interrupted (also by errors of collection), 5 nothing collected; others have no report to trust.
    if not report.is_file():
        return Outcome(suite, problem=f"pytest ended with status {run.returncode} and wrote no report")
    outcome = read_junit(suite, report)
    if run.returncode not in (0, 1, 5) and not outcome.failures:
        outcome.problem = f"pytest ended with status {run.returncode}"
    return outcome


# The report.


def kind_of(error: str) -> str:
    """An error without what differs from test to test: addresses, paths and numbers."""
    error = re.sub(r"0x[0-9a-f]+", "0x…", error)
    error = re.sub(r"(?<![\w.])/[\w.+@-]+(/[\w.+@-]+)+", "/…", error)
    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "N", error)


def grouped(failures: Iterable[Failure]) -> list[tuple[str, list[str]]]:
    """Failures by error: the first error of each kind with the names of its tests, the most frequent kind first."""
    groups: dict[str, tuple[str, list[str]]] = {}
    for failure in failures:
        groups.setdefault(kind_of(failure.error), (failure.error, []))[1].append(failure.test)
    return sorted(groups.values(), key=lambda group: -len(group[1]))


def describe_packages(packages: Sequence[Package]) -> list[str]:
    """Lines that compare what is installed with what we ask for and with the index."""
    lines = []
    width = max(len(package.asked.name) for package in packages)

    def line(package: Package, remark: str) -> str:
        ours = f"we {'ask for' if package.asked.ranged else 'develop with'} {package.asked.ours.specifier or 'any'}"
        return f"  {package.asked.name:{width}}  {package.installed:14} {ours}{remark}"

    outside = [package for package in packages if package.outside and not package.asked.pinned]
    held = [package for package in packages if package.held_back and not package.asked.pinned]
    pinned = [package for package in packages if package.asked.pinned]
    rest = [package for package in packages if package not in (*outside, *held, *pinned)]
    for title, group in (("Newer than we allow:", outside), ("Left at our pin:", pinned)):
        if group:
            lines += [title, *(line(package, "") for package in group)]
    if held:
        lines.append("Not the newest:")
        for package in held:
            lines.append(line(package, f"; the index has {package.newest}, which pip refuses:"))
            lines += [f"      {reason}" for reason in package.reasons]
    if rest:
        lines += ["The newest, within our ranges:", *(line(package, "") for package in rest)]
    return lines


def describe_outcome(outcome: Outcome) -> list[str]:
    """Lines that say what broke in one suite."""
    if outcome.problem is not None:
        return [f"{outcome.suite}: {outcome.problem}"]
    ran = outcome.tests - outcome.skipped
    if not outcome.failures:
        return [f"{outcome.suite}: {ran} tests passed, {outcome.skipped} skipped"]
    failing = len({failure.test for failure in outcome.failures})
    lines = [f"{outcome.suite}: {failing} of {ran} tests failed, {outcome.skipped} skipped"]
    for error, tests in grouped(outcome.failures):
        shown = error if len(error) <= MOST_CHARACTERS else f"{error[:MOST_CHARACTERS]}…"
        lines.append(f"  {len(tests)} × {shown}")
        lines += [f"      {test}" for test in tests[:MOST_TESTS]]
        if len(tests) > MOST_TESTS:
            lines.append(f"      and {len(tests) - MOST_TESTS} more")
    return lines


def report(packages: Sequence[Package], outcomes: Sequence[Outcome], lifted: bool) -> str:
    lines = describe_packages(packages)
    if lifted:
        lines.append("The upper limits in moe_fused.hub were lifted for the tests.")
    for outcome in outcomes:
        lines += ["", *describe_outcome(outcome)]
    return "\n".join(lines)


# The command.


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], usage="%(prog)s [options] [-- arguments of pytest]"
    )
    parser.add_argument(
        "--tests", action="append", choices=SUITES, help="tests to run; may be repeated (integration and kernel)"
    )
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="leave this package as we have it; may be repeated",
    )
    parser.add_argument("--pre", action="store_true", help="take releases before their final version, too")
    parser.add_argument(
        "--environment", type=Path, default=REPOSITORY / ".venv-newest", help="directory to make (.venv-newest)"
    )
    parser.add_argument("--keep", action="store_true", help="do not remove the environment at the end")
    parser.add_argument("--no-tests", action="store_true", help="install and compare versions only")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes of pytest (at most two)"
    )
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, behind --")
    chosen = parser.parse_args(argv)
    if chosen.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {chosen.jobs}")
    return chosen


def newest(chosen: argparse.Namespace) -> int:
    """Does what the options ask; returns the exit status.

    Raises:
        NewestError: pip or the environment stopped it.
    """
    try:
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        makefile = from_makefile((REPOSITORY / "Makefile").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise NewestError(f"pyproject.toml and the Makefile cannot be read: {error}") from error
    asked = asked_for(from_project(project), makefile, chosen.pin)
    with environment(chosen.environment.absolute(), chosen.keep) as made:
        print(f"Installing the newest of {len(asked)} packages into {made.directory}", flush=True)
        install(made, asked, chosen.pre)
        packages = look_up(made, asked, chosen.pre)
        lifted = bool(made.checked() & {package.asked.name for package in packages if package.outside})
        if lifted:
            made.lift_limits()
        suites = [] if chosen.no_tests else list(dict.fromkeys(chosen.tests or SUITES))
        outcomes = [run_suite(made, suite, chosen.pytest, chosen.jobs) for suite in suites]
        print(f"\n{report(packages, outcomes, lifted)}")
        if chosen.keep:
            print(f"\nThe environment is kept: {made.python} -m pytest …")
    return int(any(outcome.problem or outcome.failures for outcome in outcomes))


def main(argv: Sequence[str] | None = None) -> int:
    chosen = options(argv)
    # As an interruption does, a termination removes the environment.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return newest(chosen)
    except NewestError as error:
        print(f"newest: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("newest: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
