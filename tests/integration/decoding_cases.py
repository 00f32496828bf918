"""The cases of ``test_decoding.py`` that run kernels, for a process of their own.

On a CPU the kernels run in Triton's interpreter, which has to be chosen before anything imports triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_fused import decoding, generation
from moe_fused.decoding import attention
from tests.kernel import interpreter
from tests.support import accelerator

from .models import GPT_OSS, MODELS, QWEN3_MOE, ModelCase
from .test_generation import GREEDY, _states, _tensors, fast, padded

DEVICE = accelerator() or torch.device("cpu")
ON_GPU = DEVICE.type != "cpu"
if not ON_GPU:
    interpreter.mend()
    interpreter.make_faster()
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# Attention.


def plain_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What ``attend`` is to compute, in fp64."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (each.double().repeat_interleave(group, 1) for each in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(len(query), -1, 1, 1)], dim=-1)
    found = scores.softmax(-1)[..., : keys.shape[2]] @ values
    return found.transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """Sizes of an attention, and which tokens each sequence attends to: from a first one to before a last one."""

    heads: int
    kv_heads: int
    size: int
    tokens: int
    kept: tuple[tuple[int, int], ...]
    value_size: int | None = None
    programs: int = 4

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        batch = len(self.kept)
        return (
            randn(batch, self.heads, 1, self.size, dtype=dtype),
            randn(batch, self.kv_heads, self.tokens, self.size, seed=1, dtype=dtype),
            randn(batch, self.kv_heads, self.tokens, self.value_size or self.size, seed=2, dtype=dtype),
        )

    def mask(self) -> Tensor:
        found = torch.zeros(len(self.kept), 1, 1, self.tokens, dtype=torch.bool, device=DEVICE)
        for row, (first, last) in enumerate(self.kept):
            found[row, ..., first:last] = True
        return found


CASES = {
    "qwen3": Case(8, 1, 128, 200, ((0, 97), (30, 98))),
    "each head its own keys": Case(3, 3, 32, 70, ((0, 70),)),
    "many query heads": Case(40, 2, 16, 96, ((5, 33), (0, 1))),
    "no power of two": Case(6, 2, 80, 150, ((0, 64), (64, 150)), value_size=24),
    "a tiny head": Case(4, 2, 5, 33, ((0, 33),)),
    "a large head": Case(2, 1, 256, 40, ((3, 37),)),
    "a window": Case(4, 2, 16, 500, ((300, 317), (470, 471))),
    "one split": Case(4, 2, 16, 100, ((0, 41), (7, 90), (50, 100)), programs=1),
    "many splits": Case(2, 1, 16, 900, ((0, 650),), programs=64),
    "fewer keys than a block": Case(2, 1, 16, 7, ((2, 6), (0, 7))),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    found = CASES[request.param]
    monkeypatch.setattr(attention, "_multiprocessors", lambda _: found.programs)
    return found


@pytest.mark.parametrize("kind", ["bool", "added", "shared", "none"])
def test_attention(case: Case, kind: str) -> None:
    tensors, mask = case.tensors(), case.mask()
    masks = {
        "bool": mask,
        "added": torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min),
        "shared": mask[-1:],
        "none": None,
    }
    scaling = case.size**-0.5
    got = attention.attend(*tensors, masks[kind], scaling)
    assert got.is_contiguous()
    want = plain_attention(*tensors, masks[kind], scaling)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


def test_sinks_and_a_cap(case: Case) -> None:
    tensors, mask, sinks = case.tensors(), case.mask(), randn(case.heads, seed=5)
    bias = randn(*mask.shape, seed=6).masked_fill(~mask, -torch.inf)  # as of relative positions
    for options in ({"sinks": sinks}, {"softcap": 1.5}, {"softcap": 30.0, "sinks": sinks}):
        for each in (mask, bias):
            got = attention.attend(*tensors, each, 0.7, **options)
            want = plain_attention(*tensors, each, 0.7, **options)
            torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


def test_what_is_left_out_is_not_read(case: Case) -> None:
    """Blocks between the first and the last one in use are read, others are not."""
    query, keys, values = case.tensors()
    mask = case.mask()
    want = attention.attend(query, keys, values, mask, 1.0)
    for row, (first, last) in enumerate(case.kept):
        for each in (keys, values):
            each[row, :, : first // 64 * 64] = torch.nan
            each[row, :, -(-last // 64) * 64 :] = torch.nan
    torch.testing.assert_close(attention.attend(query, keys, values, mask, 1.0), want)


def test_a_hole_in_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block in the middle, of which nothing counts, and a sequence without anything."""
    monkeypatch.setattr(attention, "_multiprocessors", lambda _: 1)
    case = Case(4, 1, 16, 320, ((0, 320), (0, 320), (0, 0)))
    tensors, mask = case.tensors(), case.mask()
    mask[0, ..., 10:300], mask[1, ..., :300] = False, False
    got = attention.attend(*tensors, mask, 0.3)
    torch.testing.assert_close(got[:2], plain_attention(*tensors, mask, 0.3)[:2].float(), rtol=1e-5, atol=1e-5)
    assert not got[2].any()


