"""The kernels for documents side by side: which of them a run takes, and that each gets what it needs.

The kernels need a GPU, and cuDNN's and the Hub's a package besides. Stand-ins with the same signatures compute each document
by itself here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3MoeConfig

from moe_fused.finetune import attention, varlen
from moe_fused.finetune.options import Options
from moe_fused.finetune.resolve import candidates, set_up
from moe_fused.memory import skeleton

from .models import GPT_OSS, MODELS, QWEN3_MOE
from .test_finetune_attention import reference_backward, reference_forward

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BY_ID = {case.id: case for case in MODELS}
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
HUB_ID = "kernels-community/flash-attn3"
LENGTHS = [0, 5, 5, 6, 17, 17, 17]  # documents of 5, 0, 1, 11, 0 and 0 tokens


def each_alone(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float | None, window=None
) -> Tensor:
    """Attention over (S, heads, D), one document after the other."""
    parts = []
    for first, end in zip(boundaries.tolist(), boundaries[1:].tolist(), strict=False):
        mask = attention.causal_mask(None, end - first, window, query.device)
        rows = (tensor[first:end].transpose(0, 1)[None] for tensor in (query, key, value))
        parts.append(
            scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)
        )
    return torch.cat(parts)


def sdpa_torch(
    query, key, value, *, scale=None, is_causal=False, cu_seqlens_q=None, cu_seqlens_kv=None, max_seqlen_q=0,
    max_seqlen_kv=0, return_lse=False,
):  # fmt: skip
    """The function of NVIDIA's package, with the arguments that it has and those checks of it that matter here."""
    assert query.dim() == key.dim() == value.dim() == 3
    assert is_causal
    assert return_lse
    assert cu_seqlens_q is cu_seqlens_kv
    assert cu_seqlens_q.dtype is torch.int32
    assert max_seqlen_q == max_seqlen_kv >= cu_seqlens_q.diff().max()
    return each_alone(query, key, value, cu_seqlens_q, scale), query.new_zeros(len(query), query.shape[1], 1)


HUB_KERNEL = """
import torch

calls = []


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), deterministic=False,
):
    assert causal and cu_seqlens_q is cu_seqlens_k
    from tests.integration.test_finetune_varlen import each_alone

    calls.append((max_seqlen_q, window_size))
    window = None if window_size[0] < 0 else window_size[0] + 1
    return each_alone(q, k, v, cu_seqlens_q, softmax_scale, window)


def flash_attn_func(*_, **__):
    raise AssertionError("the function for sequences of one length")
"""


