"""Rows as they are trained: the same tokens and labels as TRL's own, and what is refused before a model is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from moe_fused.finetune import tokenizing as module
from moe_fused.finetune.data import Prepared, find, prepare
from moe_fused.finetune.formats import BadRow
from moe_fused.finetune.options import Options
from moe_fused.finetune.render import IGNORED, Renderer
from moe_fused.finetune.resolve import Batching
from moe_fused.finetune.show import show_rows

from .finetuning import CHAT_TEMPLATE, chats, save_model, write_jsonl

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHAT_TEMPLATE
)

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TOOLS = [
    {
        "messages": [
            {"role": "user", "content": "Weather in Rome?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
            ]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ],
        "tools": [{"type": "function", "function": {
            "name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}
        }}],
    },
    {
        "messages": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"n": "one", "more": [1, None]}}}
            ]},
        ],
        "tools": [{"type": "function", "function": {
            "name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "string"}}}
        }}],
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


def qwen3(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    return tokenizer


def options_of(path: Path, rows: list[Any], **options: Any) -> Options:
    return Options(model="m", dataset=str(write_jsonl(path / "rows.jsonl", rows)), output="o", **options)


def prepared(options: Options, tokenizer: Any, length: int = 4096, packing: str = "none", **more: Any) -> Prepared:
    arguments = {"accumulation": 1, "vocabulary": 272, **more}
    batching = Batching(packing, length, options.batch_size, arguments["accumulation"])
    return prepare(find(options, tokenizer), options, batching, vocabulary=arguments["vocabulary"])


def refusal(options: Options, tokenizer: Any, **more: Any) -> str:
    with pytest.raises(ValueError, match=r"rows\.jsonl") as caught:
        prepared(options, tokenizer, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the same as TRL's own


def stock(
    model: Path, tokenizer: Any, rows: list[Any], length: int, packing: str, assistant_only: bool, output: Path
) -> dict[str, list[Any]]:
    """The columns that SFTTrainer makes of ``rows``."""
    arguments = SFTConfig(
        output_dir=str(output), use_cpu=True, max_length=length, packing=packing != "none", report_to="none",
        packing_strategy=packing if packing != "none" else "bfd", assistant_only_loss=assistant_only,
    )  # fmt: skip
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model), arguments, train_dataset=table, processing_class=tokenizer
    )
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in trainer.train_dataset.column_names]
    found: dict[str, list[Any]] = trainer.train_dataset.select_columns(columns)[:]
    return found


MANY = [
    {
        "messages": [
            {"role": "user", "content": f"{i} + {i}? " * (i % 5 + 1)},
            {"role": "assistant", "content": f"{2 * i}. " * (i % 7 + 1)},
        ]
    }
    for i in range(1, 40)
]
COMPLETIONS = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}" * (i % 20 + 1)} for i in range(30)]
ENDED = [{"text": "one"}, {"text": "two<|im_end|>"}, {"text": "three " * 40}]
CHAT_COMPLETIONS = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in MANY]


@pytest.mark.parametrize("packing", ["none", "bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize(
    "rows, template, assistant_only",
    [
        (MANY, CHAT_TEMPLATE, False),
        (MANY, MARKED, True),
        (MANY, "qwen3", True),
        (CHAT_COMPLETIONS, CHAT_TEMPLATE, False),
        (CHAT_COMPLETIONS, MARKED, True),
        (COMPLETIONS, CHAT_TEMPLATE, False),
        (ENDED, CHAT_TEMPLATE, False),
    ],
    ids=["chats", "assistant", "qwen3", "completions", "completions-assistant", "prompts", "text"],
)
def test_tokens_and_labels_are_those_of_trl(
    rows: list[Any], template: str, assistant_only: bool, packing: str, model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    length = 136  # cuts some
    tokenizer.chat_template = template
    if template == "qwen3":
        qwen3(tokenizer)
    expected = stock(model, tokenizer, rows, length, packing, assistant_only, tmp_path)
    options = options_of(tmp_path, rows, assistant_only_loss=assistant_only)
    ours = prepared(options, tokenizer, length, packing)
    assert ours.dataset[:] == expected
    assert ours.report.rows == len(rows)
    learned = 0
    for ids, labels, *lengths in zip(*expected.values(), strict=True):
        begins = {0} if not lengths else {sum(lengths[0][:k]) for k in range(len(lengths[0]))}
        assert len(ids) == len(labels)
        learned += sum(label != IGNORED and i not in begins for i, label in enumerate(labels))
    if packing != "wrapped":
        assert ours.report.learned == learned
    assert ours.report.sequences == len(expected["labels"])


def test_rows_with_tools_are_those_of_trl(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Each row keeps the schema and arguments of its own tools, whatever other rows have."""
    qwen3(tokenizer)
    ours = prepared(options_of(tmp_path, TOOLS), tokenizer).dataset[:]
    for i, row in enumerate(TOOLS):
        alone = stock(model, tokenizer, [row], 4096, "none", False, tmp_path)
        assert [ours["input_ids"][i], ours["labels"][i]] == [alone["input_ids"][0], alone["labels"][0]]
    text = tokenizer.decode(ours["input_ids"][0])
    assert '"arguments": {"city": "Rome"}' in text
    assert '{"properties": ' not in text
    assert '"properties": {"city": {"type": "string"}}' in text
    assert '"arguments": {"n": "one", "more": [1, null]}' in tokenizer.decode(ours["input_ids"][1])


