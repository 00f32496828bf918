"""Reads the rows of a file, a directory or a data set on the Hub, and names the place of each row.

``text_files`` reads files of text, alone or in a directory, so that each row keeps its file and line, and a bad line
does not hide the others. Their rows become a data set of JSON texts, which keeps every row as it was written. The
library ``datasets`` reads tables (.parquet, .arrow, the output of ``save_to_disk``) and the Hub. This module does not
check the content of rows; ``formats`` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .formats import FIELDS, MEDIA, BadRow, json_problem, lacks
from .hub import reached_once
from .text_files import ENDINGS, SEPARATED, TextFile, endings_of

if TYPE_CHECKING:
    from datasets import Dataset

TABLES = {".parquet": "parquet", ".arrow": "arrow"}
KNOWN = (*ENDINGS, *TABLES)

# Advice on files that are not read, by their endings.
_ADVICE = {
    (".zip", ".tar", ".tgz", ".7z", ".rar"): "unpack it and name the file inside",
    (".xlsx", ".xls", ".ods"): "save the sheet as .csv",
    (".pdf", ".docx", ".doc", ".html", ".htm", ".epub"): "save its text as .txt",
    (".pkl", ".pickle", ".pt", ".npy", ".npz", ".h5"): "write the rows with datasets' Dataset.to_parquet or to_json",
    (".yaml", ".yml", ".xml", ".toml"): "write the rows as .jsonl, a JSON object on each line",
}


@dataclass(frozen=True)
class Purpose:
    """What a data set is for, and the options that name it in errors.

    Attributes:
        option: The option that gives the data set.
        split: The option that chooses its split.
        verb: What its rows are there to be done with.
    """

    option: str
    split: str
    verb: str

    def lacks_rows(self, dataset: str) -> str:
        """Returns the text of the error about a data set without a row."""
        return f"{self.option} {dataset} has no row to {self.verb} on"


TRAINING = Purpose("--dataset", "--split", "train")
EVALUATION = Purpose("--eval-dataset", "--eval-split", "evaluate")


@dataclass(frozen=True)
class Source:
    """A file that rows come from, with its name in errors.

    Attributes:
        name: The path of the file, below the path that the option gives.
        unit: The text between the name and the number of a row. None if the whole file is one row.
        begin: The index of the file's first row in the table of all rows. It is 0 if the rows are JSON texts, which
            have their own numbers.
    """

    name: str
    unit: str | None = ": row "
    begin: int = 0

    def place(self, number: int) -> str:
        """Names the row with this number, counted from 1, in errors."""
        return self.name if self.unit is None else f"{self.name}{self.unit}{number}"


@dataclass(frozen=True)
class Rows:
    """The rows of a data set before they are parsed.

    Attributes:
        table: If ``by_text``, a data set with the columns ``file`` (an index in ``sources``), ``number`` (int64),
            ``row`` (a JSON text or None) and ``problem`` (a text or None). Otherwise the columns of the data set that
            are needed.
        by_text: Whether the rows are JSON texts.
        sources: The files that the rows come from, in the order of the rows. If the files are not known, the data set
            counts as one file.
    """

    table: Dataset
    by_text: bool
    sources: tuple[Source, ...]

    def __len__(self) -> int:
        return len(self.table)

    def place(self, index: int) -> str:
        """Names row ``index``, counted from 0, by its file and its line or number, both counted from 1."""
        if self.by_text:
            columns = self.table.data
            file, number = (columns.column(name)[index].as_py() for name in ("file", "number"))
            return self.sources[file].place(number)
        source = self.sources[bisect_right(self.sources, index, key=lambda source: source.begin) - 1]
        return source.place(index - source.begin + 1)

    def contents(self, batch: dict[str, list[Any]]) -> list[Callable[[], object]]:
        """Returns a function for each row of a batch of ``table``, which returns the row's content or raises BadRow."""
        if self.by_text:
            return [_FromText(text, problem) for text, problem in zip(batch["row"], batch["problem"], strict=True)]
        names, features = list(batch), self.table.features
        return [
            _FromTable(dict(zip(names, values, strict=True)), features) for values in zip(*batch.values(), strict=True)
        ]


@dataclass(frozen=True)
class _FromText:
    text: str | None
    problem: str | None

    def __call__(self) -> object:
        if self.text is None:
            raise BadRow(self.problem or "is missing")
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"is not JSON ({json_problem(error)})") from None


@dataclass(frozen=True)
class _FromTable:
    values: dict[str, Any]
    features: Any

    def __call__(self) -> object:
        return {name: _as_written(value, self.features[name]) for name, value in self.values.items()}


