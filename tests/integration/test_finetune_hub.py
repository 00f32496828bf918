"""Uploads of ``moe-fused finetune`` and ``moe-fused push`` to a stand-in for the Hub."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from moe_fused.finetune.handed_through import check_handed_through
from moe_fused.finetune.options import Options
from tests.packaging.hub import READER_TOKEN, STRANGER_TOKEN, Answer, Drop, Hub, Repository
from tests.support import REPOSITORY, python_path

from .finetuning import (
    Command,
    Ended,
    Run,
    assert_error,
    checkpoints,
    finetune,
    finetune_signalled,
    leftovers,
    nothing_loads,
)

NAME = "jo/tuned"
PUSH = ("--push-to-hub", NAME)
RESULTS = {
    ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
    "finetune.yaml", "log.jsonl", "loss.png", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub().serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupts and that uploads nothing."""
    return Run(tmp_path_factory.mktemp("whole"))


def use(variables: dict[str, str], *others: Callable[[], object]) -> None:
    """Points huggingface_hub, which is imported already, to the stand-in. This runs in the process of the command."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)
    os.environ |= variables
    constants.ENDPOINT = variables["HF_ENDPOINT"]
    constants.HF_HUB_OFFLINE = variables["HF_HUB_OFFLINE"] == "1"
    constants.HF_HUB_DISABLE_XET = variables["HF_HUB_DISABLE_XET"] == "1"
    constants.HF_TOKEN_PATH = str(Path(variables["HF_HOME"]) / "token")
    for other in others:
        other()


def run_command(line: str, hub: Hub, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that was printed, as a user would."""
    program, *arguments = shlex.split(line)
    programs = {
        "moe-fused": [sys.executable, "-m", "moe_fused"],
        "hf": [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"],
    }
    environment = {**os.environ, **hub.environment(str(cwd / "home")), "PYTHONPATH": python_path(REPOSITORY), **changes}
    return subprocess.run(
        [*programs[program], *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def start(
    whole: Run, hub: Hub, cwd: Path, *options: str, others: tuple[Callable[[], object], ...] = (), **changes: str
) -> Ended:
    """Runs ``finetune`` with the data of ``whole`` in ``cwd``, with the stand-in as the Hub."""
    variables = hub.environment(str(cwd / "home")) | changes
    before = partial(use, {name: value for name, value in variables.items() if value}, *others)
    return finetune(*whole.arguments, "--output", "out", *options, cwd=cwd, before=before)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def published(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    files = hub.repositories[NAME].files(branch)
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def asked(hub: Hub) -> list[str]:
    """The requests about accounts and repositories, without telemetry."""
    return [request for request in hub.requests if re.search(r"whoami|/models/|/repos/|\.git/", request)]


# The adapter.


@pytest.mark.slow
def test_uploads_what_a_run_leaves(whole: Run, hub: Hub, tmp_path: Path) -> None:
    ended = start(whole, hub, tmp_path, *PUSH, "--private", "--report-to", "tensorboard", "--export", "per-expert")
    assert ended.status == 0, ended
    assert ended.stdout.splitlines()[-1] == f"uploaded: {hub.url}/{NAME}"
    whole.assert_as_uninterrupted(tmp_path / "out")
    repository = hub.repositories[NAME]
    assert repository.private
    assert repository.messages == ["main: initial commit", "main: Upload the adapter"]
    assert list(repository.branches) == ["main"]
    files = published(hub)
    exported = {name for name in files if name.startswith("per-expert/")}
    assert {"per-expert/adapter_config.json", "per-expert/adapter_model.safetensors"} <= exported
    assert files.keys() - exported == RESULTS - {".gitattributes"}
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_bytes() == content, name
    assert f"hf download {NAME} --local-dir out" in files["README.md"].decode()
    before = dict(repository.branches)
    again = run_command(f"moe-fused push out {NAME} --private", hub, tmp_path)
    assert (again.returncode, again.stdout) == (0, f"uploaded {hub.url}/{NAME}\n"), again
    assert repository.branches == before


@pytest.mark.slow
def test_uploads_nothing_by_default_and_in_a_dry_run(whole: Run, hub: Hub, tmp_path: Path) -> None:
    for options in (
        (*PUSH, "--dry-run"),
        ("--max-steps", "1"),
        ("--max-steps", "1", "--push-to-hub", "none", "--overwrite"),
    ):
        ended = start(whole, hub, tmp_path, *options)
        assert ended.status == 0, ended
    assert asked(hub) == ["GET /api/whoami-v2", f"GET /api/models/{NAME}"]
    ended = start(whole, hub, tmp_path, "--private", "--overwrite", "--dry-run")
    assert_error(ended, "--private has no effect: there is no --push-to-hub; leave it out")


def test_an_export_of_an_earlier_run_does_not_stay(whole: Run, hub: Hub, tmp_path: Path) -> None:
    hub.repositories[NAME] = Repository.new()
    earlier = {"per-expert/adapter_config.json": b"{}", "LICENSE": b"mine", "adapter_config.json": b"{}"}
    hub.repositories[NAME].commit("main", earlier, "earlier")
    assert start(whole, hub, tmp_path, *PUSH, "--max-steps", "1").status == 0
    assert published(hub).keys() == RESULTS - {".gitattributes"} | {"LICENSE"}


# What is refused before anything is loaded.


def assert_refused(ended: Ended, cwd: Path, *words: str) -> None:
    assert_error(ended, *words)
    assert not (cwd / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tuned", "--push-to-hub must be an organization or user and a name, as org/name, got 'tuned'"),
        ("", "--push-to-hub must be an organization or user and a name, as org/name, got ''"),
        ("a/b/c", "as org/name, got 'a/b/c'"),
        ("jo/a name", "--push-to-hub must be the name of a repository, as org/name"),
        ("jo/a--b", "--push-to-hub must be the name of a repository, as org/name"),
    ],
)
def test_a_repository_of_no_name(name: str, message: str, whole: Run, hub: Hub, tmp_path: Path) -> None:
    ended = start(whole, hub, tmp_path, "--push-to-hub", name, others=(nothing_loads,))
    assert_refused(ended, tmp_path, message)
    assert asked(hub) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"HF_TOKEN": ""}, "there is no token; run `hf auth login`, or set HF_TOKEN"),
        ({"HF_TOKEN": "hf_nobody"}, "cannot log in: the Hub does not know the token (401"),
        ({"HF_TOKEN": READER_TOKEN}, "the token may only read"),
        ({"HF_TOKEN": STRANGER_TOKEN}, "stranger, whose token this is, is not a member of jo"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it to upload"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot log in: the Hub does not answer"),
    ],
    ids=["no token", "unknown", "reader", "stranger", "offline", "no connection"],
)
def test_an_account_that_may_not_upload(
    changes: dict[str, str], message: str, whole: Run, hub: Hub, tmp_path: Path
) -> None:
    ended = start(whole, hub, tmp_path, *PUSH, others=(nothing_loads,), **changes)
    assert_refused(ended, tmp_path, f"error: --push-to-hub {NAME}: {message}")
    assert not [request for request in hub.requests if not request.startswith("GET")]


