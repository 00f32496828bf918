"""``moe_fused_linear`` with adapters, and the gradients of their factors, against weights merged in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernel.accuracy import FLOOR, assert_accurate
from tests.kernel.cases import seeded, with_gaps
from tests.kernel.lora_cases import SLACK, Factors, delta, low_rank
from tests.kernel.machine import DEVICE, DTYPES, INTERPRETED, kernel, module, name_of, stages
from tests.kernel.packed_cases import ALL, ONE, Packed4bitWeights, decoding, dequantized

LoraWeights = kernel.LoraWeights


@dataclass(frozen=True)
class LoraLinearCase:
    """One call of ``moe_fused_linear`` with adapters.

    Attributes:
        sizes: rows of each expert.
        strided: arguments that are handed over as views which are not contiguous.
        packed: None: the weight is dense, and trained. Otherwise whether it is decoded inside the products.
        half: also in fp16 where the interpreter, which is slow, runs the kernels.
    """

    id: str
    why: str
    loras: tuple[Factors, ...] = (Factors(),)
    sizes: tuple[int, ...] = (3, 0, 6, 1)
    in_features: int = 32
    out_features: int = 24
    bias: bool = False
    strided: tuple[str, ...] = ()
    packed: bool | None = None
    half: bool = False


FP32 = Factors(dtype=torch.float32)
CASES = [
    LoraLinearCase("plain", "one adapter", half=True),
    LoraLinearCase("rank-1", "a vector", (Factors(1),)),
    LoraLinearCase("rank-20", "a block and a part of one", (Factors(20),)),
    LoraLinearCase("rank-64", "several blocks in fp32", (Factors(64),)),
    LoraLinearCase("several", "of different rank, scaling and dtype", (Factors(3), FP32, Factors(17, scaling=-1.0))),
    LoraLinearCase("bias", "biases and adapters add up", bias=True),
    LoraLinearCase("fp32-factors", "gradients in fp32", (FP32,), half=True),
    LoraLinearCase("peft", "B as PEFT's parameter shows it", (Factors(4, layout="peft"),), half=True),
    LoraLinearCase("strided", "views", (Factors(layout="gaps"),), strided=("input", "weight", "grad")),
    LoraLinearCase("no-rows", "S=0: gradients of factors are zeros", sizes=(0, 0)),
    LoraLinearCase("one-takes-all", "empty experts around", sizes=(0, 0, 19, 0)),
    LoraLinearCase("odd-features", "no load is of a vector", in_features=37, out_features=15),
    LoraLinearCase("packed", "decoded in the product", in_features=64, packed=True, half=True),
    LoraLinearCase("packed-parts", "decoded beforehand", in_features=64, packed=False),
]


@dataclass
class Inputs:
    """Leaves of a case by name, the factors "lora[0].a" among them; ``packed`` stands for "weight" where it is given."""

    tensors: dict[str, Tensor]
    m_sizes: Tensor
    grad: Tensor
    packed: Any = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """Leaves of their own with the same values, in ``dtype``."""
        leaves = {name: value.detach().to(dtype).clone().requires_grad_() for name, value in self.tensors.items()}
        return Inputs(leaves, self.m_sizes, self.grad.to(dtype))

    def copy(self) -> Inputs:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in self.tensors.items()}
        return Inputs(leaves, self.m_sizes, self.grad)


def make_inputs(case: LoraLinearCase, dtype: torch.dtype) -> Inputs:
    rng = seeded(case.id)

    def normal(name: str, *shape: int, scale: float = 1.0) -> Tensor:
        value = (torch.randn(shape, generator=rng, dtype=torch.float64) * scale).to(DEVICE, dtype)
        return with_gaps(value) if name in case.strided else value

    shape = (len(case.sizes), case.out_features, case.in_features)
    rows = sum(case.sizes)
    tensors = {
        "input": normal("input", rows, case.in_features),
        "weight": normal("weight", *shape, scale=case.in_features**-0.5),
    }
    if case.bias:
        tensors["bias"] = normal("bias", *shape[:2])
    for number, factors in enumerate(case.loras):
        for part, value in zip("ab", factors.make(rng, shape, dtype), strict=True):
            tensors[f"lora[{number}].{part}"] = value
    grad = normal("grad", rows, case.out_features)
    packed = None
    if case.packed is not None:
        packed = Packed4bitWeights.quantize(tensors["weight"])
        tensors["weight"] = dequantized(packed)
    for name, value in tensors.items():
        value.requires_grad_(packed is None or name != "weight")
    return Inputs(tensors, torch.tensor(case.sizes, device=DEVICE), grad, packed)


def factors_of(case: LoraLinearCase, tensors: dict[str, Tensor]) -> list[tuple[Factors, Tensor, Tensor]]:
    return [(factors, tensors[f"lora[{i}].a"], tensors[f"lora[{i}].b"]) for i, factors in enumerate(case.loras)]


def linear(case: LoraLinearCase, inputs: Inputs) -> Tensor:
    t = inputs.tensors
    weight = t["weight"] if inputs.packed is None else inputs.packed
    loras = [LoraWeights(a, b, factors.scaling, factors.dropout) for factors, a, b in factors_of(case, t)]
    lora = loras if len(loras) > 1 else loras[0]
    with decoding(bool(case.packed), ALL if case.packed else ONE):
        return kernel.moe_fused_linear(t["input"], weight, inputs.m_sizes, t.get("bias"), lora=lora)


def plain_linear(case: LoraLinearCase, inputs: Inputs, merged: bool, masks: list[Tensor] | None = None) -> Tensor:
    """One linear layer an expert; its weight ``merged`` with s·B·A, or the adapters beside it."""
    t = inputs.tensors
    weight = t["weight"]
    if merged:
        weight = weight + sum(delta(*factors) for factors in factors_of(case, t))
    outs, start = [], 0
    for expert, size in enumerate(inputs.m_sizes.tolist()):
        rows = t["input"][start : start + size]
        out = rows @ weight[expert].T
        if case.bias:
            out = out + t["bias"][expert]
        for number, (factors, a, b) in enumerate([] if merged else factors_of(case, t)):
            kept = 1.0 if masks is None else masks[number][start : start + size].to(rows.dtype)
            out = out + low_rank(factors, rows * kept, a[expert], b[expert])
        outs.append(out)
        start += size
    return torch.cat(outs)


def results(y: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    y.backward(inputs.grad)
    grads = {f"gradient of {name}": leaf.grad for name, leaf in inputs.tensors.items()}
    return {"y": y.detach()} | {name: value for name, value in grads.items() if value is not None}


def assert_all_accurate(ours: dict[str, Tensor], truth: dict[str, Tensor], torchs: dict[str, Tensor]) -> None:
    compute = FLOOR[ours["y"].dtype]
    for name, value in ours.items():
        slack = SLACK * max(1.0, compute / FLOOR[value.dtype])
        assert_accurate(name, value, truth[name], torchs[name], slack)


def in_every_dtype(cases: list[LoraLinearCase]) -> pytest.MarkDecorator:
    parameters = [
        pytest.param(case, dtype, id=f"{case.id}-{name_of(dtype)}")
        for case in cases
        for dtype in DTYPES
        if (case.half or not (INTERPRETED and dtype == torch.float16))
        and (case.packed is None or dtype != torch.float64)
    ]
    return pytest.mark.parametrize("case, dtype", parameters)


@in_every_dtype(CASES)
def test_forward_and_gradients(case: LoraLinearCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    exact, plain = inputs.to(torch.float64), inputs.copy()
    ours = results(linear(case, inputs), inputs)
    assert ours["y"].dtype == dtype
    truth, torchs = results(plain_linear(case, exact, True), exact), results(plain_linear(case, plain, False), plain)
    assert_all_accurate(ours, truth, torchs)


P = 0.4
DROPPED = [
    LoraLinearCase("dropout", "a product of its own", (Factors(dropout=P),), half=True),
    LoraLinearCase("dropout-of-one", "those without are fused", (Factors(3), Factors(6, dropout=P)), bias=True),
    LoraLinearCase("dropout-packed", "over 4-bit weights", (Factors(dropout=P),), in_features=64, packed=True),
]


@in_every_dtype(DROPPED)
def test_dropout(case: LoraLinearCase, dtype: torch.dtype) -> None:
    """Equal to the masks that the same state of the generator gives."""
    inputs = make_inputs(case, dtype)
    exact, plain = inputs.to(torch.float64), inputs.copy()
    torch.manual_seed(7)
    ours = results(linear(case, inputs), inputs)
    torch.manual_seed(7)
    ones = torch.ones_like(inputs.tensors["input"])
    masks = [torch.nn.functional.dropout(ones, factors.dropout) for factors in case.loras]
    assert (masks[-1] == 0).any()
    truth, torchs = (results(plain_linear(case, inputs, False, masks), inputs) for inputs in (exact, plain))
    assert_all_accurate(ours, truth, torchs)


@pytest.mark.parametrize("wanted", ["input", "lora[0].a", "lora[0].b"])
def test_only_the_gradient_asked_for_is_computed(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a frozen weight: a factor needs no product with the weight, the input no weight-gradient product."""
    case = LoraLinearCase("one-gradient", "", sizes=(3, 2))
    inputs = make_inputs(case, torch.float32)
    for name, value in inputs.tensors.items():
        value.requires_grad_(name == wanted)
    y = linear(case, inputs)
    unneeded = ["grouped_row_sum", "grouped_wgrad" if wanted == "input" else "grouped_gemm"]
    if stages(torch.float32) is not module("stages.reference"):
        for name in unneeded:
            monkeypatch.setattr(stages(torch.float32), name, None)
    y.backward(inputs.grad)
    assert [name for name, value in inputs.tensors.items() if value.grad is not None] == [wanted]


