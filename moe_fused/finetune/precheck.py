"""Checks of a run that need the standard library alone, so that their errors appear before torch is imported.

``precheck`` makes all of them, and ``check_automatic_device`` asks torch for a GPU where that matters. Some of the
questions can be answered only in part at this point: ``--device auto`` is a GPU or not, and a model on the Hub has a
config that is not here yet. Their checks are functions of their own, which ``resolve`` calls again as soon as it knows
the answer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_fused.checkpoints.adapters.names import names_gpt_oss
from moe_fused.checkpoints.places import ADAPTER_CONFIG, CONFIG, read_config
from moe_fused.commands.options import check_device, check_source, check_weights, read_source
from moe_fused.quantized import check_quantization

from .handed_through import check_handed_through
from .options import DEFAULTS, MAPPINGS, OF_ADAPTERS, Options, flag
from .trackers import check_tracker

# The reason why an adapter has no layout with a matrix for each expert, or with gate and up apart.
INTERLEAVED = "gate and up of gpt-oss take turns in gate_up_proj, no tool reads adapters of them apart"

# Endings of data files. Names on the Hub do not end like this.
_FILES = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".text", ".gz", ".zst"}


@dataclass(frozen=True)
class Process:
    """This process among the processes of a run, as ``torchrun`` numbers them.

    Attributes:
        rank: The number of this process among all processes, counted from 0.
        local_rank: The number of this process among those of this machine, counted from 0.
        world_size: The number of processes.
        local_world_size: The number of processes on this machine.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Process:
        """Reads the variables that ``torchrun`` sets. Without them, a process is alone.

        Raises:
            ValueError: The variables are not those of a launcher.
        """
        found = {name: environment.get(name, default) for name, default in _VARIABLES.items()}
        for name, value in found.items():
            if not value.isdecimal():
                raise ValueError(f"the variable {name} must be a whole number, as torchrun sets it, got {value!r}")
        process = cls(*map(int, found.values()))
        if process.is_alone:
            return process
        needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if name not in environment]:
            raise ValueError(
                f"the variable WORLD_SIZE is {process.world_size}, but {', '.join(missing)} is not set: start several "
                "processes with torchrun, accelerate launch or --gpus"
            )
        if "LOCAL_WORLD_SIZE" not in environment:  # accelerate launch without torchrun
            return dataclasses.replace(process, local_world_size=process.local_rank + 1)
        return process

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether the run has no other process."""
        return self.world_size <= 1


_VARIABLES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def precheck(options: Options) -> Process:
    """Checks what can be known about a run before anything heavy is imported.

    Returns:
        This process among the processes of the run.

    Raises:
        ValueError: An option cannot have the value that it has.
        FileNotFoundError: A file is missing.
        NotImplementedError: The model is quantized in a way that is not supported.
    """
    check_device(options.device)
    check_device_type(options, options.device.partition(":")[0])
    process = Process.of_environment(os.environ)
    if not process.is_alone:
        check_shared(options)
    for part in options.datasets:
        _check_dataset("--dataset", part.dataset)
    if options.eval_dataset is not None:
        _check_dataset("--eval-dataset", options.eval_dataset)
    if options.chat_template is not None:
        _check_template_file(options.chat_template)
    check_tracker(options.report_to)
    check_handed_through(options)
    _check_model(options)
    return process


def check_said(said: Mapping[str, Any]) -> None:
    """Raises ValueError if options were given that the adapter of ``--adapter`` answers.

    Args:
        said: The options that were given, on the command line or in a file.
    """
    for name in OF_ADAPTERS if said.get("adapter") is not None else ():
        if said.get(name) is not None:
            what = name if name in MAPPINGS else flag(name)
            raise ValueError(f"{what} cannot be given with --adapter, whose adapter has its own: leave it out")


def check_adapter(options: Options) -> None:
    """Checks the adapter of ``--adapter`` as far as its config on this machine tells.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: It is of a kind that cannot be trained here.
    """
    if options.adapter is None:
        return
    content = read_source("--adapter", options.adapter, ADAPTER_CONFIG)
    check_weights("--adapter", options.adapter, ("adapter_model.safetensors",))
    if content is not None:
        check_trainable(content, f"--adapter {options.adapter}")


# Parts of adapters that experts, the kernels or this command do not train.
_UNTRAINABLE = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config",
    "arrow_config", "alora_invocation_tokens", "trainable_token_indices", "layer_replication", "megatron_config",
)  # fmt: skip
# Beginnings of the initializations that changed the weights of the base model, too.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_trainable(content: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if an adapter is of a kind that cannot be trained here.

    Args:
        content: The content of its ``adapter_config.json``.
        name: What it is called in the error.
    """
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{name} is of type {content.get('peft_type')}, finetune trains LoRA adapters")
    for option in _UNTRAINABLE:
        if content.get(option):
            raise ValueError(f"{name} has {option}, such adapters cannot be trained here: only plain LoRA can")
    if content.get("bias") not in (None, "none"):
        raise ValueError(
            f"{name} has bias {content['bias']!r}, such adapters cannot be trained here: only plain LoRA can"
        )
    begun = content.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASE):
        raise ValueError(
            f"{name} began with {begun}, which changed the base model, too: only an adapter of the unchanged model can go on"
        )


def check_device_type(options: Options, kind: str) -> None:
    """Raises ValueError if ``options`` ask for something that devices of a type do not have.

    Args:
        kind: torch's name for the type of device, or "auto", with which nothing is known.
    """
    if options.cuda_graphs and kind not in ("auto", "cuda"):
        raise ValueError("--cuda-graphs: it needs a GPU of NVIDIA or AMD")
    if options.liger and kind == "cpu":
        raise ValueError("--liger: Liger's kernels need a GPU")


