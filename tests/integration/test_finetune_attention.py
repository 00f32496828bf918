"""The attention that takes the place of a model's own: windows, sinks and boundaries, against eager attention."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moe_fused.finetune import attention
from moe_fused.finetune.architecture import boundaries_arrive
from moe_fused.memory import skeleton

from .conftest import DEVICE
from .four_bit import BY_ID
from .models import GPT_OSS, MODELS, ModelCase, tokens

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
LATENT = {"v_head_dim": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}


@pytest.mark.parametrize(
    ("attn", "sizes", "device", "whole", "packed"),
    [
        ("sdpa", {}, CUDA, True, True),
        ("auto", {}, CUDA, True, True),
        ("eager", {}, CUDA, False, False),
        ("sdpa", {}, CPU, False, False),
        ("flash_attention_2", {}, CUDA, False, False),
        ("sdpa", WINDOWS, CUDA, True, True),
        ("sdpa", {**WINDOWS, "head_dim": 512}, CUDA, False, False),
        ("sdpa", {"head_dim": 512}, CUDA, True, False),
        ("sdpa", {"head_dim": 20}, CUDA, True, False),
        ("sdpa", LATENT, CUDA, True, True),
        ("sdpa", {"v_head_dim": 24}, CUDA, True, False),
        ("sdpa", {"attention_dropout": 0.1}, CUDA, True, False),
    ],
)
def test_serves_what_it_computes(
    attn: str, sizes: dict[str, Any], device: torch.device, whole: bool, packed: bool
) -> None:
    model = skeleton(Qwen3MoeConfig(**{**SIZES, **sizes}))
    assert attention.serves(attn, model, device, torch.bfloat16, packed=False) == whole
    assert attention.serves(attn, model, device, torch.bfloat16, packed=True) == packed
    assert not attention.serves(attn, model, device, torch.float32, packed=True)


def test_does_not_serve_attention_to_later_tokens() -> None:
    model = skeleton(Qwen3MoeConfig(**SIZES))
    model.model.layers[1].self_attn.is_causal = False
    for packed in (False, True):
        assert not attention.serves("sdpa", model, CUDA, torch.bfloat16, packed=packed)


def test_serves_sinks_unless_eager_attention_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention is what Transformers chooses for such a model, and remains to be had by name."""
    model = skeleton(GPT_OSS.build().config)
    for packed in (False, True):
        assert attention.serves("auto", model, CUDA, torch.bfloat16, packed=packed)
        assert not attention.serves("eager", model, CUDA, torch.bfloat16, packed=packed)
        assert not attention.serves("auto", model, CUDA, torch.float32, packed=packed)
        assert not attention.serves("auto", model, CPU, torch.bfloat16, packed=packed)
    with monkeypatch.context() as patch:  # a torch without these operators
        patch.setattr(attention, "_sinks_run", lambda: False)
        assert not attention.serves("auto", model, CUDA, torch.bfloat16, packed=False)
    # Layers of a class that Transformers' flash attention does not know might keep their windows to themselves.
    monkeypatch.setattr(type(model), "_supports_flash_attn", False)
    assert not attention.serves("auto", model, CUDA, torch.bfloat16, packed=False)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2MoeConfig(**SIZES, **{**WINDOWS, "max_window_layers": 2}),
        PhimoeConfig(**SIZES, sliding_window=8, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    ],
    ids=lambda config: config.model_type,
)
def test_windows_that_are_in_a_mask_alone_are_not_served(config: Any) -> None:
    """These layers hand no window over, although Transformers lets flash attention compute them."""
    model = skeleton(config)
    assert attention.has_windows(config)
    assert model._supports_flash_attn
    for packed in (False, True):
        assert not attention.serves("auto", model, CUDA, torch.bfloat16, packed=packed)


@pytest.mark.parametrize(("features", "served"), [(32, True), (512, False)])
def test_layers_may_differ_in_the_sizes_of_heads(features: int, served: bool) -> None:
    """Gemma 4's layers that attend to everything have larger heads, and its config refuses to name one size for all."""
    config = Gemma4TextConfig(
        **SIZES, top_k_experts=2, enable_moe_block=True, layer_types=["sliding_attention", "full_attention"],
        global_head_dim=features, hidden_size_per_layer_input=0, vocab_size_per_layer_input=64,
    )  # fmt: skip
    for packed in (False, True):
        assert attention.serves("auto", skeleton(config), CUDA, torch.bfloat16, packed=packed) == served


