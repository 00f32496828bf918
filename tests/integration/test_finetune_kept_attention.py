"""Attention that is not computed again: the same bits, fewer calls of its operators, and where its results are kept."""

from __future__ import annotations

import dataclasses
import functools
import gc
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

pytest.importorskip("trl")
pytest.importorskip("datasets")

from moe_fused.finetune import attention, kept_attention, resolve
from moe_fused.finetune.kept_attention import OPERATORS, OnDevice, OnHost, Place
from moe_fused.finetune.options import Options
from moe_fused.finetune.plan import plan_run, plans_of, workload_of
from moe_fused.finetune.resolve import set_up
from moe_fused.memory import COPIES, Workload, attention_layers, predict, sizes_of

from .conftest import DEVICE
from .finetuning import assert_error, chats, finetune, losses, nothing_loads, save_model, write_jsonl
from .four_bit import BY_ID

# As many heads for keys as for queries: in fp32, torch has no operator of attention on a GPU that takes fewer.
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
PLACES = {"none": lambda: None, "device": OnDevice, "host": lambda: OnHost(torch.device(DEVICE))}


class Count(TorchDispatchMode):
    """Counts the calls of attention's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function._schema.name] += function._schema.name in OPERATORS
        return function(*args, **(kwargs or {}))


def tokens(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def new_model(place: Place | None, **sizes: int) -> Any:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **sizes})).to(DEVICE)
    model.set_attn_implementation("sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if place is not None:
        kept_attention.use(model, place)
    return model.train()


def step(model: Any, batch: Tensor) -> list[Tensor]:
    """The loss and the gradients of one step, in whose backward pass layers are computed again."""
    model.zero_grad()
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same bits on a CPU. On a GPU, the backward pass of attention adds in any order."""
    for value, other in zip(found, expected, strict=True):
        if value.is_cuda:
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(value, other)


@pytest.mark.parametrize("where", ["none", "device", "host"])
def test_the_same_bits_from_fewer_calls(where: str) -> None:
    batches = [tokens((2, 40), seed) for seed in range(3)]
    plain, model = new_model(None), new_model(PLACES[where]())
    for batch in batches:
        expected = step(plain, batch)
        with Count() as count:
            found = step(model, batch)
        assert len(found) > 20
        assert_same(found, expected)
        assert sum(count.calls.values()) == SIZES["num_hidden_layers"] * (2 if where == "none" else 1)


@pytest.mark.parametrize("where", ["device", "host"])
def test_batches_of_other_shapes_and_passes_without_gradients(where: str) -> None:
    """A pass that never has a backward pass, one without gradients, and shapes that come and go change nothing."""
    plain, model = new_model(None), new_model(PLACES[where]())
    for length in (24, 40, 24):
        batch = tokens((1, length), length)
        model(input_ids=batch, use_cache=False)
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)
        assert_same(step(model, batch), step(plain, batch))


def test_results_serve_one_backward_pass() -> None:
    model = new_model(OnDevice(), num_hidden_layers=1)
    loss = model(input_ids=tokens((1, 24)), use_cache=False).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="kept for one backward pass"):
        loss.backward()


