"""Prepares the data of a run before the model is loaded: renders, tokenizes, masks, cuts, packs and counts all rows.

    rows      reads the rows of files and data sets, and names the place of each row
    formats   parses rows
    render    makes a row into tokens and labels
    mix       sets rows aside for the evaluation, and mixes several data sets

``prepare`` makes the sequences of a run, those for its evaluation included. TRL takes them as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_fused.signals import workers_forked

from .formats import BadRow, Kind
from .mix import mix, set_aside
from .mixture import Part
from .options import Options
from .render import IGNORED, NOTES, Renderer, training_template
from .rows import EVALUATION, TRAINING, Purpose, Rows, program, read_rows, stream_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from .resolve import Batching

# The number of bad rows that are named: in an error, and in the report of a run that leaves them out.
NAMED, NAMED_LEFT_OUT = 5, 20
# A further process pays off for this number of rows, or of bytes of rows.
_ROWS_OF_A_PROCESS, _BYTES_OF_A_PROCESS = 1000, 2 << 20
_BATCH = 250
COLUMNS = ("input_ids", "labels")
# The number of rows that --streaming reads and packs together.
BLOCK = 1000


@dataclass(frozen=True)
class Data:
    """The rows of a data set before they are rendered, and the renderer for them.

    Attributes:
        part: The data set as the options name it.
        purpose: What the data set is for.
        rows: The rows of the data set.
        renderer: The renderer, which makes a row into tokens.
        first: The place of the first row that can be parsed.
        kind, form: The kind and the form of that row. All rows of the data set must have the same form.
    """

    part: Part
    purpose: Purpose
    rows: Rows
    renderer: Renderer
    first: str
    kind: Kind
    form: str

    @property
    def has_turns(self) -> bool:
        """Whether the rows are made of messages, which a chat template renders."""
        return self.form in ("chat", "completion of messages")

    def content(self, index: int) -> object:
        """Returns the content of row ``index``, counted from 0; raises BadRow if it cannot be read."""
        return self.rows.contents(self.rows.table[index : index + 1])[0]()


@dataclass(frozen=True)
class Report:
    """Counts of what was made of the rows, and remarks.

    Attributes:
        rows: The number of rows that are trained on.
        tokens: The number of tokens of these rows, before any was cut off.
        learned: The number of tokens that are learned from, after rows were cut.
        cut: The number of rows that were cut.
        lost: The number of tokens that were cut off.
        longest: The number of tokens of the longest row.
        sequences: The number of sequences, each of one row or of several.
        steps: The number of steps of the run; None for the rows of an evaluation.
        left_out: The place and the problem of each row that was left out.
        notes: Remarks on things that are no errors but worth a look.
        parts: What is used of each data set, if there are several.
    """

    rows: int
    tokens: int
    learned: int
    cut: int
    lost: int
    longest: int
    sequences: int
    steps: int | None
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yields the lines of the report."""
        for bad in self.left_out[:NAMED_LEFT_OUT]:
            yield f"left out: {bad}"
        if len(self.left_out) > NAMED_LEFT_OUT:
            yield f"left out: {len(self.left_out) - NAMED_LEFT_OUT:,} more"
        counts = [
            f"{counted(self.rows, 'row')}",
            f"{counted(self.tokens, 'token')} ({self.learned:,} to learn from)",
            counted(self.sequences, "sequence"),
        ]
        counts += [] if self.steps is None else [counted(self.steps, "step")]
        what = "evaluation" if self.steps is None else "data"
        for part in self.parts:
            yield f"{what}: {part}"
        yield f"{what}: {', '.join(counts)}; {counted(len(self.left_out), 'row')} left out"
        if self.cut:
            yield (
                f"cut: {counted(self.cut, 'row')}, which lose {self.lost:,} of all {counted(self.tokens, 'token')}; "
                f"the longest row has {self.longest:,}"
            )
        for note in self.notes:
            yield f"note: {note}"


@dataclass(frozen=True)
class Prepared:
    """The sequences that a run trains on.

    Attributes:
        dataset: The sequences, in the columns ``input_ids`` and ``labels``. If rows lie side by side in a sequence, the
            column ``seq_lengths`` has their lengths.
        report: The report about the rows.
        fingerprint: The sha256, in hexadecimal, of the tokens and labels of all rows that can be used, before rows are
            split, mixed, cut and packed. It changes if a change of the data, the template or the tokenizer changes any of
            them.
        evaluation: The sequences for the evaluation, if the run has one.
        parts: The same sha256 of each data set by its name, if there are several.
    """

    dataset: Dataset
    report: Report
    fingerprint: str
    evaluation: Prepared | None = None
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def used(self) -> list[str]:
        """What is used of each data set, if there are several."""
        return self.report.parts

    def lines(self) -> Iterator[str]:
        """Yields the lines of the reports."""
        yield from self.report.lines()
        if self.evaluation is not None:
            yield from self.evaluation.report.lines()


