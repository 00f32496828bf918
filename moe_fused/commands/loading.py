"""What commands around a model share: loading it with our experts, an adapter on it, and saving it with its tokenizer."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moe_fused
from moe_fused.checkpoints.architecture import CONFIG
from moe_fused.checkpoints.models import check_apart, check_replaceable, other_files
from moe_fused.experts import IMPLEMENTATION
from moe_fused.staging import staged_directory

from .options import check_source, require_4bit, require_peft

# What stands beside the weights of a model on the Hub and is small.
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*")


def read_config(model: str) -> Any:
    """The configuration of a model.

    Raises:
        FileNotFoundError: there is no such model, or none that can be reached.
        ValueError: it is not one that Transformers knows.
    """
    check_source("MODEL", model, CONFIG)
    try:
        return AutoConfig.from_pretrained(model)
    except OSError as error:
        raise FileNotFoundError(f"MODEL {model} cannot be read: {str(error).splitlines()[0]}") from error


def is_quantized(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def load_model(model: str, dtype: torch.dtype | str, device: torch.device, quantization: Any = None) -> Any:
    """A ``PreTrainedModel`` with our experts, in evaluation mode. ``moe_fused`` is enabled from then on.

    Args:
        dtype: of what is not quantized; ``"auto"`` for that of the checkpoint.
        quantization: a ``BitsAndBytesConfig`` for a dense checkpoint.
    """
    moe_fused.enable()
    options: dict[str, Any] = {"dtype": dtype, "experts_implementation": IMPLEMENTATION}
    if quantization is not None:
        options["quantization_config"] = quantization
    in_4bit = quantization is not None or is_quantized(read_config(model))
    if in_4bit:
        require_4bit("a model in 4 bits")
    if in_4bit or importlib.util.find_spec("accelerate") is not None:
        return AutoModelForCausalLM.from_pretrained(model, device_map={"": device}, **options).eval()
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(model, **options)
    return loaded.to(device).eval()


def load_adapter(model: PreTrainedModel, adapter: str) -> Any:
    """The ``PeftModel`` of an adapter on ``model``.

    Raises:
        RuntimeError: PEFT is missing.
        ValueError: the adapter was made for another model.
    """
    require_peft("an adapter")
    check_source("ADAPTER", adapter, "adapter_config.json")
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT looks for patterns among modules only, not among the parameters that an adapter of experts names.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        # It leaves what has no weights in the adapter without effect,
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, adapter)
        except (UserWarning, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"ADAPTER {adapter} does not fit {type(model).__name__}: {reason}") from error
    # and says nothing of weights that have no place in the model, unless it is asked to load them into an adapter there.
    unexpected = adapted.load_adapter(adapter, adapted.active_adapter).unexpected_keys
    if unexpected:
        reason = f"it has weights for {unexpected[0]}, which the model has not"
        raise ValueError(f"ADAPTER {adapter} does not fit {type(model).__name__}: {reason}")
    return adapted


def check_output(model: str, output: Path, overwrite: bool) -> None:
    """Raises FileExistsError or ValueError unless a model made of ``model`` may be written to ``output``."""
    if Path(model).is_dir():
        check_apart(Path(model), output)
    check_replaceable(output, overwrite)


def save_model(model: str, output: Path, overwrite: bool, nbytes: int, save: Callable[[Path], object]) -> None:
    """Writes a model with the tokenizer and whatever else stands beside ``model``, as a whole or not at all.

    Args:
        nbytes: that the result takes.
        save: is given the directory to write weights and configurations to.
    """
    with staged_directory(output, "OUTPUT", partial(check_replaceable, overwrite=overwrite), nbytes) as staging:
        save(staging)
        source = Path(model)
        if not source.is_dir():
            source = Path(snapshot_download(model, allow_patterns=list(_SMALL_FILES), ignore_patterns="*.index.json"))
        for name in other_files(source):
            # The card is about another model.
            if name != "README.md" and not (staging / name).exists():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, staging / name)
