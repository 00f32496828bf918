"""Parses rows: brings the many forms in which people write rows into a few kinds, or says why a row has none of them.

For supervised training (SFT):

{"messages": [{"role": "user", "content": "…"}, …]}          a chat, also as "conversations" or with from/value turns
{"prompt": …, "completion": …}                               two strings, or two lists of messages
{"instruction": …, "input": …, "output": …}                  a question and its answer, also under other names
{"text": "…"}                                                plain text

For preferences:

{"prompt": …, "chosen": …, "rejected": …}                    two answers to a prompt: strings, or lists of messages
{"chosen": […], "rejected": […]}                             two chats that begin with the same messages
{"prompt": …, "completion": …, "label": true}                one answer to a prompt, and whether it is wanted
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .words import as_yaml

Kind = Literal["chat", "completion", "text", "preference", "rated completion"]
Message = dict[str, Any]
Fields = Mapping[str, Any]

# The role of each speaker in from/value turns. Other names stay as they are, because the chat template may know them.
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "function_call": "function_call",
    "tool_call": "function_call", "observation": "tool", "tool": "tool", "tool_response": "tool",
    "function_response": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
_ASKED = ("instruction", "question", "query", "prompt", "input")
_ANSWERED = ("output", "response", "answer", "completion")
# The fields whose text is put below the question.
_BESIDE = ("input", "context")
_SYSTEM = ("system", "system_prompt")
_WEIGHTS = ("weight", "train", "loss", "loss_scale")
MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
# All fields that are read. A row may have others, which are ignored.
FIELDS = frozenset(
    ("messages", "conversations", "text", "tools", "functions", "chat_template_kwargs", "weight", "history", "chosen",
     "rejected", "label", *_ASKED, *_ANSWERED, *_BESIDE, *_SYSTEM, *MEDIA)
)  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")


def json_problem(error: Exception) -> str:
    """Says what is wrong with a JSON text of one line, without naming a line: it would be another number than the row's."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.pos + 1}"
    return str(error)


class BadRow(ValueError):
    """A row cannot be trained on. The message says why. It is a predicate whose subject is the name of the row."""


@dataclass(frozen=True)
class Row:
    """A parsed row.

    Attributes:
        kind: The kind of the row.
        text: The text, if the kind is text.
        prompt, completion: Two strings or two lists of messages, if the kind is a completion or a preference. The
            completion of a preference is the answer that is preferred.
        rejected: The other answer, if the kind is a preference.
        wanted: Whether the completion is wanted, if the kind is a rated completion.
        messages: The messages, if the kind is chat.
        tools: The schemas of functions as the row has them, or None.
        template_kwargs: Further arguments of the chat template.
        weights: For each of ``turns``, whether the row asks to learn from it. None if the row does not say.
    """

    kind: Kind
    text: str = ""
    prompt: str | list[Message] = ""
    completion: str | list[Message] = ""
    rejected: str | list[Message] = ""
    wanted: bool = True
    messages: list[Message] = field(default_factory=list)
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    weights: list[bool | None] = field(default_factory=list)

    @property
    def turns(self) -> list[Message]:
        """All messages, those of the prompt first. A row of strings has no messages."""
        if isinstance(self.prompt, list) and isinstance(self.completion, list):
            return self.prompt + self.completion
        return self.messages

    @property
    def form(self) -> str:
        """The kind of the row and the type of its prompt, in words. All rows of a data set must have the same form."""
        if self.kind in ("chat", "text"):
            return self.kind
        return f"{self.kind} of {'messages' if isinstance(self.prompt, list) else 'text'}"

    def with_answer(self, answer: str | list[Message]) -> Row:
        """Returns the row as a completion with one answer, which must be of the type of the prompt."""
        turns = len(self.prompt) if isinstance(self.prompt, list) else 0
        weights = self.weights[:turns] + [None] * len(answer) if turns else []
        return dataclasses.replace(self, kind="completion", completion=answer, rejected="", weights=weights)


_FORMS = {
    "chat": "a chat",
    "text": "plain text",
    "completion": "a prompt with a completion",
    "preference": "a preference",
    "rated completion": "an answer with a label",
}


