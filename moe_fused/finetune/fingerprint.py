"""Hashes the data and the model of a run, so that a resumed run notices if one of them has changed.

The hashes stand as comments at the beginning of finetune.yaml. This module imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from .data import Data, Prepared
    from .stream import Streamed

ALLOW_CHANGED, ALLOW_OTHER_BASE = "--allow-changed-data", "--allow-other-base"
_HEAD = "# The data and the model that this run began with. --resume compares them. These lines are no options.\n"
_ROWS, _EVALUATION, _TEMPLATE = "rows", "evaluation rows", "chat template"
_CONFIG, _WEIGHTS = "model config", "model weights"
_ADAPTER = "adapter"
_PROCESSES = "processes"
_LINE = re.compile(
    rf"# ({_ROWS}(?: of .+)?|{_EVALUATION}|{_TEMPLATE}|{_CONFIG}|{_WEIGHTS}|{_ADAPTER}): (sha256:[0-9a-f]{{64}})"
    rf"|# ({_PROCESSES}): ([0-9]+)"
)

# The bytes that are read from a file of weights: those at its beginning and its end, and a block at each step between.
_EDGE, _BLOCK, _STEP = 1 << 20, 1 << 16, 1 << 26
# Entries of a model's config that saving it again changes.
_VOLATILE = ("_name_or_path", "transformers_version")
# An entry of an adapter's config that names the place of its base.
_OF_PLACES = ("base_model_name_or_path",)


def fingerprints(prepared: Prepared | Streamed, data: Sequence[Data]) -> dict[str, str]:
    """Returns the sha256 of the tokens and labels of all rows, also of those of ``--eval-dataset``.

    With ``--streaming`` it is that of the first rows.

    If there are several data sets, each has its own. If rows are chats, the sha256 of the chat template is there as well.
    """
    found = {_ROWS: f"sha256:{prepared.fingerprint}"}
    if prepared.digests:
        # A name with line breaks must not end the comment.
        found = {f"{_ROWS} of {' '.join(name.split())}": f"sha256:{each}" for name, each in prepared.digests.items()}
    if prepared.evaluation is not None and prepared.evaluation.fingerprint:
        found[_EVALUATION] = f"sha256:{prepared.evaluation.fingerprint}"
    chats = [each for each in data if each.has_turns]
    if chats:
        renderer = chats[0].renderer
        templates = json.dumps([renderer.tokenizer.chat_template, renderer.template], sort_keys=True)
        found[_TEMPLATE] = _hash(templates.encode())
    return found


def base_fingerprints(model: str, revision: str, *, download: bool) -> dict[str, str]:
    """Returns the sha256 of a model's config and that of its weights. They do not depend on where the model lies.

    Reading all weights would take minutes. The hash of the weights covers the names and sizes of their files, the
    header of each file (the names, dtypes and shapes of its tensors), and samples: the first and the last MiB of each
    file, and 64 KiB of each 64 MiB between. The hash is another one for another checkpoint, and for the same checkpoint
    saved again in another dtype or in other files. It does not notice a change of single values between the samples.

    Args:
        model: A directory, or a name on the Hub.
        revision: The revision of a model on the Hub.
        download: Whether to download files that the Hub's cache lacks.

    Returns:
        The hashes by their names. There are none if the model is not on this machine and ``download`` is false.

    Raises:
        FileNotFoundError, ValueError: There are no weights, or their index is damaged.
    """
    from moe_fused.checkpoints.files import find_weights
    from moe_fused.checkpoints.places import CONFIG, read_object
    from moe_fused.checkpoints.tensor_files import read_index

    try:
        weights = find_weights(model, revision, download=download)
        if weights is None:
            return {}
        names = sorted(set(read_index(weights).values())) if weights.name.endswith(".index.json") else [weights.name]
        digest = hashlib.sha256()
        for name in names:
            with (weights.parent / name).open("rb") as file:
                for part in (name.encode(), *_samples(file)):
                    digest.update(hashlib.sha256(part).digest())
        config = {key: value for key, value in read_object(weights.parent / CONFIG).items() if key not in _VOLATILE}
    except (FileNotFoundError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(f"--model {model}: {error}") from error
    return {
        _CONFIG: _hash(json.dumps(config, sort_keys=True).encode()),
        _WEIGHTS: f"sha256:{digest.hexdigest()}",
    }


def adapter_fingerprint(directory: Path) -> dict[str, str]:
    """Returns the sha256 of an adapter's config and weights, which does not depend on where the adapter lies."""
    from moe_fused.checkpoints.places import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_object

    content = {key: value for key, value in read_object(directory / ADAPTER_CONFIG).items() if key not in _OF_PLACES}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    with (directory / ADAPTER_WEIGHTS).open("rb") as file:
        while block := file.read(_EDGE):
            digest.update(block)
    return {_ADAPTER: f"sha256:{digest.hexdigest()}"}