def test_a_hub_that_fails_at_once(whole: Run, hub: Hub, tmp_path: Path) -> None:
    for how, message in ((Answer(500, {"error": "oops"}), "the Hub answers 500: oops"), (Drop(), "does not answer")):
        hub.refuse_once("whoami", how)
        assert_refused(start(whole, hub, tmp_path, *PUSH, others=(nothing_loads,)), tmp_path, message)


def test_a_repository_that_must_not_get_the_adapter(whole: Run, hub: Hub, tmp_path: Path) -> None:
    hub.repositories[NAME] = Repository.new()
    ended = start(whole, hub, tmp_path, *PUSH, "--private", others=(nothing_loads,))
    assert_refused(ended, tmp_path, f"--push-to-hub {NAME}: it exists and is public")
    hub.repositories[NAME].commit("main", {"config.json": b"{}", "model.safetensors": b""}, "a model")
    ended = start(whole, hub, tmp_path, *PUSH, others=(nothing_loads,))
    assert_refused(ended, tmp_path, f"--push-to-hub {NAME}: it holds a model")


def test_checkpoints_need_a_repository(whole: Run, hub: Hub, tmp_path: Path) -> None:
    ended = start(whole, hub, tmp_path, "--push-checkpoints", others=(nothing_loads,))
    assert_refused(ended, tmp_path, "--push-checkpoints needs --push-to-hub")


