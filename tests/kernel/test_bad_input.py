"""Bad input ends in one line that names the argument, what was given and what is needed, before any kernel starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.kernel.machine import DEVICE, ON_GPU, kernel, module, stages
from tests.support import REPOSITORY

# Tokens, experts per token, experts, hidden and intermediate size.
T, K, E, H, N = 3, 2, 4, 8, 6


def experts_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "hidden_states": torch.ones((T, H), dtype=dtype, device=DEVICE),
        "top_k_index": torch.zeros((T, K), dtype=torch.int64, device=DEVICE),
        "top_k_weights": torch.ones((T, K), dtype=dtype, device=DEVICE),
        "gate_up_proj": torch.ones((E, 2 * N, H), dtype=dtype, device=DEVICE),
        "down_proj": torch.ones((E, H, N), dtype=dtype, device=DEVICE),
        "gate_up_bias": torch.ones((E, 2 * N), dtype=dtype, device=DEVICE),
        "down_bias": torch.ones((E, H), dtype=dtype, device=DEVICE),
    }


def linear_arguments() -> dict[str, Any]:
    return {
        "input": torch.ones((5, H), device=DEVICE),
        "weight": torch.ones((E, N, H), device=DEVICE),
        "m_sizes": torch.tensor([2, 0, 3, 0], device=DEVICE),
        "bias": torch.ones((E, N), device=DEVICE),
    }


@dataclass(frozen=True)
class BadCase:
    """One wrong argument.

    Attributes:
        argument: its name, which the message must contain.
        value: what is given in its place, or how to make it of the right one.
        error: the exception.
        says: what the message must also contain: what was given, what is needed.
    """

    id: str
    argument: str
    value: Any
    error: type[Exception]
    says: tuple[str, ...]


def shape(*size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda right: right.new_ones(size)


def to(what: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda right: right.to(what)


EXPERTS = [
    BadCase("not-a-tensor", "hidden_states", [[1.0]], TypeError, ("must be a tensor", "list")),
    BadCase("index-not-a-tensor", "top_k_index", [[0]], TypeError, ("must be a tensor", "list")),
    BadCase("bias-not-a-tensor", "down_bias", 0.5, TypeError, ("must be a tensor", "float")),
    BadCase("three-dimensions", "hidden_states", shape(1, T, H), ValueError, ("(T, H)", "(1, 3, 8)")),
    BadCase("flat-index", "top_k_index", shape(T), ValueError, ("(3, top_k)", "(3,)")),
    BadCase("other-tokens", "top_k_index", shape(T + 1, K), ValueError, ("(3, top_k)", "(4, 2)")),
    BadCase("other-top-k", "top_k_weights", shape(T, K + 1), ValueError, ("(3, 2)", "(3, 3)")),
    BadCase("top-0", "top_k_weights", shape(T, 0), ValueError, ("(3, 2)", "(3, 0)")),
    BadCase("other-hidden", "gate_up_proj", shape(E, 2 * N, H + 1), ValueError, ("(E, 2*I, 8)", "(4, 12, 9)")),
    BadCase("odd-gate-up", "gate_up_proj", shape(E, 2 * N + 1, H), ValueError, ("even", "13")),
    BadCase("other-experts", "down_proj", shape(E + 1, H, N), ValueError, ("(4, 8, 6)", "(5, 8, 6)")),
    BadCase("other-intermediate", "down_proj", shape(E, H, N + 1), ValueError, ("(4, 8, 6)", "(4, 8, 7)")),
    BadCase("transposed-weights", "down_proj", shape(E, N, H), ValueError, ("(4, 8, 6)", "(4, 6, 8)")),
    BadCase("other-up-bias", "gate_up_bias", shape(E, N), ValueError, ("(4, 12)", "(4, 6)")),
    BadCase("other-down-bias", "down_bias", shape(H), ValueError, ("(4, 8)", "(8,)")),
    BadCase("float-index", "top_k_index", to(torch.float32), TypeError, ("int64", "float32")),
    BadCase("bool-index", "top_k_index", to(torch.bool), TypeError, ("int64", "bool")),
    BadCase("integer-weights", "top_k_weights", to(torch.int64), TypeError, ("float32", "int64")),
    BadCase("packed-weights", "gate_up_proj", to(torch.uint8), TypeError, ("float32", "uint8")),
    BadCase("complex-weights", "down_proj", to(torch.complex64), TypeError, ("float32", "complex64")),
    BadCase("other-dtype", "hidden_states", to(torch.float16), TypeError, ("float32", "like gate_up_proj", "float16")),
    BadCase(
        "other-down-dtype", "down_proj", to(torch.bfloat16), TypeError, ("float32", "like gate_up_proj", "bfloat16")
    ),
    BadCase(
        "other-bias-dtype", "gate_up_bias", to(torch.float16), TypeError, ("float32", "like gate_up_proj", "float16")
    ),
    BadCase("index-elsewhere", "top_k_index", to("meta"), ValueError, (str(DEVICE.type), "like hidden_states", "meta")),
    BadCase(
        "weights-elsewhere", "top_k_weights", to("meta"), ValueError, (str(DEVICE.type), "like hidden_states", "meta")
    ),
    BadCase("up-elsewhere", "gate_up_proj", to("meta"), ValueError, (str(DEVICE.type), "like hidden_states", "meta")),
    BadCase("down-elsewhere", "down_proj", to("meta"), ValueError, (str(DEVICE.type), "like hidden_states", "meta")),
    BadCase("bias-elsewhere", "down_bias", to("meta"), ValueError, (str(DEVICE.type), "like hidden_states", "meta")),
    BadCase("unknown-activation", "activation", "swish", ValueError, ("silu", "swiglu_oai", "'swish'")),
    BadCase("activation-not-callable", "activation", 3, TypeError, ("a name or a callable", "int")),
    BadCase("activation-none", "activation", None, TypeError, ("a name or a callable", "NoneType")),
]

LINEAR = [
    BadCase("not-a-tensor", "input", [1.0], TypeError, ("must be a tensor", "list")),
    BadCase("sizes-not-a-tensor", "m_sizes", [2, 0, 3, 0], TypeError, ("must be a tensor", "list")),
    BadCase("flat-weight", "weight", shape(N, H), ValueError, ("(E, out, in)", "(6, 8)")),
    BadCase("other-in", "input", shape(5, H + 1), ValueError, ("(S, 8)", "(5, 9)")),
    BadCase("other-experts", "m_sizes", shape(E + 1), ValueError, ("(4)", "(5,)")),
    BadCase("other-bias", "bias", shape(E, H), ValueError, ("(4, 6)", "(4, 8)")),
    BadCase("float-sizes", "m_sizes", to(torch.float32), TypeError, ("int64", "float32")),
    BadCase("bool-sizes", "m_sizes", to(torch.bool), TypeError, ("int64", "bool")),
    BadCase("packed-weight", "weight", to(torch.uint8), TypeError, ("float32", "uint8")),
    BadCase("other-dtype", "input", to(torch.float16), TypeError, ("float32", "like weight", "float16")),
    BadCase("other-bias-dtype", "bias", to(torch.float16), TypeError, ("float32", "like weight", "float16")),
    BadCase("weight-elsewhere", "weight", to("meta"), ValueError, (str(DEVICE.type), "like input", "meta")),
    BadCase("sizes-elsewhere", "m_sizes", to("meta"), ValueError, (str(DEVICE.type), "like input", "meta")),
    BadCase("bias-elsewhere", "bias", to("meta"), ValueError, (str(DEVICE.type), "like input", "meta")),
]


@pytest.fixture(autouse=True)
def _no_kernel_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are refused before anything runs."""
    for name in ("route", "route_sorted", "shrink", "grouped_up", "grouped_gemm", "dispatch"):
        monkeypatch.setattr(stages(torch.float32), name, None)
    if hasattr(stages(torch.float32), "decode"):
        monkeypatch.setattr(stages(torch.float32), "decode", None)