def described(form: str) -> str:
    """Says in words what a row of a kind, or of a form, is."""
    kind, of, kept_as = form.partition(" of ")
    return _FORMS[kind] + (f" as {kept_as}" if of else "")


def lacks(names: Iterable[str], text_field: str) -> str:
    """Says that a row or a table with the fields ``names`` has none of the forms."""
    return (
        f"needs messages, conversations, prompt and completion, or {text_field}, but has {', '.join(names) or 'nothing'}: "
        "rename the question and the answer to prompt and completion, or name the field of the text with --text-field"
    )


def parse_row(content: object, text_field: str, has_template: bool) -> Row:
    """Parses a row.

    Args:
        content: The row as the data set has it.
        text_field: The name of the field that holds plain text.
        has_template: Whether there is a chat template. With one, a question and its answer become a chat.

    Raises:
        BadRow: The row cannot be trained on.
    """
    if not isinstance(content, Mapping):
        raise BadRow(f"must be an object, but is {_a(content)}")
    for name in sorted(MEDIA):
        if content.get(name):
            raise BadRow(f"has {name}, but only text can be trained on: remove the field, and its places in the text")
    for name in ("messages", "conversations"):
        if content.get(name) is not None:
            return _chat(name, content)
    if content.get("chosen") is not None and content.get("completion") is None:
        raise BadRow(
            "is a preference (chosen, rejected): --method dpo learns from it, or make a row with prompt and completion "
            "from the chosen answer"
        )
    if content.get("prompt") is not None or content.get("completion") is not None:
        return _completion(content)
    if content.get(text_field) is not None:
        return Row("text", text=_string(text_field, content[text_field]))
    if any(content.get(name) is not None for name in _ASKED):
        return _pair(content, has_template)
    if text_field in content:
        raise BadRow(f"has an empty {text_field}")
    raise BadRow(lacks(content, text_field))


def parse_preference(content: object, has_template: bool) -> Row:
    """Parses a row with two answers, of which one is preferred.

    Args:
        content: The row as the data set has it.
        has_template: Whether there is a chat template. With one, a question and its answers become chats.

    Raises:
        BadRow: The row cannot be trained on.
    """
    content = _answers_alone(content)
    for name in ("chosen", "rejected"):
        if content.get(name) is None:
            has = ", ".join(name for name, value in content.items() if value is not None) or "nothing"
            raise BadRow(f"lacks {name}: a preference needs chosen and rejected, with or without prompt, but has {has}")
    chosen, rejected = _answer("chosen", content["chosen"]), _answer("rejected", content["rejected"])
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("must have two strings or two lists of messages as chosen and rejected, but has one of each")
    if chosen == rejected:
        raise BadRow("has the same answer as chosen and as rejected: there is nothing to prefer")
    asked = next((name for name in ("prompt", *_ASKED) if content.get(name) is not None), None)
    prompt, chosen, rejected = (
        _between_chats(content, asked, chosen, rejected)
        if isinstance(chosen, list) and isinstance(rejected, list)
        else _between_texts(content, asked, str(chosen), str(rejected), has_template)
    )
    if isinstance(prompt, str):
        _nothing_for_chats(content)
        return Row("preference", prompt=prompt, completion=chosen, rejected=rejected)
    prompt, weights = _with_system(prompt, [None] * len(prompt), content)
    return Row(
        "preference",
        prompt=prompt,
        completion=chosen,
        rejected=rejected,
        weights=weights + [None] * len(chosen),
        tools=_tools(content),
        template_kwargs=_template_kwargs(content),
    )


def parse_rated(content: object) -> Row:
    """Parses a row with one answer and a label that says whether it is wanted.

    Raises:
        BadRow: The row cannot be trained on.
    """
    content = _answers_alone(content)
    if content.get("chosen") is not None and content.get("label") is None:
        raise BadRow(
            "is a preference (chosen, rejected): --method dpo learns from it, or make two rows with a label each"
        )
    label = content.get("label")
    wanted = _LABELS.get(label.strip().lower() if isinstance(label, str) else label)  # a table of text has strings
    if wanted is None:
        raise BadRow("lacks label" if label is None else f"must have true or false as label, but has {as_yaml(label)}")
    row = _completion({**content, "label": None})
    return dataclasses.replace(row, kind="rated completion", wanted=wanted)