@pytest.mark.parametrize(
    ("field", "option"),
    [
        ("push_to_hub", "--push-to-hub"), ("hub_model_id", "--push-to-hub"), ("hub_private_repo", "--private"),
        ("hub_strategy", "--push-checkpoints"),
    ],
)  # fmt: skip
def test_fields_of_trainer_have_options_instead(field: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.{field} cannot be set: use {option}"):
        check_handed_through(Options(model="m", dataset="d", trainer={field: True}))


# An upload that fails.


@pytest.mark.parametrize(
    ("request_", "how", "message"),
    [
        ("repos/create", Answer(403, {"error": "no"}), f"cannot create {NAME}: the token has no permission (403: no)"),
        ("commit/main", Answer(500, {"error": "oops"}), f"cannot upload to {NAME}: the Hub answers 500: oops"),
        ("commit/main", Answer(401, {"error": "no"}), "401"),
        ("commit/main", Drop(), "the Hub does not answer"),
    ],
    ids=["create", "500", "401", "drop"],
)
def test_a_failed_upload_loses_nothing(
    request_: str, how: Exception, message: str, whole: Run, hub: Hub, tmp_path: Path
) -> None:
    hub.refuse_once(f"POST .*{request_}", how)
    ended = start(whole, hub, tmp_path, *PUSH, "--private", "--max-steps", "1")
    assert_error(
        ended,
        f"error: the adapter is in out and was not uploaded: cannot {'create' if request_ == 'repos/create' else 'upload'}",
    )
    assert_error(ended, message)
    assert "adapter: out" in ended.stdout
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    again = run_command(ended.stderr.strip().rpartition("upload it with: ")[2], hub, tmp_path)
    assert again.returncode == 0, again
    assert published(hub) == files_of(tmp_path / "out")
    assert hub.repositories[NAME].private
    assert len(hub.repositories[NAME].messages) == 2


def test_push_refuses_what_is_no_run(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for line, message in (
        (f"push nowhere {NAME}", "DIRECTORY nowhere is missing"),
        (f"push file {NAME}", "DIRECTORY file is not a directory"),
        (f"push out {NAME}", "out has no adapter_config.json: its run has not ended, --checkpoints uploads"),
        (f"push home {NAME} --checkpoints", "home has no checkpoints"),
        ("push out tuned --checkpoints", "ID must be an organization or user and a name, as org/name, got 'tuned'"),
    ):
        (tmp_path / "home").mkdir(exist_ok=True)
        ended = run_command(f"moe-fused {line}", hub, tmp_path)
        assert ended.returncode == 1, ended
        assert f"error: {message}" in ended.stderr
    assert asked(hub) == []


# Checkpoints.


def assert_checkpoint(hub: Hub, step: int) -> None:
    files = hub.repositories[NAME].files("checkpoints")
    prefix = f"checkpoints/checkpoint-{step}/"
    found = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"} <= found
    assert {"finetune.yaml", "log.jsonl"} <= files.keys()
    assert not {name for name in files if "/" not in name} - {"finetune.yaml", "log.jsonl", ".gitattributes"}


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_as_if_nothing_had_happened(whole: Run, hub: Hub, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    before = partial(use, hub.environment(str(tmp_path / "home")))
    options = (*whole.arguments, "--output", "out", *PUSH, "--push-checkpoints", "--private")
    ended = finetune_signalled(signal.SIGTERM, 5, *options, cwd=here, before=before)
    assert ended.status == 128 + signal.SIGTERM, ended
    assert f"uploaded checkpoint-5 to {NAME}" in ended.stderr
    assert not leftovers(here / "out")
    assert_checkpoint(hub, 5)
    repository = hub.repositories[NAME]
    assert repository.private
    assert list(repository.files("main")) == [".gitattributes"]
    assert repository.messages[-1] == "checkpoints: Upload checkpoint-5"
    got = run_command(f"hf download {NAME} --revision checkpoints --local-dir moved", hub, there)
    assert got.returncode == 0, got
    ended = finetune("--resume", "--output", "moved", cwd=there, before=before)
    assert ended.status == 0, ended
    whole.assert_as_uninterrupted(there / "moved")
    assert published(hub) == {name: content for name, content in files_of(there / "moved").items() if name[0] != "."}
    assert_checkpoint(hub, 8)
    steps = {name.split("/")[1] for name in published(hub, "checkpoints") if "/" in name}
    assert steps == {f"checkpoint-{step}" for step in checkpoints(there / "moved")}


@pytest.mark.slow
def test_the_best_checkpoint_is_there_too(whole: Run, hub: Hub, tmp_path: Path) -> None:
    """With links that the run may remove: the branch has what the directory had."""
    options = ("--eval-share", "0.2", "--eval-steps", "2", "--keep-best", "--keep-checkpoints", "1")
    assert start(whole, hub, tmp_path, *PUSH, "--push-checkpoints", *options).status == 0
    files = {
        name: content for name, content in published(hub, "checkpoints").items() if name.startswith("checkpoints/")
    }
    directory = tmp_path / "out"
    expected = [path for path in (directory / "checkpoints").rglob("*") if path.is_file()]
    assert files == {path.relative_to(directory).as_posix(): path.read_bytes() for path in expected}


@pytest.mark.slow
def test_training_goes_on_when_the_network_fails(whole: Run, hub: Hub, tmp_path: Path) -> None:
    hub.refuse_once("POST .*commit/checkpoints", Answer(500, {"error": "oops"}))
    ended = start(whole, hub, tmp_path, *PUSH, "--push-checkpoints")
    assert ended.status == 0, ended
    (warning,) = (line for line in ended.stderr.splitlines() if line.startswith("warning: "))
    assert warning.startswith(
        f"warning: checkpoint-2 was not uploaded: cannot upload to {NAME}: the Hub answers 500: oops"
    )
    whole.assert_as_uninterrupted(tmp_path / "out")
    assert_checkpoint(hub, 8)
    assert "to upload the last checkpoints" not in ended.stderr


@pytest.mark.slow
def test_the_last_checkpoints_that_were_not_uploaded(whole: Run, hub: Hub, tmp_path: Path) -> None:
    def refuse(request: str) -> None:
        if "commit/checkpoints" in request:
            raise Drop

    hub.hooks.append(refuse)
    ended = start(whole, hub, tmp_path, *PUSH, "--push-checkpoints", "--max-steps", "3")
    assert ended.status == 0, ended  # the adapter is there, which is what was asked for
    hub.hooks.clear()
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("to upload the last checkpoints: "))
    assert published(hub, "checkpoints") == {}
    assert run_command(line.partition(": ")[2], hub, tmp_path).returncode == 0
    assert_checkpoint(hub, 3)
    assert not leftovers(tmp_path / "out")


@pytest.mark.parametrize("branch", ["main", "checkpoints"])
def test_a_signal_ends_an_upload_that_hangs(branch: str, whole: Run, hub: Hub, tmp_path: Path) -> None:
    reached, ended = threading.Event(), threading.Event()

    def hold(request: str) -> None:
        if f"commit/{branch}" in request:
            reached.set()
            ended.wait(120)
            raise Drop

    hub.hooks.append(hold)
    arguments = (*whole.arguments, "--output", "out", *PUSH, "--max-steps", "2")
    options = ("--push-checkpoints",) if branch == "checkpoints" else ()
    before = partial(use, hub.environment(str(tmp_path / "home")))
    command = Command("finetune", *arguments, *options, cwd=tmp_path, before=before)
    assert reached.wait(120)
    while branch == "checkpoints" and "waiting for the upload of checkpoint-2" not in command.stderr():
        assert command.process.exitcode is None, command.end()
        time.sleep(0.1)
    command.signal(signal.SIGINT)
    if branch == "main":  # huggingface_hub's connection is in this thread, and ends with it
        stopped = command.end()
        assert_error(stopped, "interrupted by SIGINT", status=130)
        assert (
            f"the adapter is in out and was not uploaded; upload it with: moe-fused push out {NAME}" in stopped.stderr
        )
    else:
        stopped = command.end()
        assert stopped.status == 130, stopped
        assert f"to upload the last checkpoints: moe-fused push out {NAME} --checkpoints" in stopped.stderr
        assert published(hub).keys() == RESULTS - {".gitattributes"}
        assert published(hub, "checkpoints") == {}
    ended.set()
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not leftovers(tmp_path / "out")


def test_a_resumed_run_need_not_upload(whole: Run, hub: Hub, tmp_path: Path) -> None:
    assert start(whole, hub, tmp_path, *PUSH, "--max-steps", "2").status == 0
    assert yaml.safe_load((tmp_path / "out" / "finetune.yaml").read_text())["push_to_hub"] == NAME
    hub.requests.clear()
    ended = finetune("--resume", "--output", "out", "--push-to-hub", "none", "--max-steps", "3", cwd=tmp_path)
    assert ended.status == 0, ended
    assert asked(hub) == []
