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
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe import modeling_qwen3_moe

from moe_fused import decoding, generation
from moe_fused.decoding import attention, heads, layers, norms, router
from tests.kernel import interpreter
from tests.support import accelerator

from .models import GPT_OSS, MODELS, QWEN3_MOE, ModelCase, tokens
from .test_generation import GREEDY, _states, _tensors, fast, padded

DEVICE = accelerator() or torch.device("cpu")
ON_GPU = DEVICE.type != "cpu"
if not ON_GPU:
    interpreter.mend()
    interpreter.make_faster()
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


# Those that differ most in what is replaced. The others are slow beside them.
OFTEN = ("qwen3_moe", "olmoe", "deepseek_v2", "glm4_moe", "qwen3_next", "gpt_oss")
FAMILIES = [case if case.id in OFTEN else pytest.param(case, marks=pytest.mark.slow) for case in MODELS]


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


# Routers.


def logits_without_ties(rows: int, experts: int) -> Tensor:
    """Distinct multiples of 1/16, in another order for each row."""
    orders = [torch.randperm(experts, generator=torch.Generator().manual_seed(row)) for row in range(rows)]
    return ((torch.stack(orders) - experts // 2) / 16).to(DEVICE)


def assert_same_routes(got: tuple[Tensor, ...], want: tuple[Tensor, ...], eps: float = 2e-6) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=eps, atol=eps)


@pytest.mark.parametrize(
    ("rows", "experts", "size", "top_k"), [(1, 128, 256, 8), (3, 6, 40, 3), (20, 70, 300, 11), (2, 2, 8, 2)]
)
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("corrects", [False, True])
def test_routes(rows: int, experts: int, size: int, top_k: int, scores: str, corrects: bool) -> None:
    weight, bias = randn(experts, size, seed=1), randn(experts, seed=2)
    correction = randn(experts, seed=3) if corrects else None
    wanted = logits_without_ties(rows, experts)
    # Tokens whose logits these are.
    hidden = (torch.linalg.pinv(weight.double()) @ (wanted - bias).t().double()).t().float()
    if experts > size:
        return
    for is_normalized, factor in ((True, 1.0), (False, 2.5)):
        rule = router.Rule(scores, top_k, is_normalized, factor, torch.float32, torch.float32, torch.float32)
        got = router.route(rule, hidden, weight, bias, correction)
        assert_same_routes(got, router.plain(rule, wanted, correction), 1e-3)
        assert_same_routes(got, router.plain(rule, got[0], correction))


def test_logits_are_rounded_as_the_model_does() -> None:
    """Products of fp16 are summed in fp32 and rounded once, and weights have a dtype of their own."""
    hidden, weight = randn(5, 300, dtype=torch.float16), randn(16, 300, seed=1, dtype=torch.float16)
    exact = hidden.double() @ weight.double().t()
    for logits, weights in (
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ):
        rule = router.Rule("softmax", 4, True, 1.0, torch.float16, logits, weights)
        got = router.route(rule, hidden, weight)
        torch.testing.assert_close(got[0].double(), exact, rtol=2**-11, atol=1e-4)
        assert torch.equal(got[0], got[0].half().to(logits))
        assert_same_routes(got, router.plain(rule, got[0]), 2**-10)
    mixed = router.Rule("softmax", 4, True, 1.0, torch.float32, torch.float32, torch.float16)
    got = router.route(mixed, hidden, weight.float())
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-5, atol=1e-5)


def test_of_equal_experts_the_first_ones_are_chosen() -> None:
    rule = router.Rule("softmax", 3, True, 1.0, torch.float32, torch.float32, torch.float32)
    weight = torch.zeros(7, 16, device=DEVICE)
    weight[5, 0], weight[2, 1], weight[4, 1] = 1.0, -1.0, -2.0
    _, weights, indices = router.route(rule, torch.eye(3, 16, device=DEVICE), weight)
    assert indices.tolist() == [[5, 0, 1], [0, 1, 3], [0, 1, 2]]
    assert torch.allclose(weights[2], torch.full((3,), 1 / 3, device=DEVICE))


# How many routers of each model have a rule that is served. The others choose among groups, take more than tokens, or are no
# modules with a weight and a number of experts to a token.
ROUTERS = {"deepseek_v3": 0, "dots1": 0, "minimax_m2": 0, "phimoe": 0, "lfm2_moe": 0}


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_routers_of_families(case: ModelCase) -> None:
    model: Any = case.build().to(DEVICE)
    found = list(router.routers(model))
    counts = {ROUTERS.get(case.id, case.moe_layers)}
    # In Transformers 5.17, those of Granite return the same in another order.
    counts |= {0} if case.id.startswith("granite") else set()
    assert len(found) in counts
    hidden = randn(4, 40, seed=7)
    for module, function in found:
        with torch.no_grad():
            want, got = module(hidden), function(hidden)
        assert_same_routes(router._in_order(got), router._in_order(want), 1e-5)


