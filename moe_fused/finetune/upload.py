"""Uploads the directory of a run to the Hugging Face Hub: the adapter, or the checkpoints.

The adapter goes to the branch ``main``. Checkpoints go to a branch of their own, so that whoever downloads the adapter
does not get the optimizer's states. Each upload is one commit, so it appears whole or not at all. Files that the Hub has
already are not sent, so the same upload can be repeated. This module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from moe_fused.checkpoints.places import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG

from .checkpoints import CHECKPOINTS, checkpoints_of
from .options import Export
from .trackers import TRACKED

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN, BRANCH = "main", "checkpoints"
# The files of a run that its checkpoints need to go on.
_OF_RUN = ("finetune.yaml", "log.jsonl")
_TOKENS = "https://huggingface.co/settings/tokens"


class UploadFailed(Exception):
    """The Hub refuses an upload or does not answer. The message is one line for users."""


def check_repository(name: str, repository: str) -> None:
    """Raises ValueError unless ``repository`` is an organization or user, a slash and a name, as the Hub takes them.

    Args:
        name: What ``repository`` is called in errors.
        repository: The value.
    """
    if repository.count("/") != 1:
        raise ValueError(f"{name} must be an organization or user and a name, as org/name, got {repository!r}")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{name} must be the name of a repository, as org/name: {_line(error)}") from None


def check_upload(name: str, repository: str, *, private: bool) -> None:
    """Makes sure, as far as the Hub tells without a change, that the token here may upload to ``repository``.

    Args:
        name: What ``repository`` is called in errors.
        repository: The repository, which need not exist.
        private: Whether it is to be a private one.

    Raises:
        ValueError: This process is offline, or there is no token.
        UploadFailed: The Hub does not know the token, the token may not write there, the repository is public although
            it is to be private, or it holds a model instead of an adapter.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{name} {repository}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it to upload")
    if get_token() is None:
        raise ValueError(f"{name} {repository}: there is no token; run `hf auth login`, or set HF_TOKEN")
    try:
        api = _api()
        _check_account(api, repository)
        _check_existing(api, repository, private)
    except UploadFailed as error:
        raise UploadFailed(f"{name} {repository}: {error}") from error


def upload_adapter(output: Path, repository: str, *, private: bool) -> str:
    """Uploads the adapter in ``output`` with all that lies beside it, except checkpoints and what is of this machine only.

    Args:
        output: The directory of the run.
        repository: The repository on the Hub. It is created if it does not exist.
        private: Whether the repository is created as a private one.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError: There is no adapter.
        UploadFailed: The Hub refuses or does not answer. The repository is as it was before.
    """
    check_adapter(output)
    layouts = tuple(f"{layout}/" for layout in get_args(Export) if layout != "none")
    files = {path.relative_to(output).as_posix(): path for path in _files(output, (CHECKPOINTS, *TRACKED))}
    api = _api()
    url = _create(api, repository, private)
    # An export of an earlier run would not fit the adapter.
    _commit(api, repository, MAIN, files, lambda path: path.startswith(layouts), "Upload the adapter")
    return url


def upload_checkpoints(output: Path, repository: str, *, private: bool) -> str:
    """Makes the branch ``checkpoints`` hold what ``--resume`` needs to go on with the run in ``output``, and nothing else.

    Args:
        output: The directory of the run.
        repository: The repository on the Hub. It is created if it does not exist.
        private: Whether the repository is created as a private one.

    Returns:
        The address of the branch.

    Raises:
        FileNotFoundError: There is no checkpoint.
        UploadFailed: The Hub refuses or does not answer. The branch is as it was before.
    """
    newest = check_checkpoints(output)
    files = {name: output / name for name in _OF_RUN if (output / name).is_file()}
    files |= {path.relative_to(output).as_posix(): path for path in _files(output / CHECKPOINTS, ())}
    api = _api()
    url = _create(api, repository, private)
    with _answers(f"create the branch {BRANCH}"):
        if BRANCH not in {found.name for found in api.list_repo_refs(repository).branches}:
            # From the first commit, which has nothing of an adapter.
            first = api.list_repo_commits(repository)[-1].commit_id
            api.create_branch(repository, branch=BRANCH, revision=first, exist_ok=True)
    _commit(api, repository, BRANCH, files, lambda path: True, f"Upload {newest.name}")
    return f"{url}/tree/{BRANCH}"