def find(options: Options, tokenizer: Any) -> tuple[Data, ...]:
    """Reads the rows of each data set of ``--dataset``, parses the first of them, and makes a renderer for them.

    Raises:
        FileNotFoundError: There is no such file, and no such data set on the Hub.
        ValueError: The file cannot be read, none of its rows can be read, or the options are not for rows of this kind.
    """
    return tuple(_find(part, TRAINING, options.split, options, tokenizer) for part in options.datasets)


def find_evaluation(options: Options, tokenizer: Any) -> Data | None:
    """Reads the rows of ``--eval-dataset`` as ``find`` does; returns None without that option."""
    if options.eval_dataset is None:
        return None
    return _find(Part(options.eval_dataset), EVALUATION, options.eval_split, options, tokenizer)


def _find(part: Part, purpose: Purpose, split: str, options: Options, tokenizer: Any) -> Data:
    if options.streaming and purpose is TRAINING:
        rows = next(blocks(part, options), None)
        if rows is None:
            raise ValueError(_nothing(part, purpose, []))
    else:
        rows = read_rows(part.dataset, split=part.split or split, purpose=purpose, **_reading(part, options))
    plain = Renderer(tokenizer, None, options.assistant_only_loss, options.text_field)
    first = None
    bad: list[str] = []
    for batch in rows.table.iter(batch_size=_BATCH):
        for content in rows.contents(batch):
            try:
                first = plain.parse(content())
                break
            except BadRow as error:
                bad.append(f"{rows.place(len(bad))} {error}")
        if first is not None:
            break
    if first is None:
        raise ValueError(_nothing(part, purpose, bad))
    if first.turns and not tokenizer.chat_template:
        raise ValueError(
            f"{purpose.option} {part.name} holds chats, but the tokenizer of {options.model} has no chat template: give "
            "one with --chat-template"
        )
    if options.assistant_only_loss and not first.turns:
        raise ValueError(
            f"--assistant-only-loss is for chats, but the rows of {purpose.option} {part.name} are {first.kind}"
        )
    template = training_template(tokenizer, options.model) if options.assistant_only_loss else None
    renderer = Renderer(tokenizer, template, options.assistant_only_loss, options.text_field)
    return Data(part, purpose, rows, renderer, rows.place(len(bad)), first.kind, first.form)


def blocks(part: Part, options: Options) -> Iterator[Rows]:
    """Yields the rows of a data set of ``--dataset``, ``BLOCK`` at a time, as ``--streaming`` reads them."""
    return stream_rows(part.dataset, BLOCK, split=part.split or options.split, **_reading(part, options))


def _reading(part: Part, options: Options) -> dict[str, Any]:
    return {"config": part.config or options.dataset_config, "text_field": options.text_field}


def prepare(
    data: Sequence[Data], options: Options, batching: Batching, *, vocabulary: int, evaluation: Data | None = None
) -> Prepared:
    """Makes all rows into the sequences that a run trains on, and those that it is evaluated on.

    Args:
        data: The rows of each data set, and their renderers.
        options: The options of the run.
        batching: How rows become sequences, batches and steps.
        vocabulary: The number of tokens that the model knows.
        evaluation: The rows of ``--eval-dataset``, if the run has them.

    Raises:
        ValueError: Some rows cannot be used, and ``options`` do not leave them out. The error names their places. It is
            also raised if no row is left to train on or to evaluate on, or if the tokenizer has tokens that the model
            does not know.
    """
    tables, named, digests = _usable_rows(data, options, batching, vocabulary)
    held: Prepared | None = None
    if options.eval_share is not None:
        tables, others = _split(tables, data, options)
        held = Prepared(*_sequences(others, data, batching, [], None), fingerprint="")
    elif evaluation is not None:
        held = prepare_evaluation(evaluation, options, batching, vocabulary)
    sequences, report = _sequences(tables, data, batching, named, options)
    if len(data) == 1:
        return Prepared(sequences, report, digests[0], held)
    parts = {each.part.name: digest for each, digest in zip(data, digests, strict=True)}
    return Prepared(sequences, report, hashlib.sha256("".join(digests).encode()).hexdigest(), held, parts)