def test_what_is_saved() -> None:
    """The rows and no product of theirs: the thin one is cheap to make again. None for frozen adapters."""
    case = LoraLinearCase("saved", "")
    for frozen in (False, True):
        inputs = make_inputs(case, torch.float32)
        for name, value in inputs.tensors.items():
            value.requires_grad_(name == "input" or (not frozen and "lora" in name))
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            linear(case, inputs)
        rows = [value for value in saved if value.dim() == 2]
        assert [value.data_ptr() for value in rows] == ([] if frozen else [inputs.tensors["input"].data_ptr()])


@pytest.mark.parametrize("dropout", [0.0, P], ids=["fused", "dropout"])
def test_checkpointing(dropout: float) -> None:
    case = LoraLinearCase("checkpoint", "", (Factors(dropout=dropout),), sizes=(2, 3))
    both = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        inputs = make_inputs(case, torch.float32)

        def run(_: Tensor, inputs: Inputs = inputs) -> Tensor:
            return linear(case, inputs)

        rows = inputs.tensors["input"]
        y = checkpoint(run, rows, use_reentrant=False) if checkpointed else run(rows)
        both.append(results(y, inputs))
    for name, value in both[0].items():
        assert torch.equal(value, both[1][name]), name


@pytest.mark.parametrize("sizes, good_rows", [((3, 2), 5), ((7, 4), 0)], ids=["too-few", "too-many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_of_no_expert_are_nan(sizes: tuple[int, int], good_rows: int, dtype: torch.dtype) -> None:
    """An adapter does not make numbers of them, and they make no gradients of its factors NaN."""
    case = LoraLinearCase("misfit", "", sizes=(6, 4))
    inputs, fitting = make_inputs(case, dtype), make_inputs(case, dtype)
    # Below the check of the public function, which a CPU always makes.
    permute, ops, arguments = (module(f"ops.{name}") for name in ("permute", "linear", "arguments"))
    m_sizes = torch.tensor(sizes, device=DEVICE)
    buffer = permute.sorted_routing_buffer(permute.RouteSortedArguments(m_sizes, 10, dtype, packed=False))
    t = inputs.tensors
    layer = ops.Linear(
        stack=arguments.StackArguments(t["weight"], [], "", transposed=False),
        lora=arguments.LoraArguments(t["lora[0].a"], t["lora[0].b"], 0.5),
        rows=ops.Rows(buffer, sorted_rows=True, packed=False, top_k=1, fill=float("nan")),
    )
    y = ops.grouped_linear(ops.LinearForward(t["input"], layer))
    assert y[good_rows:].isnan().all()
    y.backward(inputs.grad)
    names = ("weight", "lora[0].a", "lora[0].b")
    if good_rows:
        fitting.tensors["input"] = fitting.tensors["input"].detach()[:good_rows].requires_grad_()
        fitting.m_sizes, fitting.grad = torch.tensor(sizes, device=DEVICE), fitting.grad[:good_rows]
        expected = results(linear(case, fitting), fitting)
        assert torch.equal(y[:good_rows], expected["y"])
        for name in names:
            assert torch.equal(t[name].grad, expected[f"gradient of {name}"]), name
    else:
        assert all(t[name].grad.count_nonzero() == 0 for name in names)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(low: torch.dtype) -> None:
    case = LoraLinearCase("autocast", "", sizes=(2, 3))
    inputs, rounded = make_inputs(case, torch.float32), make_inputs(case, torch.float32).to(low)
    with torch.autocast(DEVICE.type, dtype=low):
        y = linear(case, inputs)
    assert y.dtype == low
    assert torch.equal(y, linear(case, rounded))
    for name, value in results(y, Inputs(inputs.tensors, inputs.m_sizes, inputs.grad.to(low))).items():
        assert value.dtype == (low if name == "y" else torch.float32), name
        assert value.isfinite().all(), name