def check_adapter(output: Path) -> None:
    """Raises FileNotFoundError if there is no whole adapter in ``output``."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (output / name).is_file():
            hint = ": its run has not ended, --checkpoints uploads its checkpoints" if checkpoints_of(output) else ""
            raise FileNotFoundError(f"{output} has no {name}{hint}")


def check_checkpoints(output: Path) -> Path:
    """Returns the newest checkpoint in ``output``. Raises FileNotFoundError if there is none."""
    found = checkpoints_of(output)
    if not found:
        raise FileNotFoundError(f"{output} has no checkpoints")
    return found[-1]


def _api() -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    disable_progress_bars()
    logging.set_verbosity_error()
    return HfApi(library_name="moe-fused")


def _check_account(api: HfApi, repository: str) -> None:
    """Raises UploadFailed for a token that is unknown, that may only read, or that is of somebody else."""
    with _answers("log in"):
        account = api.whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UploadFailed(f"the token may only read, make one with write access at {_TOKENS}")
    owner, user = repository.partition("/")[0], account["name"]
    roles = {organization["name"]: organization.get("roleInOrg") for organization in account.get("orgs", [])}
    if owner != user and owner not in roles:
        raise UploadFailed(f"{user}, whose token this is, is not a member of {owner}")
    if roles.get(owner) == "read":
        raise UploadFailed(f"{user}, whose token this is, may only read in {owner}")


def _check_existing(api: HfApi, repository: str, private: bool) -> None:
    """Raises UploadFailed if the repository exists and an upload would show or overwrite what it must not."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with _answers("look it up"):
        try:
            found = api.model_info(repository)
        except RepositoryNotFoundError:
            return
    if private and not found.private:
        raise UploadFailed("it exists and is public; make it private on the Hub, or leave out --private")
    names = {file.rfilename for file in found.siblings or []}
    if CONFIG in names and ADAPTER_CONFIG not in names:
        raise UploadFailed("it holds a model, whose files those of the adapter would replace; give another name")


def _create(api: HfApi, repository: str, private: bool) -> str:
    """Creates the repository if it does not exist, and returns its address."""
    with _answers(f"create {repository}"):
        # Not private=False, which would make it public where an organization has private ones by default.
        url = str(api.create_repo(repository, private=private or None, exist_ok=True))
    _check_existing(api, repository, private)
    return url


def _files(directory: Path, left_out: tuple[str, ...]) -> Iterator[Path]:
    """Yields all files below ``directory`` but hidden ones and those in the entries ``left_out``."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in left_out:
            continue
        if path.is_dir():
            yield from _files(path, ())
        else:
            yield path


def _commit(
    api: HfApi,
    repository: str,
    branch: str,
    files: dict[str, Path],
    is_ours: Callable[[str], bool],
    message: str,
) -> None:
    """Makes one commit that adds ``files`` and deletes the other files for which ``is_ours`` is true.

    The Hub refuses it if the branch gets another commit meanwhile, so two uploads do not become a mixture of both.
    ``HfApi.upload_folder`` may make several commits of a large folder.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with _answers(f"upload to {repository}"):
        found = api.model_info(repository, revision=branch)
        old = {file.rfilename for file in found.siblings or []} - files.keys() - {".gitattributes"}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
            *(CommitOperationDelete(name) for name in sorted(old) if is_ours(name)),
        ]
        api.create_commit(repository, operations, commit_message=message, revision=branch, parent_commit=found.sha)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


@contextlib.contextmanager
def _answers(doing: str) -> Iterator[None]:
    """Raises UploadFailed, with one line, for whatever the Hub answers, and for its silence."""
    from huggingface_hub.errors import HfHubHTTPError

    # huggingface_hub's library for HTTP has another name in each major version, but its error is a base of this one.
    silence: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = " ".join((error.server_message or str(error)).split()).rstrip(".")
        if status == 401:
            raise UploadFailed(f"cannot {doing}: the Hub does not know the token (401: {said})") from error
        if status == 403:
            raise UploadFailed(f"cannot {doing}: the token has no permission (403: {said})") from error
        raise UploadFailed(f"cannot {doing}: the Hub answers {status}: {said}") from error
    except silence as error:
        raise UploadFailed(f"cannot {doing}: the Hub does not answer: {_line(error)}") from error
    except (OSError, RuntimeError, ValueError) as error:  # as a file that cannot be read, or a header of a card
        raise UploadFailed(f"cannot {doing}: {_line(error)}") from error
