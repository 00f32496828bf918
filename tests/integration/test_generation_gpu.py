"""On a GPU: ``fast_generation`` records graphs, which give the logits and tokens that ``generate`` gives."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from moe_fused import generation

from .four_bit import build, config, load
from .models import MODELS, QWEN3_MOE, ModelCase
from .test_generation import GREEDY, fast, padded, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU"),
    pytest.mark.usefixtures("enabled"),
]
# A greedy search in fp32 has no ties on these models.
LOGITS: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the recordings and replays."""
    counted = [0, 0]
    keep, run = generation._Step._keep, generation._Step.run

    def count(self: Any, inputs: Any) -> None:
        counted[0] += 1
        keep(self, inputs)

    def counting(self: Any, forward: Any, inputs: Any) -> Any:
        output = run(self, forward, inputs)
        counted[1] += self._graph is not None
        return output

    monkeypatch.setattr(generation._Step, "_keep", count)
    monkeypatch.setattr(generation._Step, "run", counting)
    return counted


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


def assert_same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for one, other in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_families(case: ModelCase, replays: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model: Any = case.build().cuda()
    model.set_experts_implementation("moe_fused")
    for number, inputs in enumerate(map(on_gpu, (prompt(), padded())), 1):
        if case.id == "nemotron_h":  # which takes no mask
            del inputs["attention_mask"]
        want = model.generate(**inputs, **LOGITS)
        with fast(model), caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert_same(model.generate(**inputs, **LOGITS), want)
        if case.id == "phimoe":  # whose rotary embedding makes its frequencies on the CPU in each step
            assert caplog.text.count("the model cannot be recorded: Cannot copy between CPU and CUDA tensors") == number
            continue
        assert "CUDA graphs" not in caplog.text
        assert replays == [number, number * (2 * (GREEDY["max_new_tokens"] - 1) - 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_are_recorded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they compile, and are found to compute what the model does in its dtype."""
    from moe_fused.decoding import attention, heads, layers, norms, router

    counted: dict[str, int] = {}

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            if torch.cuda.is_current_stream_capturing():
                counted[name] = counted.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    for module, name in (
        (attention, "attend"), (router, "route"), (norms, "rms_norm"), (heads, "rotate"), (heads, "write"),
        (layers, "norm_and_rotate"),
    ):  # fmt: skip
        count(module, name)
    for case, expected in (
        ("qwen3_moe", {"attend": 2, "route": 2, "rms_norm": 5, "norm_and_rotate": 2}),
        ("gpt_oss", {"attend": 2, "route": 2, "rms_norm": 5, "norm_and_rotate": 2}),
        ("olmoe", {"attend": 2, "route": 2, "rms_norm": 9, "rotate": 2, "write": 2}),
    ):
        (found,) = (each for each in MODELS if each.id == case)
        model: Any = found.build().to("cuda", dtype)
        model.set_experts_implementation("moe_fused")
        with fast(model):
            model.generate(**on_gpu(padded()), **GREEDY)
        assert counted == expected
        counted.clear()


@pytest.mark.parametrize("heads", [(32, 4), (16, 16)])
def test_bf16_is_as_near_to_fp32_as_without_graphs(heads: tuple[int, int]) -> None:
    """Logits of heads of 128 numbers and prompts longer than a block, when all answer with the same tokens."""
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 128, "num_experts": 64}
    exact: Any = QWEN3_MOE.build(hidden_size=256, max_position_embeddings=1024, **sizes).cuda()
    model: Any = QWEN3_MOE.build(hidden_size=256, max_position_embeddings=1024, **sizes).to("cuda", torch.bfloat16)
    inputs = on_gpu(prompt(2, 300))

    class Fifth(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([5], device=scores.device), 0.0)

    def logits(model: Any) -> Tensor:
        model.set_experts_implementation("moe_fused")
        return torch.stack(
            model.generate(**inputs, **LOGITS, logits_processor=LogitsProcessorList([Fifth()])).logits
        ).float()

    want, plain = logits(exact), logits(model)
    with fast(model):
        got = logits(model)
    assert float((got - want).norm()) <= 1.5 * float((plain - want).norm())


@pytest.mark.parametrize("batch", [1, 3, 8, 20, 64])
def test_experts_in_4_bits(batch: int, replays: list[int], tmp_path: Any) -> None:
    """From matrix-vector products to the kernels of many rows."""
    build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load(
        tmp_path,
        dtype=torch.float32,
        quantization_config=config(bnb_4bit_compute_dtype=torch.float32),
        device_map={"": "cuda"},
        experts_implementation="moe_fused",
    )
    inputs = on_gpu(prompt(batch))
    want = model.generate(**inputs, **LOGITS)
    with fast(model):
        for _ in range(2):
            assert_same(model.generate(**inputs, **LOGITS), want)
    assert replays[0] == 1


def test_sampling_goes_on_with_torchs_random_numbers(replays: list[int]) -> None:
    model: Any = QWEN3_MOE.build().cuda()
    options = {**GREEDY, "do_sample": True, "temperature": 0.7}

    def sampled() -> list[Tensor]:
        torch.manual_seed(3)
        return [model.generate(**on_gpu(prompt()), **options) for _ in range(2)]

    results = sampled()
    assert replays == [0, 0]
    with fast(model):
        results += sampled()
    assert replays[0] == 1
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_what_waits_for_the_gpu_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    """After a recording that failed, random numbers and further graphs work."""
    model: Any = QWEN3_MOE.build().cuda()
    other: Any = QWEN3_MOE.build(seed=1).cuda()
    inputs = on_gpu(padded())
    sampled = {**GREEDY, "do_sample": True}
    wants = []
    for each in (model, other):
        torch.manual_seed(3)
        wants.append((each.generate(**inputs, **GREEDY), each.generate(**inputs, **sampled)))

    class Waits(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            assert bool(hidden.isfinite().all())
            return hidden

    model.model.norm = nn.Sequential(model.model.norm, Waits())
    with fast(model, other), caplog.at_level(logging.WARNING):
        for each, (greedy, random) in zip((model, other), wants, strict=True):
            torch.manual_seed(3)
            assert torch.equal(each.generate(**inputs, **GREEDY), greedy)
            assert torch.equal(each.generate(**inputs, **sampled), random)
    assert caplog.text.count("the model cannot be recorded: ") == 1


def test_memory_is_that_of_the_cache() -> None:
    model: Any = QWEN3_MOE.build().cuda()
    inputs = on_gpu(prompt())
    model.generate(**inputs, **GREEDY)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with fast(model) as (handle,):
        model.generate(**inputs, **GREEDY)
        cache = next(iter(handle._steps.values())).cache
        layers: list[Any] = cache.layers
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert (
            held == 2 * 2 * 2 * 2 * 512 * 8 * 4
        )  # layers, keys and values, sequences, heads, length, head size, bytes
        assert torch.cuda.memory_allocated() - before < held + 2**20
    assert torch.cuda.memory_allocated() - before < 2**16


def test_steps_do_not_wait(replays: list[int]) -> None:
    """With late checks, the host runs ahead: it waits for the step before the last one alone."""
    model: Any = QWEN3_MOE.build().cuda()
    inputs = on_gpu(prompt(1))
    eos = {**GREEDY, "eos_token_id": int(model.generate(**inputs, **GREEDY)[0, 12])}
    want = model.generate(**inputs, **eos)
    assert want.shape[1] < inputs["input_ids"].shape[1] + GREEDY["max_new_tokens"]
    with fast(model):
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **eos), want)
    assert replays[0] == 1
