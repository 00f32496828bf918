"""The options of ``moe-fused finetune``: one table, from which the command line, the YAML file and their checks are made.

Imports nothing heavy, so that a wrong option is answered at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

Quantization = Literal["nf4", "fp4", "none"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Packing = Literal["auto", "bfd", "bfd_split", "wrapped", "none"]
Export = Literal["none", "per-expert", "original"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
Optimizer = Literal[
    "auto", "paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused", "sgd"
]


@dataclass(frozen=True)
class Help:
    """What is said about an option.

    Attributes:
        text: what it does.
        shown: the default in words, where its value does not say it.
        shapes_run: whether a run that goes on must have the value it began with.
    """

    text: str
    shown: str | None = None
    shapes_run: bool = False


@dataclass(frozen=True)
class Options:
    """All that a run can be told; the help of each option stands beside it."""

    model: Annotated[str, Help("Model to adapt: Hub id or directory.", shown="required", shapes_run=True)] = ""
    dataset: Annotated[
        str,
        Help(
            "Data to train on: a file (.jsonl, .json, .txt, .parquet, .csv) or a Hub id. Rows have messages or "
            "conversations (chat), prompt and completion, or text.",
            shown="required",
            shapes_run=True,
        ),
    ] = ""
    output: Annotated[str, Help("Directory to make, for the adapter, its checkpoints, the log.", shown="required")] = ""

    revision: Annotated[str, Help("Of the model on the Hub: branch, tag or commit.", shapes_run=True)] = "main"
    quantization: Annotated[
        Quantization,
        Help("Hold experts and linear layers in 4 bits, with double quantization, or not.", shapes_run=True),
    ] = "nf4"
    dtype: Annotated[
        Dtype,
        Help("To compute in, and of weights outside 4 bits.", shown="bfloat16; float32 on a CPU", shapes_run=True),
    ] = "auto"
    attn: Annotated[str, Help("Attention of Transformers, as sdpa or kernels-community/flash-attn3.")] = "sdpa"
    liger: Annotated[
        bool | None,
        Help("Liger's kernels for rope and norms, where Liger knows the model.", shown="on NVIDIA and AMD GPUs"),
    ] = None
    cuda_graphs: Annotated[
        bool | None,
        Help(
            "The decoder's passes as CUDA graphs, which a host that is slower than the GPU does not hold up.",
            shown="on NVIDIA GPUs, where packing fills the sequences and nothing is random",
        ),
    ] = None
    device: Annotated[str, Help("Where to train: cpu, cuda, cuda:1, xpu.", shown="a GPU if there is one")] = "auto"

    dataset_config: Annotated[str | None, Help("Configuration of the data set on the Hub.", shapes_run=True)] = None
    split: Annotated[str, Help("Split of the data set on the Hub.", shapes_run=True)] = "train"
    text_field: Annotated[str, Help("Field with the text in rows of plain text.", shapes_run=True)] = "text"
    skip_bad_rows: Annotated[
        bool, Help("Leave out rows that cannot be trained on, instead of refusing them.", shapes_run=True)
    ] = False
    chat_template: Annotated[
        str | None, Help("Jinja file with a chat template.", shown="the tokenizer's", shapes_run=True)
    ] = None
    assistant_only_loss: Annotated[bool, Help("In chats, learn from the assistant's words only.", shapes_run=True)] = (
        False
    )
    packing: Annotated[
        Packing,
        Help(
            "How rows fill sequences. bfd: whole rows side by side, each attends to itself, what is too long is cut "
            "off; bfd_split: what is too long goes on in another sequence; wrapped: one stream cut into sequences; "
            "none: padding.",
            shown="bfd for chats, bfd_split for plain text",
            shapes_run=True,
        ),
    ] = "auto"
    sequence_length: Annotated[
        int | None, Help("Tokens in a sequence.", shown="what fits, 4096 at most", shapes_run=True)
    ] = None
    batch_size: Annotated[int, Help("Sequences that go through the model at once.", shapes_run=True)] = 1
    gradient_accumulation: Annotated[
        int | None, Help("Batches to a step.", shown="16384 tokens to a step", shapes_run=True)
    ] = None

    attention_rank: Annotated[int, Help("Rank of the adapters of attention, 0 for none.", shapes_run=True)] = 16
    attention_alpha: Annotated[float | None, Help("Their alpha.", shown="twice the rank", shapes_run=True)] = None
    attention_modules: Annotated[
        list[str] | None,
        Help(
            "Their layers' names; give the option again for each.", shown="q_proj k_proj v_proj o_proj", shapes_run=True
        ),
    ] = None
    expert_rank: Annotated[int, Help("Rank of the adapters of experts, 0 for none.", shapes_run=True)] = 8
    expert_alpha: Annotated[float | None, Help("Their alpha.", shown="twice the rank", shapes_run=True)] = None
    router_rank: Annotated[
        int, Help("Rank of the routers' adapters; 0 leaves routers as they are.", shapes_run=True)
    ] = 0
    lora_dropout: Annotated[float, Help("Dropout on the input of adapters.", shapes_run=True)] = 0.0
    adapter_dtype: Annotated[
        Dtype, Help("Of the adapters while they are trained.", shown="bfloat16; float32 on a CPU", shapes_run=True)
    ] = "auto"

    epochs: Annotated[float, Help("Passes over the data.")] = 1.0
    max_steps: Annotated[int | None, Help("Steps after which to end, whatever --epochs says.")] = None
    learning_rate: Annotated[float, Help("Highest learning rate.", shapes_run=True)] = 1e-4
    scheduler: Annotated[Scheduler, Help("Course of the learning rate.", shapes_run=True)] = "cosine"
    warmup: Annotated[float, Help("Warm-up of the learning rate, as a share of all steps.", shapes_run=True)] = 0.03
    weight_decay: Annotated[float, Help("Weight decay.", shapes_run=True)] = 0.0
    max_grad_norm: Annotated[float, Help("Norm to which gradients are clipped.", shapes_run=True)] = 1.0
    optimizer: Annotated[
        Optimizer, Help("Optimizer.", shown="paged_adamw_8bit; adamw_torch on a CPU", shapes_run=True)
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool, Help("Compute layers again in backward instead of keeping what they made.")
    ] = True
    router_aux_loss: Annotated[
        float, Help("Weight of the load-balancing loss, of use if routers are trained.", shapes_run=True)
    ] = 0.0
    seed: Annotated[int, Help("Of adapters, data order and dropout.", shapes_run=True)] = 0

    save_steps: Annotated[int, Help("Steps between checkpoints.")] = 50
    keep_checkpoints: Annotated[int, Help("Checkpoints to keep.")] = 2
    log_steps: Annotated[int, Help("Steps between lines of the log.")] = 1
    memory_limit: Annotated[float | None, Help("GiB of GPU memory to plan for.", shown="what is free")] = None
    export: Annotated[Export, Help("Write the adapter in this layout, too, as moe-fused convert adapter does.")] = (
        "none"
    )

    def __post_init__(self) -> None:
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{flag(name)} must be at least {low}, got {value}")
        for name in ("learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{flag(name)} must be above 0, got {getattr(self, name)}")
        for name in ("lora_dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be in [0, 1), got {getattr(self, name)}")
        if not self.attention_rank and not self.expert_rank and not self.router_rank:
            raise ValueError("--attention-rank, --expert-rank and --router-rank are all 0: there is nothing to train")
        if self.adapter_dtype == "float16":
            raise ValueError("--adapter-dtype cannot be float16, whose gradients need scaling: use float32 or bfloat16")
        if self.router_rank and self.lora_dropout:
            raise ValueError("--lora-dropout is not possible with --router-rank: PEFT has none for parameters")
        if self.export != "none" and not self.expert_rank:
            raise ValueError(f"--export {self.export} is a layout of adapters on experts, but --expert-rank is 0")

    def require(self) -> None:
        """Raises ValueError naming what a run cannot do without."""
        for name in ("model", "dataset", "output"):
            if not getattr(self, name):
                raise ValueError(f"{flag(name)} is missing: give it on the command line or in --config")

    @property
    def output_directory(self) -> Path:
        return Path(self.output)


_AT_LEAST = {
    "sequence_length": 8, "batch_size": 1, "gradient_accumulation": 1, "attention_rank": 0, "expert_rank": 0,
    "router_rank": 0, "attention_alpha": 0, "expert_alpha": 0, "max_steps": 1, "weight_decay": 0, "max_grad_norm": 0,
    "router_aux_loss": 0, "seed": 0, "save_steps": 1, "keep_checkpoints": 1, "log_steps": 1, "memory_limit": 0,
}  # fmt: skip

DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Options)}
_HINTS = {name: get_args(hint) for name, hint in get_type_hints(Options, include_extras=True).items()}
TYPES: dict[str, Any] = {name: _HINTS[name][0] for name in DEFAULTS}
HELP: dict[str, Help] = {name: _HINTS[name][1] for name in DEFAULTS}


def flag(name: str) -> str:
    """The option of the command line for a field."""
    return "--" + name.replace("_", "-")


def _convert(value: object, kind: Any) -> Any:
    """``value`` of a YAML file as ``kind``; raises ValueError saying what is needed."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (inner for inner in get_args(kind) if inner is not type(None))
        return _convert(value, kind)
    if origin is Literal:
        # YAML reads a bare "no" as False and "null" as None; neither is a choice here, so say what the choices are.
        if value not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
        return value
    if origin is list:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise ValueError("a list of names")
        return values
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 takes 1e-4 for a string
        except ValueError:
            raise ValueError("a number") from None
    if type(value) is not kind:
        needed = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]
        raise ValueError(needed)
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file, by field name; dashes in keys are as good as underscores.

    Raises:
        FileNotFoundError, ValueError: no such file; not a mapping; an unknown key or a value of another type, by name.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must map options to values, got a {type(content).__name__}")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in DEFAULTS:
            near = difflib.get_close_matches(name, DEFAULTS, n=1, cutoff=0.4)
            raise ValueError(
                f"{path}: unknown option {key}" + (f", did you mean {near[0]}?" if near else "; see finetune --help")
            )
        try:
            converted = _convert(value, TYPES[name])
        except ValueError as error:
            raise ValueError(f"{path}: {key} must be {error}, got {value!r}") from None
        values[name] = converted
    return values


def to_yaml(options: Options) -> str:
    """What ``read_yaml`` reads back, without what is at its default."""
    import yaml

    values = {name: getattr(options, name) for name, default in DEFAULTS.items() if getattr(options, name) != default}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