def assert_refused(function: Callable[..., object], case: BadCase, arguments: dict[str, Any]) -> None:
    right = arguments.get(case.argument)
    made = callable(case.value) and isinstance(right, torch.Tensor)
    arguments[case.argument] = case.value(right) if made else case.value
    with pytest.raises(case.error) as caught:
        function(**arguments)
    message = str(caught.value)
    assert re.search(rf"\b{case.argument}\b", message)
    assert [part for part in case.says if part not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: case.id)
def test_experts(case: BadCase) -> None:
    assert_refused(kernel.moe_experts, case, experts_arguments())


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.id)
def test_linear(case: BadCase) -> None:
    assert_refused(kernel.moe_fused_linear, case, linear_arguments())


# An adapter of rank 3 of the up projection (4, 12, 8), of the down projection (4, 8, 6) or of the linear layer (4, 6, 8).
R = 3


def adapter(rows: int = R, a: Any = None, b: Any = None, rank: int = R, out: int = 2 * N, **options: Any) -> Any:
    """``LoraWeights`` of the up projection unless ``out`` says otherwise; ``a`` and ``b`` in place of the right ones."""
    in_features = N if out == H else H
    a = torch.ones((E, rows, in_features), device=DEVICE) if a is None else a
    return kernel.LoraWeights(a, torch.ones((E, out, rank), device=DEVICE) if b is None else b, **options)


