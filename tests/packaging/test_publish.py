"""scripts/publish.py against a stand-in for the Hub: what it sends, in what order, what repeats, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts import build_kernel, publish
from tests.packaging.hub import OWNER, OWNER_TOKEN, READER_TOKEN, STRANGER_TOKEN, Answer, Drop, Hub, Repository
from tests.support import REPOSITORY, build_config, repo_id

SCRIPT = REPOSITORY / "scripts" / "publish.py"
MODULE = build_config()["name"].replace("-", "_")
BRANCH = f"v{build_config()['version']}"
VARIANTS = [f"torch-{backend}" for backend in build_config()["backends"]]
Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="publishing needs git")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of git with a build: a kernel of a few files, so that a run takes a second."""
    root = tmp_path_factory.mktemp("template")
    package = root / "torch-ext" / MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('from . import layers\n\n__all__ = ["layers", "double"]\n')
    (package / "layers.py").write_text("class Layer:\n    pass\n")
    (package / "table.json").write_text("{}")
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "benchmark.py").write_text("# times it\n")
    (root / "benchmarks" / "other.py").write_text("# no part of what is published\n")
    for name in ("build.toml", "CARD.md", ".gitignore"):
        shutil.copy(REPOSITORY / name, root)
    git(root, "init", "--quiet", "--initial-branch=main")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Jo", "-c", "user.email=jo@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True).stdout


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "A change")


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "checkout")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub().serving() as hub:
        yield hub


