#!/usr/bin/env python
"""Builds the kernel, checks it and publishes it to the Kernels hub: ``make publish REPO=org/name``.

It does what kernel-builder's ``build-and-upload`` does, with ``scripts/build_kernel.py`` in place of Nix:

1. The sources must be committed, so that a published build can be made again.
2. The variants are built and then checked with the parser and the digests of the ``kernels`` library.
3. ``build/`` and ``benchmarks/benchmark*.py`` go to the branch ``v<version>``, which ``get_kernel(..., version=N)`` reads.
   The card goes to ``main`` as README.md, once the variants are there.

Each branch gets one commit, so a user sees the old build or the new one. Files that the branch has already are not
sent, and files of an older build are deleted. An interrupted upload is therefore repeated by the same command.
``--dry-run`` shows every file with its digest and needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # as a script; `python -m scripts.publish` finds the package by itself
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import build_kernel
from scripts.build_kernel import REPOSITORY, BuildError, KernelConfig, one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What a published build is made of.
SOURCES = ("build.toml", "torch-ext", "benchmarks", "CARD.md", "scripts/build_kernel.py")
REPO_TYPE = "kernel"
ACCESS = "https://huggingface.co/spaces/kernels-community/README/discussions/new"


class PublishError(Exception):
    """The kernel cannot be published; the message is one line for the user."""


@dataclass(frozen=True)
class Plan:
    """What is published, before the Hub is asked for anything.

    Attributes:
        repo_id: the repository on the Hub.
        version: of the kernel; ``v<version>`` is the branch of its files.
        files: the files of that branch by their paths there.
        card: the README.md of ``main``.
        variants: the names of the build's variants.
        ids: the id of each variant.
    """

    repo_id: str
    version: int
    files: dict[str, Path]
    card: bytes
    variants: tuple[str, ...]
    ids: tuple[str, ...]

    @property
    def branch(self) -> str:
        return f"v{self.version}"


# ------------------------------------------------------------------------------------------------ without the network


def repository(name: str | None, config: KernelConfig) -> str:
    """``name``, or the repository of build.toml.

    Raises:
        PublishError: it is not an organization or user, a slash and a name, as the Hub takes them.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repo_id = name or config.repo_id
    source = "REPO" if name else "repo-id in build.toml"
    if repo_id.count("/") != 1:
        raise PublishError(f"{source} is {repo_id!r}, need an organization or user and a name: org/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{source} is {repo_id!r}, which is no name of a repository: {one_line(error)}") from error
    return repo_id


def uncommitted(root: Path) -> list[str]:
    """The sources of the build that git knows no commit of, by their paths.

    Raises:
        PublishError: ``root`` is not a checkout of git.
    """
    command = ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=all", "--", *SOURCES]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PublishError(f"git, which knows whether the sources are committed, cannot be run: {error}") from error
    if result.returncode:
        raise PublishError(f"git cannot tell whether the sources are committed: {one_line(result.stderr)}")
    return [line[3:] for line in result.stdout.splitlines()]


def checked_variants(directory: Path, config: KernelConfig) -> dict[str, Any]:
    """The metadata of each variant in ``directory`` by the variant's name, once all of them are right.

    Raises:
        PublishError: there is none, one of another kernel, version or backend, or one that was built from changed sources.
        BuildError: metadata that the kernels library does not accept, or a file that differs from its digest.
    """
    paths = sorted(path.parent for path in directory.glob("*/metadata.json"))
    if not paths:
        raise PublishError(f"{directory} has no build: no */metadata.json")
    variants = {path.name: build_kernel.validate_variant(path) for path in paths}
    for name, metadata in variants.items():
        found = (str(metadata.name), metadata.version, metadata.license)
        wanted = (config.name, config.version, config.license)
        if found != wanted:
            raise PublishError(
                f"{directory / name} is {' '.join(map(str, found))}, build.toml says {' '.join(map(str, wanted))}"
            )
        backend = str(metadata.backend.backend_type).lower()
        if backend not in config.backends:
            raise PublishError(f"{directory / name} is for {backend}, build.toml has {', '.join(config.backends)}")
        if metadata.provenance is not None and metadata.provenance.dirty:
            raise PublishError(f"{directory / name} was built from sources that were not committed: build it again")
    return variants


