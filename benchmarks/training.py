"""Training a model for a few steps, and what is measured of it: time, memory by part, and where the time goes.

``set_up`` makes of a model a ``Training``, which is all that ``measure`` knows: another set-up fits in its place.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import step_trace
from .experts_lora import SCALING
from .harness import MIB, release_memory

Recompute = Literal["layers", "selective"]

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")
CHECKPOINT: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here is random
# Attention without a mask but the causal one. Transformers looks, on the GPU, whether "sdpa" needs another, and waits.
CAUSAL = "sdpa_causal"


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        attention_rank, expert_rank: of the adapters.
        recompute: "layers" checkpoints whole decoder layers; "selective" their attention only, and leaves it to the
            experts what they recompute.
        compile_layers: ``torch.compile`` for the decoder layers around their experts.
        cuda_graphs: the decoder's forward and its backward are one CUDA graph each.
        paged: the optimizer's state may leave the GPU.
    """

    attention_rank: int = 16
    expert_rank: int = 8
    learning_rate: float = 1e-4
    recompute: Recompute = "layers"
    compile_layers: bool = False
    cuda_graphs: bool = False
    paged: bool = False


@dataclass
class Training:
    """A model that is being trained.

    Attributes:
        model: the causal language model of Transformers, with adapters inside.
        optimizer: of the adapters.
        backward: from tokens (1, T) on the model's device to the loss, once its gradients are there.
        keeps_gradients: the next backward writes over them.
        has_parts: modules run one by one, as ``step_trace.parts`` wants it.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    backward: Callable[[Tensor], Tensor]
    keeps_gradients: bool = False
    has_parts: bool = True

    def step(self, tokens: Tensor) -> Tensor:
        """One step of the optimizer on tokens (1, T); their loss."""
        loss = self.backward(tokens)
        self.optimizer.step()
        if not self.keeps_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    @property
    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


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


def _compiled(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.experts.forward = torch.compiler.disable(layer.mlp.experts.forward)
        layer.compile(dynamic=False)


def _optimizer(parameters: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    if parameters[0].device.type == "cpu":
        return torch.optim.AdamW(parameters, lr=recipe.learning_rate)
    from bitsandbytes import optim

    optimizer: torch.optim.Optimizer = (optim.PagedAdamW8bit if recipe.paged else optim.AdamW8bit)(
        parameters, lr=recipe.learning_rate
    )
    return optimizer


def set_up(model: Any, recipe: Recipe) -> Training:
    """Adapters, checkpointing, kernels for the rest of the model, and an optimizer; ``model`` is changed in place.

    On a GPU with Liger's rotary embedding, RMSNorm and fused linear cross-entropy, and 8-bit AdamW.
    """
    on_gpu = model.device.type == "cuda"
    ALL_ATTENTION_FUNCTIONS.register(CAUSAL, sdpa_attention_forward)
    model.config._attn_implementation = CAUSAL
    add_adapters(model, recipe)
    model.train()
    if on_gpu:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, {"rope": True, "rms_norm": True, "fused_linear_cross_entropy": True, "swiglu": False})
    _checkpointed(model, recipe.recompute)
    if recipe.compile_layers:
        _compiled(model)
    optimizer = _optimizer([parameter for parameter in model.parameters() if parameter.requires_grad], recipe)
    if recipe.cuda_graphs:
        return Training(model, optimizer, _GraphedBackward(model), keeps_gradients=True, has_parts=False)

    def backward(tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        torch.autograd.backward(loss)
        return loss.detach()

    return Training(model, optimizer, backward, has_parts=not recipe.compile_layers)


class _GraphedBackward:
    """Forward and backward of the decoder as CUDA graphs, for the number of tokens that they were last called with.

    The loss runs between the two: Liger's waits for the GPU to count the tokens. Gradients of the adapters lie in the
    graphs' memory, where every replay overwrites them.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tokens: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self._tokens is None or self._tokens.shape != tokens.shape:
            self._capture(tokens)
        assert self._tokens is not None
        self._tokens.copy_(tokens)
        self._forward_graph.replay()
        hidden = self._hidden.detach().requires_grad_()
        decoder = self._model.model
        # The model's own forward, so that its loss is whatever it was set up to be.
        decoder.forward = lambda *_, **__: self._output(hidden)
        try:
            loss: Tensor = self._model(input_ids=tokens, labels=tokens, use_cache=False).loss
        finally:
            del decoder.forward
        (grad,) = torch.autograd.grad(loss, hidden)
        self._grad.copy_(grad)
        self._backward_graph.replay()
        return loss.detach()

    def _output(self, hidden: Tensor) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=hidden)

    def _run(self) -> Tensor:
        hidden: Tensor = self._model.model(input_ids=self._tokens, use_cache=False).last_hidden_state
        return hidden

    def _capture(self, tokens: Tensor) -> None:
        self._forget()
        self._tokens = tokens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # whatever compiles or allocates on a first call must not do so in a capture
            hidden = self._run()
            hidden.backward(torch.zeros_like(hidden))
            del hidden
        torch.cuda.current_stream().wait_stream(stream)
        self._model.zero_grad(set_to_none=True)
        release_memory(tokens.device)
        self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward_graph):
            self._hidden = self._run()
        self._grad = torch.empty_like(self._hidden)
        with torch.cuda.graph(self._backward_graph, pool=self._forward_graph.pool()):
            self._hidden.backward(self._grad, retain_graph=False)

    def _forget(self) -> None:
        """Gives the memory of an earlier capture back."""
        for name in ("_forward_graph", "_backward_graph", "_hidden", "_grad"):
            vars(self).pop(name, None)
        self._model.zero_grad(set_to_none=True)
        release_memory(self._model.device)


