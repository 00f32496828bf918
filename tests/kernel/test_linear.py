"""``moe_fused_linear`` and its gradients against a loop over the experts in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernel.accuracy import assert_accurate
from tests.kernel.cases import seeded, with_gaps
from tests.kernel.machine import DEVICE, DTYPES, INTERPRETED, ON_GPU, kernel, module, name_of, stages


@dataclass(frozen=True)
class LinearCase:
    """One call of ``moe_fused_linear``.

    Attributes:
        id: readable name. why: what it would catch.
        sizes: rows of each expert.
        strided: arguments that are handed over as views which are not contiguous; "weight.T": (E, in, out) in memory.
        half: also in fp16 where the interpreter, which is slow, runs the kernels.
    """

    id: str
    why: str
    sizes: tuple[int, ...] = (3, 0, 7, 2, 1)
    in_features: int = 24
    out_features: int = 20
    bias: bool = False
    strided: tuple[str, ...] = ()
    sizes_dtype: torch.dtype = torch.int32
    half: bool = False


CASES = [
    LinearCase("plain", "nothing special", half=True),
    LinearCase("bias", "one bias an expert", bias=True, half=True),
    LinearCase("no-rows", "S=0", sizes=(0, 0, 0), bias=True),
    LinearCase("no-experts", "E=0 and S=0", sizes=()),
    LinearCase("one-expert", "E=1: an ordinary linear layer", sizes=(5,)),
    LinearCase("last-takes-all", "empty experts first", sizes=(0, 0, 0, 19)),
    LinearCase("first-takes-all", "empty experts last", sizes=(19, 0, 0, 0)),
    LinearCase("full-tiles", "sizes that are whole tiles of 16", sizes=(16, 32, 16)),
    LinearCase("one-over", "sizes one more than a tile", sizes=(17, 1, 33)),
    LinearCase("rows-of-128", "the tallest tiles, more than one an expert", sizes=(130, 0, 65, 80), half=True),
    LinearCase("many-experts", "more experts than rows", sizes=(0, 1) * 40),
    LinearCase("int8-sizes", "any integer dtype", sizes_dtype=torch.int8),
    LinearCase("uint8-sizes", "any integer dtype", sizes=(200, 30), sizes_dtype=torch.uint8),
    LinearCase("int16-sizes", "any integer dtype", sizes_dtype=torch.int16),
    LinearCase("int64-sizes", "any integer dtype", sizes_dtype=torch.int64),
    LinearCase("strided-sizes", "a column of counts", strided=("m_sizes",)),
    LinearCase("strided-input", "views of the rows and of their gradient", strided=("input", "grad")),
    LinearCase("strided-weight", "no features dimension is contiguous", strided=("weight",)),
    LinearCase("transposed-weight", "in features far apart, out features adjacent", strided=("weight.T",), half=True),
    LinearCase("strided-bias", "a view of the biases", strided=("bias",), bias=True),
    LinearCase("odd-features", "rows that no vector load can take", in_features=37, out_features=15),
    *(
        LinearCase(f"thin-{n}", "a LoRA factor: fewer features than any tile", in_features=n, out_features=17 - n)
        for n in range(1, 17)
    ),
    LinearCase("thin-in", "one in feature, a whole tile of out features", in_features=1, out_features=64),
    LinearCase("thin-out", "a whole tile of in features, one out feature", in_features=64, out_features=1),
]


@dataclass
class Inputs:
    input: Tensor
    weight: Tensor
    m_sizes: Tensor
    bias: Tensor | None
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """Leaves of their own with the same values, in ``dtype``."""

        def leaf(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach().to(dtype).clone().requires_grad_()

        return Inputs(leaf(self.input), leaf(self.weight), self.m_sizes, leaf(self.bias), self.grad.to(dtype))


def make_inputs(case: LinearCase, dtype: torch.dtype) -> Inputs:
    rng = seeded(case.id)

    def normal(name: str, *shape: int, scale: float = 1.0) -> Tensor:
        value = (torch.randn(shape, generator=rng, dtype=torch.float64) * scale).to(DEVICE, dtype)
        if f"{name}.T" in case.strided:
            value = value.mT.contiguous().mT
        value = with_gaps(value) if name in case.strided else value
        return value if name == "grad" else value.requires_grad_()

    num_rows, num_experts = sum(case.sizes), len(case.sizes)
    sizes = torch.tensor(case.sizes, dtype=case.sizes_dtype, device=DEVICE)
    if "m_sizes" in case.strided:
        sizes = torch.stack([sizes, torch.full_like(sizes, 99)], dim=1)[:, 0]
    return Inputs(
        input=normal("input", num_rows, case.in_features),
        weight=normal("weight", num_experts, case.out_features, case.in_features, scale=case.in_features**-0.5),
        m_sizes=sizes,
        bias=normal("bias", num_experts, case.out_features) if case.bias else None,
        grad=normal("grad", num_rows, case.out_features),
    )


def plain_linear(inputs: Inputs) -> Tensor:
    """One ``torch`` linear layer an expert."""
    outs = []
    for expert, rows in enumerate(inputs.input.split(inputs.m_sizes.tolist())):
        out = rows @ inputs.weight[expert].T
        outs.append(out if inputs.bias is None else out + inputs.bias[expert])
    return torch.cat(outs) if outs else inputs.input.new_empty((0, inputs.weight.shape[1])).requires_grad_()


def results(y: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    y.backward(inputs.grad)
    leaves = {"input": inputs.input, "weight": inputs.weight, "bias": inputs.bias}
    return {"y": y.detach()} | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}


def linear(inputs: Inputs) -> Tensor:
    return kernel.moe_fused_linear(inputs.input, inputs.weight, inputs.m_sizes, inputs.bias)


PARAMETERS = [
    pytest.param(case, dtype, id=f"{case.id}-{name_of(dtype)}")
    for case in CASES
    for dtype in DTYPES
    if case.half or not (INTERPRETED and dtype == torch.float16)
]


@pytest.mark.parametrize("case, dtype", PARAMETERS)
def test_forward_and_gradients(case: LinearCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    exact, plain = inputs.to(torch.float64), inputs.to(dtype)
    ours = results(linear(inputs), inputs)
    if not case.sizes:
        assert ours["y"].shape == (0, case.out_features)
        assert ours["gradient of weight"].shape == inputs.weight.shape
        return
    truth, torchs = results(plain_linear(exact), exact), results(plain_linear(plain), plain)
    for name, value in ours.items():
        assert_accurate(name, value, truth[name], torchs[name])


def test_the_original_contract() -> None:
    """output[b, o] = Σ_i weight[expert(b), o, i] · input[b, i], spelled out."""
    weight = torch.arange(12, dtype=torch.float32, device=DEVICE).view(2, 2, 3)
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], device=DEVICE)
    y = kernel.moe_fused_linear(rows, weight, torch.tensor([1, 2], device=DEVICE))
    assert y.tolist() == [[0.0, 3.0], [7.0, 10.0], [21.0, 30.0]]


@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
def test_only_the_gradient_asked_for_is_computed(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(LinearCase("one-gradient", "", bias=True), torch.float32)
    for name in ("input", "weight", "bias"):
        getattr(inputs, name).requires_grad_(name == wanted)
    y = linear(inputs)
    needed = {"input": "grouped_gemm", "weight": "grouped_wgrad", "bias": "grouped_row_sum"}
    for name, stage in needed.items():
        if name != wanted:
            monkeypatch.setattr(stages(torch.float32), stage, None)
    y.backward(inputs.grad)
    assert getattr(inputs, wanted).grad is not None
    assert [name for name in needed if getattr(inputs, name).grad is not None] == [wanted]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing(use_reentrant: bool) -> None:
    inputs = make_inputs(CASES[0], torch.float32)
    leaves = [leaf for leaf in (inputs.input, inputs.weight, inputs.bias) if leaf is not None]

    def run(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return kernel.moe_fused_linear(rows, weight, inputs.m_sizes, bias=bias)

    expected = torch.autograd.grad(run(*leaves), leaves, inputs.grad)
    y = checkpoint(run, *leaves, use_reentrant=use_reentrant)
    y.backward(inputs.grad)  # which reentrant checkpoints need
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_weight_gradient_keeps_the_layout_of_the_weight() -> None:
    inputs = make_inputs(LinearCase("layout", "", strided=("weight.T",)), torch.float32)
    results(linear(inputs), inputs)
    assert inputs.weight.grad.stride() == inputs.weight.stride() == (480, 1, 20)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(low: torch.dtype) -> None:
    """Computes in autocast's dtype and returns it, like torch's linear layers; gradients stay fp32."""
    inputs = make_inputs(LinearCase("autocast", "", bias=True), torch.float32)
    with torch.autocast(DEVICE.type, dtype=low):
        y = linear(inputs)
    assert y.dtype == low
    assert torch.equal(y, linear(inputs.to(low)))
    y.backward(inputs.grad.to(low))
    for leaf in (inputs.input, inputs.weight, inputs.bias):
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.isfinite().all()


# Sizes that cannot be: on a GPU nobody looks at their values unless asked to, and no row may look like a result.
@pytest.mark.parametrize(
    "sizes, good_rows",
    [((3, 2), 5), ((0, 0), 0), ((7, 4), 0), ((12, 0), 0), ((-1, 10), 0), ((2**31 - 1, 2**31 - 1), 0)],
    ids=["too-few", "none", "too-many", "one-too-large", "negative", "sum-overflows-int32"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_of_no_expert_are_nan(sizes: tuple[int, int], good_rows: int, dtype: torch.dtype) -> None:
    permute, ops, arguments = (module(f"ops.{name}") for name in ("permute", "linear", "arguments"))
    inputs = make_inputs(LinearCase("misfit", "", sizes=(6, 4), bias=True), dtype)
    m_sizes = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    # Below the check of the public function, which a CPU always makes.
    buffer = permute.sorted_routing_buffer(permute.RouteSortedArguments(m_sizes, 10, dtype, packed=False))
    rows = ops.Rows(buffer, sorted_rows=True, packed=False, top_k=1, fill=float("nan"))
    stack = arguments.StackArguments(inputs.weight, [], "", transposed=False)
    with torch.no_grad():
        linear_arguments = ops.Linear(stack, arguments.NO_LORA, rows)
        y = ops.grouped_linear(ops.LinearForward(inputs.input, linear_arguments, inputs.bias))
    assert y[good_rows:].isnan().all()
    if good_rows:
        fitting = make_inputs(LinearCase("misfit", "", sizes=(6, 4), bias=True), dtype)
        fitting.input = fitting.input[:good_rows]
        fitting.m_sizes = m_sizes
        assert torch.equal(y[:good_rows], linear(fitting))


@pytest.mark.skipif(not ON_GPU, reason="a CPU always checks the values of sizes")
def test_misfit_is_nan_and_not_an_error_on_a_gpu() -> None:
    inputs = make_inputs(LinearCase("misfit", "", sizes=(6, 4)), torch.float32)
    y = kernel.moe_fused_linear(inputs.input, inputs.weight, torch.tensor([6, 3], device=DEVICE))
    assert y[9].isnan().all()
    assert not y[:9].isnan().any()
