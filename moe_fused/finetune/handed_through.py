"""Fields of TRL's and PEFT's configs that a run hands through: the mappings ``trainer`` and ``lora`` of its options.

Any field may be given but those that ``finetune`` manages itself, for which it has an option or no way. Names and simple
types are checked against the source of the installed libraries, which takes a moment, while importing them takes seconds.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from .options import Method, Options
from .words import as_yaml

Config = Literal["trainer", "lora"]

# The files and classes that declare the fields, each with its package. The first is that of the method of a run.
_TRAINERS: dict[Method, tuple[str, str]] = {
    "sft": ("trainer/sft_config.py", "SFTConfig"),
    "dpo": ("trainer/dpo_config.py", "DPOConfig"),
    "ipo": ("trainer/dpo_config.py", "DPOConfig"),
    "kto": ("trainer/kto_config.py", "KTOConfig"),
}
_SOURCES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "trainer": (
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("transformers", "training_args.py", "TrainingArguments"),
    ),
    "lora": (
        ("peft", "tuners/lora/config.py", "LoraConfig"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "config.py", "PeftConfigMixin"),
    ),
}

_PREPARED = "the data are prepared before the model is loaded"
_GRAPHS = "it changes what runs on the GPU, which the plan of memory and the CUDA graphs do not know"
_ONE_GPU = "each GPU has the whole model, or with --shard a part of it, and a share of each step"
_REFERENCE = "the reference is the model without its adapters, which each step computes"
_BRANCH = "the adapter goes to the branch main, and checkpoints to the branch checkpoints"
_ALL = "adapters are on all layers, which the plan of memory counts"
_PARTS = "finetune trains adapters alone"
# What is used instead of a field, or the reason why it cannot be given.
MANAGED: dict[str, dict[str, str]] = {
    "trainer": {
        "logging_nan_inf_filter": "a loss that is not finite ends the run", "debug": _GRAPHS,
        "include_num_input_tokens_seen": "the log counts tokens",
        "output_dir": "--output", "per_device_train_batch_size": "--batch-size", "num_train_epochs": "--epochs",
        "max_steps": "--max-steps", "learning_rate": "--learning-rate", "lr_scheduler_type": "--scheduler",
        "warmup_steps": "--warmup", "optim": "--optimizer",
        "weight_decay": "--weight-decay", "gradient_accumulation_steps": "--gradient-accumulation",
        "max_grad_norm": "--max-grad-norm", "bf16": "--dtype and --adapter-dtype",
        "fp16": "--dtype and --adapter-dtype", "bf16_full_eval": "--dtype", "fp16_full_eval": "--dtype",
        "gradient_checkpointing": "--gradient-checkpointing",
        "gradient_checkpointing_kwargs": "--gradient-checkpointing", "use_liger_kernel": "--liger",
        "liger_kernel_config": "--liger", "logging_strategy": "--log-steps", "logging_steps": "--log-steps",
        "report_to": "--report-to", "eval_strategy": "--eval-steps", "eval_steps": "--eval-steps",
        "per_device_eval_batch_size": "--batch-size", "save_strategy": "--save-steps", "save_steps": "--save-steps",
        "save_total_limit": "--keep-checkpoints", "load_best_model_at_end": "--keep-best",
        "metric_for_best_model": "--keep-best", "greater_is_better": "--keep-best", "seed": "--seed",
        "use_cpu": "--device", "router_aux_loss_coef": "--router-aux-loss", "max_length": "--sequence-length",
        "packing": "--packing", "packing_strategy": "--packing", "padding_free": "--packing",
        "eval_packing": "--packing", "assistant_only_loss": "--assistant-only-loss",
        "chat_template_path": "--chat-template", "dataset_text_field": "--text-field",
        "resume_from_checkpoint": "--resume", "ignore_data_skip": "--resume",
        "restore_callback_states_from_checkpoint": "--resume",
        "completion_only_loss": _PREPARED, "dataset_kwargs": _PREPARED, "dataset_num_proc": _PREPARED,
        "eos_token": _PREPARED, "pad_token": _PREPARED, "pad_to_multiple_of": _PREPARED, "truncation_mode": _PREPARED,
        "remove_unused_columns": _PREPARED, "label_names": _PREPARED, "length_column_name": _PREPARED,
        "shuffle_dataset": _PREPARED, "dataloader_drop_last": _PREPARED,
        "torch_compile": _GRAPHS, "torch_compile_backend": _GRAPHS, "torch_compile_mode": _GRAPHS,
        "activation_offloading": _GRAPHS, "use_cache": _GRAPHS, "tf32": _GRAPHS, "auto_find_batch_size": _GRAPHS,
        "label_smoothing_factor": "its loss takes all logits at once, which the plan of memory does not know",
        "beta": "--beta", "precompute_ref_log_probs": _REFERENCE, "precompute_ref_batch_size": _REFERENCE,
        "sync_ref_model": _REFERENCE, "ref_model_mixup_alpha": _REFERENCE, "ref_model_sync_steps": _REFERENCE,
        "disable_dropout": "preferences are compared without dropout",
        "optim_target_modules": _PARTS, "model_init_kwargs": "--quantization, --dtype and --attn",
        "trust_remote_code": "finetune runs no code from the Hub",
        "fsdp": _ONE_GPU, "fsdp_config": _ONE_GPU, "deepspeed": _ONE_GPU, "parallelism_config": _ONE_GPU,
        "local_rank": _ONE_GPU, "ddp_backend": _ONE_GPU, "accelerator_config": _ONE_GPU,
        "push_to_hub": "--push-to-hub", "hub_model_id": "--push-to-hub", "hub_private_repo": "--private",
        "hub_strategy": "--push-checkpoints", "hub_always_push": "--push-checkpoints", "hub_revision": _BRANCH,
        "hub_token": "the token is that of `hf auth login`, or HF_TOKEN",
        "save_only_model": "a run goes on from whole checkpoints alone",
        "enable_jit_checkpoint": "Ctrl-C and SIGTERM save a checkpoint", "do_train": "the command trains",
        "do_eval": "--eval-dataset or --eval-share", "do_predict": "the command trains",
        "batch_eval_metrics": "--eval-dataset or --eval-share", "prediction_loss_only": "--eval-dataset or --eval-share",
        "include_for_metrics": "--eval-dataset or --eval-share", "disable_tqdm": "the command has a bar of its own",
    },
    "lora": {
        "r": "--attention-rank, --expert-rank, --shared-expert-rank and --router-rank",
        "lora_alpha": "--attention-alpha, --expert-alpha and --shared-expert-alpha", "lora_dropout": "--lora-dropout",
        "target_modules": "--attention-modules and --attention-rank",
        "target_parameters": "--expert-rank and --router-rank", "rank_pattern": "--expert-rank and --attention-rank",
        "alpha_pattern": "--expert-alpha and --attention-alpha", "base_model_name_or_path": "--model",
        "revision": "--revision", "task_type": "finetune trains causal language models",
        "peft_type": "finetune trains LoRA", "inference_mode": "the command trains",
        "auto_mapping": "PEFT writes it", "peft_version": "PEFT writes it",
        "layers_to_transform": _ALL, "layers_pattern": _ALL,
        "exclude_modules": "--attention-modules, or 0 as a rank",
        "modules_to_save": "--modules-to-save",
        "ensure_weight_tying": "--modules-to-save",
        "bias": _PARTS, "trainable_token_indices": _PARTS, "layer_replication": _PARTS,
        "runtime_config": _GRAPHS, "megatron_config": _ONE_GPU, "megatron_core": _ONE_GPU,
    },
}  # fmt: skip


# What a method decides by itself.
_MANAGED_BY_METHOD: dict[tuple[Method, str], str] = {
    ("ipo", "loss_type"): "chooses the loss",
    ("kto", "loss_type"): "chooses the loss",
    ("kto", "train_sampling_strategy"): "needs rows in one order; finetune mixes them once, by --seed",
}

# The smallest and the largest value of fields, and whether the largest is still one. None is no bound.
_BOUNDS: dict[str, tuple[float, float | None, bool]] = {
    "trainer.adam_beta1": (0, 1, False), "trainer.adam_beta2": (0, 1, False), "trainer.adam_epsilon": (0, None, True),
    "trainer.neftune_noise_alpha": (0, None, True), "trainer.label_smoothing": (0, 1, True),
    "trainer.ld_alpha": (0, 1, True), "trainer.desirable_weight": (0, None, True),
    "trainer.undesirable_weight": (0, None, True), "trainer.eval_delay": (0, None, True),
    "trainer.data_seed": (0, 2**32, False), "trainer.dataloader_num_workers": (0, None, True),
    "trainer.dataloader_prefetch_factor": (1, None, True), "trainer.torch_empty_cache_steps": (1, None, True),
    "trainer.eval_accumulation_steps": (1, None, True), "lora.qalora_group_size": (1, None, True),
}  # fmt: skip
# The modules of TRL that compare fields of the trainers' configs with the words that they may be, and these fields.
_COMPARED: dict[Method, tuple[str, ...]] = {
    "sft": ("trainer/sft_trainer.py", "trainer/sft_config.py"),
    "dpo": ("trainer/dpo_trainer.py",),
    "ipo": ("trainer/dpo_trainer.py",),
}
_WORDS = ("loss_type", "f_divergence_type")


def parse(text: str) -> tuple[Config, str, Any]:
    """Reads the value of ``--set``, such as ``lora.use_rslora=true``; the value behind the sign is YAML.

    Raises:
        ValueError: It has another form.
    """
    import yaml

    place, sign, value = text.partition("=")
    config, dot, name = place.strip().partition(".")
    if not sign or not dot or not name or not value.strip() or config not in get_args(Config):
        raise ValueError(f"--set must be trainer.NAME=VALUE or lora.NAME=VALUE, got {text!r}")
    try:
        return config, name, yaml.safe_load(value)  # type: ignore[return-value]  # one of the two
    except yaml.YAMLError as error:
        raise ValueError(f"--set {place}: the value must be YAML: {' '.join(str(error).split())}") from None


@functools.cache
def fields_of(config: Config, method: Method = "sft") -> Mapping[str, str]:
    """The annotations of the fields of TRL's or PEFT's config, by name, from the source of the installed libraries."""
    found: dict[str, str] = {}
    own = (("trl", *_TRAINERS[method]),) if config == "trainer" else ()
    for package, file, name in (*own, *_SOURCES[config]):
        tree = _source(package, file)
        (declared,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for node in declared.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
                found.setdefault(node.target.id, ast.unparse(node.annotation))
    return found


def _source(package: str, file: str) -> ast.Module:
    """The source of a module of an installed library."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))


