"""Linear layers of bitsandbytes compute the same through ``linear_4bit``, and those that share an input at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from moe_fused import hub
from moe_fused.decoding import linear as decoding_linear
from tests.support import accelerator

DEVICE = accelerator() or torch.device("cpu")
WIDTHS = {"q_proj": 96, "k_proj": 32, "v_proj": 40, "o_proj": 64}


class Attention(nn.Module):
    """Projections as attention has them, without what is between them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        bias = options.pop("bias", False)
        for name, width in WIDTHS.items():
            setattr(self, name, linear(128, width, bias=bias, **options))

    def forward(self, x: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
        """The outputs. The keys come from ``other`` if it is given."""
        inputs = dict.fromkeys(WIDTHS, x) | ({} if other is None else {"k_proj": other})
        return {name: getattr(self, name)(value) for name, value in inputs.items()}


def linear(in_features: int, out_features: int, **options: Any) -> Any:
    """A quantized layer in evaluation mode, which has computed before."""
    dtype = options.setdefault("compute_dtype", torch.float32)
    layer = bnb.nn.Linear4bit(in_features, out_features, **{"quant_type": "nf4", "bias": False, **options})
    layer = layer.to(DEVICE).eval()
    # On some CPUs bitsandbytes moves the bytes of a layer in bf16 when it computes.
    layer.support_avx512bf16_for_cpu = False
    layer.requires_grad_(False)
    assert layer.weight.quant_state.dtype in (dtype, torch.float32)
    return layer


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The out features of each call of the kernel, but for those that compare it with bitsandbytes."""
    monkeypatch.setattr(decoding_linear, "_is_same", lambda *_: True)
    made: list[tuple[int, ...]] = []
    kernel = hub.get_kernel()
    usual = kernel.linear_4bit

    def noting(x: Tensor, weights: list[Any], biases: Any = None) -> list[Tensor]:
        made.append(tuple(weight.shape[1] for weight in weights))
        found: list[Tensor] = usual(x, weights, biases)
        return found

    monkeypatch.setattr(kernel, "linear_4bit", noting)
    return made


@contextlib.contextmanager
def replaced(model: nn.Module) -> Iterator[int]:
    with torch.no_grad(), decoding_linear.fewer_launches(model) as count:
        yield count


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert ours[name].shape == value.shape
        tolerance = 1e-5 if value.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compress_statistics": False},
        {"quant_type": "fp4", "bias": True},
        {"quant_storage": torch.bfloat16},
        {"compute_dtype": torch.bfloat16, "bias": True},
        {"compute_dtype": None},
    ],
    ids=["nf4", "plain-scales", "fp4-bias", "storage", "cast", "compute-dtype-of-the-input"],
)
@pytest.mark.parametrize("shape", [(1, 1, 128), (5, 1, 128), (3, 128)], ids=str)
def test_outputs_are_those_of_bitsandbytes(
    options: dict[str, Any], shape: tuple[int, ...], launches: list[tuple[int, ...]]
) -> None:
    attention, x = Attention(**dict(options)), random(*shape)
    with torch.no_grad():
        theirs = attention(x)
    with replaced(attention) as count:
        ours = attention(x)
    assert count == 4
    assert launches == [(96, 32, 40), (64,)]
    assert_same(ours, theirs)


def test_an_input_of_its_own_is_computed_alone(launches: list[tuple[int, ...]]) -> None:
    attention, x = Attention(), random(2, 1, 128)
    other = x.clone()
    with replaced(attention):
        ours = attention(x, other)
    assert launches == [(96, 32, 40), (32,), (64,)]
    with torch.no_grad():
        assert_same(ours, attention(x, other))


def test_what_was_computed_from_another_value_is_forgotten(launches: list[tuple[int, ...]]) -> None:
    attention, x = Attention(), random(2, 1, 128)
    with replaced(attention):
        attention.q_proj(x)
        x.mul_(2.0)
        ours = attention.k_proj(x)
    assert launches == [(96, 32, 40), (32,)]
    with torch.no_grad():
        torch.testing.assert_close(ours, attention.k_proj(x))


def test_a_second_call_computes_again(launches: list[tuple[int, ...]]) -> None:
    attention, x = Attention(), random(2, 1, 128)
    with replaced(attention):
        outputs = [attention.q_proj(x), attention.k_proj(x), attention.k_proj(x), attention.q_proj(x)]
    assert launches == [(96, 32, 40), (32,), (96, 32, 40)]
    assert len({output.data_ptr() for output in outputs}) == 4
    assert torch.equal(outputs[0], outputs[3])
    assert torch.equal(outputs[1], outputs[2])


def test_inference_mode(launches: list[tuple[int, ...]]) -> None:
    attention = Attention()
    with torch.inference_mode(), decoding_linear.fewer_launches(attention):
        x = random(2, 1, 128)
        ours = attention(x)
    assert launches == [(96, 32, 40), (64,)]
    with torch.inference_mode():
        assert_same(ours, attention(x))


def test_adapters_compute_beside_it(launches: list[tuple[int, ...]]) -> None:
    model = nn.Sequential(Attention())
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(model, config).eval()  # type: ignore[arg-type]
    x = random(2, 1, 128)
    with torch.no_grad():
        theirs = adapted(x)
    with replaced(adapted) as count:
        ours = adapted(x)
    assert count == 4
    assert launches == [(96, 32, 40), (64,)]
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [
        lambda attention, x: (attention, x.requires_grad_(), True),
        lambda attention, x: (attention, random(65, 1, 128), False),
        lambda attention, x: (attention, x[:0], False),
    ],
    ids=["gradient", "many-rows", "no-rows"],
)
def test_other_calls_are_those_of_bitsandbytes(
    change: Callable[..., tuple[Any, Tensor, bool]], launches: list[tuple[int, ...]]
) -> None:
    attention, x, with_grad = change(Attention(), random(2, 1, 128))
    with decoding_linear.fewer_launches(attention), torch.set_grad_enabled(with_grad):
        y = attention(x)["q_proj"]
    assert launches == []
    assert y.requires_grad == with_grad


def test_layers_that_are_left_alone(launches: list[tuple[int, ...]]) -> None:
    attention = Attention()
    attention.q_proj = nn.Linear(128, 96, device=DEVICE)
    attention.k_proj.forward = attention.k_proj.forward  # somebody else's
    attention.v_proj.weight.quant_state.code = attention.v_proj.weight.quant_state.code * 2
    attention.o_proj = linear(80, 64)
    with replaced(attention) as count:
        assert count == 0
    del attention.k_proj.forward
    with replaced(attention) as count:
        assert count == 1
        assert "forward" in vars(attention.k_proj)
    assert not any("forward" in vars(module) for module in attention.modules())


def test_layers_of_other_widths_are_apart(launches: list[tuple[int, ...]]) -> None:
    """What is called q, k and v need not have one input."""
    attention = Attention()
    attention.k_proj = linear(64, 32)
    x, other = random(2, 1, 128), random(2, 1, 64)
    with replaced(attention):
        ours = attention(x, other)
    assert sorted(launches) == [(32,), (40,), (64,), (96,)]
    with torch.no_grad():
        assert_same(ours, attention(x, other))


def test_what_the_kernel_computes_otherwise_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of each kind is compared before."""
    attention, other = Attention(), Attention(quant_type="fp4")
    x = random(2, 128)
    wants = [attention(x), other(x)]
    kernel = hub.get_kernel()
    usual = kernel.linear_4bit
    compared: list[int] = []

    def wrong(x: Tensor, weights: list[Any], biases: Any = None) -> list[Tensor]:
        compared.append(weights[0].shape[1])
        factor = 2 if weights[0].format.quant_type == "fp4" and weights[0].shape[1] == 64 else 1
        return [factor * each for each in usual(x, weights, biases)]

    monkeypatch.setattr(kernel, "linear_4bit", wrong)
    for model, want, count in ((attention, wants[0], 4), (other, wants[1], 3)):
        compared.clear()
        with replaced(model) as replacements:
            assert compared == sorted(WIDTHS.values(), key=list(WIDTHS.values()).index)
            assert replacements == count
            assert_same(model(x), want)
    twice = nn.ModuleList([Attention(), Attention()])
    compared.clear()
    with replaced(twice) as replacements:
        assert (len(compared), replacements) == (4, 8)
