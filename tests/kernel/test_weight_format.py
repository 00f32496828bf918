"""A weight format is one class: each of ``FORMATS`` goes through every stage.

Among them is int4, which only ``tests/kernel/int4.py`` defines; the files of the package are as they are. What a format must
compute comes from its definition here, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel.compile_launches import compiled
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
from tests.kernel.test_compile_matrix import MAX_SPILLS_FEW_SLOTS
from tests.kernel.test_packed import assert_equals_truth, assert_taken

formats, Packed4bitWeights = module("formats"), kernel.Packed4bitWeights

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nibbles(weights: Any) -> Tensor:
    """(E, blocks, blocksize) int64, the low nibble of a byte first."""
    both = torch.stack((weights.packed & 15, weights.packed >> 4), dim=-1).long()
    return both.view(weights.shape[0], -1, weights.format.blocksize)


def e2m1(weights: Any) -> Tensor:
    """As ``nibbles``, the float64 values."""
    both = nibbles(weights)
    magnitudes = torch.tensor(E2M1, dtype=torch.float64, device=DEVICE)[both & 7]
    return torch.where(both < 8, magnitudes, -magnitudes)


def int4(weights: Any) -> Tensor:
    """(nibble - 16·[nibble ≥ 8]) · scale."""
    both = nibbles(weights).double()
    scales = weights.scales_fp16.view(torch.float16).double()
    return torch.where(both < 8, both, both - 16) * scales[..., None]


def mxfp4(weights: Any) -> Tensor:
    """Value · 2^(byte - 127)."""
    return torch.ldexp(e2m1(weights), weights.block_scale.int()[..., None] - 127)


def nvfp4(weights: Any) -> Tensor:
    """Value · (E4M3 / global scale), the quotient and the product rounded to fp32."""
    block_scales = weights.block_scale.view(torch.float8_e4m3fn).double()
    global_scales = weights.global_scale.view(torch.float32).double()
    quotients = (block_scales.unflatten(1, (global_scales.shape[1], -1)) / global_scales[..., None]).float()
    return (e2m1(weights) * quotients.double().flatten(1)[..., None]).float().double()


@dataclass(frozen=True)
class Case:
    """A format.

    Attributes:
        blocksize: the only one that it has.
        storage: of its scales.
        defined: its weights by the definition, in float64, in blocks.
        error: the most by which quantizing changes a weight, in parts of its block's largest.
    """

    blocksize: int
    storage: tuple[str, ...]
    defined: Callable[[Any], Tensor]
    error: float

    def weights(self, weights: Any) -> Tensor:
        """(E, out, in) float64 by the definition."""
        return self.defined(weights).view(weights.shape)


FORMATS = {
    "int4": Case(32, ("scales_fp16",), int4, 0.6 / 7),
    "mxfp4": Case(32, ("block_scale",), mxfp4, 1 / 5),
    "nvfp4": Case(16, ("block_scale", "global_scale"), nvfp4, 1 / 5.6),
}
NAMES = [*FORMATS]


def options(name: str) -> dict[str, Any]:
    return {"quant_type": name, "blocksize": FORMATS[name].blocksize, "double_quant": False}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    formats.register(Int4())
    yield
    formats.unregister("int4")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_dequantize(name: str, dtype: torch.dtype) -> None:
    case = FORMATS[name]
    dense = torch.randn((3, 20, 64), device=DEVICE).to(dtype)
    weights = Packed4bitWeights.quantize(dense, quant_type=name, projections=2)
    assert weights.format == kernel.Format4bit((3, 20, 64), name, case.blocksize, False, 2, dtype)
    assert tuple(weights.tensors()) == ("packed", *case.storage)
    assert torch.equal(weights.dequantize(), case.weights(weights).to(dtype))
    blocks = dense.double().view(-1, case.blocksize)
    error = (weights.dequantize().double().view(blocks.shape) - blocks).abs() / blocks.abs().amax(1, keepdim=True)
    assert 0 < error.max() < case.error + 2**-7
    moved = weights.to("meta").narrow(1, 2)
    assert (moved.device.type, tuple(moved.shape)) == ("meta", (2, 20, 64))


@pytest.mark.parametrize("name", NAMES)
def test_every_nibble_in_every_place(name: str) -> None:
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 256)
    scaled = torch.logspace(-1, 2, 16, device=DEVICE).repeat_interleave(32).view(1, 8, 64)
    weights = Packed4bitWeights.quantize(scaled, quant_type=name).replaced(packed=packed)
    exact = FORMATS[name].weights(weights).float()
    assert torch.equal(weights.dequantize(), exact)
    assert len(exact.unique()) > 30, "the blocks have different scales"
    assert exact[0, 0, :4].count_nonzero() == 1, "the low nibble comes first"
    assert exact[0, 0, 2] > 0


NAN, INF = float("nan"), float("inf")


def as_bytes(value: float, dtype: torch.dtype) -> list[int]:
    return torch.tensor([value], dtype=dtype).view(torch.uint8).tolist()


# For each format and stored tensor: bytes with which weights of all nibbles are NaN or infinite.
BROKEN: dict[str, dict[str, list[list[int]]]] = {
    "int4": {"scales_fp16": [as_bytes(value, torch.float16) for value in (NAN, INF)]},
    "mxfp4": {"block_scale": [[255], [254], [253]]},
    "nvfp4": {
        "block_scale": [[0x7F], [0xFF]],
        "global_scale": [as_bytes(value, torch.float32) for value in (NAN, INF, 0.0, 1e-36)],
    },
    "nf4": {
        "nested_absmax": [as_bytes(value, torch.float32) for value in (NAN, INF)],
        "nested_offset": [as_bytes(-INF, torch.float32)],
    },
    "fp4": {"absmax": [as_bytes(value, torch.float32) for value in (NAN, INF)]},
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in BROKEN.items() for part in parts])
def test_broken_scales(name: str, part: str) -> None:
    """Those of the second expert's last projection are found, and none in sound weights."""
    weights = Packed4bitWeights.quantize(
        torch.randn((3, 32, 64), device=DEVICE), quant_type=name, projections=2, double_quant=name == "nf4"
    )
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(3, 4)
    weights = weights.replaced(packed=every)
    form = weights.format
    found = form.weight_format.broken(form, weights.tensors())
    assert found
    assert not any(broken.any() for broken in found.values())
    for bad in BROKEN[name][part]:
        values = weights.tensors()[part].clone()
        values[1, -len(bad) :] = torch.tensor(bad, dtype=torch.uint8, device=DEVICE)
        changed = weights.replaced(**{part: values})
        dense = changed.dequantize(torch.float32)
        assert dense[0].isfinite().all()
        if bad != as_bytes(INF, torch.float32) or name != "nvfp4":  # whose weights become 0
            assert not dense[1].isfinite().all()
        found = form.weight_format.broken(form, changed.tensors())
        places = {each: broken.nonzero().tolist() for each, broken in found.items() if broken.any()}
        assert places == {part: [[1, found[part].shape[1] - 1]]}
        alone = form.weight_format.is_broken(form, part, values[1])
        assert alone is not None
        if bad not in ([254], [253]):  # with which smaller values are finite
            assert alone.nonzero().tolist() == [[len(alone) - 1]]


