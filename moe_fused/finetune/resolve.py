"""Resolves a run: answers every question that the options leave open, once, into frozen records.

    Batching      how rows become sequences, sequences batches and batches steps
    ModelSetup    the answers that options, architecture, device and process give, whatever the data are
    ResolvedRun   the same, with the answers that depend on the data and on how much memory there is

All later steps (the plan of memory, the model, the data, the trainer, the results) take a record and only read it. They
may read an option that needs no answer, such as the weight decay, from ``options``; ``ANSWERED`` names those that they
may not, and ``tests/integration/test_finetune_resolve.py`` looks at the source. Refusals of options that depend on the
architecture or the device are made here. Those that need less are made by ``options`` and ``precheck``.

Which length fits is not known before memory is planned. ``candidates`` therefore gives the records of a run in the
order in which they are preferred, and ``plan.plan_run`` takes the first that fits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_fused.commands.options import from_4bit
from moe_fused.devices import choose_device
from moe_fused.memory import is_named, skeleton
from moe_fused.quantized import PUBLISHED, QuantType, quantization_of
from moe_fused.recurrent import packages
from moe_fused.sizes import linear_modules

from . import attention, varlen
from .adapters import lora_config
from .architecture import (
    WholeModules,
    all_linear_modules,
    apart_refusal,
    attention_modules,
    boundaries_arrive,
    has_random_layers,
    shared_expert_modules,
    waits_for_lengths,
    whole_modules,
    why_rows_mix,
)
from .options import ALL_LINEAR, Optimizer, Options
from .precheck import Process, check_device_type, check_export, check_sequence_length
from .start import StartingAdapter, check_start

if TYPE_CHECKING:
    from moe_fused.checkpoints.loading import DenseWeights

# The options whose values later steps must take from a record.
ANSWERED = frozenset(
    {"quantization", "dtype", "attn", "liger", "cuda_graphs", "device", "packing", "sequence_length", "batch_size",
     "gradient_accumulation", "attention_modules", "attention_alpha", "expert_alpha", "adapter_dtype", "optimizer",
     "attention_rank", "expert_rank", "shared_expert_rank", "shared_expert_alpha", "router_rank",
     "modules_to_save", "learning_rate", "beta"}
)  # fmt: skip
# Lengths of sequences that are tried, and the number of tokens that a step should have, unless the options say.
LENGTHS = (4096, 2048, 1024, 512, 256)
STEP_TOKENS = 16384
# The learning rate of adapters, unless the options say: that of SFT, and that of preferences.
LEARNING_RATE, LEARNING_RATE_OF_PREFERENCES = 1e-4, 1e-5
BETA = 0.1


@dataclass(frozen=True)
class Batching:
    """How rows become sequences, sequences batches and batches steps.

    Attributes:
        packing: How rows fill sequences, one of the values of ``--packing`` but "auto".
        length: The number of tokens of a sequence.
        batch_size: The number of sequences in a batch, or of pairs of answers.
        accumulation: The number of batches in a step, for each process.
        answers: The number of sequences that a row becomes: 2 for a pair of answers.
        processes: The number of processes that share a step. Each takes ``accumulation`` batches of it.
    """

    packing: str
    length: int
    batch_size: int = 1
    accumulation: int = 1
    answers: int = 1
    processes: int = 1

    @property
    def sequences(self) -> int:
        """The number of sequences that go through the model at once."""
        return self.batch_size * self.answers

    @property
    def has_documents(self) -> bool:
        """Whether rows lie side by side in a sequence, as documents that do not attend to each other."""
        return self.packing.startswith("bfd")

    @property
    def cuts(self) -> bool:
        """Whether what a row has beyond the length of a sequence is cut off."""
        return self.packing in ("bfd", "none")

    @property
    def step_batches(self) -> int:
        """The number of batches in a step, those of all processes together."""
        return self.accumulation * self.processes

    @property
    def step_tokens(self) -> int:
        """The number of tokens of a step, at most."""
        return self.length * self.sequences * self.step_batches


@dataclass(frozen=True)
class Ranks:
    """The largest rank of the adapters on each kind of layer; 0 for a kind that is not adapted.

    Attributes:
        attention: That on ``attention_modules``.
        expert, shared_expert, router: Those on experts, shared experts and routers.
    """

    attention: int
    expert: int
    shared_expert: int
    router: int


@dataclass(frozen=True)
class ModelSetup:
    """What options, architecture, device and process decide about a run, whatever its data are. ``set_up`` makes it.

    Attributes:
        options: The options as they were given.
        process: This process among those of the run.
        config: The model's config, of Transformers.
        skeleton: The model on the meta device, with the attention of the run and without adapters.
        device: The device that this process trains on, with its number if it is a GPU.
        dtype: The data type of the computation and of weights that are not in 4 bits.
        adapter_dtype: The data type of the adapters' parameters, gradients and optimizer.
        optimizer: The optimizer, by TRL's name for it.
        learning_rate: The peak learning rate.
        beta: How much a preference holds the model to what it was before.
        attention: The implementation of attention, by Transformers' name for it.
        ranks: The ranks of the adapters.
        attention_modules: The linear layers that get adapters of the rank for attention, by PEFT's names for them.
        shared_expert_modules: The same for those of the rank for shared experts.
        attention_alpha, expert_alpha, shared_expert_alpha: The alphas of the adapters on these layers and on experts.
        whole: The modules that are trained in full, in ``dtype``.
        start: The adapter that the run goes on from, which says which layers it adapts. None for a new one.
        quantize_to: The 4-bit format to which weights are quantized while they are loaded. None if they are in 4 bits
            already, or stay as they are.
        quant_type: The 4-bit format of the experts, from the checkpoint or because of ``quantize_to``. None if they are
            dense.
        dense: What is dense in a checkpoint in 4 bits, and stays so. Nothing is known without its files.
        liger: Whether Liger's rotary embeddings and norms are used.
        packages: The packages that compute recurrent layers, of those that Transformers takes. There are none on a CPU.
        is_random: Whether two passes over the same batch differ, because something is dropped or jittered.
        layout_refusals: For each layout of ``--export``, why the adapter cannot be had in it, or None.
    """

    options: Options
    process: Process
    config: Any
    skeleton: Any
    device: torch.device
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    optimizer: Optimizer
    learning_rate: float
    beta: float
    attention: str
    ranks: Ranks
    attention_modules: tuple[str, ...]
    shared_expert_modules: tuple[str, ...]
    attention_alpha: float
    expert_alpha: float
    shared_expert_alpha: float
    whole: WholeModules
    start: StartingAdapter | None
    quantize_to: QuantType | None
    quant_type: QuantType | None
    dense: DenseWeights
    liger: bool
    packages: frozenset[str]
    is_random: bool
    layout_refusals: Mapping[str, str | None]

    @property
    def output(self) -> Path:
        """The directory of the run."""
        return self.options.output_directory

    @property
    def is_4bit(self) -> bool:
        """Whether experts are in 4 bits."""
        return self.quant_type is not None

    @property
    def linears_in_4bit(self) -> bool:
        """Whether linear layers are in 4 bits, too."""
        return self.quant_type is not None and self.quant_type not in PUBLISHED

    @property
    def linear_modules(self) -> tuple[str, ...]:
        """The linear layers that get adapters, by PEFT's names for them."""
        return tuple(dict.fromkeys((*self.attention_modules, *self.shared_expert_modules)))

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""
        return int(self.config.get_text_config().vocab_size)


