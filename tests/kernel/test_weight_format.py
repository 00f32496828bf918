"""A weight format is one class: int4, which only ``tests/kernel/int4.py`` defines, goes through every stage.

The files of the package are as they are. What the format must compute comes from its definition here, in float64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel.int4 import Int4
from tests.kernel.lora_cases import Factors, LoraCase, lora_gradients, make_lora_inputs
from tests.kernel.machine import DEVICE, HAS_TRITON, ON_GPU, kernel, module, name_of
from tests.kernel.packed_cases import (
    ALL,
    DTYPES,
    ONE,
    PackedCase,
    decoding,
    make_packed_inputs,
    packed_gradients,
    run_packed,
)
from tests.kernel.test_packed import assert_equals_truth, assert_taken
from tests.support import REPOSITORY

formats, Packed4bitWeights = module("formats"), kernel.Packed4bitWeights
INT4: dict[str, Any] = {"quant_type": "int4", "blocksize": 32, "double_quant": False}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    formats.register(Int4())
    yield
    formats.unregister("int4")


def defined(weights: Any) -> Tensor:
    """(E, out, in) float64 by the definition: (nibble - 16·[nibble ≥ 8]) · scale, the low nibble first."""
    nibbles = torch.stack((weights.packed & 15, weights.packed >> 4), dim=-1).view(-1, 32).double()
    values = torch.where(nibbles < 8, nibbles, nibbles - 16)
    return (values * weights.scales_fp16.view(torch.float16).view(-1, 1).double()).view(weights.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dequantize(dtype: torch.dtype) -> None:
    dense = torch.randn((3, 20, 64), device=DEVICE).to(dtype)
    weights = Packed4bitWeights.quantize(dense, quant_type="int4", projections=2)
    assert weights.format == kernel.Format4bit((3, 20, 64), "int4", 32, False, 2, dtype)
    assert set(weights.tensors()) == {"packed", "scales_fp16"}
    assert torch.equal(weights.dequantize(), defined(weights).to(dtype))
    error = (weights.dequantize().double() - dense.double()).abs().max()
    assert 0 < error < 0.6 * dense.abs().max() / 7
    moved = weights.to("meta").narrow(1, 2)
    assert (moved.device.type, tuple(moved.shape)) == ("meta", (2, 20, 64))


def test_every_nibble_in_every_place() -> None:
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 256)
    scales = torch.linspace(0.5, 2.0, 16, device=DEVICE).half().view(1, 16)
    layout = kernel.Format4bit((1, 8, 64), "int4", dtype=torch.float32)
    weights = Packed4bitWeights(layout, packed, scales.view(torch.uint8))
    assert torch.equal(weights.dequantize(), defined(weights).float())
    assert weights.dequantize()[0, 0, :4].tolist() == [0.0, 0.0, 0.5, 0.0], "the low nibble comes first"


CASES = [
    PackedCase("plain", "nothing special", half=True, **INT4),
    PackedCase("projections", "gate and up each with scales of their own", projections=2, **INT4),
    PackedCase("interleaved-bias", "gates alternate", interleaved=True, bias=True, **INT4),
    PackedCase(
        "96-in", "rows that are no whole units go through the workspace", hidden=96, takes=("part",) * 4, **INT4
    ),
    PackedCase("rows-of-128", "tiles of 128 rows, which read weights in order", tokens=260, experts=2, top_k=1, **INT4),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_backward(case: PackedCase, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and not case.half and not ON_GPU:
        pytest.skip("the interpreter, which is slow, has this case in fp32")
    inputs = make_packed_inputs(case, dtype)
    for name, weights in inputs.packed.items():
        assert torch.equal(inputs.inputs.tensors[name], defined(weights).to(dtype))
    with decoding(in_gemm=case.id != "96-in") as taken:
        ours = packed_gradients(case, inputs)
    assert_equals_truth(case, inputs, ours)
    assert_taken(taken, case.takes, dtype)


@pytest.mark.parametrize("workspace", [ALL, ONE], ids=["whole", "parts"])
def test_workspace(workspace: int) -> None:
    case = PackedCase("workspace", "", hidden=40, intermediate=48, bias=True, **INT4)
    inputs = make_packed_inputs(case, torch.float32)
    with decoding(in_gemm=False, workspace=workspace) as taken:
        ours = packed_gradients(case, inputs)
    assert_equals_truth(case, inputs, ours)
    assert set(taken) == ({"part"} if HAS_TRITON else set())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_few_slots_equal_the_routed_stages(dtype: torch.dtype) -> None:
    case = PackedCase("few", "", tokens=2, projections=2, hidden=192, bias=True, **INT4)
    inputs = make_packed_inputs(case, dtype)
    with torch.no_grad():
        few = run_packed(case, inputs)
    routed = run_packed(case, inputs).detach()
    assert (few - routed).abs().max() <= 2e-2 * routed.abs().max() if dtype != torch.float32 else 1e-5


def test_adapters_over_it() -> None:
    """An adapter over int4 weights computes what it computes over the dense weights that they dequantize to."""
    case = LoraCase("int4", "", hidden=64, intermediate=64, dense=(), up=(Factors(4),), down=(Factors(4),), **INT4)
    ours = lora_gradients(case, make_lora_inputs(case, torch.float32))
    dense = replace(make_lora_inputs(case, torch.float32), packed={})
    theirs = lora_gradients(case, dense)
    assert "gradient of gate_up_lora[0].a" in ours
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=1e-5 * theirs[name].abs().max().item()), name


def test_an_operator_takes_it_by_name() -> None:
    weights = Packed4bitWeights.quantize(torch.randn((2, 8, 64), device=DEVICE), quant_type="int4")
    _, scales, spec = module("weights").operands(weights)
    assert spec.startswith("int4 32 plain 1 ")
    assert len(scales) == 1
    rows, sizes = torch.randn((5, 64), device=DEVICE), torch.tensor([2, 3], device=DEVICE)
    compiled = torch.compile(kernel.moe_fused_linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(rows, weights, sizes), kernel.moe_fused_linear(rows, weights, sizes))


def test_names_are_words_and_are_taken_once() -> None:
    with pytest.raises(ValueError, match="there is a format of the name int4 already"):
        formats.register(Int4())
    two_words = Int4()
    two_words.name = "int 4"
    with pytest.raises(ValueError, match="must be one word, got 'int 4'"):
        formats.register(two_words)
    with pytest.raises(ValueError, match=f"quant_type must be one of {', '.join(formats.names())}, got 'int5'"):
        kernel.Format4bit((1, 8, 64), "int5")
    with pytest.raises(ValueError, match="blocksize must be one of 32, got 64"):
        kernel.Format4bit((1, 8, 64), "int4", 64)
    with pytest.raises(ValueError, match="double_quant must be False for int4"):
        kernel.Format4bit((1, 8, 64), "int4", double_quant=True)


@pytest.mark.skipif(not HAS_TRITON, reason="nothing is compiled without triton")
@pytest.mark.parametrize(
    "arch", [80, pytest.param(90, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_every_stage_compiles(arch: int) -> None:
    command = [sys.executable, "-m", "tests.kernel.compile_launches", str(arch), "bfloat16", "int4:16", "int4:128"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    launches = json.loads(run.stdout)
    kernels = {launch["kernel"] for launch in launches}
    assert kernels == {
        "packed_gemm_kernel", "packed_transposed_kernel", "packed_down_backward_kernel", "packed_gemv_up_kernel",
        "packed_gemv_down_kernel", "dequantize_kernel", "sum_parts_kernel",
    }  # fmt: skip
    assert max(launch["spills"] for launch in launches) <= 64