def test_the_trainer_takes_what_was_checked(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from moe_fused.finetune.adapters import adapt
    from moe_fused.finetune.model import load_model
    from moe_fused.finetune.plan import plan_run
    from moe_fused.finetune.resolve import set_up
    from moe_fused.finetune.trainer import make_trainer

    tokenizer.chat_template = MARKED
    options = Options(
        model=str(model), dataset=str(write_jsonl(tmp_path / "rows.jsonl", chats())), output=str(tmp_path / "out"),
        sequence_length=64, quantization="none", device="cpu", assistant_only_loss=True, gradient_accumulation=3,
        epochs=2,
    )  # fmt: skip
    setup = set_up(options, AutoConfig.from_pretrained(model), torch.device("cpu"))
    run = plan_run(setup, plain_text=False).run
    ours = prepare(find(options, tokenizer), options, run.batching, vocabulary=run.vocabulary)
    adapted = adapt(load_model(run), run)
    trainer = make_trainer(adapted, tokenizer, ours.dataset, run)
    assert trainer.train_dataset[:] == ours.dataset[:]
    assert trainer.total_steps == ours.report.steps
    batch = next(iter(trainer.get_train_dataloader()))
    assert 0 < (batch["labels"] != IGNORED).sum() < batch["labels"].numel() / 2


@pytest.mark.parametrize(
    ("packing", "asked_for"), [("bfd", False), ("wrapped", False), ("none", False), ("none", True)]
)
def test_the_trainer_does_what_the_record_says(
    packing: str, asked_for: bool, model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The trainer follows a record made for a GPU.

    Attention has no masks; batches have one shape unless it is mostly padding.
    """
    from transformers import AutoConfig

    from moe_fused.finetune.adapters import adapt
    from moe_fused.finetune.attention import NAME
    from moe_fused.finetune.batches import Documents, Sequences
    from moe_fused.finetune.model import load_model
    from moe_fused.finetune.resolve import candidates, set_up
    from moe_fused.finetune.trainer import make_trainer

    rows = [{"text": "word " * (4 if i % 2 else 40)} for i in range(12)]
    options = Options(
        model=str(model), dataset=str(write_jsonl(tmp_path / "rows.jsonl", rows)), output=str(tmp_path / "out"),
        sequence_length=128, batch_size=2, quantization="none", device="cpu", packing=packing,
    )  # fmt: skip
    setup = set_up(options, AutoConfig.from_pretrained(model), torch.device("cpu"))
    on_a_cpu = next(candidates(setup, plain_text=True))
    assert (on_a_cpu.maskless, on_a_cpu.graphs) == (False, False)
    run = dataclasses.replace(on_a_cpu, maskless=True, graphs=True, graphs_asked_for=asked_for)
    ours = prepare(find(options, tokenizer), options, run.batching, vocabulary=run.vocabulary)
    trainer = make_trainer(adapt(load_model(run), run), tokenizer, ours.dataset, run)
    longest = max(len(ids) for ids in ours.dataset["input_ids"])
    shapes = {"bfd": (1, 2 * longest), "wrapped": (2, longest), "none": (2, longest) if asked_for else None}
    assert trainer.shape == shapes[packing]
    kinds = {"bfd": Documents, "wrapped": Sequences}
    kind = kinds.get(packing, Sequences if asked_for else None)
    assert isinstance(trainer.data_collator, (Documents, Sequences)) is (kind is not None)
    assert kind is None or isinstance(trainer.data_collator, kind)
    assert trainer.model.config._attn_implementation == NAME
    batch = next(iter(trainer.get_train_dataloader()))
    if trainer.shape is not None:
        assert batch["input_ids"].shape == trainer.shape
    loss = trainer.model(**batch).loss
    assert loss.isfinite()


# --- what a row lacks stays absent


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if 'thinking' in m %}[{{ m['thinking'] }}]{% endif %}"
    "{{ m['content'] }}<|im_end|>{% endfor %}{% if tools is defined and tools is not none %}{{ tools | tojson }}{% endif %}"
    "{% if short is defined %}short{% endif %}"
)


def test_absent_stays_absent(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = THINKING
    rows = [
        {
            "messages": [USER, {**ASSISTANT, "thinking": "hm"}],
            "chat_template_kwargs": {"short": True},
            "tools": [{"name": "look"}],
        },
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, {**ASSISTANT, "thinking": None}], "chat_template_kwargs": None, "tools": None},
    ]
    texts = [tokenizer.decode(ids) for ids in prepared(options_of(tmp_path, rows), tokenizer).dataset["input_ids"]]
    plain = "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\nHello<|im_end|>"
    assert texts == [plain.replace("Hello", "[hm]Hello") + '[{"name": "look"}]short', plain, plain]


@pytest.mark.parametrize("template", ["qwen3", "glm4moe", "gptoss"])
def test_content_that_is_null(template: str, tokenizer: Any, tmp_path: Path) -> None:
    """Content that is null counts as an empty string.

    The template of glm4moe would print "None", that of gptoss would fail.
    """
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    row = json.loads(json.dumps(TOOLS[0]))
    row["tools"][0]["function"]["description"] = "The weather."
    row["messages"][1]["content"] = None
    empty = json.loads(json.dumps(row))
    empty["messages"][1]["content"] = ""
    with_null, with_empty = prepared(options_of(tmp_path, [row, empty]), tokenizer).dataset["input_ids"]
    assert with_null == with_empty


# --- what templates pass over


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": [USER, {"role": "narrator", "content": "Then"}, ASSISTANT]}, "turn 2 of the role 'narrator'"),
        ({"messages": [{"role": "human", "content": "user"}, ASSISTANT]}, "turn 1 of the role 'human'"),
        # The turn's text is in what is rendered, but at another place.
        ({"messages": [USER, {"role": "gpt", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]}, "turn 2"),
        ({"messages": [USER, {"role": "bot", "content": "im_start"}, ASSISTANT]}, "turn 2 of the role 'bot'"),
        ({"prompt": [{"role": "human", "content": "Hi"}], "completion": [ASSISTANT]}, "turn 1 of the role 'human'"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "oracle", "value": "?"}]}, "role 'oracle'"),
    ],
    ids=str,
)
def test_roles_that_a_template_passes_over(row: dict[str, Any], words: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [USER, ASSISTANT]}, row]
    if "prompt" in row:
        rows[0] = {"prompt": [USER], "completion": [ASSISTANT]}
    said = refusal(options_of(tmp_path, rows), qwen3(tokenizer))
    assert said.startswith(f"{tmp_path}/rows.jsonl:2 has ")
    assert words in said
    assert "which the chat template ignores" in said
    left = prepared(options_of(tmp_path, rows, skip_bad_rows=True), tokenizer).report
    assert (left.rows, len(left.left_out)) == (1, 1)


def test_turns_that_a_template_shows_otherwise(tokenizer: Any, tmp_path: Path) -> None:
    """A row is accepted even if the template strips, cuts or joins its text."""
    messages = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "<tool_response>\n5\n</tool_response>"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello\n\n"},
        {"role": "user", "content": " bye "},
        {"role": "assistant", "content": "<think>\nonly a thought\n</think>"},
    ]
    qwen3(tokenizer)
    assert prepared(options_of(tmp_path, [{"messages": messages}]), tokenizer).report.rows == 1
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'][:40] | upper }}{% endfor %}"
    long = {"role": "assistant", "content": "Hello " * 9}
    assert prepared(options_of(tmp_path, [{"messages": [USER, long]}]), tokenizer).report.rows == 1


def test_a_template_that_minds_marks(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] not in ['Hi', 'Hello'] %}{{ raise_exception('unknown words') }}"
        "{% endif %}"
        "{% if m['role'] != 'tool' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert prepared(options_of(tmp_path, [{"messages": [USER, ASSISTANT]}]), tokenizer).report.rows == 1
    assert "unknown words" in refusal(
        options_of(tmp_path, [{"messages": [{"role": "user", "content": "?"}]}]), tokenizer
    )


@pytest.mark.parametrize(
    "template, words",
    [
        (CHAT_TEMPLATE, "tool_calls[0] in turn 2"),
        (CHAT_TEMPLATE.replace("m['content']", "(m['tool_calls'] or [])[0:1] | tojson"), "turn 1 of the role 'user'"),
        (
            CHAT_TEMPLATE.replace("m['content'] }}", "m['content'] }}{{ (m['tool_calls'] or [])[0:1] | tojson }}"),
            "tools[0]",
        ),
    ],
)
def test_tools_that_a_template_does_not_show(template: str, words: str, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = template
    said = refusal(options_of(tmp_path, TOOLS[:1]), tokenizer)
    assert f"rows.jsonl:1 has {words}" in said
    assert "which the chat template" in said
    two = json.loads(json.dumps(TOOLS[0]))
    two["messages"][1]["tool_calls"].append(two["messages"][1]["tool_calls"][0])
    tokenizer.chat_template = (TEMPLATES / "gptoss.jinja").read_text()
    two["tools"][0]["function"]["description"] = "The weather."
    said = refusal(options_of(tmp_path, [two]), tokenizer)
    assert "rows.jsonl:1 has tool_calls[1] in turn 2, which the chat template does not show" in said


def test_text_beside_calls_that_a_template_passes_over_is_noted(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (TEMPLATES / "llama3_1.jinja").read_text()
    row = json.loads(json.dumps(TOOLS[0]))
    row["messages"][1]["content"] = "Let me see."
    (note,) = prepared(options_of(tmp_path, [row]), tokenizer).report.notes
    assert note == "1 of 1 row: the chat template ignores text beside tool_calls"


# --- templates and text that fail


def test_a_template_that_raises(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = STRICT
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [ASSISTANT, USER]}]
    said = refusal(options_of(tmp_path, rows), tokenizer)
    assert "rows.jsonl:2 cannot be rendered by the chat template: roles must alternate; --skip-bad-rows" in said
    tokenizer.chat_template = "{{ messages[1]['content'] + messages[0]['calls'][0] }}"
    said = refusal(options_of(tmp_path, rows), tokenizer)
    assert "rows.jsonl:1-2 cannot be rendered by the chat template: UndefinedError: " in said
    kwargs = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"conversation": 1}}
    tokenizer.chat_template = CHAT_TEMPLATE
    assert "cannot be rendered" in refusal(options_of(tmp_path, [kwargs]), tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        '{"text": "half \\ud83d of a smile"}',
        '{"prompt": "half \\ud83d", "completion": "a"}',
        '{"messages": [{"role": "user", "content": "half \\ud83d"}, {"role": "assistant", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\\ude00"}]}',
    ],
)
def test_half_of_a_surrogate_pair(row: str, tokenizer: Any, tmp_path: Path) -> None:
    whole = row.replace("\\ud83d", "\\ud83d\\ude00").replace('"\\ude00', '"\\ud83d\\ude00')
    said = refusal(options_of(tmp_path, [whole, row]), tokenizer)
    assert "rows.jsonl:2 has half of a surrogate pair, '\\ud" in said
    assert prepared(options_of(tmp_path, [whole]), tokenizer).report.rows == 1


# --- nothing to learn from


def test_no_turn_of_the_assistant(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [USER]}]
    tokenizer.chat_template = MARKED
    said = refusal(options_of(tmp_path, rows, assistant_only_loss=True), tokenizer)
    assert (
        "rows.jsonl:2 has no turn of the assistant, so that --assistant-only-loss leaves nothing to learn from" in said
    )
    report = prepared(options_of(tmp_path, rows, assistant_only_loss=True, skip_bad_rows=True), tokenizer).report
    assert (report.rows, len(report.left_out)) == (1, 1)
    assert prepared(options_of(tmp_path, rows), tokenizer).report.rows == 2


def test_prompts_longer_than_the_sequence(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 400, "completion": "end"}, {"prompt": "word ", "completion": "end"}]
    for packing in ("bfd", "none"):
        said = refusal(options_of(tmp_path, rows), tokenizer, length=128, packing=packing)
        assert (
            "rows.jsonl:1 has nothing left to learn from: the first of its 2004 tokens to learn from is number" in said
        )
        assert "2001, but a sequence has 128; --skip-bad-rows" in said
        options = options_of(tmp_path, rows, skip_bad_rows=True)
        report = prepared(options, tokenizer, length=128, packing=packing).report
        assert (report.rows, report.tokens, report.cut, len(report.left_out)) == (1, 9, 0, 1)
        for skip in (False, True):
            said = refusal(options_of(tmp_path, rows[:1], skip_bad_rows=skip), tokenizer, length=128, packing=packing)
            assert "rows.jsonl has no row to train on: " in said
            assert "nothing left to learn from" in said
    # With this packing, the rest of a long row goes on in another sequence.
    assert prepared(options_of(tmp_path, rows), tokenizer, length=128, packing="bfd_split").report.rows == 2


def test_what_is_cut_is_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "a" * 19}, {"text": "b" * 49}, {"text": "c" * 29}]
    report = prepared(options_of(tmp_path, rows), tokenizer, length=40, packing="bfd").report
    assert (report.rows, report.tokens, report.cut, report.lost, report.longest) == (3, 100, 1, 10, 50)
    assert report.learned == 19 + 39 + 29
    assert list(report.lines()) == [
        "data: 3 rows, 100 tokens (87 to learn from), 3 sequences, 3 steps; 0 rows left out",
        "cut: 1 row, which lose 10 of all 100 tokens; the longest row has 50",
    ]
    report = prepared(options_of(tmp_path, rows), tokenizer, length=40, packing="bfd_split").report
    assert (report.cut, report.lost) == (0, 0)


# --- weights of turns


def learned_of(tokenizer: Any, dataset: Any) -> list[str]:
    return [
        tokenizer.decode(
            [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        )
        for row in dataset
    ]


def test_turns_of_no_weight_are_not_learned_from(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = MARKED
    turns = [USER, {**ASSISTANT, "weight": 0}, USER, {"role": "assistant", "content": "Ciao", "weight": 1}]
    rows = [
        {"messages": turns},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "train": False},
                           {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ciao"}]},
    ]  # fmt: skip
    ours = prepared(options_of(tmp_path, rows, assistant_only_loss=True), tokenizer)
    assert learned_of(tokenizer, ours.dataset) == ["Ciao<|im_end|>", "Ciao<|im_end|>"]


@pytest.mark.parametrize(
    "turns, assistant_only, words",
    [
        (
            [USER, {**ASSISTANT, "weight": 0}],
            False,
            "weight 0 at turn 2, of the assistant, which only --assistant-only-loss",
        ),
        (
            [{**USER, "train": True}, ASSISTANT],
            True,
            "weight 1 at turn 1, of the user, from which training does not learn",
        ),
        ([USER, {**ASSISTANT, "weight": 0}], True, "has weights that leave nothing to learn from"),
        ([{**USER, "weight": 0}, ASSISTANT], False, "weight 0 at turn 1, of the user"),
        ([{**USER, "weight": 0}, {**ASSISTANT, "weight": 1}], True, ""),
        ([USER, {**ASSISTANT, "weight": 1}], False, ""),
    ],
)
def test_weights_are_honoured_or_refused(
    turns: list[Any], assistant_only: bool, words: str, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = MARKED
    options = options_of(tmp_path, [{"messages": turns}], assistant_only_loss=assistant_only)
    if words:
        assert words in refusal(options, tokenizer)
    else:
        assert prepared(options, tokenizer).report.rows == 1


def test_weights_where_turns_cannot_be_told_apart(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}"
    rows = [{"messages": [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]}]
    assert "not single turns" in refusal(options_of(tmp_path, rows, assistant_only_loss=True), tokenizer)


# --- notes


def test_parts_that_are_not_marked_are_noted(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = MARKED.replace("m['role'] == 'assistant'", "loop.last")
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER, ASSISTANT]}]
    (note,) = prepared(options_of(tmp_path, rows, assistant_only_loss=True), tokenizer).report.notes
    assert note.startswith("1 of 2 rows: fewer parts are learned from than the assistant has turns")


def test_an_end_that_is_not_learned_is_noted(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    options = options_of(tmp_path, [{"messages": [USER, ASSISTANT]}], assistant_only_loss=True)
    (note,) = prepared(options, tokenizer).report.notes
    assert "may not learn to stop: move that token into {% generation %}…{% endgeneration %}" in note


def test_prompts_that_are_rendered_otherwise_are_noted(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    (note,) = prepared(options_of(tmp_path, [{"prompt": [USER], "completion": [ASSISTANT]}]), tokenizer).report.notes
    assert note.startswith("1 of 1 row: the prompt is rendered differently alone and before its completion")


def test_what_prompts_of_text_and_of_many_sequences_come_to_is_noted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 60, "completion": "end"}]
    report = prepared(options_of(tmp_path, rows), tokenizer, length=100, packing="bfd_split").report
    assert (report.sequences, report.learned) == (4, 3)
    assert report.notes == [
        "3 of 4 sequences have nothing to learn from, only parts of prompts",
        "prompts of text are trained on as they are; the chat template is for lists of messages only",
    ]
    tokenizer.chat_template = None
    assert len(prepared(options_of(tmp_path, rows), tokenizer).report.notes) == 0


# --- all rows together


def test_rows_of_other_kinds(tokenizer: Any, tmp_path: Path) -> None:
    chat = {"messages": [USER, ASSISTANT]}
    said = refusal(options_of(tmp_path, [chat, {"text": "words"}]), tokenizer)
    assert "rows.jsonl:2 is plain text, but " in said
    assert "rows.jsonl:1 is a chat" in said
    rows = ["{", {"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [ASSISTANT]}]
    said = refusal(options_of(tmp_path, rows), tokenizer)
    assert "rows.jsonl:1 is not JSON" in said
    assert "rows.jsonl:3 is a prompt with a completion as messages, but " in said
    assert "rows.jsonl:2 is a prompt with a completion as text" in said
    left = prepared(options_of(tmp_path, rows, skip_bad_rows=True), tokenizer).report
    assert [bad.partition(" ")[0][-1] for bad in left.left_out] == ["1", "3"]
    assert "2 rows left out" in "\n".join(left.lines())


def test_many_bad_rows_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    bad = ["[" * number for number in range(1, 10)]  # each is wrong in another column
    said = refusal(options_of(tmp_path, [{"text": "words"}, *bad]), tokenizer)
    assert "rows.jsonl:6 is not JSON" in said
    assert "; 4 more; --skip-bad-rows leaves such rows out" in said
    assert "rows.jsonl:7" not in said
    # The same fault is said once.
    said = refusal(options_of(tmp_path, [{"text": "words"}, *["{"] * 80]), tokenizer)
    assert said.startswith(f"each of {tmp_path / 'rows.jsonl'}:2-81 is not JSON (")
    assert said.count("is not JSON") == 1
    assert "line 1" not in said  # the line in the JSON text is not that in the file
    rows = [{"text": "words"} if number % 2 else {} for number in range(20)]
    said = refusal(options_of(tmp_path, rows), tokenizer)
    assert said.startswith(f"each of {tmp_path / 'rows.jsonl'}:1, 3, 5, 7, 9 and 5 more needs messages")
    for skip in (False, True):
        said = refusal(options_of(tmp_path, ["{"], skip_bad_rows=skip), tokenizer)
        assert "rows.jsonl has no row to train on: " in said
        assert "rows.jsonl:1 is not JSON" in said
    options = options_of(tmp_path, [{"text": "words"}, *["{"] * 30], skip_bad_rows=True)
    lines = list(prepared(options, tokenizer).report.lines())
    assert [line.partition(":")[0] for line in lines] == ["left out"] * 21 + ["data"]
    assert lines[20] == "left out: 10 more"


def test_a_tokenizer_of_another_model(tokenizer: Any, tmp_path: Path) -> None:
    options = options_of(tmp_path, [{"text": "words"}])
    with pytest.raises(ValueError, match=r"makes the token \d+, but the model knows 100 tokens"):
        prepared(options, tokenizer, vocabulary=100)


def test_several_processes_make_the_same(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*MANY, "{", *MANY]
    options = options_of(tmp_path, rows, skip_bad_rows=True)
    alone = prepared(options, tokenizer, 64, "bfd")
    monkeypatch.setattr(module, "_ROWS_OF_A_PROCESS", 20)
    monkeypatch.setattr(module, "_cores", lambda: 3)
    monkeypatch.setattr(module, "_cache_key", lambda data: "several" + str(id(data)))
    several = prepared(options, tokenizer, 64, "bfd")
    assert several.dataset[:] == alone.dataset[:]
    assert (several.report, several.fingerprint) == (alone.report, alone.fingerprint)


def test_what_was_done_is_not_done_again(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(tmp_path, [{"text": f"words of {tmp_path}"}])
    before = prepared(options, tokenizer)

    def fail(*_: Any) -> None:
        pytest.fail("rendered again")

    monkeypatch.setattr(Renderer, "__call__", fail)
    again = prepared(options, AutoTokenizer.from_pretrained(save_tokenizer(tokenizer, tmp_path)), 64, "bfd")
    assert again.fingerprint == before.fingerprint


def save_tokenizer(tokenizer: Any, path: Path) -> Path:
    tokenizer.save_pretrained(path / "tokenizer")
    return path / "tokenizer"


def test_fingerprint_is_of_what_is_trained(tokenizer: Any, tmp_path: Path) -> None:
    def fingerprint(rows: list[Any], name: str = "", template: str = CHAT_TEMPLATE, **options: Any) -> str:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        tokenizer.chat_template = template
        return prepared(options_of(directory, rows, **options), tokenizer).fingerprint

    first = fingerprint(MANY)
    assert len(first) == 64
    assert first == fingerprint(MANY, "elsewhere")
    assert first == fingerprint([*MANY, "{"], skip_bad_rows=True)
    others = {
        fingerprint(MANY[1:]), fingerprint(MANY[::-1]), fingerprint(MANY, template=CHAT_TEMPLATE + " "),
        fingerprint(MANY, template=MARKED, assistant_only_loss=True), fingerprint(CHAT_COMPLETIONS),
    }  # fmt: skip
    assert len(others | {first}) == 6


def test_a_template_without_marks(tokenizer: Any, tmp_path: Path) -> None:
    options = options_of(tmp_path, MANY, assistant_only_loss=True)
    with pytest.raises(
        ValueError, match=r"--assistant-only-loss needs a chat template that marks .*the template of m does not"
    ):
        find(options, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="holds chats, but the tokenizer of m has no chat template"):
        find(options, tokenizer)


# --- rows for people


def test_rows_as_they_are_trained(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = MARKED
    rows = [{"messages": [USER, {"role": "assistant", "content": "One\n\x1btwo"}]}, {"messages": [USER]}]
    options = options_of(tmp_path, rows, assistant_only_loss=True)
    shown = show_rows(find(options, tokenizer), 9, Batching("bfd", 45))
    place = f"{tmp_path}/rows.jsonl"
    lines: list[str] = []
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 has no turn of the assistant"):
        lines.extend(shown)
    assert lines[:-1] == [
        f"{place}:1: 51 tokens, 3 to learn from, 6 cut off",
        "masked:  <|im_start|>user\\n",
        "         Hi<|im_end|><|im_start|>assistant\\n",
        "learned: One",
        "cut off: \\n",
        "         \\x1btwo<|im_end|>",
        "",
    ]
    assert lines[-1].startswith(
        f"{place}:2: this row cannot be trained on, because it has no turn of the assistant, so that "
    )


def test_only_so_many_rows_are_shown(tokenizer: Any, tmp_path: Path) -> None:
    options = options_of(tmp_path, [{"text": "a b"}, {"text": "c"}, "{"])
    lines = list(show_rows(find(options, tokenizer), 2, Batching("bfd_split", 2)))
    assert lines[1:3] == ["learned: a b<|im_end|>", ""]
    assert [line.rpartition("rows.jsonl")[2] for line in lines if "tokens" in line] == [
        ":1: 4 tokens, 3 to learn from", ":2: 2 tokens, 1 to learn from",
    ]  # fmt: skip


def test_rows_that_cannot_be_trained_on_are_shown_too(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 9, "completion": "b"}, {"text": "c"}, "{"]
    data = find(options_of(tmp_path, rows), tokenizer)
    lines: list[str] = []
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1 has nothing left .*; .*:2 is plain text, but .*; .*:3 is not JSON"
    ):
        lines.extend(show_rows(data, 3, Batching("bfd", 4)))
    assert ["cannot be trained on" in line for line in lines].count(True) == 3
    assert lines[2:4] == ["masked:  aaaa", "cut off: aaaaab<|im_end|>"]
    assert list(show_rows(data, 3, Batching("bfd", 4), skip_bad=True)) == lines


def test_a_row_that_is_none(tokenizer: Any) -> None:
    render = Renderer(tokenizer, None, False, "text")
    tokenizer.eos_token = ""
    with pytest.raises(BadRow, match="has nothing to learn from"):
        render(render.parse({"text": "a"}))