def prepare_evaluation(evaluation: Data, options: Options, batching: Batching, vocabulary: int) -> Prepared:
    """Makes the rows of ``--eval-dataset`` into sequences. The arguments and errors are those of ``prepare``."""
    tables, bad, (digest,) = _usable_rows([evaluation], options, batching, vocabulary)
    return Prepared(*_sequences(tables, [evaluation], batching, bad, None), fingerprint=digest)


def prepare_block(data: Data, options: Options, batching: Batching, vocabulary: int) -> tuple[Dataset, list[str], str]:
    """Makes a block of rows into tokens, in this process.

    Returns:
        The rows that can be used, the problems of the others, and the sha256 of the first ones.

    Raises:
        ValueError: Some rows cannot be used, and ``options`` do not leave them out, or the tokenizer has tokens that
            the model does not know.
    """
    from datasets import Dataset

    made = Dataset.from_dict(_Worker(data)(data.rows.table[:]), features=_features())
    tokens, bad = _usable(data, made, batching)
    named = [f"{data.rows.place(index)} {problem}" for index, problem in bad]
    if named and not options.skip_bad_rows:
        raise ValueError(refusal(named))
    return tokens, named, _checked_totals(tokens, options, vocabulary)


def _usable_rows(
    data: Sequence[Data], options: Options, batching: Batching, vocabulary: int
) -> tuple[list[Dataset], list[str], list[str]]:
    """Returns the rows of each data set that can be used, the problems of all others, and the sha256 of each data set."""
    tables, problems = [], []
    for each in data:
        tokens, bad = _usable(each, _tokenize(each), batching)
        named = [f"{each.rows.place(index)} {problem}" for index, problem in bad]
        if not len(tokens):
            raise ValueError(_nothing(each.part, each.purpose, named))
        tables.append(tokens)
        problems += named
    if problems and not options.skip_bad_rows:
        raise ValueError(refusal(problems))
    digests = [_checked_totals(tokens, options, vocabulary) for tokens in tables]
    return tables, problems, digests


def _checked_totals(tokens: Dataset, options: Options, vocabulary: int) -> str:
    """Returns the sha256 of the tokens; raises ValueError if one of them is not in the vocabulary of the model."""
    highest, digest = _totals(tokens)
    if highest >= vocabulary:
        raise ValueError(
            f"the tokenizer of {options.model} makes the token {highest}, but the model knows {vocabulary} tokens: they "
            "do not belong together"
        )
    return digest


def _split(tables: list[Dataset], data: Sequence[Data], options: Options) -> tuple[list[Dataset], list[Dataset]]:
    """Returns the rows to train on and those to evaluate on, of each data set. The seed of the run chooses them."""
    count, share = sum(map(len, tables)), options.eval_share or 0.0
    held = round(share * count)
    if not 0 < held < count:
        left = "evaluate on" if held == 0 else "train on"
        raise ValueError(f"--eval-share {share} of {counted(count, 'row')} leaves none to {left}")
    kept, others = set_aside(tables, held, options.seed)
    for each, table in zip(data, kept, strict=True):
        if not len(table):
            raise ValueError(
                f"--eval-share {share} leaves no row of {each.purpose.option} {each.part.name} to train on"
            )
    return kept, others


def _sequences(
    tables: list[Dataset], data: Sequence[Data], batching: Batching, left_out: list[str], options: Options | None
) -> tuple[Dataset, Report]:
    """Returns sequences of rows, and their report. ``options`` are those of the training, None for an evaluation."""
    shares = [None if options is None else each.part.share for each in data]
    tokens, taken = mix(tables, shares, 0 if options is None else options.seed)
    sizes = _sizes(tokens)
    sequences: Dataset = fit(tokens.select_columns(list(COLUMNS)), batching)
    batches = math.ceil(len(sequences) / batching.batch_size)
    over = np.maximum(sizes - batching.length, 0) if batching.cuts else np.zeros(1, dtype=np.int64)
    learned, idle = _learned(sequences)
    if options is None:
        steps = None
    else:
        steps = options.max_steps or math.ceil(options.epochs * math.ceil(batches / batching.accumulation))
    report = Report(
        rows=len(tokens),
        tokens=int(sizes.sum()),
        learned=learned,
        cut=int((over > 0).sum()),
        lost=int(over.sum()),
        longest=int(sizes.max()),
        sequences=len(sequences),
        steps=steps,
        left_out=left_out,
        notes=list(_notes(tokens, data, len(sequences), idle)),
        parts=[_used(*each) for each in zip(data, tables, taken, strict=True)] if len(data) > 1 else [],
    )
    return sequences, report


