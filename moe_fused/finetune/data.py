"""Prepares the data of a run before the model is loaded: renders, tokenizes, masks, cuts, packs and counts all rows.

    rows        reads the rows of files and data sets, and names the place of each row
    formats     parses rows
    render      makes a row into tokens and labels
    tokenizing  does so for all rows of a data set
    bad_rows    names rows that cannot be trained on
    mix         sets rows aside for the evaluation, and mixes several data sets

``prepare`` makes the sequences of a run, those for its evaluation included. TRL takes them as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import preferences
from .bad_rows import NAMED_LEFT_OUT, Bad, RefusedRows, counted, no_rows
from .formats import BadRow, Kind, described
from .mix import mix, set_aside
from .mixture import Part
from .options import DEFAULTS, Method, Options
from .render import IGNORED, NOTES, Renderer, training_template
from .rows import EVALUATION, TRAINING, Purpose, Rows, read_rows, stream_rows
from .tokenizing import BATCH, tokenize, tokenize_block

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from .resolve import Batching

COLUMNS = ("input_ids", "labels")
# The columns of a row's tokens, by the method of the run.
_COLUMNS_OF: dict[Method, tuple[str, ...]] = {
    "sft": COLUMNS,
    "dpo": (*COLUMNS, "rejected_ids"),
    "ipo": (*COLUMNS, "rejected_ids"),
    "kto": (*COLUMNS, "wanted"),
}
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
        return self.form == "chat" or self.form.endswith("of messages")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold what is learned from a row."""
        return _COLUMNS_OF[self.renderer.method]

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
        used: What is used of each data set, by its name, if there are several.
    """

    rows: int
    tokens: int
    learned: int
    cut: int
    lost: int
    longest: int
    sequences: int
    steps: int | None
    left_out: list[Bad] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    used: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """What is used of each data set, with its name before it, if there are several."""
        return [f"{name}: {used}" for name, used in self.used.items()]

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
            column ``seq_lengths`` has their lengths. For preferences, the rows, in the columns of TRL's trainers:
            ``prompt_ids`` with ``chosen_ids`` and ``rejected_ids``, or with ``completion_ids`` and ``label``.
        report: The report about the rows.
        fingerprint: The sha256, in hexadecimal, of the tokens and labels of all rows that can be used, before rows are
            split, mixed, cut and packed. It changes if a change of the data, the template or the tokenizer changes any of
            them.
        evaluation: The sequences for the evaluation, if the run has one.
        digests: The same sha256 of each data set by its name, if there are several.
    """

    dataset: Dataset
    report: Report
    fingerprint: str
    evaluation: Prepared | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

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
    found = [_find(part, TRAINING, options.split, options, tokenizer) for part in options.datasets]
    return tuple(_with_template(each, options) for each in found)


def find_evaluation(options: Options, tokenizer: Any) -> Data | None:
    """Reads the rows of ``--eval-dataset`` as ``find`` does; returns None without that option."""
    if options.eval_dataset is None:
        return None
    return _with_template(
        _find(Part(options.eval_dataset), EVALUATION, options.eval_split, options, tokenizer), options
    )


def _find(part: Part, purpose: Purpose, split: str, options: Options, tokenizer: Any) -> Data:
    if options.streaming and purpose is TRAINING:
        rows = next(blocks(part, options), None)
        if rows is None:
            raise ValueError(no_rows(part, purpose, []))
    else:
        rows = read_rows(part.dataset, split=part.split or split, purpose=purpose, **_reading(part, options))
    plain = Renderer(tokenizer, None, options.assistant_only_loss, options.text_field, options.method)
    first = None
    bad: list[Bad] = []
    for batch in rows.table.iter(batch_size=BATCH):
        for content in rows.contents(batch):
            try:
                first = plain.parse(content())
                break
            except BadRow as error:
                bad.append(Bad.of(rows.place(len(bad)), str(error)))
        if first is not None:
            break
    if first is None:
        raise ValueError(no_rows(part, purpose, bad))
    if first.turns and not tokenizer.chat_template:
        raise ValueError(
            f"{purpose.option} {part.name} holds chats, but the tokenizer of {options.model} has no chat template: give "
            "one with --chat-template"
        )
    if options.assistant_only_loss and not first.turns:
        raise ValueError(
            f"--assistant-only-loss is for chats, but a row of {purpose.option} {part.name} is {described(first.form)}"
        )
    return Data(part, purpose, rows, plain, rows.place(len(bad)), first.kind, first.form)