def ones(*size: int, **options: Any) -> torch.Tensor:
    return torch.ones(size, **{"device": DEVICE, **options})


UP, DOWN = "gate_up_lora", "down_lora"
LORA = [
    BadCase("not-an-adapter", UP, ones(E, R, H), TypeError, ("LoraWeights or a sequence of them", "Tensor")),
    BadCase("a-pair", UP, (ones(E, R, H), ones(E, 2 * N, R)), TypeError, ("LoraWeights", "Tensor")),
    BadCase("a-number", DOWN, 3, TypeError, ("LoraWeights or a sequence of them", "int")),
    BadCase("none-among-several", DOWN, [adapter(out=H), None], TypeError, ("LoraWeights", "NoneType")),
    BadCase("a-not-a-tensor", UP, adapter(a=[1.0]), TypeError, ("gate_up_lora.a must be a tensor", "list")),
    BadCase("b-not-a-tensor", DOWN, adapter(b="b", out=H), TypeError, ("down_lora.b must be a tensor", "str")),
    BadCase("flat-a", UP, adapter(a=ones(E * R, H)), ValueError, ("gate_up_lora.a", "(4, r, 8)", "(12, 8)")),
    BadCase("other-experts", UP, adapter(a=ones(E + 1, R, H)), ValueError, ("(4, r, 8)", "(5, 3, 8)")),
    BadCase("other-in", DOWN, adapter(a=ones(E, R, H), out=H), ValueError, ("down_lora.a", "(4, r, 6)", "(4, 3, 8)")),
    BadCase("other-out", UP, adapter(b=ones(E, N, R)), ValueError, ("gate_up_lora.b", "(4, 12, r)", "(4, 6, 3)")),
    BadCase("b-turned", DOWN, adapter(b=ones(E, R, H), out=H), ValueError, ("(4, 8, r)", "(4, 3, 8)")),
    BadCase("other-rank", UP, adapter(rank=4), ValueError, ("r or", "2·r", "(4, 3, 8) and (4, 12, 4)")),
    BadCase("rank-0", UP, adapter(0, rank=0), ValueError, ("r >= 1", "(4, 0, 8) and (4, 12, 0)")),
    BadCase("halves-of-down", DOWN, adapter(2 * R, out=H), ValueError, ("have r rows", "(4, 6, 6) and (4, 8, 3)")),
    BadCase("integer-a", UP, adapter(a=ones(E, R, H, dtype=torch.int8)), TypeError, ("lora.a", "float32", "int8")),
    BadCase("integer-b", UP, adapter(b=ones(E, 2 * N, R, dtype=torch.int8)), TypeError, ("lora.b", "float32", "int8")),
    BadCase(
        "a-elsewhere", UP, adapter(a=ones(E, R, H, device="meta")), ValueError, ("lora.a", "like hidden_states", "meta")
    ),
    BadCase(
        "b-elsewhere", DOWN, adapter(b=ones(E, H, R, device="meta"), out=H), ValueError, ("like hidden_states", "meta")
    ),
    BadCase("scaling-not-a-number", UP, adapter(scaling=ones(1)), TypeError, ("scaling must be a number", "Tensor")),
    BadCase("scaling-none", DOWN, adapter(scaling=None, out=H), TypeError, ("scaling must be a number", "NoneType")),
    BadCase("dropout-not-a-number", UP, adapter(dropout="0.1"), TypeError, ("dropout must be a number", "str")),
    BadCase("dropout-1", UP, adapter(dropout=1.0), ValueError, ("dropout must be in [0, 1)", "1.0")),
    BadCase("dropout-negative", DOWN, adapter(dropout=-0.1, out=H), ValueError, ("in [0, 1)", "-0.1")),
    BadCase("dropout-nan", UP, adapter(dropout=float("nan")), ValueError, ("in [0, 1)", "nan")),
    BadCase("second", UP, [adapter(), adapter(rank=4)], ValueError, ("(4, 3, 8) and (4, 12, 4)",)),
]


