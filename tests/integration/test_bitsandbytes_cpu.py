"""4-bit weights on a CPU: the same on every processor, whatever bitsandbytes does there by itself.

``repacks`` forces both answers to the question whether the processor has avx512_bf16, as layers ask it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

import moe_fused
from moe_fused.imports import OnImport
from moe_fused.integrations.quantizer import bitsandbytes_cpu
from moe_fused.integrations.quantizer.packed_experts import four_bit_config
from tests.bits import dequantize_4bit
from tests.support import REPOSITORY, python_path

from .cli import Command, save_tokenizer
from .four_bit import build, load, logits, same_state
from .models import MODELS, QWEN3_MOE, ModelCase, tokens

bnb: Any = pytest.importorskip("bitsandbytes", minversion="0.50")
BY_ID = {case.id: case for case in MODELS}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=["repacks", "does not"], ids=str)
def repacks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether layers that are made from now on are told that bitsandbytes may repack them."""
    answer = request.param == "repacks"
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: answer)
    return answer


@pytest.fixture
def registered() -> Iterator[None]:
    bitsandbytes_cpu.register()
    yield
    bitsandbytes_cpu.unregister()


@pytest.fixture
def by_itself() -> None:
    """bitsandbytes without us."""
    bitsandbytes_cpu.unregister()


def make_layer(out_features: int = 64, in_features: int = 96, **options: Any) -> Any:
    """A quantized ``Linear4bit`` in evaluation mode."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(in_features, out_features, quant_type="nf4", compute_dtype=torch.float32, **options)
    layer.load_state_dict({"weight": torch.randn(out_features, in_features), "bias": torch.randn(out_features)})
    return layer.to("cpu").eval()


def weight_of(layer: Any) -> Tensor:
    weight: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


# The operator.


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or torch.cuda.is_available(),
    reason="the fault is in the AVX-512 kernels, which its library for GPUs does not have",
)
def test_its_own_kernel_is_wrong_where_rows_are_not_whole_blocks(by_itself: None) -> None:
    """bitsandbytes' CPU kernel is wrong for such rows, so no test compares with it.

    Should this fail, bitsandbytes is mended and our kernel may go.
    """
    packed, state = bnb.functional.quantize_4bit(torch.randn(8, 96), blocksize=64, quant_type="nf4")
    theirs, right = bnb.functional.dequantize_4bit(packed, state), dequantize_4bit(packed, state)
    assert torch.equal(theirs[0], right[0])
    assert torch.equal(theirs[1, :32], right[1, :32])
    assert not torch.equal(theirs[1, 32:], right[1, 32:])


@settings(max_examples=60, deadline=None)
@example(shape=(8, 96), blocksize=64, quant_type="nf4", double_quant=True, dtype=torch.float32)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 200)),
    blocksize=st.sampled_from([32, 64, 128]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_dequantizes_any_shape(
    shape: tuple[int, int], blocksize: int, quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    bitsandbytes_cpu.register()
    try:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] * shape[1])).to(dtype)
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant
        )
        theirs = bnb.functional.dequantize_4bit(packed, state)
        right = dequantize_4bit(packed, state)
        if packed.shape[0] == 1:  # a single byte, which bitsandbytes takes for a transposed weight
            right = right.t()
        assert theirs.dtype == right.dtype
        assert torch.equal(theirs, right)
    finally:
        bitsandbytes_cpu.unregister()


def test_packed_bytes_may_be_viewed_as_another_dtype(registered: None) -> None:
    weight = torch.randn(4, 96)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), dequantize_4bit(packed, state))


# Layers.


@pytest.mark.parametrize("out_features", [64, 48, 5], ids="{} out features".format)
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "plain"])
def test_an_evaluation_leaves_a_layer_as_it_is(
    repacks: bool, registered: None, out_features: int, double_quant: bool
) -> None:
    layer = make_layer(out_features, compress_statistics=double_quant)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    weight, x = weight_of(layer), torch.randn(3, 96)
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, layer.bias))
    assert torch.equal(weight_of(layer), weight)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_backward_after_an_evaluation(repacks: bool, registered: None) -> None:
    layer = make_layer()
    weight, x = weight_of(layer), torch.randn(3, 96)
    with torch.no_grad():
        layer(x)
    x.requires_grad_()
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


def test_layers_that_exist_already(repacks: bool, by_itself: None) -> None:
    """A layer made before registering is not repacked while we are registered, and may be repacked again afterwards."""
    layer = make_layer()
    told = layer.support_avx512bf16_for_cpu
    assert told == repacks
    bitsandbytes_cpu.register()
    try:
        with torch.no_grad():
            layer(torch.randn(3, 96))
        assert not getattr(layer.weight.quant_state, bitsandbytes_cpu.REPACKED, False)
    finally:
        bitsandbytes_cpu.unregister()
    assert layer.support_avx512bf16_for_cpu == told
    assert copy.deepcopy(layer).support_avx512bf16_for_cpu == told


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "plain"])
def test_layers_that_were_repacked_before(by_itself: None, monkeypatch: pytest.MonkeyPatch, double_quant: bool) -> None:
    """Layers that were repacked before registering are unpacked, and keep the bf16 scales that the repacking left."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    layer = make_layer(in_features=128, compress_statistics=double_quant)
    weight = weight_of(layer)
    state = layer.weight.quant_state
    layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    assert getattr(state, bitsandbytes_cpu.REPACKED)
    bitsandbytes_cpu.register()
    try:
        assert not getattr(state, bitsandbytes_cpu.REPACKED)
        torch.testing.assert_close(weight_of(layer), weight, rtol=2**-8, atol=0)  # scales in bfloat16
        x = torch.randn(3, 128, requires_grad=True)
        y = layer.train()(x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight_of(layer), layer.bias))
        y.sum().backward()
        torch.testing.assert_close(x.grad, weight_of(layer).sum(0).expand(3, -1))
    finally:
        bitsandbytes_cpu.unregister()


