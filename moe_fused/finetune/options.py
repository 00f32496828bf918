"""The options of ``moe-fused finetune``, in one table that the command line, the YAML file and their checks are made from.

This module imports nothing heavy, so that an error in an option appears at once. ``Options`` checks each value by
itself and the combinations of options that no model, data set or device could make possible. ``precheck`` and
``resolve`` check the rest.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import textwrap
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .mixture import Datasets, Part, check_form, check_parts, parts_of, written
from .words import as_yaml

Method = Literal["sft", "dpo", "ipo", "kto"]
Quantization = Literal["auto", "nf4", "fp4", "mxfp4", "nvfp4", "none"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Packing = Literal["auto", "bfd", "bfd_split", "wrapped", "none"]
Export = Literal["none", "per-expert", "original"]
Tracker = Literal["none", "tensorboard", "wandb", "mlflow", "trackio"]
KeepAttention = Literal["none", "device", "host"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
Optimizer = Literal[
    "auto", "paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused", "sgd"
]
# The value of --attention-modules that stands for all linear layers but the head, routers and experts.
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Help:
    """The description of an option.

    Attributes:
        text: The text that ``--help`` shows.
        shown: The default value in words, for options whose default value does not explain itself.
        shapes_run: Whether a run that is resumed must have the same value as when it began.
        in_file: The text that the file of ``--init`` shows, if what is written there differs from the command line.
        example: YAML of another form that the option may have there, or of a value.
    """

    text: str
    shown: str | None = None
    shapes_run: bool = False
    in_file: str | None = None
    example: str | None = None


_MIXTURE = """\
dataset:
  - dataset: chats.jsonl
    share: 0.7
  - dataset: org/other-chats
    share: 0.3
    split: train
    config: en