@pytest.mark.parametrize("where", ["device", "host"])
def test_nothing_is_kept_after_a_step(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of attention do not outlive a step, also if the garbage collector does not run."""
    place = PLACES[where]()
    assert place is not None
    references: list[weakref.ref[Any]] = []
    keep = place.keep

    def noted(tensors: Any) -> Any:
        group = keep(tensors)
        references.extend(map(weakref.ref, [group, *tensors]))
        return group

    monkeypatch.setattr(place, "keep", noted)
    model = new_model(place)
    gc.disable()
    try:
        step(model, tokens((1, 40)))
        assert len(references) == 2 * SIZES["num_hidden_layers"]
        assert not [reference for reference in references if reference() is not None]
    finally:
        gc.enable()


def values(seed: int, device: str = DEVICE) -> list[Tensor]:
    """An output of attention as PyTorch lays it out, and a log-sum-exp."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(2, 40, 4, 16, generator=generator).to(device).transpose(1, 2)
    return [out, torch.randn(2, 4, 40, 32, generator=generator).to(device)]


@pytest.mark.parametrize("number", [1, COPIES, COPIES + 1, 7])
def test_host_gives_back_what_was_kept(number: int) -> None:
    """In the order of a backward pass, with the same strides. At most ``COPIES`` and what comes next are on the device."""
    place = OnHost(torch.device(DEVICE))
    for _ in range(2):
        groups: list[Any] = []
        for i in range(number):
            groups.append(place.keep(values(i)))
            assert sum(bool(group._there) for group in groups) <= COPIES
        while groups:
            group, expected = groups.pop(), values(len(groups))
            for value, other in zip(group.take(), expected, strict=True):
                assert torch.equal(value, other)
                assert value.stride() == other.stride()
            assert sum(bool(other._there) for other in groups) <= COPIES
            assert not groups or groups[-1]._there, "what comes next is on its way"
            del group
    assert [memory.numel() for memory in place._unused] == sorted([value.nbytes for value in values(0)] * number)


def test_a_copy_back_that_nobody_takes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the memory that it goes to would be used again before it has ended."""
    place, events, waited = OnHost(torch.device("cpu")), iter(range(100)), []
    monkeypatch.setattr(place, "beside", lambda copy: (copy(), next(events))[1])
    monkeypatch.setattr(place, "wait", waited.append)
    kept: list[Any] = [place.keep(values(i, "cpu")) for i in range(COPIES + 1)]
    while len(kept) > 1:
        kept.pop().take()
    begun = kept[0]._ended
    assert begun is not None
    assert begun not in waited
    kept.clear()
    assert begun in waited


def test_what_began_without_enough_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the error is the only one."""
    place, given, unraisable = OnHost(torch.device("cpu")), [], []  # type: ignore[var-annotated]
    memory = place.memory

    def scarce(size: int) -> Tensor:
        if given:
            raise torch.OutOfMemoryError
        given.append(size)
        return memory(size)

    monkeypatch.setattr(place, "memory", scarce)
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(torch.OutOfMemoryError):
        place.keep(values(0, "cpu"))
    gc.collect()
    assert not unraisable
    assert [each.numel() for each in place._unused] == given


@pytest.mark.parametrize("where", ["device", "host"])
def test_layers_may_compute_attention_twice(where: str) -> None:
    """As those of LongCat-Flash, whose results are taken in the order in which they came."""

    def layer(x: Tensor) -> Tensor:
        for _ in range(2):
            heads = x.view(1, 40, 4, 16).transpose(1, 2)
            x = x + scaled_dot_product_attention(heads, heads.sin(), heads, is_causal=True).transpose(1, 2).flatten(2)
        return x

    def gradient(context: Any) -> tuple[Tensor, int]:
        x = torch.linspace(-1, 1, 40 * 64, device=DEVICE).view(1, 40, 64).requires_grad_()
        out = x
        with Count() as count:
            for _ in range(3):
                out = checkpoint(layer, out, use_reentrant=False, **context)
            (found,) = torch.autograd.grad(out.square().sum(), x)
        return found, sum(count.calls.values())

    want, calls = gradient({})
    assert calls == 12
    place = PLACES[where]()
    assert place is not None
    for _ in range(2):
        got, calls = gradient({"context_fn": functools.partial(kept_attention.contexts, place)})
        assert calls == 6
        assert_same([got], [want])


def test_groups_that_nobody_takes_give_their_memory_back() -> None:
    place = OnHost(torch.device(DEVICE))
    kept = [place.keep(values(i)) for i in range(5)]
    del kept
    last = place.keep(values(7))
    for value, expected in zip(last.take(), values(7), strict=True):
        assert torch.equal(value, expected)
    # All of the first groups but the one that may be on its way, and the last one's, which is still referred to.
    assert len(place._unused) == 6


def test_batches_of_many_lengths_share_memory() -> None:
    """Memory is never allocated while memory of that size is unused, and what is too small makes room for what is larger."""
    place = OnHost(torch.device(DEVICE))
    for length in (3000, 1000, 2000, 3000, 4000, 4001, 1000):
        groups = [place.keep([torch.full((length,), float(i), device=DEVICE)]) for i in range(4)]
        while groups:
            (value,) = groups.pop().take()
            assert torch.equal(value, torch.full_like(value, len(groups)))
            assert len(value) == length
    assert [memory.numel() for memory in place._unused] == [4 * 4001] * 4


@pytest.mark.parametrize(
    "tensor, dense",
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).T, True),
        (torch.empty(2, 3, 4, 5).permute(2, 0, 3, 1), True),
        (torch.empty(3, 1, 4)[:, :, :], True),
        (torch.empty(3, 4)[:, :3], False),
        (torch.empty(3, 4)[::2], False),
        (torch.empty(1, 4).expand(3, 4), False),
    ],
)
def test_knows_what_fills_its_memory(tensor: Tensor, dense: bool) -> None:
    assert kept_attention._is_dense(tensor) == dense