@functools.cache
def words_of(name: str, method: Method) -> tuple[str, ...]:
    """The words that TRL's trainer for a method knows for a field, in the order in which its source compares with them.

    The trainer itself finds out about an unknown word when it is made, or at its first step.
    """
    found: dict[str, None] = {}
    for file in _COMPARED.get(method, ()):
        for node in ast.walk(_source("trl", file)):
            if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], (ast.Eq, ast.NotEq, ast.In, ast.NotIn)):
                continue
            if name == getattr(node.left, "attr", getattr(node.left, "id", None)):
                for constant in ast.walk(node.comparators[0]):
                    if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                        found.setdefault(constant.value)
    return tuple(found)


def names_given(options: Options, *configs: Config) -> str:
    """The names of the fields that ``trainer`` and ``lora`` of ``options`` have, for errors."""
    return ", ".join(f"{config}.{name}" for config in configs for name in getattr(options, config) or ())


def check_handed_through(options: Options) -> None:
    """Raises ValueError if ``trainer`` or ``lora`` of ``options`` have a field that cannot be given, or a wrong value."""
    for config, values in _given(options):
        for name, value in values.items():
            place = f"{config}.{name}"
            if (instead := MANAGED[config].get(name)) is not None:
                raise ValueError(
                    f"{place} cannot be set: " + (f"use {instead}" if instead.startswith("--") else instead)
                )
            if (reason := _MANAGED_BY_METHOD.get((options.method, name))) is not None:
                raise ValueError(f"{place} cannot be set beside --method {options.method}, which {reason}")
            known = fields_of(config, options.method)
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f", did you mean {near[0]}?" if near else ""
                raise ValueError(f"{place}: {_class_of(config, options.method)} has no field {name}{hint}")
            if (needed := _mismatch(known[name], value)) is not None:
                raise ValueError(f"{place} must be {needed}, got {as_yaml(value)}")
            if (needed := _out_of_bounds(place, value)) is not None:
                raise ValueError(f"{place} must be {needed}, got {as_yaml(value)}")
            if config == "trainer" and name in _WORDS:
                _check_words(name, options.method, value)