"""


@dataclass(frozen=True)
class Options:
    """Every option of a run. The help text of each option stands in its annotation."""

    model: Annotated[str, Help("Model to fine-tune: a Hub id or a directory.", shown="required", shapes_run=True)] = ""
    dataset: Annotated[
        Datasets,
        Help(
            "Data to train on: a file (.jsonl, .json, .txt, .parquet, .csv, also compressed), a directory that "
            "save_to_disk wrote, or a Hub id. Each row has messages or conversations (chat), prompt and completion, "
            "question and answer, or text. Repeat the option to join data sets, or to mix them by shares: A=0.7, B=0.3.",
            shown="required",
            shapes_run=True,
            in_file="Data to train on: a file (.jsonl, .json, .txt, .parquet, .csv, also compressed), a directory that "
            "save_to_disk wrote, or a Hub id. Each row has messages or conversations (chat), prompt and completion, "
            "question and answer, or text. A list joins data sets, or mixes them if each has a share.",
            example=_MIXTURE,
        ),
    ] = ""
    output: Annotated[
        str, Help("Directory for the adapter, its checkpoints and the log. It is created.", shown="required")
    ] = ""

    method: Annotated[
        Method,
        Help(
            "How to learn from the rows. sft imitates them; dpo and ipo prefer chosen to rejected answers; kto learns from "
            "answers with a label that says whether they are wanted.",
            shapes_run=True,
        ),
    ] = "sft"
    beta: Annotated[
        float | None,
        Help(
            "How strongly dpo, ipo and kto hold the model to its answers before the training. A higher value keeps it "
            "closer to them, a lower one lets it follow the preferences further.",
            shown="0.1; only for dpo, ipo and kto",
            shapes_run=True,
        ),
    ] = None

    revision: Annotated[str, Help("Branch, tag or commit of the model on the Hub.", shapes_run=True)] = "main"
    quantization: Annotated[
        Quantization,
        Help(
            "4-bit format of the experts. nf4 and fp4, as bitsandbytes has them with double quantization, are for linear "
            "layers, too. With mxfp4 and nvfp4, linear layers stay dense. none quantizes nothing. A checkpoint already in 4 "
            "bits keeps its format; naming another is an error.",
            shown="what the checkpoint has; nf4 if it is dense",
            shapes_run=True,
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype,
        Help(
            "Data type of the computation, and of weights that are not in 4 bits.",
            shown="bfloat16; float32 on a CPU",
            shapes_run=True,
        ),
    ] = "auto"
    attn: Annotated[
        str,
        Help(
            "Attention implementation of Transformers, such as sdpa, eager or the Hub's kernels-community/flash-attn3. "
            "torch and cudnn are kernels for packed rows, with sdpa for everything else.",
            shown="sdpa, or eager for models without sdpa; on a GPU torch's flash attention where it can replace them",
        ),
    ] = "auto"
    liger: Annotated[
        bool | None,
        Help(
            "Use Liger's kernels for rotary embeddings and norms, if Liger knows the model.",
            shown="on NVIDIA and AMD GPUs",
        ),
    ] = None
    cuda_graphs: Annotated[
        bool | None,
        Help(
            "Record the work of a step on the GPU once and replay it (CUDA graphs), so that the GPU does not wait for a "
            "slow CPU. It takes some more memory.",
            shown="on NVIDIA GPUs, if packing fills the sequences and nothing is random",
        ),
    ] = None
    device: Annotated[str, Help("Device to train on: cpu, cuda, cuda:1 or xpu.", shown="a GPU if there is one")] = (
        "auto"
    )
    shard: Annotated[
        bool,
        Help(
            "With several GPUs, divide the experts, their adapters and the optimizer's state among them, for models that "
            "one GPU cannot hold. Each layer is gathered when it is computed, which takes longer."
        ),
    ] = False

    dataset_config: Annotated[str | None, Help("Configuration of the data set on the Hub.", shapes_run=True)] = None
    split: Annotated[
        str, Help("Split of the data set on the Hub, or of a directory with several.", shapes_run=True)
    ] = "train"
    text_field: Annotated[
        str, Help("Name of the field that holds the text in rows of plain text.", shapes_run=True)
    ] = "text"
    skip_bad_rows: Annotated[
        bool, Help("Leave out rows that cannot be trained on, instead of ending with an error.", shapes_run=True)
    ] = False
    streaming: Annotated[
        bool,
        Help(
            "Read, check and pack rows while the run trains, for data that do not fit on the disk. It needs --max-steps.",
            shapes_run=True,
        ),
    ] = False
    chat_template: Annotated[
        str | None, Help("Jinja file with a chat template.", shown="the tokenizer's", shapes_run=True)
    ] = None
    assistant_only_loss: Annotated[bool, Help("Learn only from what the assistant says in chats.", shapes_run=True)] = (
        False
    )
    packing: Annotated[
        Packing,
        Help(
            "How rows fill sequences. bfd packs whole rows, each of which attends only to itself, and cuts off what is "
            "too long. bfd_split continues long rows in another sequence. wrapped cuts one stream of all rows into "
            "sequences. none gives each row a sequence and pads it.",
            shown="bfd for chats, bfd_split for plain text; none for models with recurrent layers",
            shapes_run=True,
        ),
    ] = "auto"
    sequence_length: Annotated[
        int | None,
        Help("Number of tokens in a sequence.", shown="the longest that fits, at most 4096", shapes_run=True),
    ] = None
    batch_size: Annotated[
        int,
        Help("Number of sequences, or of pairs of answers, that go through the model at once.", shapes_run=True),
    ] = 1
    gradient_accumulation: Annotated[
        int | None,
        Help("Number of batches in an optimizer step.", shown="as many as make 16384 tokens", shapes_run=True),
    ] = None

    adapter: Annotated[
        str | None,
        Help(
            "LoRA adapter to train further: a directory or a Hub id. Its ranks, alphas and targets replace the options "
            "for them.",
            shown="a new adapter",
            shapes_run=True,
        ),
    ] = None
    attention_rank: Annotated[
        int, Help("Rank of the adapters on attention layers; 0 adapts none.", shapes_run=True)
    ] = 16
    attention_alpha: Annotated[
        float | None, Help("LoRA alpha of the adapters on attention.", shown="twice the rank", shapes_run=True)
    ] = None
    attention_modules: Annotated[
        list[str] | None,
        Help(
            "Name of a linear layer that gets an adapter of --attention-rank; repeat the option for each name. all-linear "
            "stands for all linear layers but the head, routers and experts.",
            shown="all linear layers of attention, such as q_proj k_proj v_proj o_proj",
            shapes_run=True,
            in_file="Names of the linear layers that get adapters of --attention-rank. all-linear stands for all linear "
            "layers but the head, routers and experts.",
            example="attention_modules: [q_proj, v_proj]",
        ),
    ] = None
    expert_rank: Annotated[int, Help("Rank of the adapters on experts; 0 adapts none.", shapes_run=True)] = 8
    expert_alpha: Annotated[
        float | None, Help("LoRA alpha of the adapters on experts.", shown="twice the rank", shapes_run=True)
    ] = None
    shared_expert_rank: Annotated[
        int,
        Help("Rank of the adapters on shared experts; with 0, only --attention-modules adapts them.", shapes_run=True),
    ] = 0
    shared_expert_alpha: Annotated[
        float | None, Help("LoRA alpha of the adapters on shared experts.", shown="twice the rank", shapes_run=True)
    ] = None
    router_rank: Annotated[int, Help("Rank of the adapters on routers; 0 adapts none.", shapes_run=True)] = 0
    modules_to_save: Annotated[
        list[str] | None,
        Help(
            "Name of a module that is trained in full and saved with the adapter, such as lm_head or embed_tokens (PEFT's "
            "modules_to_save); repeat the option for each name.",
            shapes_run=True,
            in_file="Names of modules that are trained in full and saved with the adapter, such as lm_head or embed_tokens "
            "(PEFT's modules_to_save).",
            example="modules_to_save: [lm_head]",
        ),
    ] = None
    lora_dropout: Annotated[float, Help("Dropout probability for the input of the adapters.", shapes_run=True)] = 0.0
    adapter_dtype: Annotated[
        Dtype,
        Help(
            "Data type of the adapters during training.",
            shown="bfloat16 if the computation is in bfloat16, else float32",
            shapes_run=True,
        ),
    ] = "auto"

    epochs: Annotated[float, Help("Number of passes over the data.")] = 1.0
    max_steps: Annotated[int | None, Help("Number of steps after which training ends, regardless of --epochs.")] = None
    learning_rate: Annotated[
        float | None, Help("Peak learning rate.", shown="1e-4; 1e-5 for dpo, ipo and kto", shapes_run=True)
    ] = None
    scheduler: Annotated[Scheduler, Help("Schedule of the learning rate.", shapes_run=True)] = "cosine"
    warmup: Annotated[float, Help("Share of all steps during which the learning rate warms up.", shapes_run=True)] = (
        0.03
    )
    weight_decay: Annotated[float, Help("Weight decay.", shapes_run=True)] = 0.0
    max_grad_norm: Annotated[float, Help("Norm to which gradients are clipped; 0 clips nothing.", shapes_run=True)] = (
        1.0
    )
    optimizer: Annotated[
        Optimizer, Help("Optimizer.", shown="paged_adamw_8bit; adamw_torch on a CPU", shapes_run=True)
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool, Help("Recompute layers in the backward pass instead of keeping their activations.")
    ] = True
    keep_attention: Annotated[
        KeepAttention,
        Help(
            "Keep attention's output, on the device or in host memory, instead of recomputing it with the rest of a "
            "layer. Steps over long sequences become faster."
        ),
    ] = "none"
    router_aux_loss: Annotated[
        float, Help("Weight of the load-balancing loss, which helps if routers are trained.", shapes_run=True)
    ] = 0.0
    seed: Annotated[
        int, Help("Seed for the adapters' initial values, the order of the data, and dropout.", shapes_run=True)
    ] = 0

    trainer: Annotated[
        dict[str, Any] | None,
        Help(
            "Further fields of TRL's SFTConfig, such as neftune_noise_alpha: a mapping, or --set.",
            shapes_run=True,
            in_file="Further fields of TRL's SFTConfig, or of the config of --method.",
            example="trainer:\n  neftune_noise_alpha: 5\n  adam_beta2: 0.95",
        ),
    ] = None
    lora: Annotated[
        dict[str, Any] | None,
        Help(
            "Further fields of PEFT's LoraConfig, such as use_rslora: a mapping, or --set.",
            shapes_run=True,
            in_file="Further fields of PEFT's LoraConfig.",
            example="lora:\n  use_rslora: true",
        ),
    ] = None

    eval_dataset: Annotated[str | None, Help("Data to evaluate on, in the forms of --dataset.", shapes_run=True)] = None
    eval_share: Annotated[
        float | None,
        Help("Share of the rows of --dataset that is set aside for evaluation.", shapes_run=True),
    ] = None
    eval_split: Annotated[
        str, Help("Split of --eval-dataset on the Hub, or of a directory with several.", shapes_run=True)
    ] = "test"
    eval_steps: Annotated[
        int | None,
        Help("Number of steps between two evaluations. The last step has one as well.", shown="--save-steps"),
    ] = None
    keep_best: Annotated[
        bool, Help("Write the adapter of the evaluation with the lowest loss, instead of the last one.")
    ] = False
    early_stopping: Annotated[
        int | None, Help("Number of evaluations (see --eval-steps) without a lower loss after which the run ends.")
    ] = None

    save_steps: Annotated[int, Help("Number of steps between two checkpoints.")] = 50
    keep_checkpoints: Annotated[
        int, Help("Number of checkpoints to keep. --keep-best keeps the best one in addition.")
    ] = 2
    log_steps: Annotated[int, Help("Number of steps between two lines of the log.")] = 1
    report_to: Annotated[
        Tracker,
        Help("Tracker that gets all numbers of the log as well. By default it writes into --output and sends nothing."),
    ] = "none"
    memory_limit: Annotated[
        float | None, Help("GiB of GPU memory that the run may use.", shown="the memory that is free")
    ] = None
    export: Annotated[
        Export,
        Help(
            "Write a second copy of the adapter, in a directory of this name in --output, for other tools: per-expert is "
            "the layout that vLLM, SGLang and llama.cpp read, original that of the original qwen3-moe-fused. moe-fused "
            "convert adapter can do that later, too."
        ),
    ] = "none"
    push_to_hub: Annotated[
        str,
        Help("Repository on the Hub, as org/name, to which the adapter is uploaded at the end. none uploads nothing."),
    ] = "none"
    private: Annotated[bool, Help("Create the repository of --push-to-hub as a private one.")] = False
    push_checkpoints: Annotated[
        bool,
        Help(
            "Upload each checkpoint as well, to the branch checkpoints of --push-to-hub, so that another machine "
            "can resume the run."
        ),
    ] = False

    def __post_init__(self) -> None:
        for name in DEFAULTS:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag(name)} must be a finite number, got {value}")
        check_parts(self.datasets)
        object.__setattr__(self, "dataset", written(self.datasets))  # one form for what can be said in several
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be below 2**32, got {self.seed}")
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{flag(name)} must be at least {low}, got {value}")
        for name in ("learning_rate", "epochs", "memory_limit", "beta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{flag(name)} must be above 0, got {value}")
        for name in ("lora_dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be in [0, 1), got {getattr(self, name)}")
        if not any((self.attention_rank, self.expert_rank, self.shared_expert_rank, self.router_rank)):
            raise ValueError("--attention-rank, --expert-rank and --router-rank are all 0: there is nothing to train")
        if ALL_LINEAR in (self.attention_modules or ()) and self.attention_modules != [ALL_LINEAR]:
            raise ValueError(f"--attention-modules {ALL_LINEAR} stands for all names: give it alone")
        for name in ("attention_modules", "modules_to_save"):
            for value in getattr(self, name) or ():
                if not value.strip():
                    raise ValueError(f"{flag(name)} must name a module, got an empty value")
                if "," in value or " " in value.strip():
                    raise ValueError(f"{flag(name)} {value!r} is no name of a module: repeat the option for each name")
        if self.adapter_dtype == "float16":
            raise ValueError("--adapter-dtype cannot be float16, whose gradients need scaling: use float32 or bfloat16")
        if self.router_rank and self.lora_dropout:
            raise ValueError(
                "--lora-dropout is not possible with --router-rank: PEFT drops nothing in front of adapters on routers, "
                "leave one of the two options out"
            )
        self._check_method()
        if self.keep_attention != "none" and not self.gradient_checkpointing:
            raise ValueError(
                f"--keep-attention {self.keep_attention} is not possible with --no-gradient-checkpointing, which keeps all "
                "activations on the device: leave one of the two options out"
            )
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise ValueError(f"--eval-share must be above 0 and below 1, got {self.eval_share}")
        if self.eval_dataset is not None and not self.eval_dataset:
            raise ValueError("--eval-dataset must name a file, a directory or a Hub id, got an empty value")
        if self.eval_share is not None and self.eval_dataset is not None:
            raise ValueError("--eval-dataset and --eval-share exclude each other")
        if self.streaming and self.max_steps is None:
            raise ValueError("--streaming needs --max-steps: how many rows there are is not known before they are read")
        if self.streaming and self.eval_share is not None:
            raise ValueError(
                "--eval-share is not possible with --streaming, which does not know all rows before the training begins: "
                "use --eval-dataset"
            )
        for name in ("eval_steps", "keep_best", "early_stopping"):
            if getattr(self, name) and not self.evaluates:
                raise ValueError(f"{flag(name)} needs an evaluation: give --eval-dataset or --eval-share, too")
        if self.adapter is not None and not self.adapter:
            raise ValueError("--adapter must name a directory or a Hub id, got an empty value")
        if self.export != "none" and not self.expert_rank:
            raise ValueError(f"--export {self.export} is a layout of adapters on experts, but --expert-rank is 0")
        if self.push_to_hub != "none":
            from .upload import check_repository

            check_repository("--push-to-hub", self.push_to_hub)
        elif self.push_checkpoints:
            raise ValueError("--push-checkpoints needs --push-to-hub, too; --no-push-checkpoints uploads none")

    def _check_method(self) -> None:
        """Raises ValueError if other options do not go together with ``--method``."""
        if not self.has_preferences:
            if self.beta is not None:
                raise ValueError("--beta is for --method dpo, ipo and kto")
            return
        method = f"--method {self.method}"
        if self.packing not in ("auto", "none"):
            raise ValueError(
                f"--packing {self.packing} is not possible with {method}: each answer has its own sequence"
            )
        if self.assistant_only_loss:
            raise ValueError(f"--assistant-only-loss is not for {method}, which learns from the answers alone anyway")
        if self.lora_dropout:
            raise ValueError(f"--lora-dropout is not possible with {method}: TRL compares answers without dropout")
        if self.streaming:
            raise ValueError(f"--streaming is not possible with {method}, whose answers are not packed")
        if self.adapter is not None:
            raise ValueError(
                f"--adapter is not possible with {method}, whose reference is the model without adapters: merge the adapter "
                "into the model first, with moe-fused merge"
            )
        if self.modules_to_save:
            raise ValueError(f"--modules-to-save is not possible with {method}: the reference needs them as they were")
        if self.method == "kto" and self.batch_size < 2:
            raise ValueError(
                "--method kto needs a --batch-size of at least 2, because it compares each answer with those to the other "
                f"prompts of its batch, got {self.batch_size}"
            )

    def require(self, *, output: bool = True) -> None:
        """Raises ValueError if a required option is missing.

        Args:
            output: Whether ``--output`` is required, too.
        """
        for name in ("model", "dataset", "output") if output else ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{flag(name)} is missing: give it on the command line or in --config")

    @property
    def has_preferences(self) -> bool:
        """Whether the run learns from preferences between answers, or from labels of answers."""
        return self.method != "sft"

    @property
    def datasets(self) -> tuple[Part, ...]:
        """The data sets that ``--dataset`` names."""
        return parts_of(self.dataset)

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates its adapter."""
        return self.eval_dataset is not None or self.eval_share is not None

    @property
    def repository(self) -> str | None:
        """The repository that ``--push-to-hub`` names, or None."""
        return None if self.push_to_hub == "none" else self.push_to_hub

    @property
    def output_directory(self) -> Path:
        """The directory that ``--output`` names."""
        return Path(self.output)