_LABELS: dict[Any, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


# --- kinds


def _answers_alone(content: object) -> Fields:
    if not isinstance(content, Mapping):
        raise BadRow(f"must be an object, but is {_a(content)}")
    for name in sorted(MEDIA):
        if content.get(name):
            raise BadRow(f"has {name}, but only text can be trained on: remove the field, and its places in the text")
    return content


def _answer(name: str, value: object) -> str | list[Message]:
    """Returns an answer of a preference: a string, or messages."""
    if isinstance(value, str) and value.lstrip()[:1] != "[":
        return _string(name, value)
    if isinstance(value, str):  # text that begins with a bracket, or messages as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return _string(name, str(value))
    if isinstance(value, Mapping):  # a single message
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"must have a string or a list of messages as {name}, but has {_a(value)}")
    return _messages(name, value)[0]


def _between_chats(
    content: Fields, asked: str | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Returns the prompt of two chats and what follows it in each.

    Without a prompt of its own, it is what the chats have in common at their beginning. So it is if the prompt is the
    text of the last message of that beginning, as in many data sets.
    """
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    prompt = None if asked is None else content[asked]
    if isinstance(prompt, str) and same and chosen[same - 1].get("content") != prompt:
        raise BadRow(f"has a {asked} that is not the last message that chosen and rejected have in common")
    if isinstance(prompt, str) and not same:
        before: list[Message] = [{"role": "user", "content": _string(str(asked), prompt)}]
    elif prompt is None or isinstance(prompt, str):
        before, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not before:
            raise BadRow(
                "needs a prompt: chosen and rejected have no first message in common that could be taken for it. Add the "
                "field prompt, or begin both with the messages of the prompt"
            )
    else:
        before = _messages(str(asked), prompt)[0]
        if same >= len(before) and chosen[: len(before)] == before:  # the prompt stands in all three
            chosen, rejected = chosen[len(before) :], rejected[len(before) :]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not any(_says_something(message) for message in answer):
            raise BadRow(f"has an empty {name}")
    return before, chosen, rejected


def _between_texts(
    content: Fields, asked: str | None, chosen: str, rejected: str, has_template: bool
) -> tuple[Any, Any, Any]:
    """Returns the prompt and the answers of two texts. A question under another name than prompt becomes a chat."""
    from trl.data_utils import extract_prompt

    if asked is None:
        parts = extract_prompt({"chosen": chosen, "rejected": rejected})
        if not parts["prompt"]:
            raise BadRow(
                "needs a prompt: the texts of chosen and rejected have no beginning in common that could be taken for it. "
                "Add the field prompt"
            )
        return parts["prompt"], parts["chosen"], parts["rejected"]
    prompt = content[asked]
    if isinstance(prompt, str):
        prompt = _string(asked, prompt)
        if asked == "prompt" or not has_template:
            return prompt if asked == "prompt" else prompt + "\n", chosen, rejected
        messages: list[Message] = [{"role": "user", "content": prompt}]
    else:
        messages, _ = _messages(asked, prompt)
    first, second = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    return messages, first, second


def _chat(name: str, content: Fields) -> Row:
    _check_weight(content)
    messages, weights = _messages(name, content[name])
    messages, weights = _with_system(messages, weights, content)
    if not any(_says_something(message) for message in messages):
        raise BadRow(f"has no text in {name}")
    return Row(
        "chat", messages=messages, weights=weights, tools=_tools(content), template_kwargs=_template_kwargs(content)
    )


def _completion(content: Fields) -> Row:
    _check_weight(content)
    answer = next((name for name in ("completion", *_ANSWERED) if content.get(name) is not None), "completion")
    for name in ("prompt", answer):
        if content.get(name) is None:
            raise BadRow(f"lacks {name}")
    prompt, completion = content["prompt"], content[answer]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise BadRow(f"must have two strings or two lists of messages as prompt and {answer}, but has one of each")
    if isinstance(prompt, str):
        prompt, completion = _string("prompt", prompt), _string(answer, completion)
        _nothing_for_chats(content)
        return Row("completion", prompt=prompt, completion=completion)
    asked, before = _messages("prompt", prompt)
    asked, before = _with_system(asked, before, content)
    answered, after = _messages(answer, completion)
    if not any(_says_something(message) for message in answered):
        raise BadRow(f"has an empty {answer}")
    return Row(
        "completion",
        prompt=asked,
        completion=answered,
        weights=before + after,
        tools=_tools(content),
        template_kwargs=_template_kwargs(content),
    )


def _pair(content: Fields, has_template: bool) -> Row:
    """Parses a question and its answer: as a chat of two turns if there is a template, else as two texts."""
    _check_weight(content)
    asked = next(name for name in _ASKED if content.get(name) is not None)
    answer = next((name for name in _ANSWERED if content.get(name) is not None), None)
    if answer is None:
        raise BadRow(f"has {asked}, but no answer to it: {', '.join(_ANSWERED)}")
    parts = {name: content[name] for name in (asked, *_BESIDE) if content.get(name) is not None}
    for name, part in parts.items():
        if not isinstance(part, str):
            raise BadRow(f"must have a string as {name}, but has {_a(part)}")
    question = "\n\n".join(part for part in parts.values() if part.strip())
    if not question:
        raise BadRow(f"has an empty {asked}")
    completion = _string(answer, content[answer])
    if not has_template:
        _nothing_for_chats(content)
        return Row("completion", prompt=question + "\n", completion=completion)
    prompt: list[Message] = []
    for turn in _listed("history", content.get("history") or []):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadRow("must have pairs of strings in history")
        prompt += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    prompt.append({"role": "user", "content": question})
    prompt, weights = _with_system(prompt, [None] * len(prompt), content)
    return Row(
        "completion",
        prompt=prompt,
        completion=[{"role": "assistant", "content": completion}],
        weights=[*weights, None],
        tools=_tools(content),
        template_kwargs=_template_kwargs(content),
    )


# --- fields beside the messages


def _check_weight(content: Fields) -> None:
    """Raises BadRow if a row asks to count more or less than others."""
    if content.get("weight") not in (1, None, "", "1"):
        raise BadRow(f"has the weight {content['weight']!r}, but rows have no weights: leave the row out or repeat it")
    if content.get("label") is False or content.get("label") in ("false", "False"):  # a table of text has strings
        raise BadRow(
            "has the label false, which marks an answer that is not wanted: leave the row out, or learn from it with "
            "--method kto"
        )


def _nothing_for_chats(content: Fields) -> None:
    """Raises BadRow if a row of strings has fields that only a chat template can show."""
    for name in ("system", "tools", "functions", "chat_template_kwargs", "history"):
        if content.get(name):
            raise BadRow(
                f"has {name} beside a prompt of text, where no template shows it: write the prompt as messages"
            )


def _with_system(
    messages: list[Message], weights: list[bool | None], content: Fields
) -> tuple[list[Message], list[bool | None]]:
    """Puts the system message that a row has in a field of its own before the messages."""
    pairs = "messages" not in content and "conversations" not in content
    for name in _SYSTEM if pairs else _SYSTEM[:1]:
        system = content.get(name)
        if system is None or system == "":
            continue
        if not isinstance(system, str):
            raise BadRow(f"must have a string as {name}, but has {_a(system)}")
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": system}, *messages], [None, *weights]
        if messages[0]["content"] != system:
            raise BadRow(f"has a system message in its turns and another one as {name}")
    return messages, weights


def _tools(content: Fields) -> list[Any] | None:
    tools = content.get("tools")
    if not tools and content.get("functions"):  # the earlier name of the field
        tools = [{"type": "function", "function": one} for one in _listed("functions", content["functions"])]
    if not tools:
        return None
    tools = _listed("tools", tools)
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise BadRow(f"must have objects in tools, but tools[{i}] is {_a(tool)}")
    return tools or None


def _template_kwargs(content: Fields) -> dict[str, Any]:
    value = content.get("chat_template_kwargs")
    if not value:
        return {}
    value = _parsed("chat_template_kwargs", value)
    if not isinstance(value, dict):
        raise BadRow(f"must have an object as chat_template_kwargs, but has {_a(value)}")
    return value


# --- values


def _a(value: object) -> str:
    """Says what a value of a row is, in the words of JSON and with an article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRow(f"must have a string as {name}, but has {_a(value)}")
    if not value.strip():
        raise BadRow(f"has an empty {name}")
    return value


def _parsed(name: str, value: Any) -> Any:
    """Parses ``value`` as JSON if it is a string. A table of text can hold lists only as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"has {name} that are not JSON ({json_problem(error)}): write them with json.dumps") from None


def _listed(name: str, value: Any) -> list[Any]:
    parsed = _parsed(name, value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    if not isinstance(parsed, list):
        raise BadRow(f"must have a list as {name}, but has {_a(parsed)}")
    return parsed


# --- messages


def _messages(name: str, value: Any) -> tuple[list[Message], list[bool | None]]:
    """Returns messages with role and content, and their weights as in ``Row.weights``."""
    turns = _listed(name, value)
    if not turns:
        raise BadRow(f"has empty {name}")
    messages, weights = [], []
    legacy = any(isinstance(turn, Mapping) and turn.get("function_call") for turn in turns)
    for i, turn in enumerate(turns):
        where = f"{name}[{i}]"
        if not isinstance(turn, Mapping):
            raise BadRow(f"must have objects in {name}, but {where} is {_a(turn)}")
        weights.append(_weight(where, turn))
        message = _spoken(where, turn) if turn.get("from") is not None else _written(where, turn)
        if legacy and message["role"] == "function":
            message["role"] = "tool"
        messages.append(message)
    return messages, weights


def _spoken(where: str, turn: Fields) -> Message:
    """Brings a turn with from and value into the form with role and content."""
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str):
        raise BadRow(f"must have a string as from in {where}, but has {_a(speaker)}")
    role = _SPEAKERS.get(speaker.strip().lower(), speaker)
    rest = {key: item for key, item in turn.items() if item is not None and key not in ("from", "value", *_WEIGHTS)}
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(where, value), **rest}
    if isinstance(value, (dict, list)) and role == "tool" and not _is_parts(value):
        value = json.dumps(value, ensure_ascii=False)
    if value is None and not rest.get("tool_calls"):
        raise BadRow(f"lacks value in {where}")
    return {"role": role, "content": "" if value is None else _text(where, "value", value), **rest}


def _written(where: str, turn: Fields) -> Message:
    """Checks a turn with role and content, and removes keys whose value is null. Null means absent here."""
    message = {key: item for key, item in turn.items() if item is not None and key not in _WEIGHTS}
    if not isinstance(turn.get("role"), str):
        raise BadRow(f"lacks role in {where}")
    if legacy := message.pop("function_call", None):
        message["tool_calls"] = [*message.get("tool_calls", []), *_calls(where, legacy)]
    calls = message.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = calls = _listed(f"tool_calls of {where}", calls)
    content = turn.get("content")
    if content is not None:
        message["content"] = _text(where, "content", content)
    elif not calls:
        raise BadRow(f"lacks content in {where}")
    elif "content" in turn:  # some templates ask whether the content is none
        message["content"] = None
    return message


def _is_parts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, Mapping) and "type" in part for part in value)


def _text(where: str, name: str, content: Any) -> str:
    """Returns the content of a turn as one string. It joins parts of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"must have a string as {name} in {where}, but has {_a(content)}")
    texts = []
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") in _TEXT_PARTS:
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow(f"has a part of the type {kind} in the {name} of {where}: only text can be trained on")
    return "".join(texts)


def _calls(where: str, value: Any) -> list[Message]:
    """Makes ``tool_calls`` from one call of a function or a list of calls. They are usually JSON."""
    calls = _parsed(f"calls in {where}", value)
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise BadRow(f"must have objects with name and arguments as calls in {where}")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _weight(where: str, turn: Fields) -> bool | None:
    """Whether a turn asks to learn from it. None if the turn does not say."""
    said = {name: turn[name] for name in _WEIGHTS if turn.get(name) is not None}
    for name, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRow(f"has the {name} {as_yaml(value)} in {where}, which must be 0 or 1")
    if len({bool(value) for value in said.values()}) > 1:
        raise BadRow(f"has {' and '.join(said)} in {where}, which say different things")
    return bool(next(iter(said.values()))) if said else None


def _says_something(message: Message) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))