@pytest.mark.parametrize("case", LORA, ids=lambda case: case.id)
def test_adapters_of_experts(case: BadCase) -> None:
    assert_refused(kernel.moe_experts, case, experts_arguments())


@pytest.mark.parametrize("options", [{"interleaved": True}, {"gated": False}], ids=["interleaved", "no-gate"])
def test_halves_apart_where_there_are_none(options: dict[str, bool]) -> None:
    arguments = experts_arguments() | options
    if not arguments.get("gated", True):
        arguments["down_proj"] = ones(E, H, 2 * N)
    case = BadCase("", UP, adapter(2 * R), ValueError, ("have r rows", "(4, 6, 8) and (4, 12, 3)"))
    assert_refused(kernel.moe_experts, case, arguments)


LINEAR_LORA = [
    BadCase("not-an-adapter", "lora", ones(E, R, H), TypeError, ("LoraWeights or a sequence of them", "Tensor")),
    BadCase("other-in", "lora", adapter(a=ones(E, R, N), out=N), ValueError, ("lora.a", "(4, r, 8)", "(4, 3, 6)")),
    BadCase("other-out", "lora", adapter(), ValueError, ("lora.b", "(4, 6, r)", "(4, 12, 3)")),
    BadCase("halves", "lora", adapter(2 * R, out=N), ValueError, ("have r rows", "(4, 6, 8) and (4, 6, 3)")),
    BadCase("a-elsewhere", "lora", adapter(a=ones(E, R, H, device="meta"), out=N), ValueError, ("like input", "meta")),
    BadCase("dropout-1", "lora", adapter(dropout=1, out=N), ValueError, ("lora.dropout must be in [0, 1)", "1")),
]


@pytest.mark.parametrize("case", LINEAR_LORA, ids=lambda case: case.id)
def test_adapters_of_linear(case: BadCase) -> None:
    assert_refused(kernel.moe_fused_linear, case, linear_arguments())


def packed(*shape: int, dtype: torch.dtype = torch.float32, device: object = DEVICE) -> Any:
    """Packed weights of any values."""
    weight_format = kernel.Format4bit(shape, dtype=dtype)
    storage = {
        name: torch.zeros(size, dtype=torch.uint8, device=device) for name, size in weight_format.storage().items()
    }
    return kernel.Packed4bitWeights(weight_format, **storage)


def packed_arguments() -> dict[str, Any]:
    """Arguments of ``moe_experts`` with packed weights: 64 hidden and 32 intermediate features."""
    return {
        "hidden_states": torch.ones((T, 64), device=DEVICE),
        "top_k_index": torch.zeros((T, K), dtype=torch.int64, device=DEVICE),
        "top_k_weights": torch.ones((T, K), device=DEVICE),
        "gate_up_proj": packed(E, 64, 64),
        "down_proj": packed(E, 64, 32),
    }