SERVED = [
    case
    for case in MODELS
    if attention.serves("auto", skeleton(case.build().config), CUDA, torch.bfloat16, packed=False)
]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "side by side"])
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.id)
def test_every_served_family_gets_its_own_logits(case: ModelCase, packed: bool) -> None:
    """With windows, if the family has any, that are shorter than the sequences; and with documents side by side."""
    model = case.build().to(DEVICE)
    if packed and not boundaries_arrive(skeleton(model.config)):
        pytest.skip("its layers take no boundaries, so its documents are never packed")
    sequences = [tokens(batch=1, length=length, device=DEVICE) for length in (11, 17, 9)]
    with torch.no_grad():
        want = [model(ids).logits for ids in sequences]
        attention.use(model)
        if not packed:
            got = [model(ids).logits for ids in sequences]
        else:
            lengths = torch.tensor([0, *(ids.shape[1] for ids in sequences)], dtype=torch.int32, device=DEVICE)
            positions = torch.cat([torch.arange(ids.shape[1], device=DEVICE) for ids in sequences])[None]
            together = model(
                torch.cat(sequences, dim=1), position_ids=positions, cu_seq_lens_q=lengths.cumsum(0, dtype=torch.int32),
                max_length_q=17, use_cache=False,
            ).logits  # fmt: skip
            got = list(together.split([ids.shape[1] for ids in sequences], dim=1))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_windows_and_sinks_are_met() -> None:
    """The families of the test above would not notice a window or a sink that is left out, if none had any."""
    assert any(attention.has_windows(case.build().config) for case in SERVED)
    assert GPT_OSS in SERVED
    assert not attention.has_windows(BY_ID["dots1"].build().config)  # which has a size of windows, and none


