"""Training a model for a few steps, and what is measured of it: time, memory by part, and where the time goes.

A set-up makes of a model a ``Training``, which is all that ``measure`` knows. There is a plain one here, and in
``training_finetune`` that of ``moe-fused finetune``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_fused.benchmark.harness import MIB
from moe_fused.finetune import attention
from moe_fused.finetune.graphs import GraphedDecoder
from moe_fused.finetune.options import KeepAttention

from . import step_trace
from .experts_lora import SCALING

Recompute = Literal["layers", "selective"]

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")
# Steps before those that are timed: one compiles, the next is recorded as CUDA graphs.
READY = 2
CHECKPOINT: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here is random


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        attention_rank, expert_rank: of the adapters.
        recompute: "layers" checkpoints whole decoder layers; "selective" their attention only, and leaves it to the
            experts what they recompute.
        compile_layers: ``torch.compile`` for the decoder layers around their experts.
        cuda_graphs: the decoder's forward and its backward are one CUDA graph each, on a GPU.
        paged: the optimizer's state may leave the GPU.
        documents: each sequence has documents of the mix of ``documents`` side by side.
        attn: what computes attention, a value of ``finetune --attn``.
        joined: linear layers with adapters compute as ``moe_fused.finetune.projections`` has it; None for what the
            environment says.
        keep_attention: where attention's output is kept instead of being computed again, a value of
            ``finetune --keep-attention``.
    """

    attention_rank: int = 16
    expert_rank: int = 8
    learning_rate: float = 1e-4
    recompute: Recompute = "layers"
    compile_layers: bool = False
    cuda_graphs: bool = False
    paged: bool = False
    documents: bool = False
    attn: str = "auto"
    joined: bool | None = None
    keep_attention: KeepAttention = "none"


class Training(Protocol):
    """A model that is being trained.

    Attributes:
        model: the causal language model of Transformers, with adapters inside.
        has_parts: its modules can run one by one, as ``step_trace.parts`` wants it.
        has_graphs: CUDA graphs hold on to their memory.
        predicted: bytes that were predicted to be allocated at once for the last ``train``; None if nobody did.
    """

    model: Any
    has_parts: bool
    has_graphs: bool
    predicted: int | None

    def train(self, tokens: Tensor, meter: Meter) -> list[float]:
        """A step of the optimizer on each row of tokens (N, T), between ``meter.begin`` and ``meter.end``; their losses."""


def trained(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def add_adapters(model: Any, recipe: Recipe) -> None:
    """LoRA on the attention and, by PEFT's ``target_parameters``, on the experts of ``model``; all else is frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.attention_rank,
        lora_alpha=round(SCALING * recipe.attention_rank),
        target_modules=list(ATTENTION_MODULES),
        target_parameters=list(EXPERT_PARAMETERS),
        rank_pattern=dict.fromkeys(EXPERT_PARAMETERS, recipe.expert_rank),
        alpha_pattern=dict.fromkeys(EXPERT_PARAMETERS, round(SCALING * recipe.expert_rank)),
    )
    with warnings.catch_warnings():
        # PEFT 0.21 looks for the patterns of parameters among modules.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        get_peft_model(model, config, autocast_adapter_dtype=False)  # in place; the layers are all we need of it


def _checkpointed(model: Any, recompute: Recompute) -> None:
    if recompute == "layers":
        model.gradient_checkpointing_enable(CHECKPOINT)
        return
    for layer in model.model.layers:
        layer.self_attn.forward = functools.partial(checkpoint, layer.self_attn.forward, **CHECKPOINT)


def compile_layers(model: Any) -> None:
    """Compiles the decoder layers of ``model`` around their experts, which run as they are."""
    for layer in model.model.layers:
        layer.mlp.experts.forward = torch.compiler.disable(layer.mlp.experts.forward)
        layer.compile(dynamic=False)


def new_optimizer(parameters: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments on a GPU, as ``finetune`` has it by default; torch's own on a CPU."""
    if parameters[0].device.type == "cpu":
        return torch.optim.AdamW(parameters, lr=recipe.learning_rate)
    import bitsandbytes.optim as eight_bit

    chosen: Any = eight_bit
    optimizer: torch.optim.Optimizer = (chosen.PagedAdamW8bit if recipe.paged else chosen.AdamW8bit)(
        parameters, lr=recipe.learning_rate
    )
    return optimizer


def set_up_loop(model: Any, recipe: Recipe) -> Training:
    """Adapters, checkpointing, kernels for the rest of the model, and an optimizer; ``model`` is changed in place.

    On a GPU with Liger's rotary embedding, RMSNorm and fused linear cross-entropy, and 8-bit AdamW.
    """
    on_gpu = model.device.type == "cuda"
    attention.use(model)
    add_adapters(model, recipe)
    model.train()
    if on_gpu:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, {"rope": True, "rms_norm": True, "fused_linear_cross_entropy": True, "swiglu": False})
    _checkpointed(model, recipe.recompute)
    if recipe.compile_layers:
        compile_layers(model)
    return Loop(model, new_optimizer(trained(model), recipe), recipe)