_AT_LEAST = {
    "sequence_length": 8, "batch_size": 1, "gradient_accumulation": 1, "attention_rank": 0, "expert_rank": 0,
    "shared_expert_rank": 0, "router_rank": 0, "attention_alpha": 0, "expert_alpha": 0, "shared_expert_alpha": 0,
    "max_steps": 1, "weight_decay": 0, "max_grad_norm": 0,
    "router_aux_loss": 0, "seed": 0, "eval_steps": 1, "early_stopping": 1, "save_steps": 1, "keep_checkpoints": 1,
    "log_steps": 1,
}  # fmt: skip

# The options in groups, as the help and the file of ``--init`` show them. The first group has those that most runs need.
GROUPS: dict[str, tuple[str, ...]] = {
    "Most used": (
        "model", "dataset", "output", "sequence_length", "epochs", "learning_rate", "expert_rank", "attention_rank",
        "eval_share", "assistant_only_loss",
    ),
    "Method": ("method", "beta"),
    "Model": ("revision", "quantization", "dtype", "attn"),
    "Data": (
        "dataset_config", "split", "text_field", "skip_bad_rows", "streaming", "chat_template", "packing", "batch_size",
        "gradient_accumulation",
    ),
    "Adapter": (
        "attention_alpha", "attention_modules", "expert_alpha", "router_rank", "lora_dropout", "adapter_dtype",
        "lora", "shared_expert_rank", "shared_expert_alpha", "modules_to_save", "adapter",
    ),
    "Training": (
        "max_steps", "scheduler", "warmup", "weight_decay", "max_grad_norm", "optimizer", "router_aux_loss", "seed",
        "trainer",
    ),
    "Evaluation": ("eval_dataset", "eval_split", "eval_steps", "keep_best", "early_stopping"),
    "Output": (
        "save_steps", "keep_checkpoints", "log_steps", "report_to", "export", "push_to_hub", "private",
        "push_checkpoints",
    ),
    "Machine": ("device", "shard", "memory_limit", "gradient_checkpointing", "keep_attention", "cuda_graphs", "liger"),
}  # fmt: skip

DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Options)}
_HINTS = {name: get_args(hint) for name, hint in get_type_hints(Options, include_extras=True).items()}
TYPES: dict[str, Any] = {name: _HINTS[name][0] for name in DEFAULTS}
HELP: dict[str, Help] = {name: _HINTS[name][1] for name in DEFAULTS}


# Options that are mappings. The command line sets their entries by --set.
MAPPINGS = tuple(name for name, kind in TYPES.items() if kind == dict[str, Any] | None)


# The options that ``--adapter`` answers.
OF_ADAPTERS = (
    "attention_rank", "attention_alpha", "attention_modules", "expert_rank", "expert_alpha", "shared_expert_rank",
    "shared_expert_alpha", "router_rank", "modules_to_save", "lora",
)  # fmt: skip


def flag(name: str) -> str:
    """The name of a field as an option of the command line."""
    return "--" + name.replace("_", "-")


def _convert(value: object, kind: Any) -> Any:
    """Converts a value from a YAML file to the type ``kind``.

    Raises:
        ValueError: The value has another type. The message is only what is needed, such as "a number".
    """
    if kind == Datasets:
        return check_form(value)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (inner for inner in get_args(kind) if inner is not type(None))
        return _convert(value, kind)
    if origin is Literal:
        # YAML reads a bare "no" as False and "null" as None. Neither is a choice, so the error lists the choices.
        if value not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError("a mapping of names to values")
        return dict(value)
    if origin is list:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise ValueError("a list of names")
        return values
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            raise ValueError("a number") from None
    if type(value) is not kind:
        needed = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]
        raise ValueError(needed)
    return value


