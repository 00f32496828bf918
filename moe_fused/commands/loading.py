"""What several commands do with a model: load it with our experts, load an adapter, and save it with its tokenizer."""

from __future__ import annotations

import importlib.util
import re
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

import moe_fused
from moe_fused.checkpoints.adapters.fits import (
    adapter_weights,
    check_adapter,
    check_keys,
    loading_error,
    other_base,
    read_adapter,
)
from moe_fused.checkpoints.architecture import CONFIG
from moe_fused.checkpoints.files import check_json
from moe_fused.checkpoints.finite import check_finite
from moe_fused.checkpoints.loading import check_checkpoint, load_pretrained
from moe_fused.checkpoints.models import other_files
from moe_fused.checkpoints.places import check_replaceable, read_object
from moe_fused.integrations.transformers.forward import IMPLEMENTATION
from moe_fused.memory import skeleton
from moe_fused.quantized import check_quantization, quantization_of
from moe_fused.staging import check_writable, staged_directory

from .options import check_source, check_vocabulary, require_4bit, require_peft

_GENERATION = "generation_config.json"
# The small files beside the weights of a model on the Hub.
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*")


def read_config(model: str, argument: str = "MODEL") -> Any:
    """Reads the configuration of a model.

    Args:
        argument: the argument or option that gave ``model``, for messages.

    Raises:
        FileNotFoundError: there is no such model, or it cannot be reached.
        ValueError: Transformers does not know the configuration.
        NotImplementedError: the checkpoint is quantized to something else than bitsandbytes' 4 bits.
    """
    check_source(argument, model, CONFIG)
    if (path := Path(model) / CONFIG).is_file():
        read_object(path)
    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise FileNotFoundError(f"{argument} {model} cannot be read: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        reason = re.split(r"\.\s", str(error).strip(), maxsplit=1)[0]
        raise ValueError(f"{argument} {model}: {CONFIG} is not one that can be read here: {reason}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{argument} {model}: {CONFIG} is not that of a model: {error!r}") from error
    check_quantization(argument, model, config)
    return config


def is_quantized(config: Any) -> bool:
    return quantization_of(config) is not None


def check_model(model: str, config: Any, *, packs: bool = False) -> None:
    """Compares a model's files with what its config needs, before it is loaded. Only files on this machine are checked.

    Args:
        packs: whether the model will be quantized to 4 bits while it is loaded.

    Raises:
        FileNotFoundError, ValueError: a file or a tensor is missing, damaged or superfluous. The message names it.
    """
    check_checkpoint(model, f"MODEL {model}", config, packs=packs)


def read_tokenizer(model: str) -> Any:
    """Reads the tokenizer of a model.

    Raises:
        FileNotFoundError: no tokenizer comes with the model.
        ValueError: the tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    if Path(model).is_dir():
        check_json(Path(model), (path.name for path in sorted(Path(model).glob("*.json")) if "index" not in path.name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # tokenizers raises a plain Exception for a damaged file
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"MODEL {model} has no tokenizer that can be read: {reason}") from error
    check_vocabulary(tokenizer, "MODEL", model)
    return tokenizer


def check_fits(model: str, config: Any, adapter: str, allow_other_base: bool, argument: str = "ADAPTER") -> None:
    """Checks before anything is loaded that an adapter fits a model and was made for it.

    Args:
        config: the configuration of ``model``.
        allow_other_base: whether any model with the same shapes is accepted.
        argument: the argument or option that gave ``adapter``, for messages.

    Raises:
        FileNotFoundError, ValueError: a file is damaged; a tensor is missing, has another shape or does not belong to the
            model; the adapter was made for another model.
    """
    moe_fused.enable()  # because loading does so, too, and PEFT alone treats adapters of separate experts differently
    content, _ = read_adapter(adapter, f"{argument} {adapter}")
    bare = skeleton(config)
    bare.set_experts_implementation(IMPLEMENTATION)
    check_adapter(bare, adapter, f"{argument} {adapter}")
    if not allow_other_base:
        reason = other_base(content.get("base_model_name_or_path"), model, config)
        if reason is not None:
            raise ValueError(
                f"{argument} {adapter} has another base than MODEL {model}: {reason}; --allow-other-base accepts it"
            )


def load_model(model: str, dtype: torch.dtype | str, device: torch.device, quantization: Any = None) -> Any:
    """Loads a ``PreTrainedModel`` with our experts, in evaluation mode, and enables ``moe_fused``.

    Args:
        dtype: the dtype of weights that are not quantized. ``"auto"`` takes the checkpoint's.
        quantization: a ``BitsAndBytesConfig`` to quantize a dense checkpoint with.
    """
    moe_fused.enable()
    config = read_config(model)
    options: dict[str, Any] = {"dtype": dtype, "experts_implementation": IMPLEMENTATION, "quantization": quantization}
    found = quantization_of(config)
    in_4bit = quantization is not None or found is not None
    if in_4bit and not (found is not None and found.is_published):
        require_4bit("a model in 4 bits")
    if in_4bit or importlib.util.find_spec("accelerate") is not None:
        options["device_map"] = {"": device}
    loaded = load_pretrained(model, f"MODEL {model}", config, **options)
    return loaded.eval() if "device_map" in options else loaded.to(device).eval()


def load_adapter(model: PreTrainedModel, adapter: str, argument: str = "ADAPTER") -> Any:
    """Loads an adapter onto ``model`` and returns the ``PeftModel``.

    Args:
        argument: the argument or option that gave ``adapter``, for messages.

    Raises:
        RuntimeError: PEFT is not installed.
        ValueError: the adapter does not fit the model, or holds NaN or infinite values.
    """
    require_peft("an adapter")
    check_source(argument, adapter, "adapter_config.json")
    read_adapter(adapter, f"{argument} {adapter}")
    from peft import PeftConfig, get_peft_model

    begin = f"{argument} {adapter} does not fit {type(model).__name__}"

    with warnings.catch_warnings():
        # PEFT compares patterns with modules only, and not with the parameters that an adapter of experts names.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        # The model may have been moved or quantized since the adapter was made; ``check_fits`` compares the two.
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
        try:
            config = PeftConfig.from_pretrained(adapter)
            config.inference_mode = True
            # As PeftModel.from_pretrained does, which keeps to itself which tensors were missing or superfluous.
            adapted = get_peft_model(model, config)
            result = adapted.load_adapter(adapter, adapted.active_adapter)
        except KeyError as error:
            raise ValueError(f"{begin}: {error.args[0]} is missing from it") from error
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{begin}: {loading_error(error)}") from error
    check_keys(adapted, result, begin)
    check_finite(adapter_weights(adapted), f"{argument} {adapter}")
    return adapted


def check_target(model: str, output: Path, nbytes: int, max_shard_size: str) -> None:
    """Checks that a result of ``nbytes`` can be written, before it is made.

    Raises:
        OSError: there is too little space, or writing is not permitted.
        ValueError: ``max_shard_size`` is not a size, or a file that would be copied is damaged.
    """
    try:
        split_torch_state_dict_into_shards({"": torch.empty(1)}, max_shard_size=max_shard_size)
    except ValueError:
        raise ValueError(f"--max-shard-size must be a size such as 500MB or 5GB, got {max_shard_size}") from None
    if Path(model).is_dir():
        check_json(Path(model), other_files(Path(model)))
    check_writable(output, "OUTPUT", nbytes)


def generation_note(model: str) -> str | None:
    """Returns a note if Transformers would refuse to write a model's generation config, else None.

    Such a config is copied as it is.

    Raises:
        ValueError: the generation config cannot even be read.
    """
    try:
        try:
            config = GenerationConfig.from_pretrained(model)
        except OSError:  # Transformers then reads generation settings from config.json, too
            config = GenerationConfig.from_pretrained(model, config_file_name=CONFIG, _from_model_config=True)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"MODEL {model}: {_GENERATION} is not one that Transformers can read: {reason}") from error
    try:
        config.validate(strict=True)
    except ValueError as error:
        faults = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("-")]
        return f"{_GENERATION} is copied as it is, though Transformers finds fault with it: {' '.join(faults) or error}"
    return None


def _save(loaded: Any, directory: Path, max_shard_size: str) -> None:
    """Calls ``save_pretrained``, and writes a generation config that Transformers would refuse as it is."""
    generation = loaded.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:
        loaded.generation_config = type(generation)()
        loaded.save_pretrained(directory, max_shard_size=max_shard_size)
        loaded.generation_config = generation
        generation.to_json_file(directory / _GENERATION, use_diff=True, keys_to_pop=["compile_config"])
    else:
        loaded.save_pretrained(directory, max_shard_size=max_shard_size)


def save_model(loaded: Any, model: str, output: Path, overwrite: bool, nbytes: int, max_shard_size: str) -> None:
    """Writes a model with the tokenizer and all other files beside ``model``, as a whole or not at all.

    Args:
        loaded: the model that Transformers loaded.
        nbytes: the size of the result.
        max_shard_size: the largest size of a weights file.
    """
    with staged_directory(output, "OUTPUT", partial(check_replaceable, overwrite=overwrite), nbytes) as staging:
        _save(loaded, staging, max_shard_size)
        source = Path(model)
        if not source.is_dir():
            source = Path(snapshot_download(model, allow_patterns=list(_SMALL_FILES), ignore_patterns="*.index.json"))
        for name in other_files(source):
            # README.md is not copied, because the card describes the source model.
            if name == _GENERATION or (name != "README.md" and not (staging / name).exists()):
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, staging / name)