def _used(data: Data, table: Dataset, taken: Dataset) -> str:
    """Says how many rows of a data set are used, of those that can be."""
    of = "" if len(taken) == len(table) else f"{len(taken):,} of "
    return f"{data.part.name}: {of}{counted(len(table), 'row')}, {counted(int(_sizes(taken).sum()), 'token')}"


def _sizes(tokens: Dataset) -> Any:
    """Returns the number of tokens of each row, as an array of int64."""
    return np.asarray(tokens.select_columns(["length"]).with_format("numpy")[:]["length"], dtype=np.int64)


def fit(tokens: Any, batching: Batching, **arguments: Any) -> Any:
    """Cuts and packs rows into sequences, exactly as TRL does.

    Args:
        tokens: The rows, in the columns ``input_ids`` and ``labels``, as a Dataset or an IterableDataset.
        batching: How rows become sequences.
        arguments: Arguments of ``map``. The default is a description of its progress bar.

    Returns:
        The sequences, of the same type.
    """
    from trl.data_utils import pack_dataset

    if batching.packing != "none":
        return pack_dataset(tokens, batching.length, batching.packing, arguments or {"desc": "Packing"})
    arrow = tokens.with_format("arrow")
    return arrow.map(
        _cut, batched=True, fn_kwargs={"length": batching.length}, **(arguments or {"desc": "Cutting"})
    ).with_format(None)


def _cut(table: pa.Table, length: int) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pa.table({name: pc.list_slice(table[name], 0, length) for name in table.column_names})


# --- rows to tokens


def _tokenize(data: Data) -> Dataset:
    """Makes a data set with the tokens and labels of each row, and its problem if it has one."""
    count = len(data.rows)
    shares = max(count / _ROWS_OF_A_PROCESS, data.rows.table.data.nbytes / _BYTES_OF_A_PROCESS)
    processes = min(_cores(), math.ceil(shares), count)
    table = data.rows.table
    with workers_forked():
        tokens: Dataset = table.map(
            _Worker(data),
            batched=True,
            batch_size=_BATCH,
            writer_batch_size=_BATCH,
            remove_columns=table.column_names,
            features=_features(),
            num_proc=processes if processes > 1 else None,
            new_fingerprint=_cache_key(data),
            desc="Tokenizing",
        )
    return tokens


def _features() -> Any:
    from datasets import Features, List, Value

    return Features(
        {name: List(Value("int32")) for name in COLUMNS}
        | {name: Value("int32") for name in ("length", "first")}
        | {name: Value("string") for name in ("form", "problem", "notes")}
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cache_key(data: Data) -> str:
    """Names the cache of a data set's tokens by everything that the tokens depend on, this program included."""
    renderer = data.renderer
    tokenizer = renderer.tokenizer
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        data.rows.table._fingerprint,
        *(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "tokenizers", "trl", "jinja2")),
        program("data", "formats", "render", "rows", "text_files"),
        backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items())),
        repr((type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map)),
        repr((renderer.template, renderer.assistant_only, renderer.text_field, data.rows.by_text)),
    ]
    for part in parts:
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class _Worker:
    """Makes a batch of rows into tokens. It puts the problem of a bad row into the column ``problem``."""

    data: Data

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        results = [self._row(content) for content in self.data.rows.contents(batch)]
        return {name: [result[name] for result in results] for name in results[0]}

    def _row(self, content: Any) -> dict[str, Any]:
        renderer = self.data.renderer
        form = ""
        try:
            row = renderer.parse(content())
            form = row.form
            tokens = renderer(row)
        except BadRow as error:
            empty = {"input_ids": [], "labels": [], "length": 0, "first": 0}
            return {**empty, "form": form, "problem": str(error), "notes": ""}
        return {
            "input_ids": tokens.ids,
            "labels": tokens.labels,
            "length": len(tokens.ids),
            "first": tokens.first,
            "form": form,
            "problem": None,
            "notes": " ".join(tokens.notes),
        }


# --- checks of all rows