class Loop:
    """A loop of our own around a model and an optimizer; see ``Training``."""

    predicted: int | None = None

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self.model, self.optimizer = model, optimizer
        self.has_parts, self.has_graphs = not recipe.compile_layers, recipe.cuda_graphs

    def train(self, tokens: Tensor, meter: Meter) -> list[float]:
        losses = []
        graphs = GraphedDecoder(self.model.model, (1, tokens.shape[1])) if self.has_graphs else None
        try:
            for row in tokens.split(1):
                meter.begin(self.model, self.optimizer, graphs)
                losses.append(self._backward(row))
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                meter.end()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            if graphs is not None:
                graphs.close()
        return [float(loss) for loss in losses]

    def _backward(self, tokens: Tensor) -> Tensor:
        """The loss of tokens (1, T), once its gradients are there."""
        loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        torch.autograd.backward(loss)
        return loss.detach()


@dataclass(frozen=True)
class Measurement:
    """What a step took.

    Attributes:
        ms: the median of the steps timed, each from an idle GPU to its end.
        first_ms: the two before them, with whatever they compiled and recorded.
        losses: of all steps, in order.
        memory: MiB by part: "peak" is the most that was allocated at once, of which "weights" are what the model had
            without adapters, "training" adapters, gradients and what of the optimizer's state is on the GPU, and
            "transient" the rest; "reserved" is the most that the allocator held, getting ready included; "predicted" the
            peak that somebody foresaw. With CUDA graphs the peak is what the allocator held in the steps timed: their
            memory is taken for good.
            Of a CPU only that.
        parts: milliseconds of GPU time by part of the model; empty where modules do not run one by one.
        busy: the share of a traced step in which a kernel ran.
        busy_ms: how long that was, of a step traced without ranges.
        kernels: milliseconds by name of a kernel, and how many ran, in that step.
    """

    ms: float
    first_ms: float
    losses: tuple[float, ...]
    memory: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    busy: float = 0.0
    busy_ms: float = 0.0
    kernels: Mapping[str, tuple[float, int]] = field(default_factory=dict)


def _nbytes(tensors: Iterable[Any]) -> int:
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor) and value.is_cuda)


def _training_bytes(model: Any, optimizer: Any) -> int:
    """Bytes of adapters, their gradients and the optimizer's state. Paged state does not count as the GPU's."""
    parameters = trained(model)
    state = (value for values in optimizer.state.values() for value in values.values())
    # A gradient has the size and dtype of its parameter. Gradients are gone between steps, so they are counted here.
    return 2 * _nbytes(parameters) + _nbytes(value for value in state if not getattr(value, "is_paged", False))