def test_a_large_scale_of_small_values_is_sound() -> None:
    form = kernel.Format4bit((1, 1, 64), "mxfp4")
    scales = torch.tensor([[254, 127]], dtype=torch.uint8, device=DEVICE)
    for nibbles, is_broken in ((0x33, False), (0x34, True)):  # 1.5 and 2 times 2^127
        packed = torch.full((1, 32), nibbles, dtype=torch.uint8, device=DEVICE)
        found = form.weight_format.broken(form, {"packed": packed, "block_scale": scales})
        assert found["block_scale"].tolist() == [[is_broken, False]]


CASES = [
    PackedCase("plain", "nothing special", half=True),
    PackedCase("projections", "gate and up each with scales of their own", projections=2),
    PackedCase("interleaved-bias", "gates alternate", interleaved=True, bias=True),
    PackedCase(
        "gpt-oss", "as its checkpoints have it: not transposed", activation="swiglu_oai", interleaved=True, bias=True
    ),
    PackedCase("96-in", "rows that are no whole units go through the workspace", hidden=96, takes=("part",) * 4),
    PackedCase("rows-of-128", "tiles of 128 rows, which read weights in order", tokens=260, experts=2, top_k=1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name: str, case: PackedCase, dtype: torch.dtype) -> None:
    case = replace(case, **options(name))
    if dtype == torch.float16 and not case.half and not ON_GPU:
        pytest.skip("the interpreter, which is slow, has this case in fp32")
    inputs = make_packed_inputs(case, dtype)
    for argument, weights in inputs.packed.items():
        assert torch.equal(inputs.inputs.tensors[argument], FORMATS[name].weights(weights).to(dtype))
    with decoding(in_gemm=case.id != "96-in") as taken:
        ours = packed_gradients(case, inputs)
    assert_equals_truth(case, inputs, ours)
    assert_taken(taken, case.takes, dtype)


@pytest.mark.parametrize("workspace", [ALL, ONE], ids=["whole", "parts"])
@pytest.mark.parametrize("name", NAMES)
def test_workspace(name: str, workspace: int) -> None:
    hidden, intermediate = (96, 32) if formats.named(name).blocks_in_rows else (40, 48)
    case = PackedCase("workspace", "", hidden=hidden, intermediate=intermediate, bias=True, **options(name))
    inputs = make_packed_inputs(case, torch.float32)
    with decoding(in_gemm=False, workspace=workspace) as taken:
        ours = packed_gradients(case, inputs)
    assert_equals_truth(case, inputs, ours)
    assert set(taken) == ({"part"} if HAS_TRITON else set())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_few_slots_equal_the_routed_stages(name: str, dtype: torch.dtype) -> None:
    case = PackedCase("few", "", tokens=2, projections=2, hidden=192, bias=True, **options(name))
    inputs = make_packed_inputs(case, dtype)
    with torch.no_grad():
        few = run_packed(case, inputs)
    routed = run_packed(case, inputs).detach()
    assert (few - routed).abs().max() <= 2e-2 * routed.abs().max() if dtype != torch.float32 else 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_adapters_over_it(name: str) -> None:
    """An adapter over weights in the format computes what it computes over the dense weights that they dequantize to."""
    case = LoraCase(
        name, "", hidden=64, intermediate=64, dense=(), up=(Factors(4),), down=(Factors(4),), **options(name)
    )
    ours = lora_gradients(case, make_lora_inputs(case, torch.float32))
    dense = replace(make_lora_inputs(case, torch.float32), packed={})
    theirs = lora_gradients(case, dense)
    assert "gradient of gate_up_lora[0].a" in ours
    for label, value in ours.items():
        assert torch.allclose(value, theirs[label], rtol=1e-4, atol=1e-5 * theirs[label].abs().max().item()), label


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_takes_it_by_name(name: str) -> None:
    weights = Packed4bitWeights.quantize(torch.randn((2, 8, 64), device=DEVICE), quant_type=name)
    _, scales, spec = module("weights").operands(weights)
    assert spec.startswith(f"{name} {FORMATS[name].blocksize} plain 1 ")
    assert len(scales) == len(FORMATS[name].storage)
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
@pytest.mark.parametrize("name", NAMES)
def test_every_stage_compiles(name: str, arch: int) -> None:
    launches = compiled(arch, "bfloat16", [f"{name}:16", f"{name}:128"])
    kernels = {launch.kernel for launch in launches}
    assert kernels == {
        "packed_gemm_kernel", "packed_transposed_kernel", "packed_down_backward_kernel", "packed_gemv_up_kernel",
        "packed_gemv_down_kernel", "few_slots_kernel", "sum_slots_kernel", "few_rows_kernel", "dequantize_kernel",
        "sum_parts_kernel",
    }  # fmt: skip
    few = [launch.spills for launch in launches if launch.kernel == "few_slots_kernel"]
    assert max(few) <= MAX_SPILLS_FEW_SLOTS
    assert max(launch.spills for launch in launches if launch.kernel != "few_slots_kernel") <= 64