def make_plan(root: Path, repo_id: str, config: KernelConfig, build: Path | None) -> Plan:
    """Builds unless there is a ``build`` already, checks the variants and fills in the card.

    Raises:
        PublishError, BuildError: something of it is wrong.
    """
    directory = build or root / "build"
    if build is None:
        build_kernel.bundle(root, directory)
    variants = checked_variants(directory, config)
    files = {}
    for name in variants:
        for path in sorted((directory / name).rglob("*")):
            relative = path.relative_to(directory)
            if path.is_file() and "__pycache__" not in relative.parts and path.suffix != ".pyc":
                files[f"build/{relative.as_posix()}"] = path
    for path in sorted((root / "benchmarks").glob("benchmark*.py")):
        files[f"benchmarks/{path.name}"] = path
    card = build_kernel.render_card(root, replace(config, repo_id=repo_id))
    ids = tuple(metadata.id for metadata in variants.values())
    return Plan(repo_id, config.version, files, card.encode(), tuple(variants), ids)


def show(plan: Plan) -> None:
    """Prints every file with its branch, its SHA-256 and its size."""
    for name, variant_id in zip(plan.variants, plan.ids, strict=True):
        print(f"{name}: {variant_id}, the files are as their digests say")
    size = sum(path.stat().st_size for path in plan.files.values())
    print(f"{plan.repo_id}, branch {plan.branch}: {len(plan.files)} files, {size} bytes")
    for name, path in plan.files.items():
        print(f"  {hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_size:>8} {name}")
    print(f"{plan.repo_id}, branch main: 1 file, {len(plan.card)} bytes")
    print(f"  {hashlib.sha256(plan.card).hexdigest()} {len(plan.card):>8} README.md")


# --------------------------------------------------------------------------------------------------------- with the Hub


@contextlib.contextmanager
def answers(doing: str) -> Iterator[None]:
    """Makes one line of whatever the Hub answers, or of its silence."""
    from huggingface_hub.errors import HfHubHTTPError

    # huggingface_hub's library for HTTP has another name in each major version, but its error is a base of this one.
    silence: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = one_line(error.server_message or error).rstrip(".")
        if status in (401, 403):
            raise PublishError(
                f"cannot {doing}: no permission ({status}: {said}). New kernels need approval: {ACCESS}"
            ) from error
        if status == 412:
            raise PublishError(
                f"cannot {doing}: somebody else has changed the branch meanwhile, so try again"
            ) from error
        raise PublishError(f"cannot {doing}: the Hub answers {status}: {said}") from error
    except (silence, OSError) as error:
        reason = one_line(error) or type(error).__name__
        raise PublishError(f"cannot {doing}: the Hub does not answer: {reason}; try again") from error
    except ValueError as error:  # as a card whose header is wrong
        raise PublishError(f"cannot {doing}: {one_line(error)}") from error


def check_account(api: HfApi, repo_id: str) -> None:
    """Makes sure that the token may write to the repository's owner, as far as the token itself tells.

    Raises:
        PublishError: no token, one that the Hub does not know, one for reading, or one of another user or organization.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise PublishError("there is no token: run `hf auth login`, or set HF_TOKEN to a token with write access")
    with answers("log in"):
        account = api.whoami()
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PublishError(
            "the token may only read: make one with write access at https://huggingface.co/settings/tokens"
        )
    owner = repo_id.partition("/")[0]
    roles = {organization["name"]: organization.get("roleInOrg") for organization in account.get("orgs", [])}
    if owner != account["name"] and owner not in roles:
        raise PublishError(f"no permission to publish {repo_id}: {account['name']} is not a member of {owner}")
    if roles.get(owner) == "read":
        raise PublishError(f"no permission to publish {repo_id}: {account['name']} may only read in {owner}")


def prepare_branch(api: HfApi, plan: Plan, private: bool) -> bool:
    """Makes the repository and the branch if they do not exist. Returns whether nothing was published on the branch yet."""
    with answers(f"create {plan.repo_id}"):
        api.create_repo(plan.repo_id, repo_type=REPO_TYPE, private=private or None, exist_ok=True)
    with answers(f"create the branch {plan.branch}"):
        api.create_branch(plan.repo_id, branch=plan.branch, repo_type=REPO_TYPE, exist_ok=True)
        heads = {ref.name: ref.target_commit for ref in api.list_repo_refs(plan.repo_id, repo_type=REPO_TYPE).branches}
    # A branch at main's head was made by this run, or by one that was interrupted before its first commit.
    return heads[plan.branch] == heads.get("main")


def tree(api: HfApi, plan: Plan, revision: str) -> dict[str, str]:
    """What each file of ``revision`` holds by its path: the SHA-256 of a large file, else git's name of the blob."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(plan.repo_id, repo_type=REPO_TYPE, revision=revision, recursive=True)
    files = (entry for entry in entries if isinstance(entry, RepoFile))
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def stale(path: str, plan: Plan, new: bool) -> bool:
    """Whether a file of the branch belongs to an older build: in one of our variants, or a benchmark.

    Another machine may have published other variants, which stay. What a new branch has inherited from ``main`` does not.
    """
    if path in plan.files:
        return False
    if new and path.startswith(("build/", "benchmarks/")):
        return True
    variants = tuple(f"build/{name}/" for name in plan.variants)
    return path.startswith(variants) or re.fullmatch(r"benchmarks/benchmark[^/]*\.py", path) is not None


