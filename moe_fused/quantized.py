"""What the config of a checkpoint says about its quantization, and which of that this package reads.

Nothing heavy is imported here, so commands can ask before torch is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

QuantType: TypeAlias = Literal["nf4", "fp4", "mxfp4", "nvfp4"]
# The 4-bit formats of experts, by the kernel's names.
QUANT_TYPES: tuple[QuantType, ...] = get_args(QuantType)
# Those that come from published checkpoints. Linear layers beside such experts are dense.
PUBLISHED: tuple[QuantType, ...] = ("mxfp4", "nvfp4")

BITSANDBYTES, MXFP4, COMPRESSED_TENSORS = "bitsandbytes", "mxfp4", "compressed-tensors"
_METHODS = (BITSANDBYTES, MXFP4, COMPRESSED_TENSORS)
# For each format of compressed-tensors that is read, the kernel's name, and what its config says of the weights.
COMPRESSED_FORMATS: Mapping[str, tuple[QuantType, Mapping[str, Any]]] = {
    "nvfp4-pack-quantized": ("nvfp4", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4-pack-quantized": ("mxfp4", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
}
# The fields in which the methods name modules that stay dense.
_NAMES_OF_DENSE = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")
# Where transforms of compressed-tensors change the weights that are saved, so that nothing has to be done later.
_OFFLINE = ("weight_input", "weight_output")
# What compressed-tensors has as the format of a whole checkpoint if its groups are in several.
_MIXED = "mixed-precision"
# The file in which older versions of NVIDIA's ModelOpt write what newer ones write into config.json.
MODELOPT_CONFIG = "hf_quant_config.json"
# Methods that Transformers can undo while it loads, with its config class for each.
_DEQUANTIZED_BY = {"fp8": "FineGrainedFP8Config"}


@dataclass(frozen=True)
class CheckpointQuantization:
    """How the experts of a checkpoint are quantized.

    Attributes:
        method: ``quant_method`` in its config.
        quant_type: the kernel's name of the format.
    """

    method: str
    quant_type: QuantType

    @property
    def is_published(self) -> bool:
        """Whether the experts are in a format that is kept as it is published, which needs no bitsandbytes."""
        return self.quant_type in PUBLISHED


def quantization_of(config: Any) -> CheckpointQuantization | None:
    """Returns how a checkpoint is quantized, or None if it is dense or in a way that this package does not read.

    Args:
        config: the model's configuration, an object of Transformers or the content of its file.
    """
    content = content_of(config)
    return None if content is None else quantization_in(content)


def check_quantization(name: str, model: str, config: Any, revision: str = "main") -> None:
    """Raises an error unless a checkpoint is dense or quantized in a way that this package reads.

    Args:
        name: the option or argument that names the model, for the error.
        model: its value. If it is a name on the Hub, the Hub may be asked for ModelOpt's file.
        config: the model's configuration, an object of Transformers or the content of its file.
        revision: the branch, tag or commit on the Hub.

    Raises:
        NotImplementedError: the checkpoint is quantized in another way. The message says what to do.
        ValueError: as for ``check_config``, or the file of ModelOpt does not hold what it must.
    """
    check_config(name, model, config)
    content, where = content_of(config), ""
    if content is None and (path := find_modelopt_config(model, revision)) is not None:
        content, where = modelopt_content(path), f", as its {MODELOPT_CONFIG} says"
    if content is None:
        return
    if quantization_in(content) is not None:
        check_transforms(f"{name} {model}", content)
        return
    method = _method(content)
    kind = "bitsandbytes' 8 bits" if _in_8bit(content) else method
    if formats := _formats_of(content):
        kind += f" ({' and '.join(formats)})"
    begin = f"{name} {model} is quantized to {kind}{where}, which moe_fused does not read yet"
    if method in _DEQUANTIZED_BY:
        raise NotImplementedError(
            f"{begin}: make it bf16 first, by AutoModelForCausalLM.from_pretrained({model!r}, dtype='bfloat16', "
            f"quantization_config={_DEQUANTIZED_BY[method]}(dequantize=True)).save_pretrained('bf16-model', "
            "save_original_format=False), and save its tokenizer there"
        )
    if is_modelopt_nvfp4(content):
        made = converted(model, "NEW --to per-expert", revision)
        raise NotImplementedError(f"{begin}: make a checkpoint of compressed-tensors of it first, by {made}")
    raise NotImplementedError(f"{begin}: give the bf16 or fp16 checkpoint that it was made from")


def converted(model: str, arguments: str, revision: str = "main") -> str:
    """Returns the commands that convert a model, for messages. One on the Hub is downloaded first.

    Args:
        arguments: those of ``moe-fused convert model`` after the source.
        revision: the branch, tag or commit on the Hub.
    """
    if Path(model).is_dir():
        return f"`moe-fused convert model {model} {arguments}`"
    of_revision = "" if revision == "main" else f" --revision {revision}"
    return (
        f"`hf download {model}{of_revision} --local-dir DIRECTORY` and `moe-fused convert model DIRECTORY {arguments}`"
    )


def check_config(name: str, model: str, config: Any) -> None:
    """Raises ValueError if what a config says of quantization lacks something or contradicts itself.

    Args:
        name: the option or argument that names the model, for the error.
        model: its value.
        config: the model's configuration, an object of Transformers or the content of its file.

    Raises:
        ValueError: it does. The message says what is needed.
    """
    try:
        content = content_of(config)
    except ValueError as error:
        raise ValueError(f"{name} {model}: {error}") from None
    if content is not None and (fault := fault_in(content)) is not None:
        raise ValueError(f"{name} {model}: the quantization_config in its config.json {fault}")


def find_modelopt_config(model: str, revision: str = "main") -> Path | None:
    """Returns the file of older versions of ModelOpt beside a model, or None if there is none or the Hub does not answer.

    Args:
        model: a directory, or a name on the Hub, whose cache is looked into before the Hub is asked.
        revision: the branch, tag or commit on the Hub.
    """
    if Path(model).is_dir():
        path = Path(model) / MODELOPT_CONFIG
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import cached_files

    cached = try_to_load_from_cache(model, MODELOPT_CONFIG, revision=revision)
    if cached is not None:  # a path, or a sign that the commit has no such file
        return Path(cached) if isinstance(cached, str) else None
    found = cached_files(
        model,
        [MODELOPT_CONFIG],
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found[0]) if found else None


def modelopt_content(path: Path) -> Mapping[str, Any] | None:
    """Returns the file of older versions of ModelOpt as the ``quantization_config`` that newer ones write.

    Returns:
        None if it says that nothing but the cache of keys and values is quantized.

    Raises:
        ValueError: the file does not hold what it must.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    content = content.get("quantization") if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object called quantization, got {content!r}")
    return {"quant_method": "modelopt", **content} if content.get("quant_algo") else None