# Values that are not made of the right one.
PACKED = [
    BadCase("other-hidden", "gate_up_proj", packed(E, 64, 32), ValueError, ("(E, 2*I, 64)", "(4, 64, 32)")),
    BadCase("odd-gate-up", "gate_up_proj", packed(E, 63, 64), ValueError, ("even", "63")),
    BadCase("other-experts", "down_proj", packed(E + 1, 64, 32), ValueError, ("(4, 64, 32)", "(5, 64, 32)")),
    BadCase("transposed-weights", "down_proj", packed(E, 32, 64), ValueError, ("(4, 64, 32)", "(4, 32, 64)")),
    BadCase(
        "up-elsewhere",
        "gate_up_proj",
        packed(E, 64, 64, device="meta"),
        ValueError,
        (str(DEVICE.type), "like hidden_states", "meta"),
    ),
    BadCase(
        "down-elsewhere",
        "down_proj",
        packed(E, 64, 32, device="meta"),
        ValueError,
        (str(DEVICE.type), "like hidden_states", "meta"),
    ),
    BadCase("other-dtype", "hidden_states", to(torch.float16), TypeError, ("float32", "like gate_up_proj", "float16")),
    BadCase(
        "other-down-dtype",
        "down_proj",
        packed(E, 64, 32, dtype=torch.bfloat16),
        TypeError,
        ("float32", "like gate_up_proj", "bfloat16"),
    ),
    BadCase(
        "dense-beside-it",
        "down_proj",
        torch.ones((E, 64, 32), dtype=torch.float16, device=DEVICE),
        TypeError,
        ("float32", "like gate_up_proj", "float16"),
    ),
    BadCase("storage-alone", "gate_up_proj", packed(E, 64, 64).packed, ValueError, ("(E, 2*I, 64)", "(4, 2048)")),
    BadCase("format-alone", "gate_up_proj", packed(E, 64, 64).format, TypeError, ("Packed4bitWeights", "Format4bit")),
]


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_packed_experts(case: BadCase) -> None:
    assert_refused(kernel.moe_experts, case, packed_arguments())


def packed_linear_arguments() -> dict[str, Any]:
    return linear_arguments() | {
        "input": torch.ones((5, 64), device=DEVICE),
        "weight": packed(E, N, 64),
    }


PACKED_LINEAR = [
    BadCase("other-in", "input", shape(5, 32), ValueError, ("(S, 64)", "(5, 32)")),
    BadCase("other-experts", "m_sizes", shape(E + 1), ValueError, ("(4)", "(5,)")),
    BadCase("other-bias", "bias", shape(E, H), ValueError, ("(4, 6)", "(4, 8)")),
    BadCase("other-dtype", "input", to(torch.float16), TypeError, ("float32", "like weight", "float16")),
    BadCase("other-bias-dtype", "bias", to(torch.float16), TypeError, ("float32", "like weight", "float16")),
    BadCase("weight-elsewhere", "weight", packed(E, N, 64, device="meta"), ValueError, ("like input", "meta")),
    BadCase("storage-alone", "weight", packed(E, N, 64).packed, ValueError, ("(E, out, in)", "(4, 192)")),
]


@pytest.mark.parametrize("case", PACKED_LINEAR, ids=lambda case: case.id)
def test_packed_linear(case: BadCase) -> None:
    assert_refused(kernel.moe_fused_linear, case, packed_linear_arguments())


def test_packed_weights_are_frozen() -> None:
    weights = packed(E, 64, 64)
    with pytest.raises(TypeError, match="packed 4-bit weights are frozen"):
        weights.requires_grad_()
    assert weights.requires_grad_(False) is weights
    assert not weights.requires_grad


def test_no_expert_per_token() -> None:
    arguments = experts_arguments()
    arguments |= {name: arguments[name][:, :0] for name in ("top_k_index", "top_k_weights")}
    with pytest.raises(ValueError, match=r"top_k_index must have at least one expert per token, got shape \(3, 0\)"):
        kernel.moe_experts(**arguments)


def test_gated_activation_without_a_gate() -> None:
    arguments = experts_arguments()
    arguments |= {"gate_up_proj": torch.ones((E, N, H), device=DEVICE), "gate_up_bias": None}
    with pytest.raises(ValueError, match="activation 'swiglu_oai' needs gated experts, got gated=False"):
        kernel.moe_experts(**arguments, activation="swiglu_oai", gated=False)