def _usable(data: Data, tokens: Dataset, batching: Batching) -> tuple[Dataset, list[tuple[int, str]]]:
    """Returns the rows that can be trained on, and the index and the problem of each other row."""
    names = ["form", "problem", "first", "length"]
    columns = tokens.select_columns(names)[:]
    bad = []
    for i, (form, known, first, size) in enumerate(zip(*(columns[name] for name in names), strict=True)):
        problem = known or unusable(data, form, first, size, batching)
        if problem is not None:
            bad.append((i, problem))
    if not bad:
        return tokens, []
    others = {index for index, _ in bad}
    return tokens.select([i for i in range(len(tokens)) if i not in others]), bad


def unusable(data: Data, form: str, first: int, size: int, batching: Batching) -> str | None:
    """Says why a row that has tokens cannot be trained on together with the others, or returns None if it can.

    Args:
        data: The data set of the row.
        form: The form of the row.
        first: The index of the first token that is learned from.
        size: The number of tokens of the row.
        batching: How rows become sequences.
    """
    if form != data.form:
        return f"is {form}, but {data.first} is {data.form}"
    if batching.cuts and first >= batching.length:
        return (
            f"has nothing left to learn from: the first of its {size} tokens to learn from is number {first + 1}, but a "
            f"sequence has {batching.length}"
        )
    return None


def _totals(tokens: Dataset) -> tuple[int, str]:
    """Returns the highest token, and the sha256 of the tokens and labels of all rows."""
    highest, digest = -1, hashlib.sha256()
    for table in tokens.select_columns([*COLUMNS, "length"]).with_format("arrow").iter(batch_size=1000):
        for name in COLUMNS:
            values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype("<i4", copy=False)
            digest.update(np.ascontiguousarray(values).tobytes())
            if name == "input_ids":
                highest = max(highest, int(values.max()))
        digest.update(table["length"].to_numpy().astype("<i4").tobytes())
    return highest, digest.hexdigest()


def _learned(sequences: Dataset) -> tuple[int, int]:
    """Counts the tokens that are learned from, and the sequences without any such token."""
    total = idle = 0
    names = [name for name in ("labels", "seq_lengths") if name in sequences.column_names]
    for table in sequences.select_columns(names).with_format("arrow").iter(batch_size=1000):
        labels = table["labels"].combine_chunks()
        ends = np.cumsum(labels.value_lengths().to_numpy())
        rows = table[names[-1]].combine_chunks()
        sizes = rows.flatten().to_numpy() if len(names) > 1 else rows.value_lengths().to_numpy()
        learned = labels.flatten().to_numpy() != IGNORED
        learned[np.cumsum(sizes) - sizes] = False  # nothing predicts the first token of a row
        of_sequences = np.diff(np.concatenate([[0], np.cumsum(learned)[ends - 1]]))
        total, idle = total + int(of_sequences.sum()), idle + int((of_sequences == 0).sum())
    return total, idle


def _notes(tokens: Dataset, data: Sequence[Data], sequences: int, idle: int) -> Iterator[str]:
    """Yields the remarks of the report. ``idle`` is the number of sequences without a token to learn from."""
    from trl.chat_template_utils import is_chat_template_stop_token_trained

    renderer = data[0].renderer  # all have the same template
    found = Counter(note for notes in tokens.select_columns(["notes"])[:]["notes"] for note in notes.split())
    for name, count in sorted(found.items()):
        yield f"{count:,} of {counted(len(tokens), 'row')}: {NOTES[name]}"
    if idle:
        yield f"{idle:,} of {counted(sequences, 'sequence')} have nothing to learn from, only parts of prompts"
    if any(each.form == "completion of text" for each in data) and renderer.tokenizer.chat_template:
        yield "prompts of text are trained on as they are; the chat template is for lists of messages only"
    if renderer.assistant_only and not is_chat_template_stop_token_trained(
        renderer.tokenizer, chat_template=renderer.template
    ):
        yield (
            "the chat template does not mark the token that ends the assistant's turn, so the model may not learn to stop: "
            "move that token into {% generation %}…{% endgeneration %}"
        )


# --- words


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _several(named: list[str]) -> str:
    more = f"; {len(named) - NAMED:,} more" if len(named) > NAMED else ""
    return "; ".join(named[:NAMED]) + more


def refusal(named: list[str]) -> str:
    """Makes the text of the error about bad rows that are not left out."""
    return _several(named) + "; --skip-bad-rows leaves such rows out"


def _nothing(part: Part, purpose: Purpose, named: list[str]) -> str:
    return purpose.lacks_rows(part.name) + (f": {_several(named)}" if named else "")


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