# Models.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 96 weights are not whole blocks, and a head of 64 features is a multiple of 32: both faults can show."""
    path = tmp_path_factory.mktemp("small")
    build(dtype=torch.float32, hidden_size=96, moe_intermediate_size=64, head_dim=32).save_pretrained(path)
    return path


def in_4bit(path: Path) -> Any:
    return load(path, quantization_config=four_bit_config(torch.float32), dtype=torch.float32).eval()


@torch.no_grad()
def evaluated(model: Any) -> Tensor:
    return logits(model.eval())


def adapted(path: Path) -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(in_4bit(path), config)


def test_a_model_is_its_dequantized_self(repacks: bool, small: Path, enabled: None) -> None:
    model = in_4bit(small)
    packed = evaluated(model)
    dense = in_4bit(small)
    dense.dequantize()
    torch.testing.assert_close(evaluated(dense), packed, rtol=1e-3, atol=1e-3)
    model.dequantize()  # after the evaluation
    assert same_state(model, dense)


def test_merging_after_an_evaluation(repacks: bool, small: Path, enabled: None) -> None:
    fresh, used = adapted(small), adapted(small)
    before = evaluated(used)
    assert torch.equal(before, evaluated(used))
    merged = [evaluated(model.merge_and_unload()) for model in (fresh, used)]
    assert torch.equal(*merged)
    # Merged weights are rounded to 4 bits again.
    assert (merged[0] - before).abs().mean() < 0.5 * before.abs().mean()


def test_training_evaluating_and_loading_again(repacks: bool, small: Path, tmp_path: Path, enabled: None) -> None:
    """The trained model and a new one with its adapter compute the same."""
    from peft import PeftModel

    model = adapted(small).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    ids = tokens(device=str(model.device))
    losses = []
    for step in range(4):
        if step == 2:
            evaluated(model)
            model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(in_4bit(small), tmp_path)
    assert torch.equal(evaluated(model), evaluated(again))


@pytest.mark.parametrize("case", [BY_ID["qwen3_next"], BY_ID["deepseek_v3"], QWEN3_MOE], ids=lambda case: case.id)
def test_generates_in_4_bits(repacks: bool, case: ModelCase, tmp_path: Path, command: Command) -> None:
    """Models generate in 4 bits, although bitsandbytes cannot repack some of their linear layers."""
    model = case.build(hidden_size=64, moe_intermediate_size=32, use_cache=True)
    model.generation_config.update(do_sample=False, eos_token_id=None, pad_token_id=0)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    ended = command("generate", tmp_path, "--load-in-4bit", "--prompt", "w7 w8", "--max-new-tokens", "4")
    assert ended.status == 0, ended
    assert "4 tokens in" in ended.stderr


