"""Linear layers with LoRA in fewer passes: outputs and gradients are those of PEFT's layers."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")

from bitsandbytes.nn import Linear4bit, Params4bit

from moe_fused.finetune import projections, variables
from moe_fused.finetune.projections import groups_of, joined

from .conftest import DEVICE

FEATURES, ROWS = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 128}, (2, 9)


class Attention(nn.Module):
    """Projections as attention has them, around something that mixes their outputs."""

    def __init__(self, kind: str, bias: bool) -> None:
        super().__init__()
        for name, features in FEATURES.items():
            layer = nn.Linear(64 if name == "o_proj" else 128, features, bias=bias)
            setattr(self, name, in_4bit(layer) if kind == "nf4" else layer)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], dim=-1).tanh()
        return x + self.o_proj(mixed)  # type: ignore[no-any-return]


def in_4bit(layer: nn.Linear) -> nn.Module:
    made: Any = Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.float32,
        compress_statistics=True, quant_type="nf4",
    )  # fmt: skip
    made.weight = Params4bit(
        layer.weight.detach().clone(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    if layer.bias is not None:
        made.bias.data = layer.bias.detach().clone()
    return made.to(DEVICE)  # type: ignore[no-any-return]


class Layers(nn.Module):
    def __init__(self, kind: str, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(kind, bias) for _ in range(2)])
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


def adapted(kind: str = "nf4", *, bias: bool = False, adapters: int = 1, **options: Any) -> Any:
    """A model with adapters that add something, in training mode."""
    torch.manual_seed(0)
    model: Any = Layers(kind, bias).to(DEVICE)
    if kind == "nf4":  # PEFT asks the model
        model.is_loaded_in_4bit = True
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(FEATURES), **options)
    model = get_peft_model(model, config)
    for number in range(1, adapters):
        model.add_adapter(
            f"other{number}", LoraConfig(r=4 + number, lora_alpha=3, target_modules=["q_proj", "v_proj", "o_proj"])
        )
    if adapters > 1:
        model.base_model.set_adapter(["default", *(f"other{number}" for number in range(1, adapters))])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.train()


def results(model: Any, *, needs_input: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(*ROWS, 128, generator=generator).to(DEVICE) for _ in range(2))
    x.requires_grad_(needs_input)
    model.zero_grad()
    out = model(x)
    out.backward(gradient)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    if needs_input:
        found["input"] = x.grad
    return {"output": out.detach(), **found}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name] - value).norm() <= 2e-6 * value.norm(), name


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of layers that each call of the function computes."""
    calls: list[int] = []
    apply = projections._Projections.apply
    with monkeypatch.context() as patch:
        patch.setattr(
            projections._Projections,
            "apply",
            lambda x, parts, *weights: calls.append(len(parts)) or apply(x, parts, *weights),
        )
        yield calls


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize("adapters", [1, 2, 3])
@pytest.mark.parametrize(("kind", "bias"), [("nf4", False), ("nf4", True), ("dense", False), ("dense", True)])
def test_results_are_those_of_peft(
    kind: str, bias: bool, adapters: int, needs_input: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(kind, bias=bias, adapters=adapters)
    model.base_model.model.checkpointing = checkpointing
    want = results(model, needs_input=needs_input)
    with joined(model) as count, counted(monkeypatch) as calls:
        assert count == 8
        got = results(model, needs_input=needs_input)
    # An adapter that one of the three layers lacks changes nothing about that.
    assert calls == [3, 1] * (4 if checkpointing else 2)
    assert_same(got, want)
    assert len(want) > 16
    with counted(monkeypatch) as calls:
        assert_same(results(model, needs_input=needs_input), want)
    assert not calls


def test_in_float64() -> None:
    """The formulas, without roundings, and with one output that nothing is made of."""
    model = adapted("dense", adapters=2).double()
    attention = model.base_model.model.layers[0]
    x = torch.randn(3, 128, dtype=torch.float64, device=DEVICE, requires_grad=True)
    leaves = [x, *(value for value in attention.parameters() if value.requires_grad)]

    def unused() -> Tensor:
        query, _, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        return query.square().sum() + (value**3).sum()

    want = torch.autograd.grad(unused(), leaves, allow_unused=True)
    with joined(model):
        got = torch.autograd.grad(unused(), leaves, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", ["dropout", "dora", "disabled", "merged", "another dtype", "autocast", "bias"])
def test_what_is_left_to_peft(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "dropout": {"lora_dropout": 0.5},
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True},
    }.get(change, {})
    model = adapted("dense", **options)
    stack = contextlib.ExitStack()
    with stack:
        if change == "disabled":
            stack.enter_context(model.disable_adapter())
        elif change == "merged":
            model.merge_adapter()
        elif change == "another dtype":
            for layer in model.modules():
                if isinstance(layer, nn.ModuleDict) and "default" in layer and isinstance(layer["default"], nn.Linear):
                    layer["default"].double()
        elif change == "autocast":
            stack.enter_context(torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16))
        x = torch.randn(*ROWS, 128, device=DEVICE)
        torch.manual_seed(2)
        want = model(x)
        with joined(model), counted(monkeypatch) as calls:
            torch.manual_seed(2)
            got = model(x)
        assert not calls
        assert torch.equal(got, want)


