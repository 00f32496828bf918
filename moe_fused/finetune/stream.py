"""Data that are not read as a whole: rows are read, checked, rendered and packed while the run trains (``--streaming``).

Rows come in blocks. The first block of each data set is checked before the model is loaded, and what has to be decided
about the data is decided from it. After the last row the stream begins again, so that it never ends. Its sequences
depend on the data and the options alone, so a resumed run skips those that it has trained on and goes on behind them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .bad_rows import NAMED_LEFT_OUT, RefusedRows, counted
from .batches import lengths_of
from .data import (
    BLOCK,
    COLUMNS,
    Data,
    Prepared,
    blocks,
    fit,
    joined_digest,
    prepare_block,
    prepare_evaluation,
)
from .endings import Expected

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from .options import Options
    from .resolve import Batching

# A sequence has at most one document for this many of its tokens, which bounds what attention takes for boundaries.
DOCUMENT_TOKENS = 8


class BadRows(Expected):
    """Rows that came while the run trained cannot be trained on."""


@dataclass(frozen=True)
class Read:
    """What was read of a data set so far. A row that is read again, in another pass, counts once.

    Attributes:
        left_out: The place and the problem of each row that was left out.
        sizes: For each block, by its number, the numbers of rows and of tokens, and of those that were cut.
    """

    left_out: dict[str, None] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)

    def add(self, number: int, tokens: Dataset, batching: Batching) -> None:
        """Counts the rows of a block that can be used, and their tokens before any is cut off."""
        sizes = np.asarray(tokens["length"], dtype=np.int64)
        over = np.maximum(sizes - batching.length, 0) if batching.cuts else np.zeros(1, dtype=np.int64)
        self.sizes[number] = len(sizes), int(sizes.sum()), int((over > 0).sum()), int(over.sum())

    def __str__(self) -> str:
        rows, tokens, cut, lost = map(sum, zip((0, 0, 0, 0), *self.sizes.values(), strict=True))
        of_cut = f", {counted(cut, 'row')} cut, which lose {counted(lost, 'token')}" if cut else ""
        return (
            f"{counted(rows, 'row')}, {counted(tokens, 'token')}{of_cut}, {counted(len(self.left_out), 'row')} left out"
        )


@dataclass(frozen=True)
class Streamed:
    """The sequences of a run whose rows come while it trains.

    Attributes:
        dataset: The sequences, without an end, in the columns of ``data.Prepared``.
        first: The number of tokens of each sequence that the first blocks make.
        fingerprint: The sha256 of the tokens and labels of the rows of the first blocks that can be used.
        evaluation: The sequences for the evaluation, if the run has one.
        digests: The same sha256 of each data set by its name, if there are several.
        read: What was read so far of each data set, by its name and share.
    """

    dataset: IterableDataset
    first: list[int]
    fingerprint: str
    evaluation: Prepared | None
    digests: Mapping[str, str]
    read: Mapping[str, Read]

    @property
    def used(self) -> list[str]:
        """What was read of each data set so far."""
        return [f"{name}: {read}" for name, read in self.read.items()]

    def lines(self) -> Iterator[str]:
        """Says that the data are a stream, before the run begins."""
        yield f"data: {', '.join(self.read)}; rows are read and checked as they come, the first {BLOCK:,} are checked now"
        if self.evaluation is not None:
            yield from self.evaluation.report.lines()

    def ending(self) -> Iterator[str]:
        """Says at the end what was read."""
        for each in self.used:
            yield f"read: {each}"


def prepare_stream(
    data: Sequence[Data],
    options: Options,
    batching: Batching,
    say: Callable[[str], None],
    *,
    vocabulary: int,
    evaluation: Data | None = None,
) -> Streamed:
    """Checks the first block of each data set, and makes the stream of all sequences.

    Args:
        data: The first block of each data set, and their renderers.
        options: The options of the run.
        batching: How rows become sequences, batches and steps.
        say: The function that is called with a line for each row that is left out.
        vocabulary: The number of tokens that the model knows.
        evaluation: The rows of ``--eval-dataset``, if the run has them.

    Raises:
        ValueError: As ``data.prepare`` raises it, for the rows of the first blocks and of the evaluation.
    """
    from datasets import concatenate_datasets, interleave_datasets

    tables, digests = [], []
    for each in data:
        tokens, _, digest = prepare_block(each, options, batching, vocabulary)
        if not len(tokens):
            raise ValueError(
                f"{each.purpose.option} {each.part.name}: none of its first {BLOCK:,} rows can be trained on"
            )
        tables.append(tokens.select_columns(list(COLUMNS)))
        digests.append(digest)
    held = None if evaluation is None else prepare_evaluation(evaluation, options, batching, vocabulary)
    read = {str(each.part): Read() for each in data}
    streams = [
        _stream_of(each, options, batching, vocabulary, seen, say)
        for each, seen in zip(data, read.values(), strict=True)
    ]
    shares = [each.part.share for each in data if each.part.share is not None]
    if len(streams) == 1:
        joined = streams[0]
    elif not shares:
        joined = concatenate_datasets(streams)
    else:
        chances = [share / sum(shares) for share in shares]
        joined = interleave_datasets(
            streams, probabilities=chances, seed=options.seed, stopping_strategy="first_exhausted"
        )
    fingerprint, of_each = joined_digest(data, digests)
    return Streamed(
        dataset=_sequences_of(joined, batching),
        first=lengths_of(fit(concatenate_datasets(tables), batching)),
        fingerprint=fingerprint,
        evaluation=held,
        digests=of_each,
        read=read,
    )


def _stream_of(
    data: Data, options: Options, batching: Batching, vocabulary: int, read: Read, say: Callable[[str], None]
) -> IterableDataset:
    """Makes a stream of the tokens and labels of all rows of a data set that can be used."""
    from datasets import DatasetInfo, Features, IterableDataset, List, Value
    from datasets.iterable_dataset import ExamplesIterable

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, block in enumerate(blocks(data.part, options)):
            try:
                tokens, bad, _ = prepare_block(dataclasses.replace(data, rows=block), options, batching, vocabulary)
            except RefusedRows as error:
                raise BadRows(
                    f"{error.rows}; either mend what is wrong there and go on, or begin again with --overwrite and "
                    "--skip-bad-rows, which leaves such rows out"
                ) from error
            except ValueError as error:
                raise BadRows(str(error)) from error
            for problem in bad:
                if problem not in read.left_out and len(read.left_out) < NAMED_LEFT_OUT:
                    say(f"left out: {problem}")
                read.left_out[problem] = None
            read.add(number, tokens, batching)
            for row in tokens.select_columns(list(COLUMNS)):
                yield number, row

    # Not by from_generator, which would pickle the function with all that it knows.
    features = Features({name: List(Value("int32")) for name in COLUMNS})
    return IterableDataset(ExamplesIterable(rows, {}), info=DatasetInfo(features=features))


def _sequences_of(rows: IterableDataset, batching: Batching) -> IterableDataset:
    """Makes an endless stream of sequences from a stream of rows."""
    sequences: Any = fit(rows, batching, batch_size=BLOCK)
    if batching.has_documents:
        sequences = sequences.map(
            _with_fewer_documents, batched=True, batch_size=1, fn_kwargs={"most": most_documents(batching)}
        )
    endless: IterableDataset = sequences.repeat(None)
    return endless


def most_documents(batching: Batching) -> int:
    """Returns the largest number of documents in a sequence of a stream."""
    return max(1, batching.length // DOCUMENT_TOKENS)


def _with_fewer_documents(sequence: dict[str, list[list[int]]], most: int) -> dict[str, list[list[int]]]:
    """Cuts a sequence that has more than ``most`` documents into several."""
    (lengths,) = sequence["seq_lengths"]
    if len(lengths) <= most:
        return sequence
    made: dict[str, list[list[int]]] = {name: [] for name in sequence}
    begin = 0
    for first in range(0, len(lengths), most):
        some = lengths[first : first + most]
        made["seq_lengths"].append(some)
        for name in COLUMNS:
            made[name].append(sequence[name][0][begin : begin + sum(some)])
        begin += sum(some)
    return made