# Importing bitsandbytes.

_QUIET = """
import logging
logging.basicConfig()
import moe_fused
{first}
import bitsandbytes
{second}
from bitsandbytes.nn import Linear4bit
print(Linear4bit(4, 4).support_avx512bf16_for_cpu)
moe_fused.disable()
print(Linear4bit(4, 4).support_avx512bf16_for_cpu)
"""


def python(code: str, has: str) -> subprocess.CompletedProcess[str]:
    paths = python_path(REPOSITORY / "tests" / "cpu_path", REPOSITORY)
    environment = {**os.environ, "MOE_FUSED_TEST_CPU_BF16": has, "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("has", ["on", "off"])
def test_the_first_import_says_nothing_and_asks_nobody(has: str) -> None:
    """The first import of bitsandbytes mentions neither a kernel on the Hub nor trust in one."""
    ended = python(_QUIET.format(first="moe_fused.enable()", second=""), has)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["False", str(has == "on")]
    assert "kernels-community" not in ended.stderr
    assert "trust" not in ended.stderr


def test_enabled_after_the_import() -> None:
    ended = python(_QUIET.format(first="", second="moe_fused.enable()"), "on")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("has", ["on", "off"])
def test_doctor_says_it(has: str) -> None:
    code = "import sys; sys.argv = ['moe-fused', 'doctor']; from moe_fused.__main__ import main; sys.exit(main())"
    ended = python(code, has)
    assert ("bitsandbytes' own path for avx512_bf16 is switched off" in ended.stdout) == (has == "on"), ended
    assert "kernels-community" not in ended.stdout + ended.stderr


def test_other_kernels_are_loaded_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels

    monkeypatch.setattr(kernels, "get_kernel", lambda repo_id, **options: (repo_id, options))
    with bitsandbytes_cpu._without_hub_kernel():
        assert kernels.get_kernel("org/other", version=1) == ("org/other", {"version": 1})
        with pytest.raises(RuntimeError, match="leaves this kernel out"):
            kernels.get_kernel("kernels-community/quantization-bitsandbytes", version=1)
    assert kernels.get_kernel("kernels-community/quantization-bitsandbytes") == (
        "kernels-community/quantization-bitsandbytes",
        {},
    )


def test_a_failed_import_is_waited_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "imported_for_a_test.py"
    module.write_text("raise ValueError('not yet')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    seen = []

    def around(execute: Any) -> None:
        execute()
        seen.append("imported")

    hook = OnImport("imported_for_a_test", around)
    hook.wait()
    hook.wait()
    assert sys.meta_path.count(hook) == 1
    with pytest.raises(ValueError, match="not yet"):
        __import__("imported_for_a_test")
    module.write_text("value = 1  # a longer file, so that nobody takes the old one")
    assert __import__("imported_for_a_test").value == 1
    assert seen == ["imported"]
    assert not hook.waits
    monkeypatch.delitem(sys.modules, "imported_for_a_test")
    __import__("imported_for_a_test")
    assert seen == ["imported"]


def test_registering_is_undone() -> None:
    moe_fused.disable()
    packed, state = bnb.functional.quantize_4bit(torch.randn(8, 96), blocksize=64, quant_type="nf4")
    before = bnb.functional.dequantize_4bit(packed, state)
    for _ in range(3):
        bitsandbytes_cpu.register()
        bitsandbytes_cpu.register()
        assert torch.equal(bnb.functional.dequantize_4bit(packed, state), dequantize_4bit(packed, state))
        bitsandbytes_cpu.unregister()
        bitsandbytes_cpu.unregister()
        assert torch.equal(bnb.functional.dequantize_4bit(packed, state), before)


def test_registers_on_a_torch_that_overrides_only_if_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registering works on torch 2.9, the oldest that is supported, where an override must be allowed explicitly."""
    usual = torch.library.Library.impl

    def impl(library: Any, *arguments: Any, allow_override: bool = False, **options: Any) -> Any:
        return usual(library, *arguments, allow_override=allow_override, **options)

    bitsandbytes_cpu.unregister()
    monkeypatch.setattr(torch.library.Library, "impl", impl)
    bitsandbytes_cpu.register()
    bitsandbytes_cpu.unregister()