class Meter:
    """Measures training: steps to get ready, those that are timed, then two that are traced, without ranges and with.

    Args:
        weights: bytes that the model has without adapters.
        steps: how many are timed.
        has_parts: as in ``Training``; else nothing is traced with ranges.
        graphs: whether what the allocator holds is taken for good.
    """

    def __init__(
        self, device: torch.device, weights: int, *, steps: int, has_parts: bool, graphs: bool = False
    ) -> None:
        self._device, self._weights, self._graphs = device, weights, graphs
        self._phases = [*["first"] * READY, *["timed"] * steps, "traced", *["parts"] * has_parts]
        self._ended = 0
        self._times: list[float] = []
        self._memory: dict[str, float] = {}
        self._events: dict[str, step_trace.Events] = {}
        self._open = contextlib.ExitStack()
        self._start = 0.0

    @property
    def total(self) -> int:
        """Steps to train."""
        return len(self._phases)

    def begin(self, model: Any, optimizer: Any, graphs: GraphedDecoder | None) -> None:
        """Before a step of a causal language model of Transformers, which may run as CUDA graphs."""
        phase = self._phases[self._ended]
        self._model, self._optimizer = model, optimizer
        if phase == "parts":
            if graphs is not None:  # parts are of modules that run one by one
                graphs.forget()
                graphs.enabled = False
            self._open.enter_context(step_trace.parts(model, optimizer))
        if phase in ("traced", "parts"):
            self._events[phase] = self._open.enter_context(step_trace.tracing(self._device, ranges=phase == "parts"))
        self._synchronize()
        self._start = time.perf_counter()

    def end(self) -> None:
        """After it."""
        self._synchronize()
        elapsed = 1e3 * (time.perf_counter() - self._start)
        self._open.close()
        self._times.append(elapsed)
        self._ended += 1
        if self._device.type != "cuda":
            return
        if self._ended == READY:
            self._most_reserved = torch.cuda.max_memory_reserved(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._ended == self._phases.index("traced"):
            self._memory = self._measure_memory()

    def close(self) -> None:
        """Leaves nothing behind on a model whose training was broken off."""
        self._open.close()

    def measurement(self, losses: Sequence[float], predicted: int | None) -> Measurement:
        """What was measured of steps with these losses.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(f"losses must be finite, got {losses}")
        first, timed = sum(self._times[:READY]), self._times[READY : self._phases.index("traced")]
        traced, ranged = self._events["traced"], self._events.get("parts")
        busy = step_trace.busy_ms(traced)
        return Measurement(
            ms=statistics.median(timed),
            first_ms=first,
            losses=tuple(losses),
            memory=self._memory | ({} if predicted is None else {"predicted": predicted / MIB}),
            parts={} if ranged is None else step_trace.time_by_part(ranged),
            busy=busy / step_trace.wall_ms(traced),
            busy_ms=busy,
            kernels=step_trace.time_by_kernel(traced),
        )

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _measure_memory(self) -> dict[str, float]:
        reserved = torch.cuda.max_memory_reserved(self._device)
        peak = reserved if self._graphs else torch.cuda.max_memory_allocated(self._device)
        training = _training_bytes(self._model, self._optimizer)
        memory = {
            "peak": peak,
            "weights": self._weights,
            "training": training,
            "transient": peak - self._weights - training,
            "reserved": max(self._most_reserved, reserved),
        }
        return {name: value / MIB for name, value in memory.items()}


def measure(training: Training, length: int, vocabulary: int, weights: int, *, steps: int, seed: int) -> Measurement:
    """Trains on random sequences of ``length`` tokens, the same for the same seed.

    Args:
        weights: bytes that the model has without adapters.
        steps: how many are timed; there are up to four more.

    Raises:
        torch.OutOfMemoryError: a step needs more than there is.
        FloatingPointError: a loss is not finite.
    """
    device = training.model.device
    meter = Meter(device, weights, steps=steps, has_parts=training.has_parts, graphs=training.has_graphs)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (meter.total, length), generator=generator).to(device)
    try:
        losses = training.train(tokens, meter)
    finally:
        meter.close()
    return meter.measurement(losses, training.predicted)