def test_shapes_of_transposed_weights() -> None:
    with pytest.raises(ValueError, match=r"gate_up_proj must have shape \(E, 8, 2\*I\), got \(4, 12, 8\)"):
        kernel.moe_experts(**experts_arguments(), transposed=True)


def test_gate_function_that_keeps_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"activation must map \(6, 12\) to \(6, 6\), it gave \(6, 12\)"):
        kernel.moe_experts(**experts_arguments(), activation=torch.relu)


@pytest.mark.skipif(ON_GPU, reason="on a GPU the sizes are looked at with MOE_FUSED_CHECK=1 only, tested below")
@pytest.mark.parametrize(
    "sizes, message",
    [
        ((2, 0, 4, 0), "m_sizes must sum to the 5 rows of input, got a sum of 6"),
        ((2, 0, 1, 0), "m_sizes must sum to the 5 rows of input, got a sum of 3"),
        ((6, -1, 0, 0), "m_sizes must not be negative, got -1"),
    ],
    ids=["too-many", "too-few", "negative"],
)
def test_sizes_that_do_not_fit(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.moe_fused_linear(**linear_arguments() | {"m_sizes": torch.tensor(sizes)})


def test_wide_dtypes_on_an_accelerator() -> None:
    """float64 is refused on an accelerator instead of taking the CPU's implementation silently."""
    if not ON_GPU:
        pytest.skip("float64 runs in plain torch on a CPU")
    with pytest.raises(
        TypeError, match=r"dtype torch.float64 is not supported on .*: use bfloat16, float16 or float32"
    ):
        kernel.moe_experts(**experts_arguments(torch.float64))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    backend = module("stages")
    backend._check_accelerator.cache_clear()
    yield backend
    monkeypatch.undo()
    backend._check_accelerator.cache_clear()


def test_no_triton(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"tensors on cuda:0 need triton>=3.5, which is not installed"):
        backend._check_accelerator(torch.device("cuda", 0))


def test_old_triton(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    with pytest.raises(RuntimeError, match=r"triton 3.4.0 is too old for tensors on cuda:0: triton>=3.5 is needed"):
        backend._check_accelerator(torch.device("cuda", 0))


def test_old_gpu(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"Tesla T4 has compute capability 7.5: 8.0 \(Ampere\) or newer is needed"):
        backend._check_accelerator(torch.device("cuda", 0))


# MOE_FUSED_CHECK is read when the kernel is imported.
CHECKED = """
import torch
from tests.kernel.machine import DEVICE, kernel
from tests.kernel.test_bad_input import experts_arguments, linear_arguments

def refused(function, **arguments):
    try:
        function(**arguments)
    except ValueError as error:
        print(error)
    else:
        print("accepted")

for bad in (-1, 5, 2**32, 4):
    arguments = experts_arguments()
    arguments["top_k_index"][1, 1] = bad
    refused(kernel.moe_experts, **arguments)
for sizes in ((2, 0, 4, 0), (6, -1, 0, 0), (2, 0, 3, 0)):
    refused(kernel.moe_fused_linear, **linear_arguments() | {"m_sizes": torch.tensor(sizes, device=DEVICE)})
"""


@pytest.mark.parametrize("switch", ["1", "0", ""], ids=["on", "off", "empty"])
def test_debug_mode(switch: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHECKED],
        cwd=REPOSITORY,
        env={**os.environ, "MOE_FUSED_CHECK": switch},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    ids = "top_k_index must hold expert ids from 0 to 4 (= not mine), got"
    sizes = [
        "m_sizes must sum to the 5 rows of input, got a sum of 6",
        "m_sizes must not be negative, got -1",
        "accepted",
    ]
    if switch != "1":
        # On a CPU, reading the sizes costs nothing.
        assert run.stdout.splitlines() == ["accepted"] * 4 + (["accepted"] * 3 if ON_GPU else sizes)
        return
    assert run.stdout.splitlines() == [f"{ids} -1", f"{ids} 5", f"{ids} 4294967296", "accepted", *sizes]