def test_results_that_do_not_fill_their_memory_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a part of a tensor that an operator filled up."""
    monkeypatch.setattr(kept_attention, "OPERATORS", {"aten::slice.Tensor", "aten::slice"})
    weights = torch.randn(64, 64, device=DEVICE, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return ((x @ weights)[:, :40] ** 2).sum()

    x = torch.randn(64, 64, device=DEVICE)
    layer(x).backward()
    expected = weights.grad.clone()
    weights.grad = None
    context = functools.partial(kept_attention.contexts, OnHost(torch.device(DEVICE)))
    checkpoint(layer, x, use_reentrant=False, context_fn=context).backward()
    assert torch.equal(weights.grad, expected)


# --- the command


def test_the_command_trains_the_same(tmp_path: Path) -> None:
    model, rows = save_model(tmp_path / "model"), write_jsonl(tmp_path / "chats.jsonl", chats())
    found = []
    for where in ("none", "device"):
        output = tmp_path / where
        ended = finetune(
            "--model", model, "--dataset", rows, "--output", output, "--keep-attention", where,
            "--sequence-length", "64", "--gradient-accumulation", "2", "--max-steps", "3", "--lora-dropout", "0.1",
            cwd=tmp_path,
        )  # fmt: skip
        assert ended.status == 0, ended.stderr
        found.append(losses(output))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--keep-attention", "gpu"], ["--keep-attention", "none", "device", "host"]),
        (["--keep-attention", "device", "--no-gradient-checkpointing"], ["--no-gradient-checkpointing", "leave one"]),
        (["--keep-attention", "host", "--device", "cpu"], ["--keep-attention host", "needs a GPU"]),
        (["--keep-attention", "device", "--attn", "eager"], ["--keep-attention device", "--attn eager", "--attn sdpa"]),
    ],
)
def test_refuses_before_anything_is_loaded(options: list[str], words: list[str], tmp_path: Path) -> None:
    model, rows = save_model(tmp_path / "model"), write_jsonl(tmp_path / "chats.jsonl", chats())
    ended = finetune(
        "--model", model, "--dataset", rows, "--output", tmp_path / "out", *options, cwd=tmp_path, before=nothing_loads
    )
    assert_error(ended, *words, status=2 if options[1] == "gpu" else 1)
    assert not (tmp_path / "out").exists()


def test_refuses_attention_with_dropout() -> None:
    options = Options(model="m", dataset="d", output="o", keep_attention="device")
    config = Qwen3MoeConfig(**SIZES, attention_dropout=0.1)
    with pytest.raises(ValueError, match="--keep-attention device is not possible for this model, whose attention has"):
        plan_run(set_up(options, config, torch.device("cpu")), plain_text=True)


# --- the plan

GIB = 1 << 30
LARGE: dict[str, Any] = {
    "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 16,
    "num_experts_per_tok": 4,
}  # fmt: skip


def planned(config: Any = None, **options: Any) -> Any:
    chosen = Options(model="m", dataset="d", output="o", sequence_length=4096, dtype="bfloat16", **options)
    return set_up(chosen, config or Qwen3MoeConfig(**LARGE), torch.device("cuda", 0))


def plans(**options: Any) -> list[Any]:
    return list(plans_of(planned(**options), plain_text=True))


def test_the_plan_counts_what_is_kept() -> None:
    """The sizes are (T, heads, D) in bf16 and (heads, T) in fp32 for each layer."""
    of_layer = 4096 * (32 * 128 * 2 + 32 * 4)
    limit = {"memory_limit": 64.0}
    none, device, host = (plans(keep_attention=where, **limit)[0] for where in ("none", "device", "host"))
    for graphs in (False, True):
        sizes = sizes_of(none.run.skeleton)
        works = [dataclasses.replace(workload_of(plan.run), graphs=graphs) for plan in (none, device, host)]
        parts = [predict(sizes, work).parts for work in works]
        kept = [each["activations"] for each in parts]
        assert kept[1] - kept[0] == 16 * of_layer
        assert kept[2] == kept[0]
        assert parts[2]["copies of attention"] == COPIES * of_layer
        assert "copies of attention" not in parts[0] | parts[1]
    assert host.notes == ("--keep-attention host takes 0.51 GiB of the host's memory",)
    assert not none.notes


def test_a_run_that_does_not_fit_is_told_where_else_to_keep_it() -> None:
    device = plans(keep_attention="device", memory_limit=64.0)[-1].needed
    limit = {"memory_limit": (device - (64 << 20)) / GIB}
    with pytest.raises(ValueError, match="with --keep-attention host it would need"):
        plan_run(planned(keep_attention="device", cuda_graphs=False, **limit), plain_text=True)


def test_layers_without_attention_keep_nothing() -> None:
    config = BY_ID["qwen3_5_moe_linear"].build().config
    sizes = sizes_of(planned(config).skeleton)
    layers = attention_layers(sizes)
    assert 0 < layers < sizes.layers
    first = predict(sizes, Workload(kept_attention="none")).parts["activations"]
    kept = predict(sizes, Workload(kept_attention="device")).parts["activations"]
    assert kept - first == layers * 4096 * (sizes.queries * 2 + sizes.heads * 4)


def test_kernels_of_the_hub_are_refused() -> None:
    """Their operators are not known, so nothing would be kept."""
    name, setup = "kernels-community/flash-attn3", planned(keep_attention="device", memory_limit=64.0)
    with pytest.raises(ValueError, match=f"not possible with --attn {name}"):
        resolve._check_kept_attention(setup, True, name)
    for kernel in (None, *attention.KERNELS):
        resolve._check_kept_attention(setup, True, kernel)
