"""``fast_generation`` gives the tokens of ``generate``. On a CPU, a graph is a step that runs again in the same memory."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import moe_fused
from moe_fused import generation
from moe_fused.generation import FastGeneration, cache_length

from .models import GPT_OSS, MODELS, QWEN3_MOE, ModelCase, tokens

NEW = 12
# What gives the same tokens twice, and no special ones that would end a sequence.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": NEW,
    "eos_token_id": None,
    "pad_token_id": 0,
    "use_cache": True,
}


class _Again:
    """Runs a step again where a graph would be replayed."""

    def __init__(self, step: Any, forward: Any) -> None:
        self._step, self._forward = step, forward
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self._step.cache.in_step = True
        with torch.inference_mode():  # in which an output may have been made
            for name, value in self._forward(**self._step._inputs).items():
                if isinstance(value, Tensor):
                    self._step._output[name].copy_(value)
        self._step.cache.in_step = False


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_Again]]:
    """Lets a CPU count as a GPU. Returns the recordings."""
    recorded: list[_Again] = []

    def record(self: Any, forward: Any) -> None:
        layers = [layer for layer in self.cache.layers if isinstance(layer, generation._Layer)]
        lengths = [layer.cumulative_length.clone() for layer in layers]  # type: ignore[attr-defined]
        states = [_states(layer) for layer in self.cache.layers]
        self._output = forward(**self._inputs)
        # A recording computes nothing.
        for layer, length in zip(layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)  # type: ignore[attr-defined]
        for layer, state in zip(self.cache.layers, states, strict=True):
            for held, value in zip(_tensors(layer), state, strict=True):
                held.copy_(value)
        self._graph = _Again(self, forward)
        recorded.append(self._graph)

    monkeypatch.setattr(generation, "is_gpu", lambda _: True)
    monkeypatch.setattr(generation._Step, "_record", record)
    yield recorded
    assert generation._late_checks._users == 0


def _tensors(layer: Any) -> list[Tensor]:
    """The tensors of a recurrent layer's state."""
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return [state for state in states if state is not None]


def _states(layer: Any) -> list[Tensor]:
    return [value.clone() for value in _tensors(layer)]


@contextlib.contextmanager
def fast(*models: Any) -> Iterator[list[FastGeneration]]:
    handles = [moe_fused.fast_generation(model) for model in models]
    try:
        yield handles
    finally:
        for handle in handles:
            handle.disable()


