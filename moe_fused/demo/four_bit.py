"""Loads the trained model in 4 bits as any user would, measures it, and saves it as another model."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any, cast

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.quantizers.auto import AutoHfQuantizer

from moe_fused.integrations.quantizer.packed_experts import four_bit_config, packing_refusal, unpack_experts

from . import compare
from .data import Corpus
from .output import DENSE, PACKED
from .train import held_out_loss


def _experts(model: Qwen3MoeForCausalLM) -> list[Qwen3MoeExperts]:
    return [module for module in model.modules() if isinstance(module, Qwen3MoeExperts)]


def _refusal(reason: str) -> typer.BadParameter:
    return typer.BadParameter(reason, param_hint="--load-in-4bit")


def check_usable(model: Qwen3MoeForCausalLM) -> None:
    """Raises typer.BadParameter unless ``model``, with its sizes and on its device, can be loaded in 4 bits."""
    try:
        quantizer = AutoHfQuantizer.from_config(four_bit_config(model.dtype), pre_quantized=False)
        quantizer.validate_environment(device_map={"": model.device.type})
    except ImportError as error:  # the versions are too old
        raise _refusal(
            "needs newer versions of bitsandbytes and accelerate: pip install -U 'moe-fused[train]'"
        ) from error
    except RuntimeError as error:  # the device is not supported
        raise _refusal(str(error)) from error
    for module in _experts(model):
        if reason := packing_refusal(module):
            raise _refusal(f"the experts cannot be packed: {reason}")


def _load(directory: Path, device: torch.device, **options: Any) -> Qwen3MoeForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(directory, device_map={"": device}, **options)
    return cast(Qwen3MoeForCausalLM, model)


def _check_reload(model: Qwen3MoeForCausalLM, directory: Path, batch: Tensor) -> None:
    reloaded = _load(directory, batch.device)
    saved, other = model.state_dict(), reloaded.state_dict()
    if saved.keys() != other.keys() or not all(torch.equal(saved[key], other[key]) for key in saved):
        raise RuntimeError(f"the model saved in {directory.name}/ has other weights when it is loaded again")
    compare.check_same_logits(model, reloaded, directory, batch)


def _largest_logit_difference(model: Qwen3MoeForCausalLM, batch: Tensor) -> float:
    """Compares with eager experts of the same weights, dequantized. All other layers are the same."""
    dense = copy.deepcopy(model)
    unpack_experts(dense)
    dense.set_experts_implementation("eager")
    return compare.largest_difference(compare.logits(model, batch), compare.logits(dense, batch))


def _expert_parameters(model: Qwen3MoeForCausalLM) -> list[nn.Parameter]:
    return [parameter for module in _experts(model) for parameter in module.parameters()]


def convert(
    model: Qwen3MoeForCausalLM, directory: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, batch_size: int
) -> tuple[Qwen3MoeForCausalLM, dict[str, Any]]:
    """Loads ``directory / DENSE``, where ``model`` was saved, in 4 bits and saves the result to ``directory / PACKED``.

    Returns:
        The model in 4 bits, and the numbers for results.json.

    Raises:
        RuntimeError: the saved model is another one when it is loaded again, or the packed experts differ from
            Transformers' experts with the same weights, dequantized.
        OSError, safetensors.SafetensorError: a file could not be written.
    """
    start = time.perf_counter()
    probe = corpus.held_out[:batch_size]
    packed = _load(directory / DENSE, probe.device, quantization_config=four_bit_config(model.dtype))
    packed.save_pretrained(directory / PACKED)
    tokenizer.save_pretrained(directory / PACKED)
    _check_reload(packed, directory / PACKED, probe)

    weights = _expert_parameters(model)
    numbers = {
        "held_out_loss": held_out_loss(packed, corpus.held_out, batch_size),
        "largest_logit_difference": _largest_logit_difference(packed, probe),
        "experts": {
            "parameters": sum(weight.numel() for weight in weights),
            "bytes": sum(storage.nbytes for storage in _expert_parameters(packed)),
            "dense_bytes": sum(weight.nbytes for weight in weights),
        },
        "seconds": time.perf_counter() - start,
    }
    return packed, numbers