def read_yaml(path: Path, switches: Collection[str] = ()) -> dict[str, Any]:
    """Reads options from a YAML file. The keys may have dashes or underscores; the result has underscores.

    Args:
        path: The file.
        switches: The names of what only the command line can give, for the error that names it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a YAML mapping, a key is no option or stands there twice, or a value has another type
            than its option.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        twice = _key_twice(yaml.compose(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML: {error}") from None
    if twice is not None:
        raise ValueError("{}: {} stands in line {} and again in line {}: keep one of them".format(path, *twice))
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must map options to values, got a {type(content).__name__}")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in switches:
            raise ValueError(f"{path}: {key} cannot be in a file of options, give {flag(name)} on the command line")
        if name not in DEFAULTS:
            near = difflib.get_close_matches(name, DEFAULTS, n=1, cutoff=0.4)
            raise ValueError(
                f"{path}: unknown option {key}" + (f", did you mean {near[0]}?" if near else "; see finetune --help")
            )
        try:
            values[name] = _convert(value, TYPES[name])
        except ValueError as error:
            raise ValueError(f"{path}: {key} must be {error}, got {as_yaml(value)}") from None
    return values


def _key_twice(node: Any) -> tuple[str, int, int] | None:
    """Finds the first key that a YAML mapping has twice, or a mapping in it; YAML itself takes the last of them.

    A key with dashes and the same key with underscores are one option.

    Args:
        node: A node of PyYAML, or None for an empty document.

    Returns:
        The key as it stands there the second time, and both of its lines, counted from 1. None if each key is unique.
    """
    waiting, seen = [node], {id(node)}
    while waiting:
        holder = waiting.pop()
        lines: dict[str, int] = {}
        for entry in holder.value if isinstance(getattr(holder, "value", None), list) else ():
            inner = entry
            if isinstance(entry, tuple):
                key, inner = entry
                name, line = str(key.value), key.start_mark.line + 1
                name = name.replace("-", "_") if holder is node else name
                if name in lines:
                    return str(key.value), lines[name], line
                lines[name] = line
            if id(inner) not in seen:  # an alias may lead back
                seen.add(id(inner))
                waiting.append(inner)
    return None


def shown_default(name: str) -> str:
    """Returns the default of an option in words, as the help shows it."""
    words, default = HELP[name].shown, DEFAULTS[name]
    if words is not None:
        return words
    return ("on" if default else "off") if isinstance(default, bool) else "none" if default is None else str(default)


def described_in_file(name: str) -> str:
    """Returns the description of an option for the file of ``--init``, with its choices and its default."""
    described, kind = HELP[name], TYPES[name]
    choices = f" Choices: {', '.join(get_args(kind))}." if get_origin(kind) is Literal else ""
    text = f"{described.in_file or described.text}{choices} Default: {shown_default(name)}."
    # The file names other options as it writes them.
    return re.sub("--([a-z-]*[a-z])", lambda found: _key(found[1]) or found[0], text)


def _key(words: str) -> str | None:
    name = words.replace("-", "_")
    return name if name in DEFAULTS else None


def template(given: Mapping[str, Any]) -> str:
    """Returns a YAML file with every option and its description, for ``read_yaml``.

    Options that are neither required nor in ``given`` are comments, with their defaults.
    """
    import yaml

    lines = [
        "# Options of moe-fused finetune, for --config. Comments that begin with #name: show the defaults.",
        "# Fill in model, dataset and output, and remove the # in front of whatever you change. The lines below",
        "# 'For example' show another form of the option that follows: remove '# ' in front of each of them to use it,",
        "# and the option below them.",
    ]
    for group, names in GROUPS.items():
        lines += ["", f"# {group}"]
        for name in names:
            lines += ["", *(f"# {line}" for line in textwrap.wrap(described_in_file(name), 96, break_on_hyphens=False))]
            if example := HELP[name].example:
                lines += ["# For example:", *(f"# {line}" for line in example.splitlines())]
            value = yaml.safe_dump({name: given.get(name, DEFAULTS[name])}, width=1000, sort_keys=False).strip()
            is_set = name in given or HELP[name].shown == "required"
            lines += [line if is_set else f"#{line}" for line in value.splitlines()]
    return "\n".join(lines) + "\n"


def to_yaml(options: Options) -> str:
    """Writes options as YAML that ``read_yaml`` reads back. Options with their default value are left out."""
    import yaml

    values = {name: getattr(options, name) for name, default in DEFAULTS.items() if getattr(options, name) != default}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