def prompt(batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    ids = tokens(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded() -> dict[str, Tensor]:
    """Prompts of 7, 4 and 1 tokens, padded on the left."""
    ids = tokens(3, 7)
    mask = torch.ones_like(ids)
    for row, count in ((1, 3), (2, 6)):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def model() -> Any:
    return QWEN3_MOE.build(num_hidden_layers=2)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_families(case: ModelCase, steps: list[_Again], caplog: pytest.LogCaptureFixture) -> None:
    model: Any = case.build()
    for inputs in (prompt(), padded()):
        if case.id == "nemotron_h":  # which takes no mask
            del inputs["attention_mask"]
        want = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        with fast(model), caplog.at_level(logging.WARNING):
            for _ in range(2):
                got = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
                assert torch.equal(got.sequences, want.sequences)
                for one, other in zip(got.logits, want.logits, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert "CUDA graphs" not in caplog.text
    # One is recorded for each shape, and serves both calls: of the first, all steps but the prompt's and one more.
    assert [step.replays for step in steps] == [2 * (NEW - 1) - 1] * 2


def test_the_window_of_a_layer_counts(steps: list[_Again]) -> None:
    """A window of 4 tokens, which prompts and answers exceed, in half of the layers."""
    model: Any = GPT_OSS.build(sliding_window=4)
    wide: Any = GPT_OSS.build(sliding_window=60)
    want = model.generate(**padded(), **GREEDY)
    assert not torch.equal(want, wide.generate(**padded(), **GREEDY))
    with fast(model):
        assert torch.equal(model.generate(**padded(), **GREEDY), want)
    assert len(steps) == 1


def test_sampling_takes_the_same_random_numbers(model: Any, steps: list[_Again]) -> None:
    options = {**GREEDY, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "num_return_sequences": 2}
    torch.manual_seed(5)
    want = model.generate(**padded(), **options)
    torch.manual_seed(5)
    with fast(model):
        assert torch.equal(model.generate(**padded(), **options), want)
    assert len(steps) == 1


def test_sequences_end_when_they_do(model: Any, steps: list[_Again]) -> None:
    """One sequence ends early, then all: the tokens of the end are those that greedy search comes to."""
    plain = model.generate(**prompt(), **GREEDY)
    first, second = (int(plain[row, 7 + at]) for row, at in ((0, 4), (1, 8)))
    options = {**GREEDY, "eos_token_id": [first, second]}
    want = model.generate(**prompt(), **options)
    assert want.shape[1] < plain.shape[1]
    with fast(model):
        assert torch.equal(model.generate(**prompt(), **options), want)


class _Stop(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 12)


class _Streamer(BaseStreamer):
    def __init__(self) -> None:
        self.put_tokens: list[int] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.put_tokens += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


def test_stopping_criteria_and_streams(model: Any, steps: list[_Again]) -> None:
    options = {**GREEDY, "stopping_criteria": StoppingCriteriaList([_Stop()])}
    streamers = [_Streamer(), _Streamer()]
    want = model.generate(**prompt(1), **options, streamer=streamers[0])
    assert want.shape == (1, 12)
    with fast(model):
        assert torch.equal(model.generate(**prompt(1), **options, streamer=streamers[1]), want)
    assert streamers[0].put_tokens == streamers[1].put_tokens == want[0].tolist()
    assert streamers[1].has_ended


def test_a_longer_answer_gets_a_longer_cache(model: Any, steps: list[_Again], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SHORTEST", 8)
    short, long = ({**GREEDY, "max_new_tokens": count} for count in (5, 30))
    wants = [model.generate(**prompt(), **options) for options in (short, long)]
    with fast(model) as (handle,):
        for options, want in (*zip((short, long), wants, strict=True), (short, wants[0])):
            assert torch.equal(model.generate(**prompt(), **options), want)
        assert [key[1] for key in handle._steps] == [64, 16]  # the last one used is the last
        assert len(steps) == 2
        # A third shape takes the place of the one that was used longest ago.
        model.generate(**prompt(1), **short)
        assert [key[:2] for key in handle._steps] == [(2, 16), (1, 16)]
        handle.forget()
        assert not handle._steps
        assert torch.equal(model.generate(**prompt(), **short), wants[0])


def test_lengths_are_few() -> None:
    assert [cache_length(tokens) for tokens in (1, 512, 513, 2048, 8192, 8193, 20000)] == [
        512, 512, 1024, 2048, 8192, 16384, 24576,
    ]  # fmt: skip


def test_several_models(steps: list[_Again]) -> None:
    models: list[Any] = [QWEN3_MOE.build(seed=seed) for seed in (0, 1)]
    wants = [model.generate(**prompt(), **GREEDY) for model in models]
    assert not torch.equal(*wants)
    with fast(*models):
        for _ in range(2):
            for model, want in zip(models, wants, strict=True):
                assert torch.equal(model.generate(**prompt(), **GREEDY), want)
    assert len(steps) == 2


def test_adapters(model: Any, steps: list[_Again]) -> None:
    """A graph is recorded anew when other adapters are in use, or none, and not when weights change in place."""
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))

    def results() -> list[Tensor]:
        found = []
        for name in ("default", "other"):
            adapted.set_adapter(name)
            found.append(adapted.generate(**prompt(), **GREEDY))
        with adapted.disable_adapter():
            found.append(adapted.generate(**prompt(), **GREEDY))
        return found

    def scale(factor: float) -> None:
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_B" in name:
                    value.mul_(factor)

    before = results()
    assert len({tuple(each.flatten().tolist()) for each in before}) == 3
    scale(-8.0)
    scaled = results()
    assert not torch.equal(before[1], scaled[1])
    scale(-0.125)
    with fast(adapted):
        for got, want in zip(results(), before, strict=True):
            assert torch.equal(got, want)
        assert len(steps) == 3
        adapted.set_adapter("other")
        assert torch.equal(adapted.generate(**prompt(), **GREEDY), before[1])
        scale(-8.0)
        count = len(steps)
        assert torch.equal(adapted.generate(**prompt(), **GREEDY), scaled[1])
        assert len(steps) == count
        adapted.merge_adapter()
        merged = adapted.generate(**prompt(), **GREEDY)
        assert len(steps) == count + 1
    assert torch.equal(adapted.generate(**prompt(), **GREEDY), merged)


def test_scales_of_adapters_are_noticed(model: Any, steps: list[_Again]) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.helpers import rescale_adapter_scale

    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    with fast(adapted):
        for factor in (1.0, 20.0, 1.0):
            with rescale_adapter_scale(adapted, factor):
                adapted.generate(**prompt(), **GREEDY)
        assert len(steps) == 3
        adapted.generate(**prompt(), **GREEDY)
    assert len(steps) == 3


def test_adapters_for_each_sequence(model: Any, steps: list[_Again], caplog: pytest.LogCaptureFixture) -> None:
    """A graph that was recorded without such names does not know them."""
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    names = ["default", "__base__"]
    want = adapted.generate(**prompt(), **GREEDY, adapter_names=names)
    with fast(adapted), caplog.at_level(logging.WARNING):
        adapted.generate(**prompt(), **GREEDY)
        replays = steps[0].replays
        assert torch.equal(adapted.generate(**prompt(), **GREEDY, adapter_names=names), want)
        assert steps[0].replays == replays
        assert "because adapter_names or other hooks choose adapters" in caplog.text
        adapted.generate(**prompt(), **GREEDY)
    assert len(steps) == 1
    assert steps[0].replays > replays


def test_what_an_earlier_call_left_does_not_count(model: Any, steps: list[_Again]) -> None:
    """Also if it was no number, in a place of the cache that the next call does not reach."""
    inputs, longer = prompt(), prompt(length=40)
    inputs["input_ids"][inputs["input_ids"] == 3] = 4
    longer["input_ids"][:, 30] = 3
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = torch.nan
    options = {**GREEDY, "bad_words_ids": [[3]]}
    want = model.generate(**inputs, **options)
    with fast(model):
        model.generate(**longer, **options)
        assert torch.equal(model.generate(**inputs, **options), want)
    assert len(steps) == 1


def test_weights_elsewhere_are_noticed(model: Any, steps: list[_Again]) -> None:
    with fast(model):
        model.generate(**prompt(), **GREEDY)
        model.lm_head.weight.data = torch.randn_like(model.lm_head.weight)
        got = model.generate(**prompt(), **GREEDY)
        assert len(steps) == 2
    assert torch.equal(got, model.generate(**prompt(), **GREEDY))


def test_buffers_and_scales_elsewhere_are_noticed(model: Any, steps: list[_Again]) -> None:
    """A model that goes to the CPU and comes back may find the old places of its weights, and other ones for these."""
    weight = model.lm_head.weight
    with fast(model):
        weight.quant_state = SimpleNamespace(absmax=torch.ones(3), state2=SimpleNamespace(absmax=torch.ones(1)))
        changes = (
            lambda: None,
            lambda: setattr(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq.clone()),
            lambda: setattr(weight.quant_state, "absmax", torch.ones(3)),
            lambda: setattr(weight.quant_state.state2, "absmax", torch.ones(1)),
        )
        held = []
        for count, change in enumerate(changes, 1):
            held.append((model.model.rotary_emb.inv_freq, weight.quant_state.absmax, weight.quant_state.state2.absmax))
            change()
            for _ in range(2):
                model.generate(**prompt(), **GREEDY)
                assert len(steps) == count


def test_a_model_may_change_its_dtype(model: Any, steps: list[_Again]) -> None:
    with fast(model):
        model.generate(**prompt(), **GREEDY)
        model.double()
        got = model.generate(**prompt(), **GREEDY)
        assert len(steps) == 2
    assert torch.equal(got, model.generate(**prompt(), **GREEDY))


def test_modes_of_inference_may_change(model: Any, steps: list[_Again]) -> None:
    with fast(model):
        with torch.inference_mode():
            want = model.generate(**prompt(), **GREEDY)
        assert torch.equal(model.generate(**prompt(), **GREEDY), want)
        with torch.inference_mode():
            assert torch.equal(model.generate(**prompt(), **GREEDY), want)
    assert len(steps) == 1


def test_scores_and_the_cache_are_the_callers(model: Any, steps: list[_Again]) -> None:
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    want = model.generate(**prompt(), **options)
    with fast(model):
        got = model.generate(**prompt(), **options)
        assert torch.equal(got.sequences, want.sequences)
        for name in ("scores", "logits"):
            for one, other in zip(got[name], want[name], strict=True):
                torch.testing.assert_close(one, other)
        again = model.generate(**prompt(), **options)
        assert torch.equal(again.sequences, want.sequences)
        assert len(steps) == 1
    # The caller may go on with the cache.
    for output in (got, again):
        longer = model.generate(input_ids=output.sequences, past_key_values=output.past_key_values, **GREEDY)
        assert torch.equal(longer, model.generate(input_ids=want.sequences, **GREEDY))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "beam_search moves or drops tokens of the cache"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states or attentions are returned"),
        ({"num_return_sequences": 40, "do_sample": True}, "80 sequences are more than 64"),
        ({"prefill_chunk_size": 1}, "prefill_chunk_size is 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_recorded_says_so_once(
    model: Any, steps: list[_Again], caplog: pytest.LogCaptureFixture, options: dict[str, Any], words: str
) -> None:
    def generate() -> Tensor:
        torch.manual_seed(0)
        output = model.generate(**prompt(), **GREEDY | options)
        found: Tensor = output if isinstance(output, Tensor) else output.sequences
        return found

    want = generate()
    with fast(model), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(generate(), want)
        assert caplog.text.count(f"generating without CUDA graphs, because {words}") == 1
        assert not steps
        model.generate(**prompt(), **GREEDY)
        assert len(steps) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_cache": False}, "use_cache is False"),
        ({"cache_implementation": "static"}, "cache_implementation is static"),
        ({"past_key_values": DynamicCache()}, "past_key_values are given"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_another_cache_is_taken_as_asked(
    model: Any, steps: list[_Again], caplog: pytest.LogCaptureFixture, options: dict[str, Any], words: str
) -> None:
    want = model.generate(**prompt(), **GREEDY)
    with fast(model), caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(**prompt(), **GREEDY | options), want)
    assert not steps
    assert f"generating without CUDA graphs, because {words}" in caplog.text


def test_a_model_whose_settings_have_no_cache(
    model: Any, steps: list[_Again], caplog: pytest.LogCaptureFixture
) -> None:
    """Configs of trained models often have ``use_cache`` off, and a call that does not say otherwise is slow."""
    model.generation_config.use_cache = False
    with fast(model), caplog.at_level(logging.WARNING):
        model.generate(**prompt(), **{name: value for name, value in GREEDY.items() if name != "use_cache"})
    assert not steps
    assert "because use_cache is False" in caplog.text


@pytest.mark.parametrize("by_config", [False, True])
def test_router_logits(model: Any, steps: list[_Again], caplog: pytest.LogCaptureFixture, by_config: bool) -> None:
    """Their loss takes no mask of the whole cache."""
    options = GREEDY if by_config else {**GREEDY, "output_router_logits": True}
    model.config.output_router_logits = by_config
    try:
        want = model.generate(**prompt(), **options)
    except RuntimeError:
        pytest.skip("generate itself fails, as in Transformers 5.17")
    with fast(model), caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(**prompt(), **options), want)
    assert "because router logits are returned" in caplog.text
    assert not steps


def test_an_assistant_takes_tokens_back(model: Any, steps: list[_Again]) -> None:
    """Its cache must be one that can forget tokens, also those outside of a window."""
    assistant: Any = GPT_OSS.build(sliding_window=4)
    want = model.generate(**prompt(1), **GREEDY, assistant_model=assistant)
    with fast(assistant):
        assert torch.equal(model.generate(**prompt(1), **GREEDY, assistant_model=assistant), want)
    assert not steps


class _Copies(TorchDispatchMode):
    """Counts tensors that are made of values of the host, which would be copied to a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_masks_of_eager_attention_are_made_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.17 copies a number to it. Masks are the same, and a model's functions are its own again."""
    model: Any = GPT_OSS.build(sliding_window=4)
    functions, copies = dict(ALL_MASK_ATTENTION_FUNCTIONS.items()), _Copies()

    @contextlib.contextmanager
    def recording(_: Any) -> Iterator[None]:
        with copies:
            yield
        raise generation._CannotRecord("a CPU has no graphs")

    monkeypatch.setattr(generation, "is_gpu", lambda _: True)
    monkeypatch.setattr(generation, "recording", recording)
    monkeypatch.setattr(generation.decoding, "runs_on", lambda _: False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    with fast(model):
        model.generate(**padded(), **GREEDY)
    assert copies.count == 0
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS.items()) == functions
    options = {
        "batch_size": 2, "q_length": 1, "kv_length": 9, "q_offset": 5, "attention_mask": torch.arange(18).view(2, 9) > 2,
    }  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        want = functions["eager"](**options, dtype=dtype, allow_is_causal_skip=True)
        assert torch.equal(generation._eager_mask(**options, dtype=dtype, allow_is_causal_skip=True), want)


def test_a_recording_has_a_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own stream belongs to the device of the first recording. Other threads may wait meanwhile, and no memory of
    cuBLAS goes from one graph to another.
    """
    given: list[dict[str, Any]] = []
    events: list[str] = []

    def graph(_: Any, **options: Any) -> Any:
        given.append(options)
        events.append("recorded")
        return contextlib.nullcontext()

    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: events.append("cleared"), raising=False)

    generators = [SimpleNamespace(clone_state=lambda: None)] * 2
    for name, value in {
        "default_generators": generators, "current_stream": lambda: None, "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda device: f"stream of {device}", "graph": graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    generation._stream.cache_clear()
    try:
        for device in (0, 1, 0):
            monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
            with generation.recording(None):
                pass
    finally:
        generation._stream.cache_clear()
    assert [options["stream"] for options in given] == ["stream of 0", "stream of 1", "stream of 0"]
    assert {options["capture_error_mode"] for options in given} == {"thread_local"}
    assert events == ["cleared", "recorded", "cleared"] * 3


def test_the_reason_is_of_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the caller handles meanwhile, such as that a larger batch had too little memory."""
    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda _: None)
    for name, value in {
        "default_generators": [generator], "current_device": lambda: 0, "current_stream": lambda: None,
        "graph_pool_handle": lambda: (0, 1), "set_stream": lambda _: None,
        "graph": lambda *_, **__: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(generation, "_stream", lambda _: None)
    monkeypatch.setattr(generation, "close_pool", lambda _: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)

    def fails() -> None:
        with generation.recording(None):
            raise RuntimeError("something waits for the GPU")

    try:
        raise torch.OutOfMemoryError("too large")
    except torch.OutOfMemoryError:
        with pytest.raises(generation._CannotRecord, match="something waits for the GPU"):
            fails()
    with pytest.raises(torch.OutOfMemoryError), generation.recording(None):
        raise torch.OutOfMemoryError("too large")


def test_one_model_is_recorded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two threads. A recording replaces functions that all models share."""
    models: list[Any] = [QWEN3_MOE.build(num_hidden_layers=2, seed=seed) for seed in (0, 1)]
    under_way, most = 0, 0

    @contextlib.contextmanager
    def recording(_: Any) -> Iterator[None]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(1)
        yield
        under_way -= 1
        raise generation._CannotRecord("a CPU has no graphs")

    monkeypatch.setattr(generation, "is_gpu", lambda _: True)
    monkeypatch.setattr(generation, "recording", recording)
    monkeypatch.setattr(generation.decoding, "runs_on", lambda _: False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    with fast(*models):
        threads = [threading.Thread(target=lambda m=model: m.generate(**prompt(), **GREEDY)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert most == 1


def test_a_failed_recording_goes_on_without(
    model: Any, steps: list[_Again], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise generation._CannotRecord("something waits for the GPU")

    monkeypatch.setattr(generation._Step, "_record", fail)
    want = model.generate(**padded(), **GREEDY)
    with fast(model), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(model.generate(**padded(), **GREEDY), want)
    assert caplog.text.count("the model cannot be recorded: something waits for the GPU") == 1


def test_on_a_cpu_it_generates_as_before(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    want = model.generate(**prompt(), **GREEDY)
    with fast(model), caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(**prompt(), **GREEDY), want)
    assert "because the model is on cpu, not on a GPU" in caplog.text


def test_two_calls_at_a_time(model: Any, steps: list[_Again], caplog: pytest.LogCaptureFixture) -> None:
    """The second one has a cache of its own."""
    want = model.generate(**prompt(1), **GREEDY)
    found: list[Tensor] = []

    class Nested(_Streamer):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.put_tokens) == 7 + 5 and not found:
                thread = threading.Thread(target=lambda: found.append(model.generate(**prompt(1), **GREEDY)))
                thread.start()
                thread.join(60)

    with fast(model), caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(**prompt(1), **GREEDY, streamer=Nested()), want)
    assert torch.equal(found[0], want)
    assert "because another call of generate is under way" in caplog.text


def test_a_call_that_fails_leaves_nothing_behind(model: Any, steps: list[_Again]) -> None:
    want = model.generate(**prompt(1), **GREEDY)

    class Broken(_Streamer):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.put_tokens) == 7 + 5:
                raise KeyboardInterrupt

    with fast(model):
        with pytest.raises(KeyboardInterrupt):
            model.generate(**prompt(1), **GREEDY, streamer=Broken())
        assert torch.equal(model.generate(**prompt(1), **GREEDY), want)
    assert len(steps) == 1


def test_a_copy_would_be_the_first_model(model: Any) -> None:
    handle = moe_fused.fast_generation(model)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled: call its disable\(\) before"):
        copy.deepcopy(model)
    handle.disable()
    want = model.generate(**prompt(), **GREEDY)
    assert torch.equal(copy.deepcopy(model).generate(**prompt(), **GREEDY), want)


def test_it_is_undone(model: Any) -> None:
    before = dict(vars(model))
    handle = moe_fused.fast_generation(model)
    assert moe_fused.fast_generation(model) is handle
    for _ in range(2):
        handle.disable()
    assert vars(model).keys() == before.keys()
    with pytest.raises(TypeError, match="a Linear cannot generate: give a model of Transformers"):
        moe_fused.fast_generation(torch.nn.Linear(2, 2))