@dataclass(frozen=True)
class ResolvedRun(ModelSetup):
    """All that is decided about a run. ``candidates`` makes it.

    Attributes:
        batching: How rows become sequences, batches and steps.
        maskless: Whether ``attention`` of this package takes the place of the model's, which needs no masks.
        kernel: The kernel with which it computes documents and windows, by its name in ``varlen``. None if it needs none.
        graphs: Whether the decoder runs as CUDA graphs, if the sequences are full enough.
        graphs_asked_for: Whether it does so however much padding that takes.
    """

    batching: Batching
    maskless: bool
    kernel: str | None
    graphs: bool
    graphs_asked_for: bool

    def settled(self) -> Options:
        """The options with the answers filled in, so that a run that goes on elsewhere or later decides nothing anew.

        What depends on the machine (the device, CUDA graphs, Liger) is left open.
        """
        modules = self.options.attention_modules
        if self.attention_modules and modules != [ALL_LINEAR]:
            modules = list(self.attention_modules)
        # Only "auto" stands for flash attention in place of eager attention. By name, eager attention means Transformers'.
        attn = "auto" if self.maskless and self.attention == "eager" else self.attention
        if self.options.attn in attention.KERNELS:
            attn = self.options.attn
        return dataclasses.replace(
            self.options,
            quantization=self.quant_type or "none",
            sequence_length=self.batching.length,
            gradient_accumulation=self.batching.accumulation,
            packing=self.batching.packing,  # type: ignore[arg-type]  # one of the names
            attn=attn,
            attention_modules=modules,
            dtype=_name(self.dtype),  # type: ignore[arg-type]
            adapter_dtype=_name(self.adapter_dtype),  # type: ignore[arg-type]
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            beta=self.beta if self.options.has_preferences else None,
        )


