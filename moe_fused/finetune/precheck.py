"""Checks of a run that need the standard library alone, so that their errors appear before torch is imported.

``precheck`` makes all of them, and ``check_automatic_device`` asks torch for a GPU where that matters. Some of the
questions can be answered only in part at this point: ``--device auto`` is a GPU or not, and a model on the Hub has a
config that is not here yet. Their checks are functions of their own, which ``resolve`` calls again as soon as it knows
the answer.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_fused.checkpoints.adapters.names import names_gpt_oss
from moe_fused.checkpoints.places import ADAPTER_CONFIG, CONFIG, read_config
from moe_fused.commands.options import check_device, check_source, check_weights, from_4bit, read_source
from moe_fused.quantized import check_quantization, quantization_of

from .handed_through import check_handed_through
from .options import DEFAULTS, MAPPINGS, OF_ADAPTERS, Options, flag
from .rows import KNOWN
from .text_files import endings_of
from .trackers import check_tracker

# The reason why an adapter has no layout with a matrix for each expert, or with gate and up apart.
INTERLEAVED = (
    "the gate and up features of gpt-oss alternate in the tensor gate_up_proj, and no tool reads adapters of them apart"
)


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
        _check_variables(environment)
        process = cls(*(int(environment.get(name, default)) for name, default in _VARIABLES.items()))
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
# What torch needs to connect processes, and accelerate wherever LOCAL_RANK is set.
_CONNECTING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The variables in which an MPI says how many processes it has started. It does not say how they find each other.
_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCHERS = "start several processes with torchrun, accelerate launch or --gpus"


def _check_variables(environment: Mapping[str, str]) -> None:
    """Raises ValueError unless the variables of a launcher are absent, or are all there and fit together."""
    for name in _VARIABLES:
        if name in environment:
            _check_number(name, environment[name], 1 if name.endswith("SIZE") else 0)
    _check_below("RANK", "WORLD_SIZE", environment)
    if "LOCAL_WORLD_SIZE" in environment:
        _check_below("LOCAL_RANK", "LOCAL_WORLD_SIZE", environment)
    several = int(environment.get("WORLD_SIZE", "1")) > 1
    if several or "LOCAL_RANK" in environment:
        _check_connecting("WORLD_SIZE" if several else "LOCAL_RANK", environment)
        return
    for name in _OF_MPI:
        if (number := environment.get(name, "")).isdecimal() and int(number) > 1:
            raise ValueError(
                f"the variable {name} is {number}, but processes that an MPI started cannot train together: {_LAUNCHERS}, "
                "or unset it to train in one process"
            )


def _check_below(name: str, limit: str, environment: Mapping[str, str]) -> None:
    """Raises ValueError unless the number of a process is below the number of processes, which is 1 if it is not set."""
    number, processes = (environment.get(each, _VARIABLES[each]) for each in (name, limit))
    if int(number) >= int(processes):
        raise ValueError(
            f"the variable {name} is {number} and must be below {limit}, which is "
            f"{processes if limit in environment else 'not set'}: {_LAUNCHERS}, or unset {name} to train in one process"
        )


def _check_connecting(first: str, environment: Mapping[str, str]) -> None:
    """Raises ValueError unless the variables that connect processes are there. ``first`` is why they are needed."""
    missing = [name for name in _CONNECTING if not environment.get(name)]
    if missing:
        raise ValueError(
            f"the variable {first} is {environment[first]}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            f"not set: {_LAUNCHERS}, or unset {first} to train in one process"
        )
    _check_number("MASTER_PORT", environment["MASTER_PORT"], 1, 65535)


def _check_number(name: str, value: str, least: int, most: int | None = None) -> None:
    if not value.isdecimal():
        raise ValueError(f"the variable {name} must be a whole number, as torchrun sets it, got {value!r}")
    if int(value) < least or (most is not None and int(value) > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"the variable {name} must be {limits}, got {value}")


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
            what = ", ".join(f"{name}.{field}" for field in said[name]) if name in MAPPINGS else flag(name)
            raise ValueError(
                f"{what} cannot be given with --adapter, because that adapter has its own value: leave the option out"
            )


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
    if options.keep_attention == "host" and kind not in ("auto", "cuda"):
        raise ValueError("--keep-attention host: it needs a GPU of NVIDIA or AMD")


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
    if options.device == "auto" and (options.cuda_graphs or options.liger or options.keep_attention == "host"):
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
            f"--export {options.export}: {reason}; leave --export out, `moe-fused merge` makes a model of the adapter"
        )


def _check_template_file(name: str) -> None:
    """Raises FileNotFoundError unless ``name``, the value of ``--chat-template``, is a file."""
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"--chat-template {name} {'is not a file' if path.exists() else 'is missing'}")


# What a name on the Hub looks like: one or two parts of these letters. Those of one part are old, and have no dots.
_HUB_ID = re.compile(r"[\w-]+|[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def _check_dataset(option: str, name: str) -> None:
    """Raises FileNotFoundError or ValueError if there is no file of that name, and it cannot be a name on the Hub."""
    path = Path(name)
    if not name or path.exists():
        return
    if "," in name:
        again = "repeat the option for each data set" if option == "--dataset" else "it takes one data set"
        raise ValueError(f"{option} {name} is neither a file nor a name on the Hub: {again}")
    ending, compression = endings_of(path)
    if ending in KNOWN or compression is not None:
        raise FileNotFoundError(f"{option} {name} is missing")
    near = difflib.get_close_matches(path.suffix.lower(), KNOWN, n=1, cutoff=0.75)
    is_beside = path.suffix[1:].isalnum() and len(path.parts) > 1 and path.parent.is_dir()
    if not _HUB_ID.fullmatch(name) or ".." in name or near or is_beside:
        mistyped = f", did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(
            f"{option} {name} is missing: there is no file or directory of this name, and files end in "
            f"{', '.join(KNOWN)}{mistyped}"
        )


def _check_model(options: Options) -> None:
    path = Path(options.model)
    if not path.is_dir():
        check_source("--model", options.model, CONFIG)
        return
    config = read_config(path)
    check_quantization("--model", options.model, config)
    check_sequence_length(options, (config.get("text_config") or config).get("max_position_embeddings"))
    check_export(options, INTERLEAVED if names_gpt_oss(str(config["model_type"])) else None)


def check_used(options: Options, said: Mapping[str, Any]) -> None:
    """Raises ValueError if one of the options that were given has no effect beside the others.

    Args:
        options: The options of the run, those that it began with included.
        said: The options that were given now, on the command line or in a file.
    """
    for name, reason in _unused(options):
        if name in said:
            raise ValueError(f"{reason}; leave it out")


def notes(options: Options) -> Iterator[str]:
    """Remarks about options that have no effect beside the others, although nothing is wrong with them."""
    for _, reason in _unused(options):
        yield reason
    if options.max_steps is not None and options.epochs != DEFAULTS["epochs"]:
        yield f"--epochs has no effect: the run ends after --max-steps {options.max_steps}"


def _unused(options: Options) -> Iterator[tuple[str, str]]:
    """Yields options that have another value than their default and no effect, each with the reason."""
    reasons = dict(_why_unused(options))
    for name, reason in reasons.items():
        if getattr(options, name) != DEFAULTS[name]:
            yield name, f"{flag(name)} has no effect: {reason}"
    for part in options.datasets:
        for name, value in (("split", part.split), ("config", part.config)):
            if value is not None and (why := _takes_no(name, part.dataset)) is not None:
                yield "dataset", f"--dataset: {name} {value} of {part.dataset} has no effect: {why}"


def _why_unused(options: Options) -> Iterator[tuple[str, str]]:
    """Yields options that would have no effect, each with the reason."""
    for name, field in (("split", "split"), ("dataset_config", "config")):
        reasons = [
            f"{part.dataset} has a {field} of its own" if getattr(part, field) else _takes_no(field, part.dataset)
            for part in options.datasets
        ]
        if all(reasons) and options.dataset:
            yield name, f"--dataset {', '.join(map(str, reasons))}"
    if options.eval_dataset is None:
        yield "eval_split", "there is no --eval-dataset"
    elif (reason := _takes_no("split", options.eval_dataset)) is not None:
        yield "eval_split", f"--eval-dataset {reason}"
    if options.has_preferences:
        yield "text_field", f"--method {options.method} does not learn from plain text"
    if Path(options.model).is_dir():
        yield "revision", f"--model {options.model} is a directory"
        held = _four_bit_format(Path(options.model))
        if held is not None and options.quantization not in ("auto", held):
            yield (
                "quantization",
                f"--model {options.model} is in 4 bits already, as {held} ({from_4bit(options.model)})",
            )
    if options.repository is None:
        yield "private", "there is no --push-to-hub"
    if options.scheduler == "constant":
        yield "warmup", "--scheduler constant has no warm-up, constant_with_warmup has one"
    for rank, names in _BELONGING.items():
        if not getattr(options, rank):
            for name in names:
                yield name, f"{flag(rank)} is 0"


_BELONGING = {
    "attention_rank": ("attention_alpha", "attention_modules"),
    "expert_rank": ("expert_alpha",),
    "shared_expert_rank": ("shared_expert_alpha",),
}


def _takes_no(field: str, dataset: str) -> str | None:
    """Why a data set has no choice of a split, or of a configuration; None if it may have."""
    path = Path(dataset)
    if path.is_file():
        return f"{dataset} is a file"
    if (path / "state.json").is_file():
        return f"{dataset} is a single data set of save_to_disk"
    if field == "config" and (path / "dataset_dict.json").is_file():
        return f"{dataset} is the output of save_to_disk"
    return None


def _four_bit_format(model: Path) -> str | None:
    """The 4-bit format of a model in a directory; None if it is not in 4 bits, or has no config that can be read."""
    try:
        found = quantization_of(read_config(model))
    except (OSError, ValueError):
        return None
    return None if found is None else found.quant_type