def test_a_model_that_keeps_boundaries_to_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skeleton(Qwen3MoeConfig(**SIZES))
    assert boundaries_arrive(model)
    layer = type(model.model.layers[0])
    original = layer.forward

    def forward(self: Any, *args: Any, cu_seq_lens_q: Tensor | None = None, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    assert not boundaries_arrive(model)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_looking_for_boundaries_runs_no_kernel(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's norms and rotary embeddings are kernels, which would read memory that tensors on meta do not have."""
    model = skeleton(case.build().config)
    before = boundaries_arrive(model)

    def kernel(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel ran on meta")

    for kind in {type(module) for module in model.modules()}:
        if "Norm" in kind.__name__:
            monkeypatch.setattr(kind, "forward", kernel)
    code = sys.modules[type(model).__module__]
    if hasattr(code, "apply_rotary_pos_emb"):
        monkeypatch.setattr(code, "apply_rotary_pos_emb", kernel)
    assert boundaries_arrive(model) == before
    assert not any("forward" in vars(module) for module in model.modules())


# Sinks, by flash attention's operators.


def reference_forward(query, key, value, first, _, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """What torch's operator returns for documents: the output, and the log-sum-exp of each query's scores."""
    scores, value = _scores(query, key, value, first, **kwargs)
    lse = scores.logsumexp(-1)
    out = torch.einsum("hqk,khd->qhd", (scores - lse[..., None]).exp(), value)
    return out.to(query.dtype), lse.float(), lse.new_zeros(2), lse.new_zeros(0), lse.new_zeros(0)


def reference_backward(grad, query, key, value, out, lse, first, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Gradients as flash attention computes them, from nothing but its inputs, the output and the log-sum-exp."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        scores, values = _scores(*leaves, first, **kwargs)
        weights = (scores.detach() - lse[..., None]).exp()
        means = torch.einsum("qhd,qhd->hq", grad, out)
        of_scores = weights * (torch.einsum("qhd,khd->hqk", grad, values.detach()) - means[..., None])
        of_values = torch.einsum("hqk,qhd->khd", weights, grad)
        found = torch.autograd.grad((scores, values), leaves, (of_scores, of_values))
    return tuple(found)


def _scores(query, key, value, first, *, scale, window_size_left=None, window_size_right=None) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    window = None if window_size_left is None else window_size_left + 1
    mask = attention.causal_mask(first, len(query), window, query.device)[0]
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask, float("-inf")), value


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", reference_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", reference_backward)


def sink_inputs(dtype: torch.dtype, device: str, length: int, *, head_dim: int = 16) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, 6, head_dim), (length, 2, head_dim), (length, 2, head_dim), (6,)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    gradient = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    return [tensor.to(device, dtype) for tensor in made], gradient.to(device, dtype)


def with_gradients(inputs: list[Tensor], gradient: Tensor, run: Any) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = run(*leaves)
    out.backward(gradient)
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def plainly(boundaries: Tensor, window: int | None, scale: float | None) -> Any:
    """Eager attention with sinks, for (S, heads, D)."""

    def run(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        mask = attention.causal_mask(boundaries, len(query), window, query.device)
        heads = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return attention.attention_with_sinks(*heads, sinks, mask, scale)[0]

    return run


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sinks_by_the_operators_of_flash_attention(window: int | None, scale: float | None) -> None:
    """Outputs and all gradients, the sinks' included, are those of eager attention."""
    inputs, gradient = sink_inputs(torch.float64, "cpu", 23)
    boundaries = torch.tensor([0, 4, 4, 15, 23], dtype=torch.int32)
    got = with_gradients(
        inputs, gradient, lambda *leaves: attention._FlashWithSinks.apply(*leaves, boundaries, 11, scale, window)
    )
    want = with_gradients(inputs, gradient, plainly(boundaries, window, scale))
    # The log-sum-exp is in fp32, as torch's operator returns it.
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    without = with_gradients([*inputs[:3], inputs[3] - 100], gradient, plainly(boundaries, window, scale))
    assert (without[0] - want[0]).abs().max() > 0.05  # so that sinks count


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinks_keep_the_data_type(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-sum-exp is in fp32. Flash attention's backward wants the output in the dtype of the queries."""
    given: list[set[torch.dtype]] = []

    def backward(grad, query, key, value, out, lse, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        given.extend([{tensor.dtype for tensor in (grad, query, key, value, out)}, {lse.dtype}])
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    inputs, gradient = sink_inputs(dtype, "cpu", 23)
    boundaries = torch.tensor([0, 4, 23], dtype=torch.int32)
    got = with_gradients(
        inputs, gradient, lambda *leaves: attention._FlashWithSinks.apply(*leaves, boundaries, 19, None, None)
    )
    assert {tensor.dtype for tensor in got} == {dtype}
    assert given == [{dtype}, {torch.float32}]
    want = plainly(boundaries, None, None)(*(tensor.double() for tensor in inputs))
    assert (got[0] - want).norm() <= 0.01 * want.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("length", [129, 1024])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sinks_on_a_gpu(window: int | None, length: int, head_dim: int) -> None:
    """Against float64, the error is at most twice that of eager attention in the same dtype."""
    cuts = [0, length // 3, length // 3, length - 20, length]
    boundaries = torch.tensor(cuts, dtype=torch.int32, device=DEVICE)
    inputs, gradient = sink_inputs(torch.bfloat16, DEVICE, length, head_dim=head_dim)
    got = with_gradients(
        inputs, gradient, lambda *leaves: attention._FlashWithSinks.apply(*leaves, boundaries, length, None, window)
    )
    run = plainly(boundaries, window, None)
    theirs = with_gradients(inputs, gradient, run)
    truth = with_gradients([tensor.double() for tensor in inputs], gradient.double(), run)
    for one, other, want in zip(got, theirs, truth, strict=True):
        error, allowed = (one - want).norm(), (other - want).norm()
        assert error <= 2 * allowed, (error, allowed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")
def test_values_of_fewer_features_on_a_gpu() -> None:
    """Those of multi-head latent attention, against documents by themselves."""
    shapes = [(1, 4, 300, 192), (1, 4, 300, 192), (1, 4, 300, 128)]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_() for shape in shapes]
    gradient = torch.randn(1, 300, 4, 128, generator=generator).to(DEVICE, torch.bfloat16)
    boundaries = torch.tensor([0, 100, 300], dtype=torch.int32, device=DEVICE)
    module = torch.nn.Module()
    out, _ = attention.attention(module, *leaves, None, cu_seq_lens_q=boundaries, max_length_q=200)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mask = attention.causal_mask(boundaries, 300, None, out.device)
    truth = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=mask).transpose(1, 2)
    want = [truth, *torch.autograd.grad(truth, exact, gradient.double())]
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")
def test_a_model_with_sinks_on_a_gpu() -> None:
    """Whole sequences in a batch, and one in float32, which flash attention does not take."""
    config = GptOssConfig(
        **{**dict(GPT_OSS.options), "head_dim": 64, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 64},
        num_hidden_layers=2, num_key_value_heads=2, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).to(DEVICE).eval()
    model.set_experts_implementation("eager")
    ids = torch.randint(64, (2, 40), device=DEVICE)
    with torch.no_grad():
        truth = model(ids).logits
        theirs = model.bfloat16()(ids).logits
        attention.use(model)
        ours = model(ids).logits
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm()
        torch.testing.assert_close(model.float()(ids).logits, truth, rtol=2e-2, atol=2e-2)