def training_device(options: Options, process: Process | None = None, *, only_plans: bool = False) -> torch.device:
    """The device that this process trains on, with its number if it is a GPU.

    Args:
        options: The options of the run.
        process: This process among those of the run. The default is a process that is alone.
        only_plans: Whether the run ends with its plan, which ``--device cuda`` can have on a machine without a GPU.

    Raises:
        ValueError: This machine has no such device, or fewer of them than processes.
    """
    if only_plans and options.device == "cuda" and not torch.cuda.is_available():
        return torch.device("cuda", 0)
    device = choose_device(options.device)
    if device.type == "cpu" or ":" in options.device:
        return device
    if process is not None and not process.is_alone:
        there = torch.accelerator.device_count()
        if process.local_world_size > there:
            raise ValueError(
                f"{process.local_world_size} processes, but this machine has {there} GPU{'' if there == 1 else 's'}"
            )
        return torch.device(device.type, process.local_rank)
    return torch.device(device.type, torch.accelerator.current_device_index())


def set_up(
    options: Options,
    config: Any,
    device: torch.device,
    process: Process | None = None,
    *,
    start: StartingAdapter | None = None,
    allow_other_base: bool = False,
) -> ModelSetup:
    """Decides all that does not depend on the data.

    Args:
        options: The options as they were given.
        config: The model's config, of Transformers.
        device: The device to train on, as ``training_device`` gives it.
        process: This process among those of the run. The default is a process that is alone.
        start: The adapter that the run goes on from.
        allow_other_base: Whether that adapter may have been made for another model of the same shapes.

    Raises:
        ValueError: The model or the device does not have what the options ask for, or Transformers has no causal
            language model for the config.
    """
    check_device_type(options, device.type)
    model = _skeleton(options, config, device)
    _check_kernel(options, model, device)
    setup = _set_up(options, process or Process(), config, model, device, start, _dense_weights(options, config))
    if start is not None:
        check_start(start, options, _skeleton(options, config, device), config, allow_other_base=allow_other_base)
    return setup