def check_same_adapter(path: Path, now: dict[str, str], needed: bool) -> tuple[dict[str, str], list[str]]:
    """Compares the adapter of ``--adapter`` with the one that a resumed run began with.

    Args:
        path: The finetune.yaml of the run.
        now: The fingerprint of the adapter today, as ``adapter_fingerprint`` gives it; empty if it is not there any more.
        needed: Whether the run begins with the adapter again, because it has no checkpoint.

    Returns:
        The fingerprint to record, and a remark if the adapter has changed.

    Raises:
        ValueError: The adapter has changed, and it is needed.
    """
    before = {what: value for what, value in recorded(path).items() if what == _ADAPTER}
    if not before or not now or before == now:
        return before or now, []
    changed = f"{_changes(before, now)} changed since the run in {path.parent} began"
    if needed:
        raise ValueError(f"{changed}: put back what was there, or start again with --overwrite")
    return before, [f"{changed}; the run goes on from its checkpoint, which does not need it"]


def _samples(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the size of a file of weights, its header, and samples of its content."""
    size = file.seek(0, 2)
    yield str(size).encode()
    file.seek(0)
    # A safetensors file begins with the size of its header. A file of torch.save has its header at the end.
    header = 8 + int.from_bytes(file.read(8), "little") if file.name.endswith(".safetensors") else 0
    spans = [(0, max(header, _EDGE)), *((place, _BLOCK) for place in range(_STEP, size, _STEP)), (size - _EDGE, _EDGE)]
    for begin, length in spans:
        file.seek(max(begin, 0))
        yield file.read(length)


def _hash(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def as_comment(found: dict[str, str]) -> str:
    """Writes the fingerprints as comments for the beginning of a YAML file."""
    return _HEAD + "".join(f"# {what}: {value}\n" for what, value in found.items())


def recorded(path: Path) -> dict[str, str]:
    """Reads the fingerprints that ``as_comment`` wrote into a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = (match for line in lines if (match := _LINE.fullmatch(line)))
    return {match[1] or match[3]: match[2] or match[4] for match in found}


def recorded_processes(path: Path) -> int:
    """Returns the number of processes that the run of a finetune.yaml had last."""
    return int(recorded(path).get(_PROCESSES, "1"))


def of_processes(number: int) -> dict[str, str]:
    """Returns the number of processes as ``as_comment`` writes it. A process that is alone is not recorded."""
    return {} if number <= 1 else {_PROCESSES: str(number)}


def check_same_data(path: Path, now: dict[str, str], allow: bool) -> list[str]:
    """Compares the data of a resumed run with the data that it began with.

    Args:
        path: The finetune.yaml of the run.
        now: The fingerprints of the data today, as ``fingerprints`` gives them.
        allow: Whether the data may have changed.

    Returns:
        A remark if the data have changed or cannot be compared, else none.

    Raises:
        ValueError: The data have changed, and ``allow`` is false.
    """
    of_data = (_ROWS, _EVALUATION, _TEMPLATE)
    before = {what: value for what, value in recorded(path).items() if what.startswith(of_data)}
    if not before:
        return [f"{path} does not say what data the run began with, so that they cannot be compared"]
    changed, run = _changes(before, now), path.parent
    if not changed:
        return []
    if not allow:
        raise ValueError(
            f"{changed} changed since the run in {run} began: put back what was there, or go on with {ALLOW_CHANGED}"
        )
    return [f"{changed} changed since the run in {run} began; the run goes on with the data of today"]


def check_same_base(path: Path, model: str, now: dict[str, str], allow: bool) -> list[str]:
    """Compares the model of a resumed run with the one that it began with.

    Runs of versions that did not record their model are not compared.

    Args:
        path: The finetune.yaml of the run.
        model: The model, as ``--model`` gives it.
        now: The fingerprints of the model today, as ``base_fingerprints`` gives them.
        allow: Whether the model may have changed.

    Returns:
        A remark if the model has changed, else none.

    Raises:
        ValueError: The model has changed, and ``allow`` is false.
    """
    changed = _changes({what: value for what, value in recorded(path).items() if what in now}, now)
    run = path.parent
    if not changed:
        return []
    if not allow:
        raise ValueError(
            f"{changed} changed since the run in {run} began: --model {model} is not what its adapter was trained on; put "
            f"back what was there, or go on with {ALLOW_OTHER_BASE}"
        )
    return [f"{changed} changed since the run in {run} began; the run goes on with the model of today"]


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
    """Names the fingerprints that have changed, each with both values. The text is empty if none has changed."""
    return " and ".join(
        f"the {what} ({value[:15]} before, {now.get(what, 'none')[:15]} now)"
        for what, value in before.items()
        if value != now.get(what)
    )