def command(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--root", str(root), *arguments]


@pytest.fixture
def run(root: Path, hub: Hub, tmp_path: Path) -> Run:
    """Runs the script as a user does."""

    def run(*arguments: str, token: str | None = OWNER_TOKEN) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **hub.environment(str(tmp_path / "home"), token)}
        return subprocess.run(
            command(root, *arguments), env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    return run


@pytest.fixture
def refusal(root: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the script in this process, which is offline, and returns the one line with which it refuses."""

    def refusal(*arguments: str) -> str:
        status = publish.main(["--root", str(root), *arguments])
        output = capfd.readouterr()
        return error_of(subprocess.CompletedProcess(arguments, status, output.out, output.err))

    return refusal


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one line with which the script refuses."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("publish: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("publish: error: ").strip()


def built(root: Path) -> dict[str, bytes]:
    """What the branch of the version must hold, but for what it has inherited."""
    files = {
        f"build/{name}/{path}": content for name in VARIANTS for path, content in tree(root / "build" / name).items()
    }
    return files | {"benchmarks/benchmark.py": (root / "benchmarks" / "benchmark.py").read_bytes()}


def tree(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def published(hub: Hub, branch: str = BRANCH, name: str | None = None) -> dict[str, bytes]:
    files = dict(hub.repositories[name or repo_id()].files(branch))
    files.pop(".gitattributes")
    return files


def test_a_dry_run_shows_files_and_digests_and_asks_for_nothing(root: Path, hub: Hub, run: Run) -> None:
    lines = succeed(run("--dry-run", token=None)).splitlines()
    shown = {line.split()[2]: line.split()[0] for line in lines if re.match(r"  [0-9a-f]{64} ", line)}
    card = shown.pop("README.md")
    assert shown == {name: hashlib.sha256(content).hexdigest() for name, content in built(root).items()}
    assert card == hashlib.sha256((root / "build" / "CARD.md").read_bytes()).hexdigest()
    assert lines[-1] == "dry run: nothing was sent"
    assert hub.requests == []


def test_it_publishes_the_build_on_the_branch_of_the_version_and_the_card_on_main(
    root: Path, hub: Hub, run: Run
) -> None:
    output = succeed(run())
    assert published(hub) == built(root)
    repository = hub.repositories[repo_id()]
    readme = repository.files("main")["README.md"].decode()
    assert f'get_kernel("{repo_id()}", version={build_config()["version"]}' in readme
    assert "- `double`" in readme
    assert "- `Layer`" in readme
    assert "kernels benchmark" in readme
    head = git(root, "rev-parse", "HEAD").strip()
    assert repository.messages[1:] == [f"{branch}: Publish the build of {head}" for branch in (BRANCH, "main")]
    assert output == f"published {hub.url}/kernels/{repo_id()}/tree/{BRANCH} at {repository.branches[BRANCH]}\n"


def test_another_repository_has_its_own_name_in_the_card(hub: Hub, run: Run) -> None:
    succeed(run("--repo", "jo/mine"))
    assert list(hub.repositories) == ["jo/mine"]
    assert b'get_kernel("jo/mine"' in published(hub, "main", "jo/mine")["README.md"]


def test_publishing_again_changes_nothing(hub: Hub, run: Run) -> None:
    succeed(run())
    before = dict(hub.repositories[repo_id()].branches)
    hub.requests.clear()
    succeed(run())
    assert hub.repositories[repo_id()].branches == before
    assert not [request for request in hub.requests if "/commit/" in request]


def test_a_new_build_replaces_the_old_one_and_leaves_what_others_published(root: Path, hub: Hub, run: Run) -> None:
    succeed(run())
    repository = hub.repositories[repo_id()]
    others = {"build/torch-metal/__init__.py": b"", "benchmarks/media.svg": b""}
    repository.commit(BRANCH, {**repository.files(BRANCH), **others, "benchmarks/benchmark_old.py": b""}, "others")
    package = root / "torch-ext" / MODULE
    (package / "table.json").unlink()
    (package / "new.py").write_text("")
    commit(root)
    succeed(run())
    assert published(hub) == built(root) | others
    assert "build/torch-cpu/new.py" in published(hub)
    assert "build/torch-cpu/table.json" not in published(hub)


def test_a_new_version_has_a_branch_of_its_own(root: Path, hub: Hub, run: Run) -> None:
    succeed(run())
    first = published(hub)
    # As a repository may look whose builds were on main once.
    repository = hub.repositories[repo_id()]
    repository.commit("main", {**repository.files("main"), "build/torch28/__init__.py": b""}, "legacy")
    (root / "build.toml").write_text((root / "build.toml").read_text().replace("version = 0", "version = 1"))
    commit(root)
    succeed(run())
    assert published(hub, "v0") == first
    second = published(hub, "v1")
    assert {name for name in second if name != "README.md"} == set(built(root))
    assert b"version=1" in published(hub, "main")["README.md"]


def test_large_files_go_to_the_large_file_storage(root: Path, hub: Hub, run: Run) -> None:
    hub.large = re.compile(r"\.json$")
    succeed(run())
    assert published(hub) == built(root)
    assert hashlib.sha256((root / "build" / "torch-cpu" / "table.json").read_bytes()).hexdigest() in hub.lfs
    hub.requests.clear()
    succeed(run())
    assert not [request for request in hub.requests if "/commit/" in request or request.startswith("PUT")]


# The connection ends at each request that changes something, before or after the Hub has done it.


@pytest.mark.parametrize("step", ["repos/create", f"branch/{BRANCH}", f"commit/{BRANCH}", "commit/main"])
def test_a_connection_that_ends_is_one_line_and_the_next_run_completes(
    step: str, root: Path, hub: Hub, run: Run
) -> None:
    hub.refuse_once(rf"^POST /api/.*{step}$", Drop())
    assert "the Hub does not answer" in error_of(run())
    if step != "commit/main":
        files = hub.repositories[repo_id()].files if repo_id() in hub.repositories else None
        assert files is None or "README.md" not in files("main")
    succeed(run())
    assert published(hub) == built(root)
    assert set(published(hub, "main")) == {"README.md"}
    assert len(hub.repositories[repo_id()].messages) == 3


def test_an_answer_that_is_lost_does_not_publish_twice(
    root: Path, hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Repository.commit

    def commit_and_drop(repository: Repository, *arguments: object) -> str:
        monkeypatch.setattr(Repository, "commit", original)
        original(repository, *arguments)
        raise Drop

    succeed(run("--repo", "jo/first"))  # so that the repository's first commit is not the one that is dropped
    hub.repositories[repo_id()] = Repository.new()
    monkeypatch.setattr(Repository, "commit", commit_and_drop)
    assert "the Hub does not answer" in error_of(run())
    succeed(run())
    assert published(hub) == built(root)
    assert len(hub.repositories[repo_id()].messages) == 3


def test_ctrl_c_between_the_two_commits(root: Path, hub: Hub, run: Run, tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hold(request: str) -> None:
        if request.endswith("/commit/main"):
            reached.set()
            go_on.wait(300)
            raise Drop

    hub.hooks.append(hold)
    environment = {**os.environ, **hub.environment(str(tmp_path / "home"))}
    process = subprocess.Popen(
        command(root), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert reached.wait(300)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        go_on.set()
        process.kill()
    assert process.returncode == 130
    assert errors == "publish: interrupted; the same command goes on\n"
    assert published(hub) == built(root)
    assert published(hub, "main") == {}
    hub.hooks.clear()
    succeed(run())
    assert set(published(hub, "main")) == {"README.md"}


def test_somebody_elses_commit_meanwhile_is_not_overwritten(hub: Hub, run: Run) -> None:
    succeed(run())
    hub.repositories[repo_id()].commit(BRANCH, {".gitattributes": b""}, "others")
    hub.refuse_once(f"commit/{BRANCH}$", Answer(412, {"error": "A commit has happened since"}))
    assert "somebody else has changed the branch meanwhile" in error_of(run())


# What is refused before anything is uploaded.


def untouched(hub: Hub) -> bool:
    return not [request for request in hub.requests if request.startswith(("POST", "PUT"))]


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("mine", "REPO is 'mine', need an organization or user and a name: org/name"),
        ("a/b/c", "REPO is 'a/b/c', need an organization or user and a name: org/name"),
        ("org/a name", "REPO is 'org/a name', which is no name of a repository"),
        ("/name", "REPO is '/name'"),
    ],
)
def test_a_repository_of_no_name(repo: str, message: str, refusal: Callable[..., str]) -> None:
    assert message in refusal("--repo", repo)


def test_no_token(hub: Hub, run: Run) -> None:
    assert "there is no token: run `hf auth login`" in error_of(run(token=None))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_nobody", "cannot log in: no permission (401"),
        (READER_TOKEN, "the token may only read"),
        (STRANGER_TOKEN, f"no permission to publish {repo_id()}: stranger is not a member of {OWNER}"),
    ],
    ids=["unknown", "reader", "stranger"],
)
def test_a_token_that_may_not_publish(token: str, message: str, hub: Hub, run: Run) -> None:
    assert message in error_of(run(token=token))
    assert untouched(hub)


def test_an_organization_that_may_not_publish_kernels(hub: Hub, run: Run) -> None:
    """The Hub grants kernels by request; a member's token alone does not tell."""
    hub.refuse_once("repos/create", Answer(403, {"error": "Kernel repositories need approval"}))
    message = error_of(run())
    assert f"cannot create {repo_id()}: no permission (403: Kernel repositories need approval)" in message
    assert "https://huggingface.co/spaces/kernels-community" in message
    assert hub.repositories == {}


@pytest.mark.parametrize("change", ["changed", "added"])
def test_sources_that_are_not_committed(
    change: str, root: Path, refusal: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = root / "torch-ext" / MODULE / ("layers.py" if change == "changed" else "more.py")
    path.write_text("# not committed\n")
    assert refusal() == f"not committed: {path.relative_to(root)}; commit the sources first"
    assert publish.main(["--root", str(root), "--dry-run"]) == 0
    assert "It would be refused: not committed" in capfd.readouterr().out


def test_sources_outside_of_git(root: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(root / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(root.parent))
    assert refusal().startswith("git cannot tell whether the sources are committed: fatal: not a git repository")


def test_a_card_that_asks_for_what_kernel_builder_does_not_have(root: Path, refusal: Callable[..., str]) -> None:
    (root / "CARD.md").write_text("{{ repo_name }}")
    commit(root)
    assert refusal() == f"{root / 'CARD.md'}: 'repo_name' is undefined"


def test_a_build_whose_files_are_not_as_their_digests_say(
    root: Path, refusal: Callable[..., str], tmp_path: Path
) -> None:
    build_kernel.bundle(root, tmp_path / "build")
    with (tmp_path / "build" / "torch-cuda" / "layers.py").open("a") as file:
        file.write("# changed\n")
    assert "mismatch for layers.py" in refusal("--build", str(tmp_path / "build"))


DIRTY = {"kernel-builder": {"version": "0.17.2"}, "kernel": {"sha": "0" * 40, "dirty": True}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "7 Apache-2.0, build.toml says"),
        ({"backend": {"type": "metal"}}, "is for metal, build.toml has cpu, cuda, rocm, xpu"),
        ({"provenance": DIRTY}, "torch-cpu was built from sources that were not committed: build it again"),
        ({"id": None}, "torch-cpu/metadata.json"),
    ],
    ids=["version", "backend", "dirty", "no-id"],
)
def test_a_build_that_does_not_fit(
    change: dict[str, object], message: str, root: Path, refusal: Callable[..., str], tmp_path: Path
) -> None:
    build_kernel.bundle(root, tmp_path / "build")
    path = tmp_path / "build" / "torch-cpu" / "metadata.json"
    metadata = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))
    assert message in refusal("--build", str(tmp_path / "build"))


def test_a_directory_without_a_build(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert "has no build: no */metadata.json" in refusal("--build", str(tmp_path))


def test_make_publish_passes_the_repository_and_arguments_on(tmp_path: Path) -> None:
    variables = ["REPO=jo/mine", "ARGS=--dry-run", f"VENV={tmp_path / 'venv'}"]
    command = ["make", "--dry-run", "publish", *variables]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path / 'venv'}/bin/python scripts/publish.py --repo jo/mine --dry-run" in result.stdout