def test_routers_that_change_are_followed() -> None:
    """A weight is read when the router runs, and another dtype than the model's goes the old way."""
    model: Any = QWEN3_MOE.build().to(DEVICE)
    (module, function), *_ = router.routers(model)
    with torch.no_grad():
        module.weight = nn.Parameter(randn(*module.weight.shape, seed=9))
        hidden = randn(3, 40, seed=7)
        assert_same_routes(function(hidden), module(hidden), 1e-5)
        module.half()
        assert function(hidden.half())[0].dtype is torch.float16


class Twice(nn.Module):
    """A router that gives each token its experts with twice their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.weight = 2, nn.Parameter(torch.randn(6, 40))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.t()
        weights, indices = logits.softmax(-1).topk(2)
        return logits, 2 * weights, indices


class Largest(Twice):
    """A router whose second expert is the least likely one."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = super().forward(hidden)
        return logits, weights / 2, torch.stack([indices[:, 0], logits.argmin(-1)], dim=-1)


class Rounded(Twice):
    """A router whose logits are coarser than its dtype."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = (hidden @ self.weight.t() * 16).round() / 16
        weights, indices = logits.softmax(-1).topk(2)
        return logits, weights, indices


@pytest.mark.parametrize("kind", [Twice, Largest, Rounded])
def test_other_rules_stay(kind: type[nn.Module]) -> None:
    assert not list(router.routers(kind().to(DEVICE)))


# Norms, rotary embeddings and the cache.


def plain_norm(values: Tensor, weight: Tensor, norm: norms.Norm) -> Tensor:
    x = values.float() * torch.rsqrt(values.float().square().mean(-1, keepdim=True) + norm.eps)
    return (x * (1 + weight.float())).to(values.dtype) if norm.is_offset else weight * x.to(values.dtype)


@pytest.mark.parametrize("shape", [(1, 1, 2048), (2, 1, 7, 24), (3, 300), (1, 16384), (5, 1)], ids=str)
@pytest.mark.parametrize("is_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms(shape: tuple[int, ...], is_offset: bool, dtype: torch.dtype) -> None:
    values, weight = 3 * randn(*shape, dtype=dtype), randn(shape[-1], seed=1, dtype=dtype)
    norm = norms.Norm(1e-5, is_offset)
    eps = 2 * torch.finfo(dtype).eps
    for each in (
        values,
        torch.cat([values, values], dim=-1)[..., : shape[-1]],
        values.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        torch.testing.assert_close(
            norms.rms_norm(each, weight, norm), plain_norm(values, weight, norm), rtol=eps, atol=eps
        )


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor, is_half: bool) -> Tensor:
    cos, sin = (torch.cat([each, each], dim=-1) if is_half else each for each in (cos, sin))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


@pytest.mark.parametrize(("heads_", "kv_heads", "size", "width", "is_half"), [
    (8, 2, 128, 128, False), (5, 1, 24, 24, False), (3, 3, 20, 10, True), (4, 2, 24, 10, False), (1, 6, 8, 2, False),
])  # fmt: skip
@pytest.mark.parametrize("shared", [False, True])
def test_rotations(heads_: int, kv_heads: int, size: int, width: int, is_half: bool, shared: bool) -> None:
    q, k = randn(3, 1, heads_, size).transpose(1, 2), randn(3, kv_heads, 1, size, seed=1)
    cos, sin = (randn(1 if shared else 3, 1, width, seed=seed) for seed in (2, 3))
    assert heads.can_rotate(q, k, cos, sin)
    for got, each in zip(heads.rotate(q, k, cos, sin, is_half=is_half), (q, k), strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, plain_rotate(each, cos, sin, is_half), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", [None, norms.Norm(1e-6, is_offset=False), norms.Norm(1e-6, is_offset=True)], ids=str)
@pytest.mark.parametrize("width", [0, 16, 24])
def test_heads_go_into_the_cache(norm: norms.Norm | None, width: int) -> None:
    """At the place that a tensor says, and nowhere else."""
    q, k, value = randn(2, 6, 1, 24), randn(2, 5, 1, 24, seed=1), randn(2, 5, 1, 10, seed=2)
    angles = (randn(2, 1, width, seed=3), randn(2, 1, width, seed=4)) if width else None
    weights = (randn(24, seed=5), randn(24, seed=6)) if norm is not None else None
    place, before = made_place(), made_place()
    got = heads.norm_and_rotate(q, k, value, angles, place, weights=weights, norm=norm)
    wants = []
    for each, number in ((q, 0), (k, 1)):
        want = each if norm is None or weights is None else plain_norm(each, weights[number], norm)
        wants.append(want if angles is None else plain_rotate(want, *angles, is_half=False))
    torch.testing.assert_close(got, wants[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(place.keys[:, :, 4:5], wants[1], rtol=1e-5, atol=1e-5)
    assert_written(place, before, place.keys[:, :, 4:5].clone(), value)


def made_place() -> heads.Place:
    position, length = (torch.tensor(number, device=DEVICE) for number in (4, 4))
    return heads.Place(randn(2, 5, 9, 24, seed=8), randn(2, 5, 9, 10, seed=9), position, length)


def assert_written(place: heads.Place, before: heads.Place, key: Tensor, value: Tensor) -> None:
    for held, old, new in ((place.keys, before.keys, key), (place.values, before.values, value)):
        assert torch.equal(held[:, :, 4:5], new)
        assert torch.equal(held[:, :, :4], old[:, :, :4])
        assert torch.equal(held[:, :, 5:], old[:, :, 5:])
    assert (int(place.position), int(place.length)) == (4, 5)


def test_the_write_into_the_cache() -> None:
    place, before = made_place(), made_place()
    key, value = randn(2, 1, 5, 24).transpose(1, 2), randn(2, 5, 1, 20, seed=1)[..., :10]
    assert heads.can_write(key, value, place)
    heads.write(key, value, place)
    assert_written(place, before, key, value)
    assert not heads.can_write(key.half(), value, place)
    assert not heads.can_write(key.expand(2, 5, 2, 24), value.expand(2, 5, 2, 10), place)


# Whole models.


def decoder_parts(model: Any) -> tuple[int, set[str]]:
    """How many norms are replaced, and how rotary embeddings turn."""
    turns = {f"{'whole ' if each.whole else ''}{each.narrow}".strip() for _, each in heads.rotations(model)}
    return len(list(norms.norms(model))), turns


def test_what_is_replaced() -> None:
    """Qwen3-MoE has two norms in a layer, those of queries and keys, and a last one. Other families differ in details."""
    found = {case.id: decoder_parts(case.build().to(DEVICE)) for case in MODELS}
    assert found["qwen3_moe"] == (2 * 4 + 1, {"whole"})
    assert found["gpt_oss"] == (2 * 2 + 1, {"half"})
    assert found["glm4_moe"] == (2 * 2 + 1, {"whole part"})
    assert (
        found["qwen3_next"][0] == 2 * 2 + 2 + 1
    )  # and one in the gate of linear attention, which takes two inputs, stays
    assert not [name for name, (count, _) in found.items() if count == 0 and name not in WITHOUT_NORMS]


WITHOUT_NORMS = ("phimoe",)  # which has layer norms


class PlusOneRMSNorm(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.randn(8)), 1e-6, offset

    def forward(self, values: Tensor) -> Tensor:
        norm = norms.Norm(self.eps, is_offset=self.offset == 1)
        return plain_norm(values, self.weight + (self.offset if self.offset == 2 else 0), norm)


def test_other_norms_stay() -> None:
    model = nn.Sequential(PlusOneRMSNorm(0), PlusOneRMSNorm(1), nn.LayerNorm(8), nn.RMSNorm(8)).to(DEVICE)
    # torch's RMSNorm has no eps of its own by default.
    assert [(module, norm.is_offset) for module, norm, _ in norms.norms(model)] == [(model[0], False), (model[1], True)]
    assert not list(norms.norms(nn.Sequential(PlusOneRMSNorm(2)).to(DEVICE)))


def test_norms_of_another_dtype_go_the_old_way() -> None:
    """A weight in fp32 makes its result fp32, also of values that are not."""
    model = nn.Sequential(PlusOneRMSNorm(0)).to(DEVICE)
    ((module, _, function),) = norms.norms(model)
    values = randn(3, 8, dtype=torch.float16)
    with torch.no_grad():
        assert torch.equal(function(values), module(values))
        assert function(values).dtype is torch.float32


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.id)
def test_prompts_of_families_compute_the_same(case: ModelCase) -> None:
    """Also without a cache, and everything is as before afterwards."""
    model: Any = case.build().to(DEVICE)
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    state = torch.get_rng_state()
    inputs = tokens().to(DEVICE)
    with torch.no_grad():
        want = model(inputs).logits
        with decoding.fewer_launches(model):
            got = model(inputs).logits
        assert torch.equal(model(inputs).logits, want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == functions
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_interruption_undoes_all() -> None:
    model: Any = QWEN3_MOE.build().to(DEVICE)
    rotate = modeling_qwen3_moe.apply_rotary_pos_emb
    with pytest.raises(KeyboardInterrupt), decoding.fewer_launches(model):
        raise KeyboardInterrupt
    assert modeling_qwen3_moe.apply_rotary_pos_emb is rotate
    assert not any("forward" in vars(module) for module in model.modules())


class Again:
    """Runs a step again where a graph would be replayed, with what it was recorded with."""

    def __init__(self, step: Any, forward: Any) -> None:
        self._step, self._forward = step, forward

    def replay(self) -> None:
        self._step.cache.in_step = True
        with torch.no_grad(), decoding.fewer_launches(self._step._model), self._step.cache.writing():
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
        found = [layer for layer in step.cache.layers if isinstance(layer, generation._Layer)]
        for layer, length in zip(found, lengths, strict=True):
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


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether attention modules that look as if they could be replaced are."""
    results: list[bool] = []
    known: dict[Any, bool] = {}
    compare = layers.Layer._compare

    def noting(self: Any, *args: Any) -> bool:
        if self._module not in known:  # a replay here makes new objects, and would compare again
            known[self._module] = compare(self, *args)
            results.append(known[self._module])
        return known[self._module]

    monkeypatch.setattr(layers.Layer, "_compare", noting)
    return results


