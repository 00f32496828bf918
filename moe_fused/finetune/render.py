"""Makes a row into tokens and labels with the chat template, and masks the tokens that are not learned from.

Tokens and labels are those that TRL's SFTTrainer makes of the same row (``tests/integration/test_finetune_render.py``
compares them). TRL does this after the model is loaded, and stops at the first row that fails without naming it. Here
all rows are rendered before the model is loaded, and a row that fails keeps its problem.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .formats import BadRow, Message, Row, parse_preference, parse_rated, parse_row
from .options import Method

# The label of a token that the model reads but does not learn from.
IGNORED = -100
# A mark is put behind a part of a row. If the template ignores that part, the mark is missing from the rendered text.
# No text contains such a word by itself.
_MARK = "zQ7mArK{}kRaM7Qz"

# Remarks on rows that are trained on all the same. The report puts the number of such rows before each remark.
NOTES = {
    "boundary": "the prompt is rendered differently alone and before its completion; the end that differs is learned "
    "from as if it belonged to the completion",
    "content": "the chat template ignores text beside tool_calls",
    "spans": "fewer parts are learned from than the assistant has turns; --show-rows shows which",
}


@dataclass(frozen=True)
class Tokens:
    """The tokens and labels of a row.

    Attributes:
        ids: The tokens.
        labels: The same tokens, with ``IGNORED`` in place of each token that is not learned from.
        notes: The keys of the remarks in ``NOTES`` that apply to the row.
        rejected: The tokens of the other answer of a preference, without those of the prompt.
    """

    ids: list[int]
    labels: list[int]
    notes: list[str]
    rejected: list[int] = field(default_factory=list)

    @property
    def first(self) -> int | None:
        """The index of the first token that is learned from. It is never 0, because nothing predicts token 0."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORED and i), None)


