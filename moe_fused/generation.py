"""Lets Transformers' own ``generate`` launch each decoding step of a model as one CUDA graph.

    moe_fused.fast_generation(model)
    model.generate(**inputs, max_new_tokens=200)

A step for one token launches some 3000 kernels in a model like Qwen3-30B-A3B, which takes the host 70 ms. ``generate`` keeps
its loop, its sampling and its stopping criteria. Two methods of the model are replaced: the one that makes the cache, and
``forward``. The cache is a static one of Transformers, whose memory does not move. The prompt runs as it always does, the
first step after it as well, and the second step is recorded. Caches and graphs are kept for further calls with as many
sequences.

What cannot be recorded runs as before, and the reason is logged once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import DeferredStopCheck
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from . import decoding
from .checkpoints.finite import scales_of
from .cuda_graphs import cause_of, clear_workspaces, close_pool, reason_of, registered, takes

__all__ = ["FastGeneration", "fast_generation"]

logger = logging.getLogger(__name__)

# The most sequences whose steps are recorded.
LARGEST_BATCH = 64
# The shortest cache. Longer ones have the next power of two, and beyond LONG the next multiple of it.
SHORTEST, LONG = 512, 8192
# For how many shapes of a cache a model keeps the memory.
KEPT = 2
ATTENTION = ("sdpa", "eager")
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# torch records one graph at a time, and what a recording replaces belongs to all models.
_one_recording = threading.Lock()


def fast_generation(model: Any) -> FastGeneration:
    """Lets ``model.generate`` launch each decoding step as one CUDA graph.

    It serves greedy search and sampling of up to 64 sequences, with streaming, stopping criteria, padded prompts and
    adapters. What it does not serve runs as before, and one line in the log says why. A second call for the same model
    returns the same handle.

    Args:
        model: A model of Transformers, or PEFT's model around one.

    Returns:
        A handle, whose ``disable`` makes the model generate as before, and whose ``forget`` frees the memory of caches and
        graphs.

    Raises:
        TypeError: The model cannot generate.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "_prepare_cache_for_generation"):
        raise TypeError(f"a {type(model).__name__} cannot generate: give a model of Transformers with a language head")
    return getattr(base, "_moe_fused_generation", None) or FastGeneration(base)


