"""FLOP and byte counts against sums done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from moe_fused.benchmark.layers import (
    DEFAULT_LAYERS,
    FORWARD,
    FORWARD_BACKWARD,
    FORWARD_CUDA_GRAPH,
    LAYERS,
    RECOMPUTE,
    Ceilings,
    Layer,
    compulsory_bytes,
    flops,
    roofline_ms,
)

SMALL = Layer("small", hidden=4, intermediate=3, experts=5, top_k=2)  # an expert has 2·3·4 + 4·3 = 36 parameters
ADAPTED = dataclasses.replace(SMALL, lora_rank=2)  # its adapters 2·4 + 6·2 of gate and up, 2·3 + 4·2 of down: 34


def test_shapes_are_those_of_the_models():
    shapes = {name: (layer.hidden, layer.intermediate, layer.experts, layer.top_k) for name, layer in LAYERS.items()}
    assert shapes["qwen3-30b-a3b"] == (2048, 768, 128, 8)
    assert shapes["deepseek-v2-lite"] == (2048, 1408, 64, 6)
    assert shapes["gpt-oss-20b-like"] == (2880, 2880, 32, 4)
    assert set(DEFAULT_LAYERS) < set(shapes)


def test_parameters():
    assert SMALL.expert_parameters == 36
    assert SMALL.parameters == 180


def test_flops():
    # 3 tokens to 2 experts are 6 rows; up: 6 rows x 6 features x 4 inputs, down: 6 x 4 x 3; a multiply-add is two.
    assert flops(SMALL, 3, FORWARD) == 2 * (6 * 6 * 4 + 6 * 4 * 3) == 432
    assert flops(SMALL, 3, FORWARD_CUDA_GRAPH) == 432
    assert flops(SMALL, 3, FORWARD_BACKWARD) == 3 * 432


def test_forward_bytes():
    weights = 4 * 36 * 2  # of the 4 experts that were chosen, of 5
    tokens = 3 * 4 * 2  # read x, and the same again to write y
    routing = 6 * (8 + 2)  # int64 ids and bf16 weights
    assert compulsory_bytes(SMALL, 3, 4, FORWARD) == weights + 2 * tokens + routing == 396
    assert compulsory_bytes(SMALL, 3, 4, FORWARD_CUDA_GRAPH) == 396


def test_forward_backward_bytes():
    weights, tokens, routing = 4 * 36 * 2, 3 * 4 * 2, 6 * (8 + 2)
    backward_reads = weights + 2 * tokens + routing  # the weights, x and the gradient of y, ids and weights
    weight_gradients = 5 * 36 * 2  # dense: also of the expert that nobody chose
    backward_writes = weight_gradients + tokens + 6 * 2  # and of x and of the routing weights
    assert compulsory_bytes(SMALL, 3, 4, FORWARD_BACKWARD) == 396 + backward_reads + backward_writes


def test_flops_of_lora():
    # 6 rows through 36 weights and 34 adapter parameters: there, back, and once more for the adapters alone.
    assert ADAPTED.adapter_parameters == 34
    assert flops(ADAPTED, 3, FORWARD) == 2 * 6 * (36 + 34)
    assert flops(ADAPTED, 3, FORWARD_BACKWARD) == 2 * 6 * (2 * (36 + 34) + 34)


def test_bytes_of_lora():
    """Adapters are read with the weights of their experts, in their own dtype; only their gradients are written."""
    packed, adapters, tokens, routing = 4 * 36 * 0.5, 4 * 34 * 2, 3 * 4 * 2, 6 * (8 + 2)
    forward = packed + adapters + 2 * tokens + routing
    assert compulsory_bytes(ADAPTED, 3, 4, FORWARD, weight_bytes=0.5) == forward
    writes = 5 * 34 * 2 + tokens + 6 * 2
    assert compulsory_bytes(ADAPTED, 3, 4, FORWARD_BACKWARD, weight_bytes=0.5) == 2 * forward + writes


@pytest.mark.parametrize("layer", [SMALL, ADAPTED])
def test_recomputing_is_no_work_that_counts(layer):
    assert flops(layer, 3, RECOMPUTE) == flops(layer, 3, FORWARD_BACKWARD)
    assert compulsory_bytes(layer, 3, 4, RECOMPUTE) == compulsory_bytes(layer, 3, 4, FORWARD_BACKWARD)


def test_bytes_scale_with_the_dtype_but_for_the_ids():
    assert compulsory_bytes(SMALL, 3, 4, FORWARD, itemsize=4) == 2 * (396 - 6 * 8) + 6 * 8


def test_bytes_of_packed_weights():
    """Only what is read of the weights shrinks: tokens and routing stay half-precision numbers and ids."""
    assert compulsory_bytes(SMALL, 3, 4, FORWARD, weight_bytes=0.5) == 4 * 36 * 0.5 + 2 * 24 + 60 == 180
    assert roofline_ms(SMALL, 3, 4, FORWARD, Ceilings(180e3, 1e12), weight_bytes=0.5) == pytest.approx(1.0)


def test_roofline_is_the_slower_of_memory_and_compute():
    assert roofline_ms(SMALL, 3, 4, FORWARD, Ceilings(396e3, 1e12)) == pytest.approx(1.0)
    assert roofline_ms(SMALL, 3, 4, FORWARD, Ceilings(1e12, 432e3)) == pytest.approx(1.0)


@pytest.mark.parametrize(("tokens", "active", "ms"), [(1, 8, 0.025), (512, 128, 0.41), (16384, 128, 1.6)])
def test_roofline_of_a_real_layer(tokens, active, ms):
    """The rooflines of an H100, whose copies reach 3.0 TB/s, its products about 760 TFLOP/s."""
    roofline = roofline_ms(LAYERS["qwen3-30b-a3b"], tokens, active, FORWARD, Ceilings(3.0e12, 760e12))
    assert roofline == pytest.approx(ms, rel=0.05)


def test_unknown_phase():
    with pytest.raises(ValueError, match=r"phase must be one of .*, got 'backward'"):
        flops(SMALL, 1, "backward")
    with pytest.raises(ValueError, match=r"phase must be one of .*, got 'backward'"):
        compulsory_bytes(SMALL, 1, 1, "backward")