# The families whose attention modules are replaced. The others have norms over all heads or behind the rotary embedding,
# gates of outputs, latents of keys and values, or embeddings that turn neighbours.
WHOLE_LAYERS = {
    "qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "dots1", "phimoe", "granitemoe", "granitemoeshared", "gpt_oss",
}  # fmt: skip


@pytest.mark.skipif(ON_GPU, reason="test_generation_gpu.py does this with graphs")
@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.id)
def test_families(
    case: ModelCase,
    recordings: list[Any],
    compared: list[bool],
    attended: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generation, "SHORTEST", 16)
    model: Any = case.build()
    inputs: dict[str, Any] = padded()
    if case.id == "nemotron_h":  # which takes no mask
        del inputs["attention_mask"]
    options = {**GREEDY, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**inputs, **options)
    with fast(model):
        got = model.generate(**inputs, **options)
    assert torch.equal(got.sequences, want.sequences)
    for one, other in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(recordings) == 1
    assert len(attended) >= 4
    assert (case.id in WHOLE_LAYERS) == (bool(compared) and all(compared))


@pytest.mark.skipif(ON_GPU, reason="test_generation_gpu.py does this with graphs")
def test_a_layer_that_computes_something_else_stays(
    recordings: list[Any], compared: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "SHORTEST", 16)

    class Doubled(modeling_qwen3_moe.Qwen3MoeAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, weights = super().forward(*args, **kwargs)
            return 2 * output, weights

    class Forgetful(modeling_qwen3_moe.Qwen3MoeAttention):
        def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            found = super().forward(*args, past_key_values=past_key_values, **kwargs)
            if hasattr(past_key_values, "place"):
                past_key_values.place.values[:, :, 0] = 0
            return found

    model: Any = QWEN3_MOE.build()
    for layer, kind in zip(model.model.layers, (Doubled, Forgetful), strict=True):
        kind.__module__ = modeling_qwen3_moe.__name__
        layer.self_attn.__class__ = kind
    options = {**GREEDY, "max_new_tokens": 4}
    want = model.generate(**padded(), **options)
    with fast(model):
        assert torch.equal(model.generate(**padded(), **options), want)
    assert compared == [False, False]


@pytest.mark.skipif(ON_GPU, reason="test_generation_gpu.py does this with graphs")
def test_windows_and_sinks(recordings: list[Any], monkeypatch: pytest.MonkeyPatch, attended: list[Any]) -> None:
    monkeypatch.setattr(generation, "SHORTEST", 16)
    model: Any = GPT_OSS.build(sliding_window=4)
    want = model.generate(**padded(), **GREEDY)
    with fast(model):
        assert torch.equal(model.generate(**padded(), **GREEDY), want)
    assert len(attended) >= 2 * (GREEDY["max_new_tokens"] - 2)


@pytest.mark.skipif(ON_GPU, reason="test_generation_gpu.py does this with graphs")
def test_a_kernel_that_fails_is_a_reason(
    recordings: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The step runs as before then, from the same cache, and the reason is said once."""
    monkeypatch.setattr(generation, "SHORTEST", 16)
    monkeypatch.setattr(attention.Attention, "_is_same", lambda *_: True)

    def failing(*_: Any, **__: Any) -> Tensor:
        raise ValueError("out of resources\nshared memory")

    monkeypatch.setattr(attention, "attend", failing)
    model: Any = QWEN3_MOE.build()
    want = model.generate(**padded(), **GREEDY)
    with fast(model), caplog.at_level("WARNING"):
        for _ in range(2):
            assert torch.equal(model.generate(**padded(), **GREEDY), want)
    assert caplog.text.count("because the model cannot be recorded: ValueError: out of resources\n") == 1
