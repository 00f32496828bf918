"""Refuses checkpoints that another library than bitsandbytes quantized, before they are loaded.

The error says how to make such a checkpoint bf16. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Methods that Transformers can undo while it loads, with its config class for each.
_DEQUANTIZED_BY = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
_BITSANDBYTES = "bitsandbytes"


def check_quantization(name: str, model: str, config: Any) -> None:
    """Raises an error unless a checkpoint is dense or in bitsandbytes' 4 bits.

    Args:
        name: the option or argument that names the model, for the error.
        model: its value.
        config: the model's configuration, an object of Transformers or the content of its file.

    Raises:
        NotImplementedError: the checkpoint is quantized in another way. The message says what to do.
    """
    quantization = _of(config)
    if quantization is None:
        return
    method = str(quantization.get("quant_method") or _BITSANDBYTES)
    in_8bit = bool(quantization.get("load_in_8bit") or quantization.get("_load_in_8bit")) or method.endswith("_8bit")
    if method.startswith(_BITSANDBYTES) and not in_8bit:
        return
    kind = "bitsandbytes' 8 bits" if in_8bit else method
    begin = f"{name} {model} is quantized to {kind}, which moe_fused does not read yet"
    if method in _DEQUANTIZED_BY:
        raise NotImplementedError(
            f"{begin}: make it bf16 first, by AutoModelForCausalLM.from_pretrained({model!r}, dtype='bfloat16', "
            f"quantization_config={_DEQUANTIZED_BY[method]}(dequantize=True)).save_pretrained('bf16-model', "
            "save_original_format=False), and save its tokenizer there"
        )
    raise NotImplementedError(f"{begin}: give the bf16 or fp16 checkpoint that it was made from")


def _of(config: Any) -> Mapping[str, Any] | None:
    """Returns the ``quantization_config`` of a model, or of the text model within it."""
    if isinstance(config, Mapping):
        parts = [config, config.get("text_config") or {}]
    else:
        parts = [
            vars(part) for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else config)
        ]
    for part in parts:
        quantization = part.get("quantization_config")
        if quantization is not None:
            return quantization if isinstance(quantization, Mapping) else vars(quantization)
    return None