# Values of trainer.train_sampling_strategy, the order of the rows, that depend on the number of processes.
_UNSHARED_ORDERS = ("group_by_length", "batch_rebalance")


def check_shared(options: Options) -> None:
    """Raises ValueError if ``options`` ask for something that several processes cannot do together."""
    reasons = {
        "--streaming": options.streaming,
        f"--method {options.method}": options.has_preferences,
        **{
            f"trainer.train_sampling_strategy {order}": (options.trainer or {}).get("train_sampling_strategy") == order
            for order in _UNSHARED_ORDERS
        },
    }
    for what, is_given in reasons.items():
        if is_given:
            raise ValueError(f"{what} cannot be shared by several processes yet: start it on one GPU")
    if (options.trainer or {}).get("average_tokens_across_devices") is False:
        raise ValueError("trainer.average_tokens_across_devices must be true with several processes")
    if ":" in options.device:
        kind = options.device.partition(":")[0]
        raise ValueError(
            f"--device {options.device} is one device, and there are several processes: give --device {kind}, and choose "
            "GPUs with CUDA_VISIBLE_DEVICES"
        )


def shared_again(options: Options, before: int, process: Process) -> Options:
    """Returns the options with which the processes of today take the same steps as those that a run had before.

    Args:
        options: The options of the run, which have the batches that each process took.
        before: The number of processes that it had.
        process: This process.

    Raises:
        ValueError: The batches of a step cannot be shared by so many processes.
    """
    now, each = process.world_size, options.gradient_accumulation
    if before == now or each is None:
        return options
    if each * before % now:
        raise ValueError(
            f"the run in {options.output} has {each * before} batches in a step, which {now} processes cannot share: go on "
            f"with a number of processes that divides {each * before}"
        )
    return dataclasses.replace(options, gradient_accumulation=each * before // now)


def check_automatic_device(options: Options) -> None:
    """Raises ValueError if ``--device auto`` finds no GPU, and ``options`` ask for something that needs one.

    ``resolve`` would say the same some seconds later: this function imports torch, if it must, and nothing else. It
    does not initialize CUDA, because the settings of torch's allocator are not made yet.
    """
    if options.device == "auto" and (options.cuda_graphs or options.liger):
        import torch

        from moe_fused.devices import choose_device

        if not torch.cuda.is_available():
            check_device_type(options, choose_device("auto").type)


def check_sequence_length(options: Options, longest: object) -> None:
    """Raises ValueError if ``--sequence-length`` is more than the model has positions.

    Args:
        options: The options of the run.
        longest: The number of positions. Anything but an int stands for a number that is not known.
    """
    length = options.sequence_length
    if length is not None and isinstance(longest, int) and length > longest:
        raise ValueError(f"--sequence-length must be at most {longest} for {options.model}, got {length}")


def check_export(options: Options, reason: str | None) -> None:
    """Raises ValueError if the adapter is to be exported and there is a ``reason`` why it cannot be."""
    if options.export != "none" and reason is not None:
        raise ValueError(
            f"--export {options.export}: {reason}; leave it out, `moe-fused merge` makes a model of the adapter"
        )


def _check_template_file(name: str) -> None:
    """Raises FileNotFoundError unless ``name``, the value of ``--chat-template``, is a file."""
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"--chat-template {name} {'is not a file' if path.exists() else 'is missing'}")


def _looks_like_a_path(name: str) -> bool:
    """Whether a name cannot be a name on the Hub, which has at most one slash."""
    return Path(name).is_absolute() or name.startswith(".") or len(Path(name).parts) > 2


def _check_dataset(option: str, name: str) -> None:
    is_path = _looks_like_a_path(name) or Path(name).suffix.lower() in _FILES
    if is_path and not Path(name).exists():
        raise FileNotFoundError(f"{option} {name} is missing")


def _check_model(options: Options) -> None:
    path = Path(options.model)
    if not path.is_dir():
        check_source("--model", options.model, CONFIG)
        return
    config = read_config(path)
    check_quantization("--model", options.model, config)
    check_sequence_length(options, (config.get("text_config") or config).get("max_position_embeddings"))
    check_export(options, INTERLEAVED if names_gpt_oss(str(config["model_type"])) else None)


def notes(options: Options) -> Iterator[str]:
    """Remarks about options that were given and have no effect beside the others."""
    if all(Path(part.dataset).is_file() for part in options.datasets):
        files = ", ".join(part.dataset for part in options.datasets)
        what = f"{files} is a file" if len(options.datasets) == 1 else f"{files} are files"
        for name in ("dataset_config", "split"):
            yield from _unused(options, name, f"--dataset {what}")
    if options.eval_dataset is None:
        yield from _unused(options, "eval_split", "there is no --eval-dataset")
    elif Path(options.eval_dataset).is_file():
        yield from _unused(options, "eval_split", f"--eval-dataset {options.eval_dataset} is a file")
    if options.streaming:
        yield from _unused(options, "epochs", "--streaming goes on until --max-steps")
    if Path(options.model).is_dir():
        yield from _unused(options, "revision", f"--model {options.model} is a directory")
    if options.repository is None:
        yield from _unused(options, "private", "there is no --push-to-hub")
    for rank, names in _BELONGING.items():
        if not getattr(options, rank):
            for name in names:
                yield from _unused(options, name, f"{flag(rank)} is 0")


_BELONGING = {
    "attention_rank": ("attention_alpha", "attention_modules"),
    "expert_rank": ("expert_alpha",),
    "shared_expert_rank": ("shared_expert_alpha",),
}


def _unused(options: Options, name: str, reason: str) -> Iterator[str]:
    if getattr(options, name) != DEFAULTS[name]:
        yield f"{flag(name)} has no effect: {reason}"