def _set_up(
    options: Options,
    process: Process,
    config: Any,
    model: Any,
    device: torch.device,
    start: StartingAdapter | None,
    dense: DenseWeights,
) -> ModelSetup:
    from moe_fused.integrations.quantizer.configs import has_stacks_alone

    dtype = _dtype(options, device)
    held, wanted = quantization_of(config), options.quantization
    quantize_to: QuantType | None = None
    if held is not None and wanted not in ("auto", held.quant_type):
        raise ValueError(
            f"--quantization {wanted} is not possible: --model {options.model} is in 4 bits already, as {held.quant_type} "
            f"({from_4bit(options.model, options.revision)}); leave it out"
        )
    if held is None and wanted != "none":
        quantize_to = "nf4" if wanted == "auto" else wanted
    quant_type = held.quant_type if held is not None else quantize_to
    linears_in_4bit: frozenset[str] = frozenset()
    if quant_type is not None and quant_type not in PUBLISHED:
        linears_in_4bit = frozenset(linear_modules(model)) - dense.linears
    setup = ModelSetup(
        options=options,
        process=process,
        config=config,
        skeleton=model,
        device=device,
        dtype=dtype,
        adapter_dtype=_adapter_dtype(options, dtype),
        optimizer=_optimizer(options, device),
        learning_rate=_learning_rate(options),
        beta=BETA if options.beta is None else options.beta,
        attention=attention.chosen(options.attn, config),
        ranks=_ranks(options, model, start),
        attention_modules=() if start else _attention_modules(options, model),
        shared_expert_modules=_shared_expert_modules(options, model),
        attention_alpha=_alpha(options.attention_alpha, options.attention_rank or 1),
        expert_alpha=_alpha(options.expert_alpha, options.expert_rank),
        shared_expert_alpha=_alpha(options.shared_expert_alpha, options.shared_expert_rank),
        whole=_whole(options, model, dtype, start, linears_in_4bit),
        start=start,
        quantize_to=quantize_to,
        quant_type=quant_type,
        dense=dense,
        liger=_liger(options, config, device),
        packages=packages() if device.type == "cuda" else frozenset(),
        is_random=bool(options.lora_dropout) or has_random_layers(config) or _has_noise(options),
        layout_refusals={layout: apart_refusal(options.model, config, model, layout) for layout in _LAYOUTS},
    )
    if quant_type in PUBLISHED and (reason := _experts_that_stay_dense(model, quant_type)) is not None:
        raise ValueError(f"--model {options.model} cannot be held in {quant_type}: the experts of {reason}")
    if quantize_to == "nvfp4" and has_stacks_alone(model):  # the base of the adapter could not be written
        raise ValueError(
            f"--quantization nvfp4 is not possible: a {type(model).__name__} cannot be saved in nvfp4, because its "
            "checkpoints have no matrix for each expert; use --quantization mxfp4"
        )
    check_export(options, setup.layout_refusals.get(options.export))
    if start is not None and options.export != "none" and not setup.ranks.expert:
        raise ValueError(f"--export {options.export} is a layout of adapters on experts, but {start.name} has none")
    lora_config(setup, model)  # raises if the model lacks a layer that is to be adapted
    if options.shard and (reason := shard_refusal(setup, process.world_size)) is not None:
        raise ValueError(f"--shard: {reason}")
    return setup


def _dense_weights(options: Options, config: Any) -> DenseWeights:
    """What is dense in a checkpoint in 4 bits. What is wrong with its files is said later."""
    from moe_fused.checkpoints.loading import DenseWeights, dense_weights

    try:
        return dense_weights(options.model, config, revision=options.revision)
    except (OSError, ValueError):
        return DenseWeights()