def _as_written(value: Any, feature: Any) -> Any:
    """Removes from a value the keys that only other rows have. A table holds None for them.

    A ``content`` that is None is kept, because the row may have been written so.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        return {
            name: _as_written(item, feature[name])
            for name, item in value.items()
            if item is not None or name == "content"
        }
    inner = getattr(feature, "feature", None)
    if isinstance(value, list) and inner is not None:
        return [_as_written(item, inner) for item in value]
    return value


def read_rows(
    dataset: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    purpose: Purpose = TRAINING,
) -> Rows:
    """Reads the rows of a file, of a directory or of a data set on the Hub.

    Args:
        dataset: A path or a Hub id.
        config: The configuration of a data set on the Hub.
        split: The split of a data set on the Hub, of a directory, or of a data set that ``save_to_disk`` wrote.
        text_field: The name of the field that holds plain text.
        purpose: What the data set is for. Errors name its options.

    Raises:
        FileNotFoundError: There is no such file, and no such data set on the Hub.
        ValueError: The kind of file is not known, or the file cannot be read as what its ending says.
    """
    path = Path(dataset)
    ending, _ = endings_of(path)
    if path.is_file() and ending in ENDINGS:
        return _text_rows(dataset, purpose, [TextFile.at(path, dataset, alone=True)])
    if path.is_dir() and not _is_saved(path):
        return _rows_of_directory(dataset, purpose, config, split, text_field)
    table = _needed_columns(dataset, purpose, _with_datasets(dataset, purpose, config, split), text_field)
    return Rows(table, by_text=False, sources=(Source(dataset),))


def stream_rows(
    dataset: str,
    size: int,
    *,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    purpose: Purpose = TRAINING,
) -> Iterator[Rows]:
    """Yields the rows that ``read_rows`` reads, ``size`` at a time. Nothing is written, and no more than that is held.

    Files of text are read line by line, and the library ``datasets`` streams tables and data sets on the Hub. Rows of
    the tables in a directory are numbered through. The arguments and the errors are those of ``read_rows``.
    """
    from datasets import Dataset

    path = Path(dataset)
    files: list[TextFile] = []
    if path.is_file() and endings_of(path)[0] in ENDINGS:
        files = [TextFile.at(path, dataset, alone=True)]
    elif path.is_dir() and not _is_saved(path):
        found = _files_of_directory(dataset, purpose, config, split)
        if all(endings_of(file)[0] in ENDINGS for file in found):
            files = [TextFile.at(file, _name_within(dataset, file), alone=False) for file in found]
    if files:
        items, sources = _items(tuple(files)), tuple(Source(file.name, file.unit) for file in files)
        while block := list(itertools.islice(items, size)):
            yield Rows(Dataset.from_list(block, features=_text_features()), by_text=True, sources=sources)
        return
    with _reading(dataset, purpose):
        stream: Any = _with_datasets(dataset, purpose, config, split, streaming=True)
        if stream.features is None:  # known only once the first rows are read
            stream = stream._resolve_features()
    stream = _needed_columns(dataset, purpose, stream, text_field)
    begin = 0
    for batch in stream.iter(batch_size=size):
        table = Dataset.from_dict(batch, features=stream.features)
        yield Rows(table, by_text=False, sources=(Source(dataset, begin=-begin),))
        begin += len(table)


# --- files of text


def _text_features() -> Any:
    from datasets import Features, Value

    return Features(
        {"file": Value("int32"), "number": Value("int64"), "row": Value("large_string"), "problem": Value("string")}
    )


def _text_rows(dataset: str, purpose: Purpose, files: list[TextFile]) -> Rows:
    from datasets import Dataset, exceptions

    # A tuple, because datasets takes a list for shards of the work.
    arguments = {"files": tuple(files)}
    try:
        table = Dataset.from_generator(
            _items,
            features=_text_features(),
            gen_kwargs=arguments,
            cache_dir=_cache_directory(),
            fingerprint=_fingerprint(files),
        )
    except exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, (OSError, ValueError)):
            raise cause from None
        raise
    except ValueError:  # datasets raises it if there are no rows
        if next(_items(**arguments), None) is None:
            raise ValueError(purpose.lacks_rows(dataset)) from None
        raise
    return Rows(table, by_text=True, sources=tuple(Source(file.name, file.unit) for file in files))


def _items(files: tuple[TextFile, ...]) -> Iterator[dict[str, object]]:
    for index, file in enumerate(files):
        for number, row, problem in file.items():
            yield {"file": index, "number": number, "row": row, "problem": problem}


def program(*names: str) -> str:
    """Returns the source code of modules in this package.

    It is a part of the names of caches, so that another version of the code does not read the caches of this one.
    """
    return "".join((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in names)


def _fingerprint(files: list[TextFile]) -> str:
    """Names the cache of files' rows by the content of the files. A changed file may keep its name and time."""
    digest = hashlib.sha256(program("rows", "text_files").encode())
    for file in files:
        digest.update(f" {file.ending} {file.compression} {file.alone} {file.path.stat().st_size} ".encode())
        with file.path.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def _cache_directory() -> str | None:
    """Returns a temporary directory if the cache of ``datasets`` is read-only, as in some containers, else None."""
    from datasets import config
    from datasets.fingerprint import get_temporary_cache_files_directory

    directory = Path(config.HF_DATASETS_CACHE)
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    if os.access(directory, os.W_OK):
        return None
    temporary: str = get_temporary_cache_files_directory()
    return temporary