def test_layers_that_are_not_known_are_left_alone() -> None:
    """A subclass may compute something else, and layers that are trained in full need gradients of their weights."""
    model = adapted("dense")
    layers = model.base_model.model.layers
    assert [len(group) for group in groups_of(model)] == [3, 3, 1, 1]

    class Other(nn.Linear):
        pass

    layers[0].q_proj.base_layer.__class__ = Other
    layers[1].o_proj.base_layer.weight.requires_grad_(True)
    assert sorted(len(group) for group in groups_of(model)) == [1, 1, 1, 3]
    layers[1].k_proj.forward = layers[1].k_proj.forward
    assert sorted(len(group) for group in groups_of(model)) == [1, 1, 1, 1, 1]


def test_another_tensor_is_computed_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in cross attention, whose keys and values are of other tokens."""
    model = adapted("dense")
    attention = model.base_model.model.layers[0]
    x, other = (torch.randn(*ROWS, 128, device=DEVICE) for _ in range(2))
    want = [attention.q_proj(x), attention.k_proj(other), attention.v_proj(other), attention.k_proj(x)]
    with joined(model), counted(monkeypatch) as calls:
        got = [attention.q_proj(x), attention.k_proj(other), attention.v_proj(other), attention.k_proj(x)]
        assert calls == [3, 3, 3]  # v_proj's output for the other tensor was there
        twice = [attention.k_proj(x), attention.k_proj(x)]
    for one, two in zip([*got, *twice], [*want, want[3], want[3]], strict=True):
        torch.testing.assert_close(one, two)


def test_leaves_nothing_behind() -> None:
    model = adapted()
    before = copy.copy(vars(model.base_model.model.layers[0].q_proj))
    with joined(model):
        assert "forward" in vars(model.base_model.model.layers[0].q_proj)
    with pytest.raises(RuntimeError, match="stops"), joined(model):
        raise RuntimeError("it stops here")
    assert vars(model.base_model.model.layers[0].q_proj) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_in_bf16_on_a_gpu(kind: str) -> None:
    """Against float64, errors are at most PEFT's and a fifth more, eagerly and replayed from a CUDA graph."""
    model = adapted(kind)
    truth = results(model)
    model = model.bfloat16()
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(*ROWS, 128, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def run() -> dict[str, Tensor]:
        leaf = x.detach().requires_grad_()
        out = model(leaf)
        grads = torch.autograd.grad(out, [leaf, *named.values()], gradient)
        return dict(zip(["output", "input", *named], [out.detach(), *grads], strict=True))

    def error(found: dict[str, Tensor], name: str) -> float:
        return float((found[name].double() - truth[name].double()).norm() / truth[name].double().norm())

    theirs = run()
    with joined(model):
        ours = run()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            recorded = run()
        graph.replay()
    for name in truth:
        for found in (ours, recorded):
            assert error(found, name) <= 1.2 * error(theirs, name) + 2e-3, name


# A run of the command.


def _note_calls() -> None:
    """Switches the functions on, and notes how many layers each call computes."""
    os.environ[variables.QKV] = "1"
    apply = projections._Projections.apply

    def noting(x: Tensor, parts: Any, *weights: Tensor) -> Any:
        with open("calls.txt", "a", encoding="utf-8") as file:
            file.write(f"{len(parts)}\n")
        return apply(x, parts, *weights)

    projections._Projections.apply = noting  # type: ignore[method-assign]


def _switch_off() -> None:
    _note_calls()
    del os.environ[variables.QKV]


def test_a_run_has_the_losses_of_one_by_peft(tmp_path: Path) -> None:
    """With evaluations in between, and the run goes on without these functions."""
    from .finetuning import OPTIONS, STEPS, chats, finetune, losses, save_model, write_jsonl

    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "chat.jsonl", chats())
    arguments = (
        "--model", tmp_path / "model", "--dataset", tmp_path / "chat.jsonl", *OPTIONS, "--lora-dropout", "0",
        "--eval-share", "0.2", "--eval-steps", "4",
    )  # fmt: skip
    found = {}
    for name, before in {"mine": _note_calls, "other": _switch_off}.items():
        ended = finetune(*arguments, "--output", name, cwd=tmp_path, before=before)
        assert ended.status == 0, ended
        found[name] = (tmp_path / "calls.txt").read_text().split()
    assert set(found["mine"]) == {"1", "3"}
    assert found["other"] == found["mine"]  # the second run has noted none
    mine, other = (losses(tmp_path / name) for name in ("mine", "other"))
    assert mine.keys() == other.keys()
    assert list(mine.values()) == pytest.approx(list(other.values()), rel=1e-3)
    ended = finetune("--resume", "--output", "mine", "--max-steps", str(STEPS + 2), cwd=tmp_path, before=_switch_off)
    assert ended.status == 0, ended
    assert (tmp_path / "calls.txt").read_text().split() == found["mine"]