def cache_length(tokens: int) -> int:
    """Returns the length of the cache for so many tokens. It is one of few lengths, so that calls share caches."""
    if tokens > LONG:
        return -(-tokens // LONG) * LONG
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


class _Layer(StaticLayer):
    """A static layer that gives the prompt's attention the prompt alone, and not the empty rest of the cache.

    It also serves layers with a window: the mask leaves out what is outside of it.
    """

    def __init__(self, max_cache_len: int, *, is_sliding: bool) -> None:
        super().__init__(max_cache_len)
        self.is_sliding = is_sliding
        self.has_prompt = False
        # The place of the next token, while a step is recorded whose kernels can run on the device.
        self.position: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Memory of an inference mode cannot be written outside of one, and the cache outlives the call.
        with torch.inference_mode(False):
            super().lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        is_prompt, self.has_prompt = not self.has_prompt, True
        if self.position is not None:
            from .decoding.heads import wrote  # which imports triton

            if wrote(self, key_states, value_states):
                return self.keys, self.values  # type: ignore[return-value]  # a prompt has made them
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return (key_states, value_states) if is_prompt else (keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_cache_len if self.has_prompt else query_length), 0

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.has_prompt else 0

    def reset(self) -> None:
        self.has_prompt = False
        if self.is_initialized:
            # Masked tokens have a weight of 0, and 0 times a NaN that the last call left behind would be NaN.
            for held in (self.cumulative_length, self.keys, self.values):
                held.zero_()  # type: ignore[union-attr]  # tensors


class _Recurrent(LinearAttentionLayer):
    """The state of a recurrent layer, in memory that outlives an inference mode."""

    @property
    def held(self) -> list[Tensor]:
        """The tensors of the state."""
        return [each for each in (*self.conv_states.values(), *self.recurrent_states.values()) if each is not None]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        with torch.inference_mode(False):
            super().lazy_initialization(*args, **kwargs)


class StepCache(StaticCache):
    """The cache of a model whose steps are recorded: all keys and values, (B, heads, length, head size), in place.

    Attributes:
        in_step: Whether a decoding step runs. Only then does Transformers see a static cache, whose empty part its masks
            must leave out. Otherwise ``generate`` would compile the model, and make masks that grow.
    """

    in_step = False

    def __init__(self, config: Any, length: int) -> None:
        super().__init__(config=config, max_cache_len=length)
        self.length = length
        made: list[Any] = self.layers
        self.layers = [
            _Layer(length, is_sliding=layer.is_sliding)
            if isinstance(layer, StaticLayer)
            else _Recurrent(number_of_states=layer.number_of_states)
            for layer in made
        ]

    @property
    def is_compileable(self) -> bool:
        return self.in_step

    @property
    def has_prompt(self) -> bool:
        """Whether a prompt has gone through the model."""
        return all(layer.has_prompt for layer in self.layers if isinstance(layer, _Layer))

    @property
    def state(self) -> list[Tensor]:
        """The tensors that a step changes and the next one reads. Keys and values are not among them: a step that runs
        again writes them again.
        """
        lengths: list[Any] = [layer.cumulative_length for layer in self.layers if isinstance(layer, _Layer)]
        return lengths + [each for layer in self.layers if isinstance(layer, _Recurrent) for each in layer.held]

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lets layers write the token of a step in one launch within the block. All hold the same number of tokens."""
        layers: list[Any] = [layer for layer in self.layers if isinstance(layer, _Layer) and layer.is_initialized]
        position = layers[0].cumulative_length.clone() if layers else None
        for layer in layers:
            layer.position = position
        try:
            yield
        finally:
            for layer in layers:
                layer.position = None

    def copied(self, config: Any) -> DynamicCache:
        """Returns a cache with the same tokens that can grow, such as ``generate`` makes by default."""
        found = DynamicCache(config=config)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, _Layer):
                length = int(layer.get_seq_length())
                keys, values = (held[:, :, :length].clone() for held in (layer.keys, layer.values) if held is not None)
                found.update(keys, values, index)
            else:
                found.layers[index] = copy.deepcopy(layer)
        return found


class _Step:
    """The decoding step of a model with one cache, as a graph.

    Args:
        model: The model.
        cache: The cache.
        batch: The number of sequences.
    """

    def __init__(self, model: Any, cache: StepCache, batch: int) -> None:
        self._model, self.cache, self.batch = model, cache, batch
        self._is_warm = False
        self._graph: Any = None
        self._inputs: dict[str, Any] = {}
        self._mask: Tensor | None = None
        self._mask_is_new = True
        self._output: Any = None
        self._state: object = None

    def begin(self, state: object) -> None:
        """Prepares for another prompt.

        Args:
            state: What the graph depends on beside its inputs. If it has changed, the graph is recorded anew.
        """
        self.cache.reset()
        self._mask_is_new = True
        if state != self._state:
            self._graph, self._output, self._is_warm, self._state = None, None, False, state

    def run(self, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """Computes the output of a step, which the next one overwrites.

        Args:
            forward: The model's own forward.
            inputs: Its arguments.

        Raises:
            _CannotRecord: The step cannot be recorded. It has not run.
        """
        inputs = {**inputs, "attention_mask": self._whole_mask(inputs)}
        self.cache.in_step = True
        try:
            if not self._is_warm:
                self._is_warm = True
                return forward(**inputs)
            if self._graph is None:
                self._keep(inputs)
                self._record(forward)
            elif not takes(inputs, self._inputs):
                return forward(**inputs)
        finally:
            self.cache.in_step = False
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value is not self._mask:
                self._inputs[name].copy_(value)
        self._graph.replay()
        return type(self._output)(**self._output)

    def _whole_mask(self, inputs: Mapping[str, Any]) -> Tensor:
        """Returns a mask (B, length of the cache) in memory that does not move. Places of tokens to come are 1 already."""
        if self._mask is None:
            with torch.inference_mode(False):
                device = inputs["input_ids"].device
                self._mask = torch.ones(self.batch, self.cache.length, dtype=torch.long, device=device)
        given = inputs.get("attention_mask")
        if self._mask_is_new:
            self._mask_is_new = False
            self._mask.fill_(1)
            if given is not None:
                self._mask[:, : given.shape[1]].copy_(given)
        return self._mask

    def _keep(self, inputs: Mapping[str, Any]) -> None:
        """Makes the memory in which the graph finds its inputs."""
        with torch.inference_mode(False):
            self._inputs = {
                name: value.clone() if isinstance(value, Tensor) and value is not self._mask else value
                for name, value in inputs.items()
            }

    def _record(self, forward: Callable[..., Any]) -> None:
        gc.collect()  # a tensor of another stream that is freed meanwhile would be waited for
        device = self._model.device
        with_kernels = decoding.runs_on(device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_one_recording)
            graph = torch.cuda.CUDAGraph()
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))  # what is recorded, and where Triton launches
            stack.enter_context(masks_without_copies())
            if with_kernels:
                with trying():
                    stack.enter_context(decoding.fewer_launches(self._model))
                    self._rehearse(forward)
            with recording(graph), self.cache.writing() if with_kernels else contextlib.nullcontext():
                self._output = forward(**self._inputs)
        self._graph = graph

    def _rehearse(self, forward: Callable[..., Any]) -> None:
        """Runs a step, and leaves the cache as it was. Kernels compile when they first run, which no recording may do."""
        before = [(each, each.clone()) for each in self.cache.state]
        try:
            with self.cache.writing():
                forward(**self._inputs)
        finally:
            for held, value in before:
                held.copy_(value)


class _CannotRecord(Exception):
    """A step cannot be recorded."""


@contextlib.contextmanager
def trying() -> Iterator[None]:
    """Turns an error within the block into the reason why a step is not recorded.

    An error of the model itself comes again when the step runs as before.

    Raises:
        _CannotRecord: Something failed, such as a kernel that cannot be compiled for this GPU.
        torch.OutOfMemoryError: The GPU has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _CannotRecord(f"{type(error).__name__}: {reason_of(error)}") from error


def masks_without_copies() -> contextlib.AbstractContextManager[None]:
    """Lets masks of eager attention be made on their device within the block.

    Transformers 5.17 copies a zero from the host for each of them, which a recording cannot contain.
    """
    return registered(ALL_MASK_ATTENTION_FUNCTIONS, {"eager": _eager_mask})


def _eager_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """What eager attention adds to scores: 0, or the lowest number where a token is left out."""
    keeps = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    if keeps is None:
        return None
    return torch.zeros_like(keeps, dtype=dtype).masked_fill_(~keeps, torch.finfo(dtype).min)


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream on which graphs are recorded on a device.

    torch's own belongs to the device on which the first graph of the process was recorded.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def recording(graph: Any) -> Iterator[None]:
    """Records what the block launches. If that fails, torch's random state, stream and allocator are as before.

    Raises:
        _CannotRecord: Something waits for the GPU, for example.
        torch.OutOfMemoryError: The GPU has too little memory.
    """
    device, handled = torch.cuda.current_device(), sys.exc_info()[1]
    generator = torch.cuda.default_generators[device]
    before, stream, pool = generator.clone_state(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    # Another call of ``generate`` may use the GPU in its own thread meanwhile.
    options: dict[str, Any] = {"stream": _stream(device), "capture_error_mode": "thread_local"}
    # cuBLAS keeps memory that it has taken of a graph's pool, and the next graph would use it when the pool is gone.
    clear_workspaces()
    try:
        with torch.cuda.graph(graph, pool=pool, **options):
            yield
    except RuntimeError as error:
        generator.graphsafe_set_state(before)
        torch.cuda.set_stream(stream)
        close_pool(pool)
        cause = cause_of(error, handled)
        if isinstance(cause, torch.OutOfMemoryError):
            raise
        raise _CannotRecord(reason_of(cause)) from error
    finally:
        clear_workspaces()


class FastGeneration:
    """The handle of a model whose ``generate`` launches steps as CUDA graphs. ``fast_generation`` makes it.

    Args:
        model: A model of Transformers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._steps: OrderedDict[tuple[Any, ...], _Step] = OrderedDict()
        self._said: set[str] = set()
        self._failed: str | None = None
        self._lock, self._busy = threading.Lock(), threading.local()
        names = ("forward", "generate", "_prepare_cache_for_generation")
        self._before = {name: vars(model).get(name) for name in names}
        self._forward, self._generate, self._prepare = (getattr(model, name) for name in names)
        # ``generate`` looks at the arguments that ``forward`` has, so the others show those of what they replace.
        for name, function in zip(names, (self._step, self._call, self._make_cache), strict=True):
            setattr(model, name, _InPlaceOf(getattr(model, name), function))
        model._moe_fused_generation = self
        _late_checks.add()

    def disable(self) -> None:
        """Makes the model generate as before, and frees the memory of its graphs and caches."""
        if vars(self._model).pop("_moe_fused_generation", None) is None:
            return
        _late_checks.remove()
        for name, value in self._before.items():
            if value is None:
                delattr(self._model, name)
            else:
                setattr(self._model, name, value)
        self.forget()

    def forget(self) -> None:
        """Frees the memory of graphs and caches. The next call of ``generate`` makes new ones."""
        self._steps.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # What replaces methods of the model.

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Generates. One call at a time uses the caches; another one beside it runs without graphs."""
        if not self._lock.acquire(blocking=False):
            self._busy.value = True
            try:
                return self._generate(*args, **kwargs)
            finally:
                self._busy.value = False
        try:
            output = self._generate(*args, **kwargs)
        finally:
            self._lock.release()
        if isinstance(cache := getattr(output, "past_key_values", None), StepCache):
            output.past_key_values = cache.copied(self._config)  # the next call uses this one
        return output

    def _make_cache(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        batch = batch_size * (generation_config.num_return_sequences or 1)
        # The call may ask for another cache, or the model's own generation config.
        asked = {
            "past_key_values are given": model_kwargs.get("past_key_values") is not None,
            f"cache_implementation is {generation_config.cache_implementation}": (
                generation_config.cache_implementation is not None
            ),
            "use_cache is False": generation_config.use_cache is False,
            "the model assists another one": bool(generation_config.is_assistant),
            "prefill_chunk_size is 1": generation_config.prefill_chunk_size == 1,
            # Their loss compares the mask with the tokens of the step.
            "router logits are returned": bool(
                model_kwargs.get("output_router_logits", getattr(self._config, "output_router_logits", False))
            ),
        }
        reason = next((text for text, applies in asked.items() if applies), None)
        reason = reason or self._reason(generation_config, generation_mode, batch)
        if reason is not None:
            self._say(reason)
            return self._prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        length = cache_length(max_cache_length)
        key = batch, length, self._model.device, self._model.dtype
        if key not in self._steps:
            while len(self._steps) >= KEPT:
                self._steps.popitem(last=False)
            with torch.inference_mode(False):
                self._steps[key] = _Step(self._model, StepCache(self._config, length), batch)
        self._steps.move_to_end(key)
        self._steps[key].begin(self._state())
        model_kwargs["past_key_values"] = self._steps[key].cache
        return None

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        step = next((each for each in self._steps.values() if each.cache is cache), None)
        tokens = kwargs.get("input_ids")
        if step is None or args or tokens is None or not step.cache.has_prompt or torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        if self._failed is None and tokens.shape == (step.batch, 1):
            try:
                return step.run(self._forward, kwargs)
            except _CannotRecord as error:
                self._failed = f"the model cannot be recorded: {error}"
                self._say(self._failed)
        step.cache.in_step = True
        try:
            return self._forward(**kwargs)
        finally:
            step.cache.in_step = False

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("moe_fused.fast_generation: generating without CUDA graphs, because %s", reason)

    # What can be recorded.

    @property
    def _config(self) -> Any:
        return self._model.config.get_text_config(decoder=True)

    def _reason(self, generation_config: Any, mode: Any, batch: int) -> str | None:
        """Why a call of ``generate`` does not run as graphs, or None if it does."""
        device, attention = self._model.device, str(self._config._attn_implementation)
        devices = set((getattr(self._model, "hf_device_map", None) or {"": device}).values())
        reasons = {
            f"the model is on {device.type}, not on a GPU": not is_gpu(device),
            "the model is on several devices": len(devices) > 1,
            "the model has an encoder": self._model.config.is_encoder_decoder,
            f"{getattr(mode, 'value', mode)} moves or drops tokens of the cache": mode not in MODES,
            f"{batch} sequences are more than {LARGEST_BATCH}": batch > LARGEST_BATCH,
            f"attention {attention} takes no mask, use {' or '.join(ATTENTION)}": attention not in ATTENTION,
            "hidden states or attentions are returned": bool(
                generation_config.output_hidden_states or generation_config.output_attentions
            ),
            "autocast is on": torch.is_autocast_enabled(device.type),
            "adapter_names or other hooks choose adapters": any(each._forward_pre_hooks for each in self._adapted),
            "another call of generate is under way": getattr(self._busy, "value", False),
        }
        found = next((text for text, applies in reasons.items() if applies), None)
        return found or self._failed or self._reason_of_cache

    @functools.cached_property
    def _reason_of_cache(self) -> str | None:
        """Why the model's cache cannot be recorded, or None if it can."""
        if not self._model._supports_default_dynamic_cache():
            return "the model has a cache of its own"
        known = {StaticLayer, StaticSlidingWindowLayer, LinearAttentionLayer}
        layers = StaticCache(config=self._config, max_cache_len=1).layers
        others = sorted({type(layer).__name__ for layer in layers if type(layer) not in known})
        return f"its cache has {', '.join(others)}" if others else None

    @property
    def _adapted(self) -> list[Any]:
        """The layers of PEFT."""
        peft: Any = sys.modules.get("peft.tuners.tuners_utils")
        return [each for each in self._model.modules() if peft is not None and isinstance(each, peft.BaseTunerLayer)]

    def _state(self) -> object:
        """What a graph depends on beside its inputs: the memory of the weights, and the adapters that are in use."""
        adapters = [
            (layer.disable_adapters, layer.merged, tuple(layer.active_adapters), dict(getattr(layer, "scaling", {})))
            for layer in self._adapted
        ]
        tensors: list[Tensor] = [*self._model.parameters(), *self._model.buffers()]
        for value in tuple(tensors):  # scales of bitsandbytes are no parameters
            tensors += scales_of(getattr(value, "quant_state", None)).values()
        return adapters, self._model.training, tuple(value.data_ptr() for value in tensors)


class _InPlaceOf:
    """A function in the place of a model's method, whose arguments it shows.

    A copy of the model would still call the first model, so that it cannot be copied.
    """

    def __init__(self, method: Callable[..., Any], function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a model with moe_fused.fast_generation cannot be copied or pickled: call its disable() before")


def is_gpu(device: torch.device) -> bool:
    """Whether graphs can be recorded on a device."""
    return device.type == "cuda"


class _LateChecks:
    """Lets ``generate`` ask one step late whether all sequences have ended, if the step is a graph.

    Otherwise the host would wait for the GPU in each step, and the GPU would then wait for the host to prepare the next
    one. Transformers has these late checks, but uses them on one kind of device only.
    """

    def __init__(self) -> None:
        self._users = 0
        self._before: Any = None

    def add(self) -> None:
        self._users += 1
        if self._users > 1:
            return
        before = self._before = DeferredStopCheck.is_supported

        def is_supported(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
            if isinstance(cache, StepCache) and device.type != "cpu":
                return not cache_is_returned and not is_assistant
            return bool(before(device, cache, cache_is_returned, is_assistant))

        DeferredStopCheck.is_supported = staticmethod(is_supported)  # type: ignore[method-assign]

    def remove(self) -> None:
        self._users -= 1
        if not self._users:
            DeferredStopCheck.is_supported = staticmethod(self._before)  # type: ignore[method-assign]


_late_checks = _LateChecks()
