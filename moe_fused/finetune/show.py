"""Shows rows as they will be trained on, with their special tokens, masks and cuts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .data import Data, refusal, unusable
from .formats import BadRow
from .render import IGNORED, Tokens

if TYPE_CHECKING:
    from .resolve import Batching

_WIDTH = len("learned: ")


def show_rows(parts: Sequence[Data], number: int, batching: Batching, *, skip_bad: bool = False) -> Iterator[str]:
    """Yields the lines that show the first ``number`` rows of each data set.

    The first line of a row has its place and its counts. The text of the row follows in pieces. The model reads a
    ``masked`` piece, but does not learn from it. A piece that is ``cut off`` lies beyond the end of the sequence. A
    line break in the text is shown as ``\\n`` at the end of a line. Other control characters are shown as Python writes
    them.

    Args:
        parts: The rows of each data set, and their renderers.
        number: The number of rows of a data set to show.
        batching: How rows become sequences.
        skip_bad: Whether rows that cannot be trained on are left out.

    Raises:
        ValueError: Some of these rows cannot be trained on, and are not left out. The error comes after all lines.
    """
    bad = []
    for data, index in ((each, i) for each in parts for i in range(min(number, len(each.rows)))):
        place = data.rows.place(index)
        try:
            row = data.renderer.parse(data.content(index))
            tokens = data.renderer(row)
            problem = unusable(data, row.form, tokens.first or 0, len(tokens.ids), batching)
        except BadRow as error:
            tokens, problem = None, str(error)
        if problem is not None:
            bad.append(f"{place} {problem}")
            yield f"{place}: this row cannot be trained on, because it {problem}"
        if tokens is not None:
            end = batching.length if batching.cuts else len(tokens.ids)
            yield from _row(place, tokens, data.renderer.tokenizer, end)
    if bad and not skip_bad:
        raise ValueError(refusal(bad))


def _row(place: str, tokens: Tokens, tokenizer: Any, end: int) -> Iterator[str]:
    count = len(tokens.ids)
    kinds = [
        "cut off" if i >= end else "learned" if label != IGNORED else "masked" for i, label in enumerate(tokens.labels)
    ]
    cut = f", {count - end} cut off" if count > end else ""
    # Nothing predicts the first token, so it is not learned from, whatever its label is.
    yield f"{place}: {count} tokens, {kinds[1:].count('learned')} to learn from{cut}"
    begin = 0
    for kind, group in groupby(kinds):
        ids = tokens.ids[begin : begin + len(list(group))]
        begin += len(ids)
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        visible = "".join(repr(letter)[1:-1] if letter < " " and letter not in "\n\t" else letter for letter in text)
        first, *others = visible.replace("\n", "\\n\n").removesuffix("\n").split("\n")
        yield f"{kind + ':':<{_WIDTH}}{first}"
        yield from (" " * _WIDTH + line for line in others)
    yield ""