def test_attention_in_strides() -> None:
    """Tensors whose heads lie behind tokens, and a mask that is a part of another one."""
    query = randn(2, 1, 6, 24).transpose(1, 2)
    keys, values = (randn(2, 90, 3, 24, seed=seed).transpose(1, 2) for seed in (1, 2))
    mask = (randn(2, 1, 4, 90, seed=3) > 0)[:, :, 2:3]
    got = attention.attend(query, keys, values, mask, 0.2)
    torch.testing.assert_close(got, plain_attention(query, keys, values, mask, 0.2).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if ON_GPU else [])])
def test_attention_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    tensors, mask, sinks = case.tensors(dtype), case.mask(), randn(case.heads, seed=5, dtype=dtype)
    got = attention.attend(*tensors, mask, case.size**-0.5, sinks=sinks)
    want = plain_attention(*tensors, mask, case.size**-0.5, sinks=sinks)
    assert got.dtype is dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=2 * eps)


def test_what_attention_does_not_serve() -> None:
    query, keys, values = Case(4, 2, 16, 40, ((0, 40), (0, 40))).tensors()
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool, device=DEVICE)
    assert attention.is_served(query, keys, values, mask)
    for others in (
        (randn(2, 4, 3, 16), keys, values, mask),
        (query.double(), keys.double(), values.double(), mask),
        (query, keys.half(), values, mask),
        (query, keys, values[:, :, :30], mask),
        (query, randn(2, 3, 40, 16), randn(2, 3, 40, 16), mask),
        (randn(2, 2, 1, 257), randn(2, 2, 40, 257), values, mask),
        (query, keys, randn(2, 2, 16, 40).transpose(2, 3), mask),
        (query, keys, values, mask[..., :30]),
        (query, keys, values, mask.expand(2, 4, 1, 40)),
        (query, keys, values, mask.long()),
    ):
        assert not attention.is_served(*others)
        with pytest.raises(ValueError, match="one token a sequence is served"):
            attention.attend(*others, 1.0)