def _with_template(data: Data, options: Options) -> Data:
    """Returns the same data with the template that marks what the assistant says, with ``--assistant-only-loss``."""
    if not options.assistant_only_loss:
        return data
    template = training_template(data.renderer.tokenizer, options.model)
    return dataclasses.replace(data, renderer=dataclasses.replace(data.renderer, template=template))


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
        tables, others = split_off(tables, data, options)
        held = Prepared(*_sequences(others, data, batching, [], None), fingerprint="")
    elif evaluation is not None:
        held = prepare_evaluation(evaluation, options, batching, vocabulary)
    sequences, report = _sequences(tables, data, batching, named, options)
    fingerprint, of_each = joined_digest(data, digests)
    return Prepared(sequences, report, fingerprint, held, of_each)


def joined_digest(data: Sequence[Data], digests: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Returns the sha256 of all data sets, and that of each by its name, if there are several."""
    if len(data) == 1:
        return digests[0], {}
    of_each = {each.part.name: digest for each, digest in zip(data, digests, strict=True)}
    return hashlib.sha256("".join(digests).encode()).hexdigest(), of_each


def prepare_evaluation(evaluation: Data, options: Options, batching: Batching, vocabulary: int) -> Prepared:
    """Makes the rows of ``--eval-dataset`` into sequences. The arguments and errors are those of ``prepare``."""
    tables, bad, (digest,) = _usable_rows([evaluation], options, batching, vocabulary)
    return Prepared(*_sequences(tables, [evaluation], batching, bad, None), fingerprint=digest)


def prepare_block(data: Data, options: Options, batching: Batching, vocabulary: int) -> tuple[Dataset, list[Bad], str]:
    """Makes a block of rows into tokens, in this process.

    Returns:
        The rows that can be used, the problems of the others, and the sha256 of the first ones.

    Raises:
        ValueError: Some rows cannot be used, and ``options`` do not leave them out, or the tokenizer has tokens that
            the model does not know.
    """
    tokens, named = usable(data, tokenize_block(data), batching)
    if named and not options.skip_bad_rows:
        raise RefusedRows(named)
    return tokens, named, _checked_totals(tokens, data, options, vocabulary)


def _usable_rows(
    data: Sequence[Data], options: Options, batching: Batching, vocabulary: int
) -> tuple[list[Dataset], list[Bad], list[str]]:
    """Returns the rows of each data set that can be used, the problems of all others, and the sha256 of each data set."""
    tables: list[Dataset] = []
    problems: list[Bad] = []
    for each in data:
        tokens, named = usable(each, tokenize(each), batching)
        if not len(tokens):
            raise ValueError(no_rows(each.part, each.purpose, named))
        tables.append(tokens)
        problems += named
    if problems and not options.skip_bad_rows:
        raise RefusedRows(problems)
    digests = [_checked_totals(tokens, each, options, vocabulary) for each, tokens in zip(data, tables, strict=True)]
    return tables, problems, digests


def _checked_totals(tokens: Dataset, data: Data, options: Options, vocabulary: int) -> str:
    """Returns the sha256 of the tokens; raises ValueError if one of them is not in the vocabulary of the model."""
    highest, digest = _totals(tokens, data.columns)
    if highest >= vocabulary:
        raise ValueError(
            f"the tokenizer of {options.model} makes the token {highest}, but the model knows {vocabulary} tokens: they "
            "do not belong together"
        )
    return digest


def split_off(tables: list[Dataset], data: Sequence[Data], options: Options) -> tuple[list[Dataset], list[Dataset]]:
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
    tables: list[Dataset], data: Sequence[Data], batching: Batching, left_out: list[Bad], options: Options | None
) -> tuple[Dataset, Report]:
    """Returns sequences of rows, and their report. ``options`` are those of the training, None for an evaluation."""
    if data[0].renderer.method != "sft":
        return _preferences(tables, data, batching, left_out, options)
    tokens, taken = mixed(tables, data, options)
    sizes = _sizes(tokens)
    sequences: Dataset = fit(tokens.select_columns(list(COLUMNS)), batching)
    batches = math.ceil(len(sequences) / batching.batch_size)
    over = np.maximum(sizes - batching.length, 0) if batching.cuts else np.zeros(1, dtype=np.int64)
    learned, idle = _learned(sequences)
    steps = None if options is None else _steps(options, batches, batching)
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
        notes=[
            *_notes(data, len(sequences), idle),
            *_remarks(tokens, data),
            *_notes_on_shares(data, taken, options),
            *_notes_on_steps(options, steps),
        ],
        used=_all_used(data, tables, taken),
    )
    return sequences, report


def _preferences(
    tables: list[Dataset], data: Sequence[Data], batching: Batching, left_out: list[Bad], options: Options | None
) -> tuple[Dataset, Report]:
    """Does for rows of preferences what ``_sequences`` does."""
    tokens, taken = mixed(tables, data, options)
    # TRL goes through rated rows in their order, because it compares an answer with those beside it.
    found = preferences.for_trl(tokens, options.seed if options is not None and options.method == "kto" else None)
    whole, prompts = preferences.whole_lengths(found), preferences.prompt_lengths(found)
    held = np.minimum(whole, batching.length)
    batches = math.ceil(len(found) / batching.batch_size)
    steps = None if options is None else _steps(options, batches, batching)
    report = Report(
        rows=len(found),
        tokens=int(whole.sum()),
        learned=int((held - prompts).sum()),
        cut=int((whole > held).any(axis=0).sum()),
        lost=int((whole - held).sum()),
        longest=int(whole.max()),
        sequences=whole.size,
        steps=steps,
        left_out=left_out,
        notes=[*_remarks(tokens, data), *_notes_on_shares(data, taken, options), *_notes_on_steps(options, steps)],
        used=_all_used(data, tables, taken),
    )
    return found, report


def _steps(options: Options, batches: int, batching: Batching) -> int:
    """Returns the number of steps of a run whose data make ``batches`` batches."""
    return options.max_steps or math.ceil(options.epochs * math.ceil(batches / batching.step_batches))


def mixed(tables: list[Dataset], data: Sequence[Data], options: Options | None) -> tuple[Dataset, list[Dataset]]:
    """Returns the rows of all data sets, and those that were taken from each. ``options`` are None for an evaluation."""
    return mix(
        tables, [None if options is None else each.part.share for each in data], 0 if options is None else options.seed
    )


def _all_used(data: Sequence[Data], tables: list[Dataset], taken: list[Dataset]) -> dict[str, str]:
    parts = zip(data, tables, taken, strict=True) if len(data) > 1 else ()
    return {each.part.name: _used(table, rows) for each, table, rows in parts}


def _used(table: Dataset, taken: Dataset) -> str:
    """Says how many rows of a data set are used, of those that can be."""
    of = "" if len(taken) == len(table) else f"{len(taken):,} of "
    return f"{of}{counted(len(table), 'row')}, {counted(int(_sizes(taken).sum()), 'token')}"


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


# --- checks of all rows


def usable(data: Data, tokens: Dataset, batching: Batching) -> tuple[Dataset, list[Bad]]:
    """Returns the rows that can be trained on, and the place and the problem of each other row."""
    names = ["form", "problem", "first", "length"]
    columns = tokens.select_columns(names)[:]
    bad: dict[int, Bad] = {}
    for i, (form, known, first, size) in enumerate(zip(*(columns[name] for name in names), strict=True)):
        problem = known or unusable(data, form, first, size, batching)
        if problem is not None:
            bad[i] = Bad.of(data.rows.place(i), problem)
    if not bad:
        return tokens, []
    return tokens.select([i for i in range(len(tokens)) if i not in bad]), list(bad.values())


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
        forms = f"{described(form)}, but {data.first} is {described(data.form)}"
        return f"is {forms}: all rows of a data set must have the same form"
    if batching.cuts and first >= batching.length:
        return (
            f"has nothing left to learn from: the first of its {size} tokens to learn from is number {first + 1}, but a "
            f"sequence has {batching.length}"
        )
    return None


def _totals(tokens: Dataset, columns: tuple[str, ...]) -> tuple[int, str]:
    """Returns the highest token, and the sha256 of what is learned from in all rows."""
    highest, digest = -1, hashlib.sha256()
    for table in tokens.select_columns([*columns, "length"]).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            array = table[name].combine_chunks()
            flat = array if name == "wanted" else array.flatten()
            values = flat.to_numpy(zero_copy_only=False).astype("<i4", copy=False)
            digest.update(np.ascontiguousarray(values).tobytes())
            if name in ("input_ids", "rejected_ids"):
                highest = max(highest, int(values.max(initial=-1)))
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


def _remarks(tokens: Dataset, data: Sequence[Data]) -> Iterator[str]:
    """Yields the remarks on rows and on how they are written."""
    found = Counter(note for notes in tokens.select_columns(["notes"])[:]["notes"] for note in notes.split())
    for name, count in sorted(found.items()):
        yield f"{count:,} of {counted(len(tokens), 'row')}: {NOTES[name]}"
    field = data[0].renderer.text_field
    if field != DEFAULTS["text_field"] and not any(each.kind == "text" for each in data):
        yield f"--text-field {field} has no effect: no row is plain text"
    if any(each.form.endswith("of text") for each in data) and data[0].renderer.tokenizer.chat_template:
        yield "prompts of text are trained on as they are; the chat template is for lists of messages only"


def _notes(data: Sequence[Data], sequences: int, idle: int) -> Iterator[str]:
    """Yields the remarks on sequences. ``idle`` is the number of sequences without a token to learn from."""
    from trl.chat_template_utils import is_chat_template_stop_token_trained

    renderer = data[0].renderer  # all have the same template
    if idle:
        yield f"{idle:,} of {counted(sequences, 'sequence')} have nothing to learn from, only parts of prompts"
    if renderer.assistant_only and not is_chat_template_stop_token_trained(
        renderer.tokenizer, chat_template=renderer.template
    ):
        yield (
            "the chat template does not mark the token that ends the assistant's turn, so the model may not learn to stop: "
            "move that token into {% generation %}…{% endgeneration %}"
        )


def _notes_on_shares(data: Sequence[Data], taken: Sequence[Dataset], options: Options | None) -> Iterator[str]:
    """Yields a remark for each data set of which the mix has no row."""
    for each, rows in zip(data, taken, strict=True):
        if options is not None and each.part.share is not None and not len(rows):
            yield (
                f"no row of {each.part.name} is used: with the share {each.part.share:g}, none was drawn before a data set "
                "had no row left; a larger share, or more rows in the others, makes it count"
            )


def _notes_on_steps(options: Options | None, steps: int | None) -> Iterator[str]:
    """Yields the remarks that need the number of steps of the training."""
    if options is None or steps is None or not options.evaluates:
        return
    every = options.eval_steps or options.save_steps
    if every > steps:
        source = "" if options.eval_steps else ", as --save-steps,"
        yield (
            f"--eval-steps is {every}{source} and the run has {counted(steps, 'step')}: the only evaluation is that "
            "after the last step"
        )