def _out_of_bounds(place: str, value: object) -> str | None:
    """What a number must be, if it is certainly wrong; None if it may be right, or is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return "a finite number"
    low, high, closed = _BOUNDS.get(place, (-math.inf, None, True))
    if value >= low and (high is None or value < high or (closed and value == high)):
        return None
    if high is None:
        return f"at least {low:g}"
    return f"at least {low} and {'at most' if closed else 'below'} {high}"


def _check_words(name: str, method: Method, value: object) -> None:
    """Raises ValueError unless the trainer of a method knows the word, or the words, that a field is."""
    known = words_of(name, method)
    several = name == "loss_type" and method != "sft"  # DPO adds up several losses
    given = value if several and isinstance(value, list) else [value]
    unknown = next((word for word in given if word not in known), None)
    if not known or (given and unknown is None):
        return
    near = difflib.get_close_matches(str(unknown), known, n=1)
    raise ValueError(
        f"trainer.{name} must be {'a list of some' if several else 'one'} of {', '.join(known)}, got {as_yaml(value)}"
        + (f": did you mean {near[0]}?" if near else "")
    )


def _class_of(config: Config, method: Method) -> str:
    return f"TRL's {_TRAINERS[method][1]}" if config == "trainer" else "PEFT's LoraConfig"


def _given(options: Options) -> Iterator[tuple[Config, Mapping[str, Any]]]:
    for config in get_args(Config):
        if values := getattr(options, config):
            yield config, values


_SIMPLE: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"), "int": ((int,), "a whole number"), "float": ((int, float), "a number"),
    "str": ((str,), "a string"), "None": ((type(None),), "null"),
}  # fmt: skip


def _mismatch(annotation: str, value: object) -> str | None:
    """What a field with simple types must be, if ``value`` is something else; None for other types."""
    text = annotation.strip("'\"")
    if text.startswith("Optional[") and text.endswith("]"):
        text = f"{text[9:-1]} | None"
    if text.startswith("Union[") and text.endswith("]"):
        text = text[6:-1].replace(", ", " | ")
    names = [name.strip() for name in text.split("|")]
    if not all(name in _SIMPLE for name in names):
        return None
    for name in names:
        kinds, _ = _SIMPLE[name]
        if isinstance(value, kinds) and (name == "bool" or not isinstance(value, bool)):
            return None
    return " or ".join(_SIMPLE[name][1] for name in names)