# Attention functions of Transformers.


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of ``attend``, beside those that compare."""
    calls: list[Any] = []
    attend = attention.attend

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention, "attend", counting)
    return calls


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_functions_are_replaced(name: str, attended: list[Any]) -> None:
    model: Any = QWEN3_MOE.build().to(DEVICE)
    model.set_attn_implementation(name)
    layer = model.model.layers[0].self_attn
    other = QWEN3_MOE.build().to(DEVICE).model.layers[0].self_attn  # type: ignore[union-attr, operator]
    query, keys, values = Case(4, 2, 8, 40, ((0, 40), (0, 40))).tensors()
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool, device=DEVICE)
    mask[..., 30:] = False
    if name == "eager":
        mask = torch.zeros(mask.shape, device=DEVICE).masked_fill_(~mask, torch.finfo(torch.float32).min)
    eager = __import__(type(layer).__module__, fromlist=["x"]).eager_attention_forward

    def call(module: Any = layer, query: Tensor = query, **options: Any) -> Tensor:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        options = {"scaling": 0.3, "dropout": 0.0, "sliding_window": None, "position_ids": mask, **options}
        with torch.no_grad():
            found: Tensor = function(module, query, keys, values, mask, **options)[0]
        return found

    wants = [call(), call(scaling=0.9)]
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    with attention.Attention(model).replaced():
        for want, scaling in zip(wants, (0.3, 0.9), strict=True):
            for count in (2, 1):  # the first call compares
                attended.clear()
                torch.testing.assert_close(call(scaling=scaling), want, rtol=1e-5, atol=1e-5)
                assert len(attended) == count
        attended.clear()
        call(module=other)
        call(dropout=0.5)
        call(position_bias=None, query=query.expand(-1, -1, 1, -1), something=3)
        mask = mask.expand(2, 1, 3, 40)
        call(query=query.expand(-1, -1, 3, -1))
        assert not attended
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == before


def test_another_attention_stays(attended: list[Any]) -> None:
    """A function that computes something else is called as before."""

    def doubled(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        return 2 * attention.attend(query, key, value, mask, options["scaling"]), None

    registry = AttentionInterface()
    registry["sdpa"] = doubled
    model: Any = QWEN3_MOE.build().to(DEVICE)
    found = attention.Attention(model)
    found._registries = [registry]
    tensors = Case(4, 2, 8, 40, ((0, 40), (0, 40))).tensors()
    with found.replaced():
        got, _ = registry["sdpa"](model.model.layers[0].self_attn, *tensors, None, scaling=0.3)
    torch.testing.assert_close(got, 2 * attention.attend(*tensors, None, 0.3))
    assert registry["sdpa"] is doubled


# Whole models.


class Again:
    """Runs a step again where a graph would be replayed, with what it was recorded with."""

    def __init__(self, step: Any, forward: Any) -> None:
        self._step, self._forward = step, forward
        self.calls: list[int] = []

    def replay(self) -> None:
        self._step.cache.in_step = True
        with torch.no_grad(), decoding.fewer_launches(self._step._model):
            for name, value in self._forward(**self._step._inputs).items():
                if isinstance(value, Tensor):
                    self._step._output[name].copy_(value)
        self._step.cache.in_step = False


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets a CPU count as a GPU. A recording runs the step, and leaves the state of the cache as it was."""
    made: list[Any] = []

    @contextlib.contextmanager
    def recording(graph: Any) -> Iterator[None]:
        step = graph.step
        lengths = [
            layer.cumulative_length.clone() for layer in step.cache.layers if isinstance(layer, generation._Layer)
        ]
        states = [_states(layer) for layer in step.cache.layers]
        yield
        layers = [layer for layer in step.cache.layers if isinstance(layer, generation._Layer)]
        for layer, length in zip(layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)
        for layer, state in zip(step.cache.layers, states, strict=True):
            for held, value in zip(_tensors(layer), state, strict=True):
                held.copy_(value)

    record = generation._Step._record

    def recorded(self: Any, forward: Any) -> None:
        graph: Any = Again(self, forward)
        graph.step = self
        made.append(graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        record(self, forward)

    monkeypatch.setattr(generation, "is_gpu", lambda _: True)
    monkeypatch.setattr(generation, "recording", recording)
    monkeypatch.setattr(generation._Step, "_record", recorded)
    return made


@pytest.mark.skipif(ON_GPU, reason="test_generation_gpu.py does this with graphs")
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_families(case: ModelCase, recordings: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SHORTEST", 16)
    model: Any = case.build()
    inputs: dict[str, Any] = padded()
    if case.id == "nemotron_h":  # which takes no mask
        del inputs["attention_mask"]
    options = {**GREEDY, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**inputs, **options)
    with fast(model):
        got = model.generate(**inputs, **options)
    assert torch.equal(got.sequences, want.sequences)
    for one, other in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(recordings) == 1


@pytest.mark.skipif(ON_GPU, reason="test_generation_gpu.py does this with graphs")
def test_windows_and_sinks(recordings: list[Any], monkeypatch: pytest.MonkeyPatch, attended: list[Any]) -> None:
    monkeypatch.setattr(generation, "SHORTEST", 16)
    model: Any = GPT_OSS.build(sliding_window=4)
    want = model.generate(**padded(), **GREEDY)
    with fast(model):
        assert torch.equal(model.generate(**padded(), **GREEDY), want)
    assert len(attended) >= 2 * (GREEDY["max_new_tokens"] - 2)