@dataclass(frozen=True)
class Renderer:
    """Makes rows into tokens and labels.

    Attributes:
        tokenizer: The model's tokenizer.
        template: A chat template that replaces the tokenizer's own, or None.
        assistant_only: Whether training on chats learns only from the assistant's words.
        text_field: The name of the field that holds plain text.
        method: How the run learns from rows, one of the values of ``--method``.
    """

    tokenizer: Any
    template: str | None
    assistant_only: bool
    text_field: str
    method: Method = "sft"

    def parse(self, content: object) -> Row:
        """Parses a row of the data set; raises BadRow."""
        has_template = bool(self.tokenizer.chat_template)
        if self.method == "sft":
            return parse_row(content, self.text_field, has_template)
        return parse_rated(content) if self.method == "kto" else parse_preference(content, has_template)

    def __call__(self, row: Row) -> Tokens:
        """Returns the tokens and labels of a row.

        Raises:
            BadRow: The row cannot be rendered as it is, or there is nothing in it to learn from.
        """
        if row.kind == "preference":
            return self._preference(row)
        try:
            tokens = self._chat(row) if row.turns else self._text(row)
        except UnicodeEncodeError as error:
            letter = error.object[error.start : error.start + 1]
            raise BadRow(f"has half of a surrogate pair, {letter!a}, which is not text") from None
        if not tokens.ids:
            raise BadRow("has no tokens")
        if tokens.first is None:
            raise BadRow(self._why_nothing(row))
        return tokens

    def _why_nothing(self, row: Row) -> str:
        if not self.assistant_only:
            return "has nothing to learn from"
        if not any(turn["role"] == "assistant" for turn in row.turns):
            return "has no turn of the assistant, so that --assistant-only-loss leaves nothing to learn from"
        if any(weight is False for weight in row.weights):
            return "has weights that leave nothing to learn from"
        return "has nothing to learn from: the chat template marks none of it with {% generation %}"

    def _preference(self, row: Row) -> Tokens:
        """Renders both answers. As in TRL, the prompt ends where the first of them differs from the prompt alone."""
        chosen, rejected = (self(row.with_answer(answer)) for answer in (row.completion, row.rejected))
        begin = min(_prompt_length(chosen), _prompt_length(rejected))
        if chosen.ids == rejected.ids:
            raise BadRow("has answers that have the same tokens: there is nothing to prefer")
        notes = sorted({*chosen.notes, *rejected.notes})
        return Tokens(chosen.ids, [IGNORED] * begin + chosen.ids[begin:], notes, rejected.ids[begin:])

    # Text.

    def _encode(self, text: str) -> list[int]:
        text.encode()  # This raises for half of a surrogate pair, which some tokenizers would replace silently.
        ids: list[int] = self.tokenizer(text=text, verbose=False)["input_ids"]
        return ids

    def _text(self, row: Row) -> Tokens:
        end = self.tokenizer.eos_token
        if row.kind == "text":
            ids = self._encode(_ended(row.text, end))
            return Tokens(ids, ids, [])
        prompt, completion = str(row.prompt), _ended(str(row.completion), end)
        return _completed(self._encode(prompt), self._encode(prompt + completion), None)

    # Chats.

    def render(self, turns: list[Message], row: Row, tools: list[Any] | None) -> str:
        """Renders ``turns`` with the chat template; raises BadRow if the template fails."""
        return str(self._apply(turns, row, tools, tokenize=False))

    def _apply(self, turns: list[Message], row: Row, tools: list[Any] | None, **arguments: Any) -> Any:
        try:
            all_arguments = {"chat_template": self.template, "tools": tools, **row.template_kwargs, **arguments}
            return self.tokenizer.apply_chat_template(turns, **all_arguments)
        except UnicodeEncodeError:
            raise
        except Exception as error:  # noqa: BLE001  # templates are programs, which can raise anything
            raise BadRow(f"cannot be rendered by the chat template: {_reason(error)}") from None

    def _chat(self, row: Row) -> Tokens:
        self._check_weights(row)
        row = self._without_null(row)
        notes = self._check_shown(row)
        dictionary = {"tokenize": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}}
        output = self._apply(row.turns, row, row.tools, return_assistant_tokens_mask=self.assistant_only, **dictionary)
        ids: list[int] = output["input_ids"]
        mask: list[int] | None = None
        if self.assistant_only:
            mask, seen = self._weighed(row, list(output["assistant_masks"]))
            if any(mask) and seen < _answers(row):
                notes.append("spans")
        if not isinstance(row.prompt, list):
            return Tokens(ids, _masked(ids, mask), notes)
        prompt = self._apply(row.prompt, row, row.tools, add_generation_prompt=True, **dictionary)["input_ids"]
        tokens = _completed(prompt, ids, mask)
        return Tokens(tokens.ids, tokens.labels, notes + tokens.notes)

    def _check_weights(self, row: Row) -> None:
        """Raises BadRow if the weight of a turn does not agree with whether training learns from the turn."""
        start = len(row.prompt) if isinstance(row.prompt, list) else 0
        for i, (turn, weight) in enumerate(zip(row.turns, row.weights, strict=True)):
            answers = turn["role"] == "assistant"
            learned = i >= start and (answers or not self.assistant_only)
            if weight is None or weight is learned or (weight is False and answers and self.assistant_only):
                continue
            which = f"turn {i + 1}, of the {turn['role']}"
            if weight:
                raise BadRow(f"has the weight 1 at {which}, from which training does not learn")
            raise BadRow(f"has the weight 0 at {which}, which only --assistant-only-loss can leave out")

    def _weighed(self, row: Row, mask: list[int]) -> tuple[list[int], int]:
        """Sets ``mask`` to 0 in turns whose weight is 0.

        Returns:
            The mask, and the number of spans that it had before.
        """
        spans = list(_spans(mask))
        if not any(weight is False for weight in row.weights):
            return mask, len(spans)
        weights = [weight for turn, weight in zip(row.turns, row.weights, strict=True) if turn["role"] == "assistant"]
        if len(spans) != len(weights):
            raise BadRow(
                "has weights of turns, but the parts that the chat template marks as the assistant's are not single turns"
            )
        for (begin, end), weight in zip(spans, weights, strict=True):
            if weight is False:
                mask[begin:end] = [0] * (end - begin)
        return mask, len(spans)

    # Parts of rows that templates ignore.

    def _check_shown(self, row: Row) -> list[str]:
        """Raises BadRow if the template ignores a turn, a call or a tool of a row.

        The texts of the row are not searched for in the rendered text, because templates strip and cut texts, and short
        texts occur anywhere. Instead a mark is put behind each part, and the marks are searched for.

        Returns:
            The keys of remarks in ``NOTES``.
        """
        marked, tools, marks = _with_marks(row)
        try:
            text = self.render(marked, row, tools)
        except BadRow:
            # If the row is at fault, this raises again. Otherwise the template refuses the marks, and the texts are
            # searched for.
            text = self.render(row.turns, row, row.tools)
            marks = {(turn.get("content") or "").strip(): f"{i}.content" for i, turn in enumerate(row.turns)}
        text.encode()
        notes = []
        seen = text.casefold()  # because a template may change upper and lower case
        missing = [where for name, where in marks.items() if name.casefold() not in seen]
        for where in missing:
            if where.startswith("tools["):
                raise BadRow(
                    f"has {where}, which the chat template does not show: give another one with --chat-template"
                )
            turn, _, part = where.partition(".")
            role = row.turns[int(turn)]["role"]
            which = f"turn {int(turn) + 1}"
            shown = [where for where in marks.values() if where.startswith(f"{turn}.") and where not in missing]
            if part == "content" and not shown and not self._shows_otherwise(row, int(turn)):
                raise BadRow(f"has {which} of the role {role!r}, which the chat template ignores")
            if part == "content" and shown:
                notes.append("content")
            elif part != "content":
                raise BadRow(
                    f"has {part} in {which}, which the chat template does not show: give another one with --chat-template"
                )
        return sorted(set(notes))

    def _shows_otherwise(self, row: Row, index: int) -> bool:
        """Whether a mark before the text of a turn is shown. A template may cut the text at its end."""
        turns = list(row.turns)
        mark = _MARK.format(0).casefold()
        turns[index] = {**turns[index], "content": mark + (turns[index]["content"] or "")}
        try:
            return mark in self.render(turns, row, row.tools).casefold()
        except BadRow:
            return False

    def _without_null(self, row: Row) -> Row:
        """Replaces content that is null by empty strings, if the template cannot render null."""
        if all(turn.get("content", "") is not None for turn in row.turns):
            return row
        empty = dataclasses.replace(row, messages=_filled(row.messages))
        if isinstance(row.prompt, list) and isinstance(row.completion, list):
            empty = dataclasses.replace(row, prompt=_filled(row.prompt), completion=_filled(row.completion))
        try:
            text = self.render(row.turns, row, row.tools)
        except BadRow:
            return empty
        return empty if text.count("None") > self.render(empty.turns, row, row.tools).count("None") else row