@dataclass(frozen=True)
class Measurement:
    """What a step took.

    Attributes:
        ms: the median of the steps timed, each from an idle GPU to its end.
        first_ms: the step before them, with whatever it compiled.
        losses: of all steps timed.
        memory: MiB by part: "peak" is the most that was allocated at once, of which "weights" are what the model had
            without adapters, "training" adapters, gradients and what of the optimizer's state is on the GPU, and
            "transient" the rest; "reserved" is what the allocator held. Empty on a CPU.
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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _nbytes(tensors: Any) -> int:
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor) and value.is_cuda)


def _training_bytes(training: Training) -> int:
    """Of adapters, their gradients and the optimizer's state; what is paged counts as elsewhere."""
    trained = training.trained
    state = [
        value
        for own in training.optimizer.state.values()
        for value in own.values()
        if not getattr(value, "is_paged", False)
    ]
    # Gradients are of the size and dtype of what they are of, and gone between steps.
    return 2 * _nbytes(trained) + _nbytes(state)


def measure(training: Training, tokens: Tensor, weights: int, *, steps: int = 3) -> Measurement:
    """Trains for one step, then ``steps`` that are timed, and two that are traced, on the rows of ``tokens`` in turn.

    Args:
        tokens: (N, T), on the model's device.
        weights: bytes that the model has without adapters.

    Raises:
        torch.OutOfMemoryError: a step needs more than there is.
        FloatingPointError: a loss is not finite.
    """
    device = tokens.device
    losses: list[Tensor] = []

    def step() -> None:
        losses.append(training.step(tokens[len(losses) % len(tokens)][None]))
        _synchronize(device)

    def timed() -> float:
        _synchronize(device)
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)

    first = timed()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [timed() for _ in range(steps)]
    memory = _memory(training, weights, device)
    events = step_trace.trace(step, device, ranges=False)
    wall, busy = step_trace.wall_ms(events), step_trace.busy_ms(events)
    parts: dict[str, float] = {}
    if training.has_parts:
        with step_trace.parts(training.model, training.optimizer):
            parts = step_trace.time_by_part(step_trace.trace(step, device, ranges=True))
    values = tuple(float(loss) for loss in losses)
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"losses must be finite, got {values}")
    kernels = step_trace.time_by_kernel(events)
    return Measurement(statistics.median(times), first, values, memory, parts, busy / wall, busy, kernels)


def _memory(training: Training, weights: int, device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    own = _training_bytes(training)
    memory = {
        "peak": peak,
        "weights": weights,
        "training": own,
        "transient": peak - weights - own,
        "reserved": torch.cuda.max_memory_reserved(device),
    }
    return {name: value / MIB for name, value in memory.items()}