def shard_refusal(setup: ModelSetup, processes: int) -> str | None:
    """Why a model cannot be divided among so many processes, or None if it can."""
    experts = [int(module.num_experts) for module in setup.skeleton.modules() if hasattr(type(module), "_apply_gate")]
    if not experts:
        return f"{type(setup.skeleton).__name__} has no experts to divide"
    if setup.quant_type is None:
        return "experts must be in 4 bits, use --quantization nf4"
    if (dense := _experts_that_stay_dense(setup.skeleton, setup.quant_type)) is not None:
        return f"experts must be in 4 bits, and those of {dense}"
    if setup.dense.experts:
        return f"experts must be in 4 bits, and {min(setup.dense.experts)} is dense in --model {setup.options.model}"
    if setup.options.router_aux_loss > 0:
        return "FSDP2 hides from --router-aux-loss what the routers give, leave one of the two out"
    if setup.dtype is torch.float16:
        return "the gradients of --dtype float16 need scaling, use bfloat16"
    if -(-min(experts) // processes) * (processes - 1) >= min(experts):
        return f"{min(experts)} experts to a layer cannot be divided among {processes} GPUs"
    return None


def _experts_that_stay_dense(model: Any, quant_type: QuantType) -> str | None:
    """Says which experts of a model cannot be held in a format and why, or returns None."""
    from moe_fused.integrations.quantizer.packed_experts import packing_refusal

    for module in model.modules():
        if hasattr(type(module), "_apply_gate") and (reason := packing_refusal(module, quant_type)) is not None:
            return f"{type(module).__name__} stay dense: {reason}"
    return None


_LAYOUTS = ("per-expert", "original")


def _has_noise(options: Options) -> bool:
    """Whether TRL adds noise to embeddings (NEFTune)."""
    return bool((options.trainer or {}).get("neftune_noise_alpha"))


def candidates(setup: ModelSetup, *, plain_text: bool, rows: int = 0) -> Iterator[ResolvedRun]:
    """The records that a run may have, in the order in which they are preferred: they need less and less memory.

    Args:
        setup: What is decided already.
        plain_text: Whether the rows are plain text.
        rows: The number of rows, 0 if it is not known.

    Raises:
        ValueError: The model or the device cannot have what the options ask for.
    """
    packing = _packing(setup, plain_text=plain_text, rows=rows)
    for length in _lengths(setup):
        run = _resolved(setup, packing, length)
        yield run
        # Rather without graphs, which take some memory, than shorter.
        if run.graphs and not run.graphs_asked_for:
            yield dataclasses.replace(run, graphs=False)


def with_options(run: ResolvedRun, **changes: Any) -> ResolvedRun:
    """The record that ``run`` would have with some other options, for the same data and on the same device."""
    options = dataclasses.replace(run.options, **changes)
    setup = _set_up(options, run.process, run.config, run.skeleton, run.device, run.start, run.dense)
    return _resolved(setup, run.batching.packing, changes.get("sequence_length", run.batching.length))


def _resolved(setup: ModelSetup, packing: str, length: int) -> ResolvedRun:
    options = setup.options
    size, answers = options.batch_size, 2 if options.method in ("dpo", "ipo") else 1
    processes = setup.process.world_size
    accumulation = options.gradient_accumulation or max(1, STEP_TOKENS // (size * answers * length * processes))
    batching = Batching(packing, length, size, accumulation, answers, processes)
    packed = batching.has_documents
    maskless, tokens = _is_maskless(setup, packed=packed), batching.sequences * length
    kernel = (
        attention.kernel_for(options.attn, setup.skeleton, setup.device, tokens, packed=packed) if maskless else None
    )
    _check_kept_attention(setup, maskless, kernel)
    return ResolvedRun(
        **{field.name: getattr(setup, field.name) for field in dataclasses.fields(ModelSetup)},
        batching=batching,
        maskless=maskless,
        kernel=kernel,
        graphs=_graphs(setup, batching, maskless),
        graphs_asked_for=bool(options.cuda_graphs),
    )


# --- each question


def _dtype(options: Options, device: torch.device) -> torch.dtype:
    if options.dtype != "auto":
        dtype: torch.dtype = getattr(torch, options.dtype)
        return dtype
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _adapter_dtype(options: Options, dtype: torch.dtype) -> torch.dtype:
    """The data type of the adapters. It is never fp16: its gradients would need unscaling, which torch refuses."""
    if options.adapter_dtype != "auto":
        chosen: torch.dtype = getattr(torch, options.adapter_dtype)
        return chosen
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _optimizer(options: Options, device: torch.device) -> Optimizer:
    if options.optimizer != "auto":
        return options.optimizer
    return "adamw_torch" if device.type == "cpu" else "paged_adamw_8bit"


def _learning_rate(options: Options) -> float:
    if options.learning_rate is not None:
        return options.learning_rate
    return LEARNING_RATE_OF_PREFERENCES if options.has_preferences else LEARNING_RATE


def _alpha(alpha: float | None, rank: int) -> float:
    return 2.0 * rank if alpha is None else alpha


def _skeleton(options: Options, config: Any, device: torch.device) -> Any:
    model = skeleton(config)
    cause: Exception | None = None
    reason = attention.name_refusal(options.attn, device)
    if reason is None and options.attn in ("auto", *attention.KERNELS):
        return model
    if reason is None:
        try:
            return skeleton(config, options.attn)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            reason, cause = re.split(r"\.\s", str(error).strip(), maxsplit=1)[0], error
        except (AttributeError, NameError) as error:  # what Transformers does not find in a kernel of the Hub
            if not varlen.is_hub_id(options.attn):
                raise
            reason, cause = "that kernel has no attention that Transformers can call", error
    raise ValueError(_no_attention(options, model, reason)) from cause


def _check_kernel(options: Options, model: Any, device: torch.device) -> None:
    """Raises ValueError if ``--attn`` names a kernel of ``varlen`` for rows side by side that the run cannot have."""
    if options.attn not in attention.KERNELS:
        return
    reason = varlen.cudnn_refusal(device) if options.attn == varlen.CUDNN else None
    reason = reason or attention.refusal(options.attn, model, device, _dtype(options, device), packed=True)
    if reason is None and not boundaries_arrive(model):
        reason = "its layers do not hand the boundaries of rows to their attention"
    if reason is not None:
        raise ValueError(_no_attention(options, model, reason))


def _no_attention(options: Options, model: Any, reason: str) -> str:
    # A resumed run cannot leave out what its finetune.yaml has.
    instead = attention.chosen("auto", model.config)
    return (
        f"--attn {options.attn} is not possible for {type(model).__name__} here, leave it out or use --attn {instead}: "
        f"{reason}"
    )


def _check_kept_attention(setup: ModelSetup, maskless: bool, kernel: str | None) -> None:
    """Raises ValueError if ``--keep-attention`` asks for results of attention that cannot be kept."""
    where = setup.options.keep_attention
    if where == "none":
        return
    name = setup.attention if kernel is None else kernel
    of_torch = setup.attention == "sdpa" if kernel is None else kernel in attention.KERNELS
    if not (of_torch or (maskless and kernel is None)):
        raise ValueError(
            f"--keep-attention {where} is not possible with --attn {name}: only results of torch's attention and of cuDNN's "
            "are known, take --attn sdpa, torch or cudnn, or --keep-attention none"
        )
    if getattr(setup.config.get_text_config(), "attention_dropout", None):
        raise ValueError(
            f"--keep-attention {where} is not possible for this model, whose attention has dropout: random numbers would "
            "differ when a layer is recomputed without it"
        )


def _attention_modules(options: Options, model: Any) -> tuple[str, ...]:
    if not options.attention_rank:
        return ()
    if options.attention_modules is None:
        return attention_modules(model)
    if options.attention_modules == [ALL_LINEAR]:
        return all_linear_modules(model, shared=not options.shared_expert_rank)
    paths, head = (
        [path for path, module in model.named_modules() if isinstance(module, nn.Linear)],
        model.get_output_embeddings(),
    )
    for name in options.attention_modules:
        if not any(is_named(path, (name,)) for path in paths):
            has = ", ".join(
                sorted({path.rpartition(".")[2] for path in paths if model.get_submodule(path) is not head})
            )
            raise ValueError(f"--attention-modules: {type(model).__name__} has no linear layer {name}, it has {has}")
    of_head = [path for path in paths if model.get_submodule(path) is head]
    for name in options.attention_modules:
        if any(is_named(path, (name,)) for path in of_head):
            raise ValueError(
                f"--attention-modules {name}: the head of the model gets no adapter, because the loss reads its weight "
                f"directly; --modules-to-save {name} trains the head in full"
            )
    return tuple(options.attention_modules)


def _shared_expert_modules(options: Options, model: Any) -> tuple[str, ...]:
    if not options.shared_expert_rank:
        return ()
    if not (names := shared_expert_modules(model)):
        raise ValueError(f"--shared-expert-rank: {type(model).__name__} has no shared experts, set it to 0")
    return names


def _ranks(options: Options, model: Any, start: StartingAdapter | None) -> Ranks:
    if start is None:
        return Ranks(options.attention_rank, options.expert_rank, options.shared_expert_rank, options.router_rank)
    experts = next((int(module.num_experts) for module in model.modules() if hasattr(type(module), "_apply_gate")), 0)
    others, expert = start.ranks(experts)
    return Ranks(others, expert, 0, 0)


def _whole(
    options: Options, model: Any, dtype: torch.dtype, start: StartingAdapter | None, in_4bit: Collection[str]
) -> WholeModules:
    option, names = "--modules-to-save", options.modules_to_save
    if start is not None:
        option, names = f"{start.name}, modules_to_save", list(start.modules_to_save)
    if not names:
        return WholeModules()
    if dtype is torch.float16:
        raise ValueError(f"{option} is not possible with --dtype float16, whose gradients need scaling: use bfloat16")
    whole = whole_modules(model, names, option, in_4bit)
    if start is not None and whole.is_tied and not start.config.get("ensure_weight_tying"):
        raise ValueError(f"{option} has head or embedding untied, which {type(model).__name__} ties")
    return whole


def _liger(options: Options, config: Any, device: torch.device) -> bool:
    if options.liger is False or (options.liger is None and device.type != "cuda"):
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    known = config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN
    if options.liger and not known:
        raise ValueError(f"--liger: Liger does not know models of type {config.model_type}")
    return known


def _is_maskless(setup: ModelSetup, *, packed: bool) -> bool:
    """Whether the attention of this package takes the place of the model's."""
    model = setup.skeleton
    if not attention.serves(setup.options.attn, model, setup.device, setup.dtype, packed=packed):
        return False
    return not packed or boundaries_arrive(model)


def _packing(setup: ModelSetup, *, plain_text: bool, rows: int) -> str:
    """How rows fill sequences. A single text may go on from sequence to sequence, whatever the model is."""
    asked, model = setup.options.packing, setup.skeleton
    if setup.options.has_preferences:
        return "none"
    reason = None if _is_maskless(setup, packed=True) else why_rows_mix(model)
    if asked == "auto":
        if reason is None:
            return "bfd_split" if plain_text else "bfd"
        return "wrapped" if plain_text and rows == 1 else "none"
    if reason is not None and asked.startswith("bfd"):
        raise ValueError(
            f"--packing {asked} is not possible for {type(model).__name__}, where one row would see the one "
            f"before it: {reason}; use --packing none"
        )
    return asked


def _lengths(setup: ModelSetup) -> list[int]:
    """The lengths of sequences that are tried, the longest first."""
    longest = getattr(setup.config.get_text_config(), "max_position_embeddings", None) or LENGTHS[0]
    if setup.options.sequence_length is not None:
        check_sequence_length(setup.options, longest)
        return [setup.options.sequence_length]
    return sorted({min(length, longest) for length in LENGTHS}, reverse=True)


def _graphs(setup: ModelSetup, batching: Batching, maskless: bool) -> bool:
    """Whether the decoder runs as CUDA graphs: if asked for, or on NVIDIA GPUs where packing makes batches alike."""
    options = setup.options
    if options.cuda_graphs is False or setup.device.type != "cuda":
        return False
    reasons = {
        "what dropout drops could not be dropped again when layers are computed anew": setup.is_random,
        "--router-aux-loss takes more than hidden states out of the decoder": options.router_aux_loss > 0,
        "adapters of another dtype than the weights need autocast": setup.adapter_dtype is not setup.dtype,
        "the embedding is trained in full, whose gradient no graph makes": any(
            one.embeds for one in setup.whole.tensors
        ),
        "the model's rotary embedding waits for the GPU": waits_for_lengths(setup.config),
        f"--attn {setup.attention} waits for the GPU, or the model's layers do not attend to all that is before them": (
            not maskless
        ),
    }
    reason = next((text for text, applies in reasons.items() if applies), None)
    if options.cuda_graphs and reason is not None:
        raise ValueError(f"--cuda-graphs: {reason}")
    # Answers are padded. Whether that takes too much is known with the data.
    alike = batching.packing != "none" or options.has_preferences
    by_itself = alike and torch.version.hip is None
    return reason is None and (bool(options.cuda_graphs) or by_itself)