def forget() -> None:
    for function in (
        varlen._cudnn_function,
        varlen.torch_kernel,
        varlen.cudnn_kernel,
        varlen.hub_kernel,
        varlen.speeds,
    ):
        function.cache_clear()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for NVIDIA's package."""
    package: Any = ModuleType("cudnn")
    package.__spec__ = SimpleNamespace(name="cudnn")
    package.sdpa_torch, package.backend_version = sdpa_torch, lambda: 91900
    monkeypatch.setitem(sys.modules, "cudnn", package)
    return package


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory that stands in for the kernel of the Hub."""
    for backend in ("cpu", "cuda", "rocm"):
        directory = tmp_path / "build" / f"torch-{backend}"
        directory.mkdir(parents=True)
        (directory / "__init__.py").write_text(HUB_KERNEL, encoding="utf-8")
        metadata = {
            "name": "flash-attn3", "id": f"_flash_attn3_{backend}_{tmp_path.name}".replace("-", "_"), "version": 1,
            "license": "BSD-3-Clause", "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        (directory / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    monkeypatch.setenv("LOCAL_KERNELS", f"{HUB_ID}={tmp_path}")
    monkeypatch.setattr("transformers.modeling_flash_attention_utils._loaded_implementation", None)
    return HUB_ID


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the stand-ins compute tensors of a CPU."""
    monkeypatch.setattr(attention, "_is_on_gpu", lambda query: True)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    """Query, key and value (1, heads, T, D), the boundaries, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 17, 16), (1, 2, 17, 16), (1, 2, 17, 16)]
    made = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]
    gradient = torch.randn(1, 17, 4, 16, generator=generator, dtype=dtype)
    return made, torch.tensor(LENGTHS, dtype=torch.int32), gradient


@pytest.mark.usefixtures("kernels_run", "cudnn")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", ["cudnn", "hub"])
def test_documents_by_a_kernel(name: str, window: int | None, hub: str) -> None:
    """Empty documents at the end and in between change nothing. cuDNN's windows are left to a mask."""
    kernel = hub if name == "hub" else name
    leaves, boundaries, gradient = inputs()
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    options = {"cu_seq_lens_q": boundaries, "max_length_q": 11, "sliding_window": window, "scaling": 0.3}
    out, _ = attention.attention(module, *leaves, None, kernel=kernel, **options)
    got = [out, *torch.autograd.grad(out, leaves, gradient)]
    mask = attention.causal_mask(boundaries, 17, window, CPU)
    truth = scaled_dot_product_attention(*leaves, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    for one, other in zip(got, [truth, *torch.autograd.grad(truth, leaves, gradient)], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("window", [None, 4])
def test_whole_sequences_by_a_kernel_of_the_hub(window: int | None, hub: str) -> None:
    """Who names a kernel gets it for whole sequences, too."""
    leaves, _, _ = inputs()
    pair = [torch.cat([leaf, leaf.flip(2)]) for leaf in leaves]
    out, _ = attention.attention(torch.nn.Module(), *pair, None, kernel=hub, sliding_window=window)
    want = scaled_dot_product_attention(
        *pair, attn_mask=attention.causal_mask(None, 17, window, CPU), enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, want)
    loaded = sys.modules[varlen.hub_kernel(hub).attend.__closure__[0].cell_contents.__module__]  # type: ignore[union-attr, index]
    assert loaded.calls == [(17, (-1, -1) if window is None else (3, 0))]


def test_values_of_fewer_features_are_filled_up(kernels_run: None, cudnn: ModuleType) -> None:
    leaves, boundaries, _ = inputs()
    values = leaves[2][..., :8]
    out, _ = attention.attention(
        torch.nn.Module(), *leaves[:2], values, None, cu_seq_lens_q=boundaries, max_length_q=11, kernel="cudnn"
    )
    mask = attention.causal_mask(boundaries, 17, None, CPU)
    want = scaled_dot_product_attention(*leaves[:2], values, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, want)


@pytest.mark.usefixtures("kernels_run", "cudnn")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["cudnn", "hub"])
def test_a_model_with_a_kernel(name: str, checkpointing: bool, hub: str) -> None:
    """Logits and gradients are those of documents by themselves, with layers computed again, too."""
    model = QWEN3_MOE.build().train()
    lengths = torch.tensor([0, 4, 4, 11, 16, 16], dtype=torch.int32)
    ids = torch.arange(16)[None] % model.config.vocab_size
    want = torch.cat([model(part).logits for part in ids.split([4, 7, 5], dim=1)], dim=1)
    weight = model.model.layers[0].self_attn.q_proj.weight
    (expected,) = torch.autograd.grad(want.square().sum(), weight)
    attention.use(model, hub if name == "hub" else name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    positions = torch.cat([torch.arange(4), torch.arange(7), torch.arange(5)])[None]
    got = model(ids, position_ids=positions, cu_seq_lens_q=lengths, max_length_q=7, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_flash_attention_whose_function_repeats_keys(
    window: int | None, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's function that takes no groups is gone around, by its operators."""
    from torch.nn.attention import varlen as of_torch

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        raise AssertionError

    monkeypatch.setattr(of_torch, "varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", reference_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", reference_backward)
    for runs, groups in ((True, True), (False, False)):
        varlen.torch_kernel.cache_clear()
        monkeypatch.setattr(varlen, "operators_run", lambda runs=runs: runs)
        kernel = varlen.torch_kernel()
        assert kernel is not None
        assert kernel.groups == groups
        if not runs:
            break
        leaves, boundaries, gradient = inputs()
        rows = [leaf[0].transpose(0, 1) for leaf in leaves]
        out = kernel.attend(rows[0], rows[1], rows[2], boundaries, 11, scale, window)
        want = each_alone(rows[0], rows[1], rows[2], boundaries, scale, window)
        for one, other in zip(
            [out, *torch.autograd.grad(out, leaves, gradient[0])],
            [want, *torch.autograd.grad(want, leaves, gradient[0])],
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # the log-sum-exp is in fp32


def test_two_models_keep_their_kernels(kernels_run: None, cudnn: ModuleType) -> None:
    """The kernel belongs to the model that uses it, and Transformers takes its name for none of its own."""
    first, second = QWEN3_MOE.build(), QWEN3_MOE.build()
    attention.use(first, "cudnn")
    attention.use(second)
    names = [model.config.get_text_config()._attn_implementation for model in (first, second)]
    assert names[1] == attention.NAME != names[0]
    assert not any("flash" in name or "sdpa" in name for name in names)


# Which kernel a run has.


def run_of(attn: str = "auto", config: Any = None, **options: Any) -> Any:
    config = QWEN3_MOE.build(max_position_embeddings=4096).config if config is None else config
    return next(candidates(set_up(Options(model="m", attn=attn, **options), config, CUDA), plain_text=False))


def test_without_measurements_documents_are_torchs() -> None:
    assert run_of().kernel == "torch"
    assert run_of(packing="none").kernel is None  # causal attention over whole sequences needs none
    assert run_of("torch").kernel == "torch"
    assert run_of("eager").kernel is None


def test_cudnn_by_name(cudnn: ModuleType) -> None:
    run = run_of("cudnn")
    assert (run.attention, run.kernel, run.graphs, run.maskless) == ("sdpa", "cudnn", True, True)
    assert run.settled().attn == "cudnn"
    assert run_of("cudnn", packing="none").kernel is None


def test_cudnns_own_errors_name_the_option(cudnn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package raises errors of its own, which derive from Exception alone. Other errors stay as they are."""
    own = type("cudnnGraphNotSupportedError", (Exception,), {"__module__": "cudnn._compiled_module"})
    leaves, boundaries, _ = inputs()
    query, key, value = (leaf[0].transpose(0, 1) for leaf in leaves)
    for raised, error, message in (
        (own("no plan"), RuntimeError, "cuDNN does not compute this attention, use --attn torch: no plan"),
        (KeyError("q"), KeyError, "q"),
    ):

        def fails(*args: Any, raised: Exception = raised, **kwargs: Any) -> Any:
            raise raised

        # The kernel is kept with the function that it found.
        varlen.cudnn_kernel.cache_clear()
        varlen._cudnn_function.cache_clear()
        monkeypatch.setattr(cudnn, "sdpa_torch", functools.wraps(sdpa_torch)(fails))
        kernel = varlen.cudnn_kernel()
        assert kernel is not None
        with pytest.raises(error, match=message):
            kernel.attend(query, key, value, boundaries, 11, None, None)


def test_a_kernel_of_the_hub_by_name(hub: str) -> None:
    """It needs no masks and waits for nothing, so that its steps run as CUDA graphs."""
    for packing in ("bfd", "none"):
        run = run_of(hub, packing=packing)
        assert (run.attention, run.kernel, run.maskless) == (hub, hub, True)
    assert run_of(hub).graphs
    assert run_of(hub).settled().attn == hub


@pytest.mark.parametrize("name", [HUB_ID, f"{HUB_ID}:another_function"])
def test_a_kernel_of_the_hub_without_attention(name: str, hub: str, tmp_path: Path) -> None:
    """Transformers takes any kernel for one of attention, and then looks for a function that is not there."""
    for path in tmp_path.glob("build/*/__init__.py"):
        path.write_text("nothing = None", encoding="utf-8")
    for path in tmp_path.glob("build/*/metadata.json"):  # another module than that of other tests
        path.write_text(path.read_text().replace('"_flash', '"_without_flash'), encoding="utf-8")
    message = (
        f"--attn {name} is not possible for .* use --attn sdpa: that kernel has no attention that Transformers can"
    )
    with pytest.raises(ValueError, match=message):
        run_of(name)


def test_a_kernel_of_the_hub_has_no_sinks(hub: str) -> None:
    model = skeleton(GPT_OSS.build().config)
    assert not attention.serves(hub, model, CUDA, torch.bfloat16, packed=True)
    assert attention.kernel_refusal(hub, model) == "its attention has sinks"


def without_cudnn() -> int:
    raise RuntimeError("Unable to find symbol cudnnGetVersion")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sdpa_torch": None}, "has no sdpa_torch, update it"),
        ({"sdpa_torch": lambda query, key, value: None}, "computes no attention over several lengths"),
        ({"backend_version": without_cudnn}, "nvidia-cudnn-frontend does not load: Unable to find symbol"),
        ({"backend_version": lambda: 90501}, r"it needs cuDNN 9\.18, and this is 9\.5"),
    ],
)
def test_packages_that_are_too_old(change: dict[str, Any], message: str, cudnn: Any, monkeypatch: Any) -> None:
    for name, value in change.items():
        if value is None:
            monkeypatch.delattr(cudnn, name)
        else:
            monkeypatch.setattr(cudnn, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(ValueError, match=f"--attn cudnn is not possible for Qwen3MoeForCausalLM here, .*{message}"):
        run_of("cudnn")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(ValueError, match="needs the package nvidia-cudnn-frontend, which is not installed"):
        run_of("cudnn")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    with pytest.raises(ValueError, match="needs a GPU of compute capability 9 or 10"):
        run_of("cudnn")
    with pytest.raises(ValueError, match="it needs an NVIDIA GPU"):
        set_up(Options(model="m", attn="cudnn", device="cpu"), QWEN3_MOE.build().config, CPU)


def test_a_plan_for_another_machine_needs_the_package_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the plan would be one with masks, and without graphs."""
    monkeypatch.setitem(sys.modules, "cudnn", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs the package nvidia-cudnn-frontend, which is not installed"):
        run_of("cudnn")


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"dtype": "float32"}, None, "it needs --dtype bfloat16 or float16"),
        ({}, Qwen3MoeConfig(**{**SIZES, "head_dim": 20}), "a number that is no multiple of 8"),
        ({}, Qwen3MoeConfig(**SIZES, attention_dropout=0.1), "its attention has dropout"),
        ({}, BY_ID["qwen3_next"].build().config, "layers of type linear_attention take no boundaries of rows"),
        ({}, BY_ID["phimoe"].build(head_dim=8, sliding_window=8).config, "a sliding window in their masks alone"),
    ],
    ids=["dtype", "heads", "dropout", "recurrent", "windows"],
)
def test_a_named_kernel_is_taken_or_refused(options: dict[str, Any], config: Any, message: str) -> None:
    """A mask of all pairs of tokens does not silently take its place."""
    with pytest.raises(
        ValueError, match=f"--attn torch is not possible for .* here, leave it out or use --attn .*: .*{message}"
    ):
        run_of("torch", config, **options)


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "torch_kernel", lambda: None)
    with pytest.raises(ValueError, match=r"leave it out or use --attn sdpa: it needs a torch newer than 2\.10"):
        run_of("torch")
    assert run_of().kernel is None


@pytest.mark.parametrize("attn", ["", "flash", "paged|sdpa", "paged|kernels-community/flash-attn3", "a/b/c", "Torch"])
def test_names_of_no_attention(attn: str) -> None:
    words = attention.name_refusal(attn, CUDA)
    assert words is not None
    assert re.fullmatch(r"it must be one of torch, cudnn, eager, .*sdpa, or a kernel of the Hub as org/name", words)
    assert attention.NAME not in words


@pytest.mark.parametrize(
    "attn", ["auto", "torch", "cudnn", "sdpa", "eager", "flex_attention", "flash_attention_2", HUB_ID]
)
def test_names_of_an_attention(attn: str) -> None:
    assert attention.name_refusal(attn, CUDA) is None
    assert (attention.name_refusal(attn, CPU) is None) == (attn != "flex_attention")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen3MoeConfig(**SIZES, **WINDOWS), "sliding window"),
        (Qwen3MoeConfig(**{**SIZES, "head_dim": 256}), "more than 128 features"),
        (GPT_OSS.build().config, "sinks"),
    ],
)
def test_what_cudnn_does_not_compute(config: Any, message: str, cudnn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(ValueError, match=message):
        set_up(Options(model="m", attn="cudnn"), config, CUDA)


MEASURED = varlen.Speeds(
    "NVIDIA H200", (9, 0), "2.11", 16, [4096, 16384], {"torch": [1.0, 1.0], "cudnn": [0.98, 0.5], "other": [2.0, 0.1]}
)


@pytest.mark.parametrize(
    ("tokens", "change", "want"),
    [
        (4096, {}, "torch"),  # two percent are no gain
        (12000, {}, "cudnn"),
        (10000, {"gpu": "NVIDIA H100"}, "torch"),
        (16384, {"capability": (10, 0)}, "torch"),
        (16384, {"torch": "2.12"}, "torch"),
        (16384, {"features": 64}, "torch"),
    ],
)
def test_what_was_measured_decides(
    tokens: int, change: dict[str, Any], want: str, cudnn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same kind of GPU, with the same torch and heads as large. A kernel that cannot run here is no choice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(varlen, "torch_release", lambda: "2.11")
    monkeypatch.setattr(varlen, "speeds", lambda: (dataclasses.replace(MEASURED, **change),))
    model = skeleton(Qwen3MoeConfig(**SIZES))
    if "gpu" in change:  # 10,000 tokens are nearer to 4,096
        assert attention.kernel_for("auto", model, CUDA, 10300, packed=True) == "cudnn"
    assert attention.kernel_for("auto", model, CUDA, tokens, packed=True) == want
    assert attention.kernel_for("torch", model, CUDA, tokens, packed=True) == "torch"
    windows = skeleton(Qwen3MoeConfig(**SIZES, **WINDOWS))
    assert attention.kernel_for("auto", windows, CUDA, tokens, packed=True) == "torch"


def test_without_the_package_what_was_measured_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(varlen, "torch_release", lambda: "2.11")
    monkeypatch.setattr(varlen, "speeds", lambda: (MEASURED,))
    model = skeleton(Qwen3MoeConfig(**SIZES))
    assert attention.kernel_for("auto", model, CUDA, 16384, packed=True) == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")
@pytest.mark.parametrize("name", ["torch", "cudnn"])
@pytest.mark.parametrize("features", [64, 128])
def test_kernels_on_a_gpu(name: str, features: int) -> None:
    """Eagerly, and within CUDA graphs whose boundaries change, against float64."""
    kernel = None if name == "cudnn" and varlen.cudnn_refusal(CUDA) else varlen.kernel_of(name)
    if kernel is None:
        pytest.skip(f"no attention over documents of {name} here")
    generator = torch.Generator().manual_seed(0)
    shapes = [(700, 8, features), (700, 2, features), (700, 2, features), (700, 8, features)]
    *inputs, gradient = (torch.randn(shape, generator=generator).to(CUDA, torch.bfloat16) for shape in shapes)
    mixes = [
        torch.tensor(ends, dtype=torch.int32, device=CUDA)
        for ends in ([0, 1, 1, 130, 389, 700, 700, 700], [0, 300, 517, 700, 700, 700, 700, 700])
    ]
    boundaries = mixes[0].clone()

    if not kernel.groups:
        inputs[1:] = [tensor.repeat_interleave(4, dim=1) for tensor in inputs[1:]]

    def run() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = kernel.attend(leaves[0], leaves[1], leaves[2], boundaries, 400, None, None)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    def truth(mix: Tensor) -> list[Tensor]:
        leaves = [tensor.double().requires_grad_() for tensor in inputs]
        out = each_alone(*leaves, mix, None)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient.double())]

    def compare(got: list[Tensor], mix: Tensor) -> None:
        for one, other in zip(got, truth(mix), strict=True):
            assert (one - other).norm() <= 0.01 * other.norm()

    compare(run(), mixes[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for mix in (mixes[1], mixes[0]):
        boundaries.copy_(mix)
        graph.replay()
        compare(found, mix)