# --- directories

# The builders of datasets that read the files of a split one after another, and nothing else.
_PLAIN_BUILDERS = ("json", "csv", "text", *TABLES.values())


def _rows_of_directory(dataset: str, purpose: Purpose, config: str | None, split: str, text_field: str) -> Rows:
    """Reads a directory whose files are arranged like those of a data set on the Hub."""
    files = _files_of_directory(dataset, purpose, config, split)
    names = [_name_within(dataset, file) for file in files]
    if files and all(endings_of(file)[0] in ENDINGS for file in files):
        return _text_rows(
            dataset, purpose, [TextFile.at(file, name, alone=False) for file, name in zip(files, names, strict=True)]
        )
    table = _needed_columns(dataset, purpose, _from_hub(dataset, purpose, config, split), text_field)
    sources: tuple[Source, ...] = ()
    if files and all(file.suffix.lower() in TABLES for file in files):
        counts = [_number_of_rows(file) for file in files]
        if sum(counts) == len(table):
            begins = itertools.accumulate(counts[:-1], initial=0)
            sources = tuple(Source(name, begin=begin) for name, begin in zip(names, begins, strict=True))
    return Rows(table, by_text=False, sources=sources or (Source(dataset),))


def _files_of_directory(dataset: str, purpose: Purpose, config: str | None, split: str) -> list[Path]:
    """Lists the files of a split of a directory, in the order of their rows.

    The list is empty if it is not known which rows come from which file. This is so if ``split`` names a part of a
    split or several splits, if the kind of file is not one that is read here, and if the directory's card (README.md)
    changes how files are read.
    """
    import datasets

    with _reading(dataset, purpose):
        builder = datasets.load_dataset_builder(dataset, config)
    if builder.info.builder_name not in _PLAIN_BUILDERS:
        return []
    settings = builder.config
    files = {str(name): [Path(file) for file in names] for name, names in (settings.data_files or {}).items()}
    found = files.get(split, [])
    if not all(file.is_file() for file in found):
        return []
    default = type(settings)()
    named = {field.name for field in dataclasses.fields(datasets.BuilderConfig)} | {"features"}
    changed = {
        field.name
        for field in dataclasses.fields(settings)
        if field.name not in named and getattr(settings, field.name) != getattr(default, field.name)
    }
    separators = {SEPARATED.get(endings_of(file)[0]) for file in found}
    if "sep" in vars(settings) and separators == {settings.sep}:
        changed.discard("sep")
    return [] if changed else found


def _name_within(dataset: str, file: Path) -> str:
    """Names a file in the directory ``dataset``. The name begins with the directory as the user gave it."""
    with contextlib.suppress(ValueError):
        return str(Path(dataset) / file.relative_to(Path(dataset).resolve()))
    return str(file)


def _number_of_rows(file: Path) -> int:
    """Counts the rows in a .parquet or .arrow file."""
    import pyarrow as pa
    from pyarrow import parquet

    if file.suffix.lower() == ".parquet":
        return int(parquet.read_metadata(file).num_rows)
    with pa.memory_map(str(file)) as content:
        try:
            batches: Any = pa.ipc.open_stream(content)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(content)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        return sum(batch.num_rows for batch in batches)


# --- tables and the Hub


