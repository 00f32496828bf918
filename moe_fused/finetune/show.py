"""Shows rows as they will be trained on, with their special tokens, masks and cuts, and the sequences that they become."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from .bad_rows import Bad, RefusedRows, no_rows, refusal
from .data import COLUMNS as OF_TOKENS
from .data import Data, fit, mixed, split_off, unusable, usable
from .formats import BadRow
from .options import Method
from .render import IGNORED, Tokens
from .tokenizing import tokenize

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from .options import Options
    from .resolve import Batching

# The number of columns of a line about a sequence, and of the name of a row in it.
COLUMNS, _NAME = 100, 40
_INDENT = len("  at 16,384: ")
_POSITIONS = {
    "bfd": "positions begin at 0 with each row",
    "bfd_split": "positions begin at 0 with each row or part of one",
    "wrapped": "positions run on, so rows see those before them",
    "none": "padded to the longest of its batch",
}
# Names of the columns that say where each token of a sequence came from: the index of its row, and its own in the row.
ROW, PLACE = "row", "place"
# TRL packs this many rows at a time, so the first sequences depend on no others.
_ROWS_OF_PACKING = 1000
# What a piece is called that is learned from, where that is not all to say.
_LEARNED: dict[Method, str] = {"dpo": "chosen", "ipo": "chosen", "kto": "answer"}


def show_rows(parts: Sequence[Data], number: int, batching: Batching, *, skip_bad: bool = False) -> Iterator[str]:
    """Yields the lines that show the first ``number`` rows of each data set.

    The first line of a row has its place and its counts. The text of the row follows in pieces. The model reads a
    ``masked`` piece, but does not learn from it. A piece that is ``cut off`` lies beyond the end of the sequence. A
    line break in the text is shown as ``\\n`` at the end of a line. Other control characters are shown as Python writes
    them. A preference is shown as its prompt with the chosen answer, and then the rejected answer alone.

    Args:
        parts: The rows of each data set, and their renderers.
        number: The number of rows of a data set to show.
        batching: How rows become sequences.
        skip_bad: Whether rows that cannot be trained on are left out.

    Raises:
        ValueError: Some of these rows cannot be trained on, and are not left out. The error comes after all lines.
    """
    bad: list[Bad] = []
    for data, index in ((each, i) for each in parts for i in range(min(number, len(each.rows)))):
        place = data.rows.place(index)
        try:
            row = data.renderer.parse(data.content(index))
            tokens = data.renderer(row)
            problem = unusable(data, row.form, tokens.first or 0, len(tokens.ids), batching)
        except BadRow as error:
            tokens, problem = None, str(error)
        if problem is not None:
            bad.append(Bad.of(place, problem))
            yield f"{place}: this row cannot be trained on, because it {problem}"
        if tokens is not None:
            end = batching.length if batching.cuts else len(tokens.ids)
            learned = _LEARNED.get(data.renderer.method, "learned")
            yield from _row(place, tokens, data.renderer.tokenizer, end, learned)
            yield ""
    if bad and not skip_bad:
        raise RefusedRows(bad)


def _row(place: str, tokens: Tokens, tokenizer: Any, end: int, learned: str) -> Iterator[str]:
    kinds = _kinds(tokens.labels, end, learned)
    answers = [(tokens.ids, kinds, 0)]
    counts = _counts(kinds, learned)
    if tokens.rejected:  # the prompt before it is shown once
        prompt = [label for label in tokens.labels if label == IGNORED]
        others = _kinds(prompt + tokens.rejected, end, "rejected")
        answers.append((tokens.ids[: len(prompt)] + tokens.rejected, others, len(prompt)))
        counts = f"chosen {counts}; rejected {_counts(others, 'rejected')}"
    yield f"{place}: {counts}"
    width = max(len(kind) for kind in ("learned", "cut off", learned, *(["rejected"] if tokens.rejected else []))) + 2
    for ids, all_kinds, begin in answers:
        yield from _pieces(ids[begin:], all_kinds[begin:], tokenizer, width)


def _kinds(labels: Sequence[int], end: int, learned: str) -> list[str]:
    """What becomes of each token of a row."""
    return ["cut off" if i >= end else learned if label != IGNORED else "masked" for i, label in enumerate(labels)]


def _counts(kinds: Sequence[str], learned: str) -> str:
    cut = kinds.count("cut off")
    # Nothing predicts the first token, so it is not learned from, whatever its label is.
    return f"{len(kinds)} tokens, {kinds[1:].count(learned)} to learn from" + (f", {cut} cut off" if cut else "")


def _pieces(all_ids: Sequence[int], kinds: Sequence[str], tokenizer: Any, width: int) -> Iterator[str]:
    """Yields the lines of the text, in pieces of one kind, with the name of the kind in so many columns before them."""
    begin = 0
    for kind, group in groupby(kinds):
        ids = all_ids[begin : begin + len(list(group))]
        begin += len(ids)
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        visible = "".join(repr(letter)[1:-1] if letter < " " and letter not in "\n\t" else letter for letter in text)
        first, *others = visible.replace("\n", "\\n\n").removesuffix("\n").split("\n")
        yield f"{kind + ':':<{width}}{first}"
        yield from (" " * width + line for line in others)


def show_sequences(data: Sequence[Data], options: Options, number: int, batching: Batching) -> Iterator[str]:
    """Yields the lines that show the first ``number`` sequences that packing makes.

    The first line of a sequence says how full it is. A line for each of its rows follows: where it begins in the
    sequence, its place, its number of tokens, how many of them were cut off, and the positions that are learned from. No
    line is longer than ``COLUMNS``.

    Args:
        data: The rows of each data set, and their renderers.
        options: The options of the run.
        number: The number of sequences to show.
        batching: How rows become sequences.

    Raises:
        ValueError: No row is left to train on.
    """
    sequences, sizes, bad = first_sequences(data, options, batching, number)
    if bad and not options.skip_bad_rows:
        yield f"no sequences: {refusal(bad)}"
        return
    for index, sequence in enumerate(sequences.with_format("numpy"), 1):
        yield from _sequence(index, sequence, sizes, data, batching)


def first_sequences(
    data: Sequence[Data], options: Options, batching: Batching, number: int
) -> tuple[Dataset, dict[int, int], list[Bad]]:
    """Makes the first sequences that a run trains on, and keeps where each of their tokens came from.

    Args:
        data: The rows of each data set, and their renderers.
        options: The options of the run.
        batching: How rows become sequences.
        number: The number of sequences.

    Returns:
        The sequences with the columns ``ROW`` (the number of the row among those of all data sets, see ``place_of``) and
        ``PLACE``, the number of tokens of each of these rows, and the problems of rows that cannot be trained on, which
        are left out.

    Raises:
        ValueError: No row of a data set is left to train on.
    """
    from datasets import Dataset

    most = number * _ROWS_OF_PACKING
    is_mixed = any(each.part.share is not None for each in data)
    needs_all = is_mixed or options.eval_share is not None or options.skip_bad_rows
    tables: list[Dataset] = []
    named: list[Bad] = []
    begin = 0
    for each in data:
        rows = each.rows
        some = (
            rows if needs_all or most >= len(rows) else dataclasses.replace(rows, table=rows.table.select(range(most)))
        )
        tokens = tokenize(dataclasses.replace(each, rows=some))
        tokens, problems = usable(each, tokens.add_column(ROW, np.arange(len(tokens)) + begin), batching)
        if not len(tokens):
            raise ValueError(no_rows(each.part, each.purpose, problems))
        tables.append(tokens)
        named += problems
        begin += len(rows)
    if options.eval_share is not None:
        tables, _ = split_off(tables, data, options)
    tokens, _ = mixed(tables, data, options)
    tokens = tokens.select(range(min(len(tokens), most)))
    columns = tokens.select_columns([ROW, "length"]).with_format("numpy")[:]
    numbers, sizes = columns[ROW], columns["length"]
    table = tokens.select_columns(list(OF_TOKENS)).with_format("arrow")[:]
    table = table.append_column(ROW, _lists(np.repeat(numbers, sizes), sizes))
    table = table.append_column(PLACE, _lists(np.concatenate([np.arange(size) for size in sizes]), sizes))
    sequences = fit(Dataset(table), batching)
    sequences = sequences.select(range(min(number, len(sequences))))
    return sequences, dict(zip(numbers.tolist(), sizes.tolist(), strict=True)), named


def place_of(data: Sequence[Data], number: int) -> str:
    """Returns the place of a row, by its number among the rows of all data sets."""
    for each in data:
        if number < len(each.rows):
            return each.rows.place(number)
        number -= len(each.rows)
    raise IndexError("there is no such row")


def _lists(values: np.ndarray, sizes: np.ndarray) -> pa.Array:
    """Cuts values into lists of these sizes."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values.astype(np.int32))