def commit(api: HfApi, plan: Plan, branch: str, contents: dict[str, Path | bytes], new: bool, message: str) -> str:
    """Makes ``branch`` hold ``contents``, and returns the id of the commit; of the last one if there was nothing to change.

    Raises:
        PublishError: the Hub refuses, or has other files afterwards than were sent.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with answers(f"publish on {branch}"):
        refs = api.list_repo_refs(plan.repo_id, repo_type=REPO_TYPE).branches
        head = next(ref.target_commit for ref in refs if ref.name == branch)
        old = [path for path in tree(api, plan, head) if branch != "main" and stale(path, plan, new)]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(
                CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
                for name, content in contents.items()
            ),
            *(CommitOperationDelete(path) for path in old),
        ]
        info = api.create_commit(
            plan.repo_id, operations, commit_message=message, repo_type=REPO_TYPE, revision=branch, parent_commit=head
        )
        there = tree(api, plan, info.oid)
    for name, content in contents.items():
        data = content.read_bytes() if isinstance(content, Path) else content
        blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        if there.get(name) not in (blob, hashlib.sha256(data).hexdigest()):
            raise PublishError(f"the Hub's {name} on {branch} is not what was sent: publish again")
    return str(info.oid)


def publish(plan: Plan, private: bool, message: str) -> None:
    """Uploads the plan: first the build, then the card that says how to use it."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    disable_progress_bars()
    logging.set_verbosity_error()
    api = HfApi(library_name="moe-fused")
    check_account(api, plan.repo_id)
    new = prepare_branch(api, plan, private)
    oid = commit(api, plan, plan.branch, dict(plan.files), new, message)
    commit(api, plan, "main", {"README.md": plan.card}, False, message)
    print(f"published {api.endpoint}/kernels/{plan.repo_id}/tree/{plan.branch} at {oid}")


def head_of(root: Path) -> str:
    """The commit that the sources are at."""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PublishError(f"git knows no commit in {root}: {one_line(result.stderr)}")
    return result.stdout.strip()


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repo", help="the repository on the Hub, org/name (repo-id in build.toml)")
    parser.add_argument("--dry-run", action="store_true", help="show the files and their digests, and send nothing")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--build", type=Path, help="publish this build, as of kernel-builder, instead of making one")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="directory of build.toml (this checkout)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = arguments_of(argv)
    try:
        config = build_kernel.read_config(arguments.root)
        repo_id = repository(arguments.repo, config)
        changed = uncommitted(arguments.root)
        dirty = f"not committed: {', '.join(changed[:3])}{', …' * (len(changed) > 3)}; commit the sources first"
        if changed and not arguments.dry_run:
            raise PublishError(dirty)
        plan = make_plan(arguments.root, repo_id, config, arguments.build)
        if arguments.dry_run:
            show(plan)
            if config.source is None:
                print("build.toml names no source under [general], so the card and the metadata name none")
            print(f"dry run: nothing was sent{'. It would be refused: ' + dirty if changed else ''}")
        else:
            publish(plan, arguments.private, f"Publish the build of {head_of(arguments.root)}")
    except (PublishError, BuildError) as error:
        print(f"publish: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("publish: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