def is_modelopt_nvfp4(content: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is of NVIDIA's ModelOpt in NVFP4, without further scales of its own."""
    return _method(content) == "modelopt" and content.get("quant_algo") in ("NVFP4", "W4A16_NVFP4")


def compressed_quant_type(content: Mapping[str, Any]) -> QuantType | None:
    """Returns the format of all weights that a config of compressed-tensors quantizes, or None if it is not known.

    Args:
        content: the ``quantization_config`` as ``config.json`` has it.
    """
    groups = content.get("config_groups")
    if not isinstance(groups, Mapping):
        return None
    found = {_of_group(content, group) for group in groups.values()}
    return found.pop() if len(found) == 1 else None


def compressed_content(quant_type: str, ignore: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a checkpoint of compressed-tensors.

    Args:
        quant_type: ``"mxfp4"`` or ``"nvfp4"``.
        ignore: the names of modules that stay dense, or regular expressions after ``re:``.
    """
    name, weights = next((name, weights) for name, (kind, weights) in COMPRESSED_FORMATS.items() if kind == quant_type)
    scale_dtype = {"mxfp4": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}[quant_type]
    fixed = {"symmetric": True, "dynamic": False, "scale_dtype": scale_dtype, "zp_dtype": scale_dtype}
    group = {
        "targets": ["Linear"],
        "weights": {**weights, **fixed},
        "input_activations": None,
        "output_activations": None,
        "format": name,
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def mxfp4_content(skipped: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a checkpoint with stacks in mxfp4, as gpt-oss has them.

    Args:
        skipped: the names of modules that stay dense.
    """
    return {"quant_method": MXFP4, "modules_to_not_convert": list(skipped)}


def with_content(config: Mapping[str, Any], content: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the content of ``config.json`` with another ``quantization_config``, or with none."""
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(text := result.get("text_config"), Mapping):
        result["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    if content is not None:
        result["quantization_config"] = dict(content)
    return result


def check_transforms(name: str, content: Mapping[str, Any]) -> None:
    """Raises NotImplementedError if a config of compressed-tensors transforms activations, which this package does not do.

    Without the transforms, the weights would give wrong results.

    Args:
        name: what the checkpoint is called in the error.
        content: the ``quantization_config`` as ``config.json`` has it.
    """
    transforms = content.get("transform_config")
    groups = transforms.get("config_groups") if isinstance(transforms, Mapping) else None
    for key, group in groups.items() if isinstance(groups, Mapping) else ():
        for applied in group.get("apply") or () if isinstance(group, Mapping) else ():
            place = applied.get("location") if isinstance(applied, Mapping) else applied
            if place not in _OFFLINE:
                raise NotImplementedError(
                    f"{name} has weights for transformed activations ({key} in transform_config, at {place}), and moe_fused "
                    "does not transform them: give a checkpoint without such transforms"
                )


def contradiction_of(content: Mapping[str, Any]) -> str | None:
    """Says where the format of a config of compressed-tensors is not that of one of its groups; None if it is.

    The library itself reads the format of the group, and writes that of the whole for people. The whole is
    "mixed-precision" if groups are in several formats. In older configs, groups name none.

    Args:
        content: the ``quantization_config`` as ``config.json`` has it.
    """
    whole, groups = content.get("format"), content.get("config_groups")
    if whole in (None, _MIXED) or not isinstance(groups, Mapping):
        return None
    for key, group in groups.items():
        of_group = group.get("format") if isinstance(group, Mapping) else None
        if of_group not in (None, whole) and not COMPRESSED_FORMATS.keys().isdisjoint((str(whole), str(of_group))):
            return f"must have one format, got {whole} for the whole and {of_group} in config_groups.{key}"
    return None


def _of_group(content: Mapping[str, Any], group: Any) -> QuantType | None:
    if not isinstance(group, Mapping):
        return None
    weights = group.get("weights")
    quant_type, wanted = COMPRESSED_FORMATS.get(_format_of(content, group), (None, {}))
    if not isinstance(weights, Mapping):
        return None
    return quant_type if all(weights.get(key) == value for key, value in wanted.items()) else None


def _format_of(content: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    return str(group.get("format") or content.get("format"))


def _formats_of(content: Mapping[str, Any]) -> list[str]:
    """Returns the formats of the groups of a config, or else the one of the whole, if it names any."""
    groups = content.get("config_groups")
    named = groups.values() if isinstance(groups, Mapping) else ()
    found = {str(group["format"]) for group in named if isinstance(group, Mapping) and group.get("format")}
    whole = content.get("format") or content.get("quant_algo")  # as compressed-tensors or as ModelOpt calls it
    return sorted(found) or ([str(whole)] if whole else [])


def fault_in(content: Mapping[str, Any]) -> str | None:
    """Says what a ``quantization_config`` lacks or contradicts itself in; None if it can be, read or not.

    Args:
        content: the ``quantization_config`` as ``config.json`` has it.
    """
    old = any(
        content.get(f"{prefix}load_in_{bits}bit") for prefix in ("", "_") for bits in (4, 8)
    )  # as Transformers has it
    if not content.get("quant_method") and not old:
        return f"has no quant_method, which says how the weights are quantized, such as {', '.join(_METHODS)}"
    for field in _NAMES_OF_DENSE:
        names = content.get(field)
        if names is not None and not (
            isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        ):
            return f"must have the names of modules in {field}, a list, got {names!r}"
    method, kind = _method(content), content.get("bnb_4bit_quant_type")
    if method.startswith(BITSANDBYTES) and not _in_8bit(content) and kind not in (None, "nf4", "fp4"):
        return f"must have nf4 or fp4 as bnb_4bit_quant_type, got {kind!r}"
    if method != COMPRESSED_TENSORS:
        return None
    groups = content.get("config_groups")
    if not groups and str(content.get("format")) not in COMPRESSED_FORMATS:
        return None
    if not isinstance(groups, Mapping) or not groups:
        instead = "none" if not groups else f"a {type(groups).__name__}"
        return f"must have config_groups, an object with a group of weights in it, got {instead}"
    for key, group in groups.items():
        if not isinstance(group, Mapping):
            return f"must have objects in config_groups, got a {type(group).__name__} as {key}"
        name = _format_of(content, group)
        if name not in COMPRESSED_FORMATS:
            return contradiction_of(content)
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            return f"must have weights in config_groups.{key}, an object that describes them, got {weights!r}"
        for field, value in COMPRESSED_FORMATS[name][1].items():
            if (got := weights.get(field)) != value:
                return f"is of format {name}: {field} must be {value} in config_groups.{key}.weights, got {got}"
    formats = sorted({_format_of(content, group) for group in groups.values()})
    if len(formats) > 1:
        return f"must have groups of one format, got {' and '.join(formats)}"
    return contradiction_of(content)


def quantization_in(content: Mapping[str, Any]) -> CheckpointQuantization | None:
    """As ``quantization_of``, for the ``quantization_config`` itself.

    Args:
        content: the ``quantization_config`` as ``config.json`` has it.
    """
    method = _method(content)
    if method == MXFP4:
        return CheckpointQuantization(MXFP4, "mxfp4")
    if method == COMPRESSED_TENSORS:
        quant_type = compressed_quant_type(content)
        return None if quant_type is None else CheckpointQuantization(COMPRESSED_TENSORS, quant_type)
    if method.startswith(BITSANDBYTES) and not _in_8bit(content):
        # As BitsAndBytesConfig has it, a config that does not say is of fp4.
        return CheckpointQuantization(BITSANDBYTES, "nf4" if content.get("bnb_4bit_quant_type") == "nf4" else "fp4")
    return None


def _method(content: Mapping[str, Any]) -> str:
    """Returns the quant_method, which is a member of an enumeration in objects of Transformers."""
    method = content.get("quant_method") or BITSANDBYTES
    return str(getattr(method, "value", method))


def _in_8bit(content: Mapping[str, Any]) -> bool:
    method = _method(content)
    return bool(content.get("load_in_8bit") or content.get("_load_in_8bit")) or method.endswith("_8bit")


def content_of(config: Any) -> Mapping[str, Any] | None:
    """Returns the ``quantization_config`` of a model, or of the text model within it, or None.

    Args:
        config: the model's configuration, an object of Transformers or the content of its file.

    Raises:
        ValueError: the ``quantization_config`` is neither an object of JSON nor one of Transformers.
    """
    if isinstance(config, Mapping):
        parts = [config, config.get("text_config") or {}]
    else:
        parts = [
            vars(part) for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else config)
        ]
    for part in parts:
        quantization = part.get("quantization_config")
        if quantization is not None:
            if not isinstance(quantization, Mapping) and not hasattr(quantization, "to_dict"):
                raise ValueError(
                    f"quantization_config in config.json must be an object, got a {type(quantization).__name__}"
                )
            content: Mapping[str, Any] = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
            return content
    return None