def _filled(turns: list[Message]) -> list[Message]:
    """Replaces content that is null by empty strings."""
    return [{**turn, "content": ""} if turn.get("content", "") is None else turn for turn in turns]


def _reason(error: Exception) -> str:
    """Returns the message of an error in a template, on one line.

    It begins with the type of the error, unless the template itself raised it.
    """
    words = " ".join(str(error).split()) or "no reason given"
    return words if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {words}"


def _ended(text: str, end: str) -> str:
    return text if text.endswith(end) else text + end


def _masked(ids: list[int], mask: list[int] | None) -> list[int]:
    return ids if mask is None else [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]


def _completed(prompt: list[int], ids: list[int], mask: list[int] | None) -> Tokens:
    """Returns the tokens of a prompt and its completion, with labels for the completion.

    Args:
        prompt: The tokens of the prompt alone.
        ids: The tokens of the prompt and its completion.
        mask: For each of ``ids``, whether it may be learned from. None allows all of them.
    """
    from trl.data_utils import common_prefix_length

    length = common_prefix_length(prompt, ids)
    labels = [IGNORED] * length + _masked(ids, mask)[length:]
    return Tokens(ids, labels, ["boundary"] if length < len(prompt) else [])


def _prompt_length(tokens: Tokens) -> int:
    return next((i for i, label in enumerate(tokens.labels) if label != IGNORED), len(tokens.ids))


def _spans(mask: list[int]) -> Iterator[tuple[int, int]]:
    """Yields the begin and the end of each run of ones in a mask."""
    begin = None
    for i, learned in enumerate([*mask, 0]):
        if learned and begin is None:
            begin = i
        elif not learned and begin is not None:
            yield begin, i
            begin = None


def _answers(row: Row) -> int:
    """Counts the turns in which the assistant says something. Turns that follow one another count as one."""
    roles = [turn["role"] for turn in row.turns if (turn.get("content") or "").strip() or turn.get("tool_calls")]
    return sum(role == "assistant" and before != "assistant" for role, before in zip(roles, ["", *roles], strict=False))


def _with_marks(row: Row) -> tuple[list[Message], list[Any] | None, dict[str, str]]:
    """Puts a mark behind each part of a row.

    Returns:
        The turns and the tools with marks, and for each mark its part, as "turn.part" or "tools[i]".
    """
    turns, tools = copy.deepcopy(row.turns), copy.deepcopy(row.tools)
    marks: dict[str, str] = {}

    def mark(where: str) -> str:
        name = _MARK.format(len(marks))
        marks[name] = where
        return name

    for i, turn in enumerate(turns):
        if (turn.get("content") or "").strip():
            turn["content"] += mark(f"{i}.content")
        for k, call in enumerate(turn.get("tool_calls") or []):
            if (function := _named_function(call)) is not None:
                function["name"] += mark(f"{i}.tool_calls[{k}]")
    for k, tool in enumerate(tools or []):
        if (function := _named_function(tool)) is not None:
            function["name"] += mark(f"tools[{k}]")
    return turns, tools, marks


def _named_function(owner: object) -> dict[str, Any] | None:
    """Returns the function of a call or of a tool if it has a name, else None."""
    function = owner.get("function", owner) if isinstance(owner, dict) else None
    return function if isinstance(function, dict) and isinstance(function.get("name"), str) else None


def check_template(tokenizer: Any, where: str) -> None:
    """Raises ValueError if a tokenizer has a chat template that is not valid Jinja. ``where`` names the template."""
    from jinja2 import TemplateSyntaxError

    if not tokenizer.chat_template:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"{where} is not a template: {error.message} in line {error.lineno}") from None
    except Exception:  # noqa: BLE001  # templates are programs, which can raise anything
        return  # The template is Jinja. Whether it accepts a chat is found out with each chat.


def training_template(tokenizer: Any, model: str) -> str | None:
    """Returns a chat template of TRL that marks what the assistant says, or None if the tokenizer's template does so.

    Raises:
        ValueError: The tokenizer's template does not mark it, and TRL has no template to replace it.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError:
        raise ValueError(
            f"--assistant-only-loss needs a chat template that marks what the assistant says with {{% generation %}} and "
            f"{{% endgeneration %}}, but the template of {model} does not: give another one with --chat-template"
        ) from None
    return template