def _sequence(
    index: int, sequence: dict[str, Any], sizes: dict[int, int], data: Sequence[Data], batching: Batching
) -> Iterator[str]:
    rows, places = sequence[ROW], sequence[PLACE]
    count, learned = len(rows), sequence["labels"] != IGNORED
    # A row begins where the row changes, and where a part of the same row follows that is not the next one.
    begins = [0, *(np.flatnonzero((np.diff(rows) != 0) | (np.diff(places) != 1)) + 1)]
    if batching.has_documents:
        begins = [0, *np.cumsum(sequence["seq_lengths"])[:-1]]
        learned[begins] = False  # nothing predicts the first token of a row
    else:
        learned[0] = False
    what = "1 row" if len(begins) == 1 else f"{len(begins):,} rows"
    share = count / batching.length
    yield (
        f"sequence {index}: {what}, {count:,} of {batching.length:,} tokens ({int(100 * share)} % full), "
        f"{int(learned.sum()):,} to learn from"
    )
    yield f"  packing {batching.packing}: {_POSITIONS[batching.packing]}"
    for begin, end in zip(begins, [*begins[1:], count], strict=True):
        size, first, last = sizes[int(rows[begin])], int(places[begin]), int(places[end - 1])
        zero = begin if batching.has_documents else 0
        words = f"{end - begin:,} tokens"
        if batching.cuts and end - begin < size:
            words += f", {size - (end - begin):,} cut off"
        elif end - begin < size:
            words = f"tokens {first + 1:,} to {last + 1:,} of {size:,}"
        name = place_of(data, int(rows[begin]))
        name = name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
        line = f"  at {int(begin):>6,}: {name}, {words}"
        positions = np.flatnonzero(learned[begin:end]) + begin - zero
        ranges = _ranges(positions, COLUMNS - _INDENT)
        if len(line) + len(ranges) + 2 <= COLUMNS:
            yield f"{line}; {ranges}"
        else:
            yield line
            yield f"{'':<{_INDENT}}{ranges}"
    yield ""


def _ranges(positions: np.ndarray, columns: int) -> str:
    """Writes the positions that are learned from as ranges, as many as fit into a number of columns."""
    if not len(positions):
        return "nothing learned"
    ends = np.flatnonzero(np.diff(positions) != 1)
    firsts, lasts = positions[[0, *(ends + 1)]], positions[[*ends, len(positions) - 1]]
    ranges = [f"{first}" if first == last else f"{first}-{last}" for first, last in zip(firsts, lasts, strict=True)]
    for kept in range(len(ranges), 0, -1):
        more = f" and {len(ranges) - kept:,} more" if kept < len(ranges) else ""
        text = f"learned {', '.join(ranges[:kept])}{more}"
        if len(text) <= columns or kept == 1:
            break
    return text