def _with_datasets(dataset: str, purpose: Purpose, config: str | None, split: str, streaming: bool = False) -> Dataset:
    """Reads a .parquet or .arrow file, the output of ``save_to_disk``, or a data set on the Hub."""
    import datasets

    path = Path(dataset)
    ending, compression = endings_of(path)
    if path.is_file():
        if compression is not None:
            raise ValueError(
                f"{purpose.option} {dataset}: a compressed file must be one of {', '.join(ENDINGS)}; unpack it"
            )
        if ending not in TABLES:
            raise ValueError(
                f"{purpose.option} must be a file with one of the endings {', '.join(KNOWN)}, a directory or a Hub id, got "
                f"{dataset}" + next((f": {advice}" for endings, advice in _ADVICE.items() if ending in endings), "")
            )
        try:
            table: Dataset = datasets.load_dataset(
                TABLES[ending], data_files=str(path), split="train", streaming=streaming
            )
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(f"{path} cannot be read as {TABLES[ending]}: {_line(error.__cause__ or error)}") from None
        return table
    if _is_saved(path):
        return _from_disk(dataset, purpose, split)
    if path.is_dir():
        return _from_hub(dataset, purpose, config, split, streaming)
    if ending in KNOWN or compression is not None or path.is_absolute() or dataset.startswith("."):
        raise FileNotFoundError(f"{purpose.option} {dataset} is missing")
    return _from_hub(dataset, purpose, config, split, streaming)


def _from_hub(dataset: str, purpose: Purpose, config: str | None, split: str, streaming: bool = False) -> Dataset:
    """Reads a data set on the Hub, or a directory whose files are arranged like those of one."""
    import datasets

    hub: Any = contextlib.nullcontext() if Path(dataset).is_dir() else reached_once()
    with hub as unreachable, _reading(dataset, purpose, unreachable):
        table: Dataset = datasets.load_dataset(dataset, config, split=split, streaming=streaming)
    return table


@contextlib.contextmanager
def _reading(dataset: str, purpose: Purpose, unreachable: str | None = None) -> Iterator[None]:
    """Turns errors of the library ``datasets`` within the block into errors of one line that name ``dataset``.

    Args:
        dataset: A path or a Hub id.
        purpose: What the data set is for.
        unreachable: Why the Hub cannot be reached, if it cannot.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    not_found = datasets.exceptions.DatasetNotFoundError
    try:
        yield
    except (FileNotFoundError, not_found, HfHubHTTPError, HFValidationError, ConnectionError) as error:
        if Path(dataset).is_dir():
            raise FileNotFoundError(
                f"{purpose.option} {dataset} has no file that can be read: {_line(error)}"
            ) from None
        if unreachable is not None:
            raise FileNotFoundError(
                f"{purpose.option} {dataset} is not a file, is not in the cache, and the Hub cannot be reached: "
                f"{unreachable}"
            ) from None
        raise FileNotFoundError(
            f"{purpose.option} {dataset} is not a file, and cannot be loaded from the Hub: {_line(error)}"
        ) from None
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{purpose.option} {dataset} cannot be read: {_line(error.__cause__ or error)}") from None
    except ValueError as error:  # an unknown split or configuration, which the error lists
        hint = f"; {purpose.split} chooses another one" if "split" in str(error) else ""
        raise ValueError(f"{purpose.option} {dataset}: {_line(error)}{hint}") from None


def _line(error: BaseException) -> str:
    """Returns the first line of an error, without the name of its cause's class and the full stop at its end."""
    return re.sub(r" \(\w*(Error|Enabled)\)$", "", str(error).strip().partition("\n")[0]).rstrip(".")


def _is_saved(path: Path) -> bool:
    """Whether a directory is the output of ``save_to_disk``."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _from_disk(dataset: str, purpose: Purpose, split: str) -> Dataset:
    import datasets

    try:
        found = datasets.load_from_disk(dataset)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{purpose.option} {dataset} cannot be read as a data set of save_to_disk: {_line(error)}"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"{purpose.split}: {dataset} has no {split}, but has {', '.join(found)}")
        return found[split]
    return found


def _needed_columns(dataset: str, purpose: Purpose, table: Dataset, text_field: str) -> Dataset:
    """Selects the columns that are needed. It does not decode pictures and sounds, which takes time."""
    kept = [name for name in table.column_names if name in FIELDS or name == text_field]
    for name in kept:
        if name in MEDIA:
            table = table.cast_column(name, _undecoded(table.features[name]))
    if not kept:
        raise ValueError(f"{purpose.option} {dataset} {lacks(table.column_names, text_field)}")
    return table.select_columns(kept).with_format(None)


def _undecoded(feature: Any) -> Any:
    from datasets import List

    if isinstance(feature, List):
        return List(_undecoded(feature.feature))
    return type(feature)(decode=False) if hasattr(feature, "decode") else feature


@contextlib.contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Shows the progress bars of the library ``datasets`` within the block, if ``shown``, and hides them afterwards."""
    import datasets

    if shown:
        datasets.enable_progress_bars()
    try:
        yield
    finally:
        datasets.disable_progress_bars()
