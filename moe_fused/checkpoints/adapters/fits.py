"""Checks that an adapter fits a model: that each tensor belongs to the model, and that the adapter was made for it."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fused.checkpoints.files import Header, find_adapter, find_weights, read_tensors
from moe_fused.checkpoints.places import read_object

from .names import Layout
from .saved import SavedAdapter

# The names that configs have for the number of experts in a layer.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# The settings that define an architecture, under all names that configs have for them.
_SIZES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    *_EXPERTS,
)
# A factor of a single expert.
_OF_EXPERT = re.compile(r"\.experts\.(\d+)\..*lora_[AB]\.")
_SNAPSHOT = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/[^/]+/?")
# The relative tolerance for weights that were rounded to another 16-bit dtype.
_TOLERANCE = 2**-7
_COMPARED = 8
_PROBED_BYTES = 1 << 16
# A linear layer, with the module that it is in, whose last name is that of an expert's linear layer.
_BESIDE_EXPERTS = re.compile(r"\.(\w+\.(?:gate_proj|up_proj|down_proj))\.lora_[AB]\.")


def read_adapter(source: str, name: str) -> tuple[dict[str, Any], Mapping[str, Header]]:
    """Reads the config of an adapter, and the header of its file of tensors.

    Args:
        source: a directory, or a name on the Hub.
        name: what ``source`` is called in errors.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    try:
        config, weights = find_adapter(source)
        content = read_object(config)
        if not isinstance(content.get("peft_type"), str):
            raise ValueError(f"{config} must hold a peft_type, as LORA, got {content.get('peft_type')!r}")
        return content, read_tensors(weights)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def check_adapter(model: Any, source: str, name: str) -> None:
    """Raises ValueError unless an adapter has exactly the tensors that its config asks for in ``model``.

    Args:
        model: a model of Transformers on meta. It gets the adapter, and must not be used afterwards.
        source: a directory, or a name on the Hub.
        name: what ``source`` is called in errors.
    """
    from peft import PeftConfig

    _, tensors = read_adapter(source, name)
    try:
        config = PeftConfig.from_pretrained(source)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: adapter_config.json is not one that PEFT can read: {error}") from error
    if not config.is_prompt_learning:
        check_contents(model, config, {key: header.shape for key, header in tensors.items()}, name)


def check_contents(model: Any, config: Any, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Raises ValueError unless tensors of these shapes are exactly those that a config asks for in ``model``.

    Args:
        model: a model of Transformers on meta. It gets the adapter, and must not be used afterwards.
        config: PEFT's config.
        shapes: the shape of each tensor of the adapter, by the names in its file.
        name: what the adapter is called in errors.
    """
    from peft import get_peft_model

    begin = f"{name} does not fit {type(model).__name__}"
    _check_number_of_experts(model.config, shapes, name, "the model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these warnings are about loading, which comes later
        try:
            adapted = get_peft_model(model, config)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{begin}: {loading_error(error)}") from error
        _check_tensors(adapted, shapes, begin)


def _check_tensors(adapted: Any, shapes: Mapping[str, tuple[int, ...]], begin: str) -> None:
    """Raises ValueError unless ``shapes`` are what ``adapted``, on meta, needs. The message begins with ``begin``."""
    from peft.utils import set_peft_model_state_dict

    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    try:
        result = set_peft_model_state_dict(adapted, state)
    except KeyError as error:
        raise ValueError(f"{begin}: {error.args[0]} is missing from it") from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{begin}: {loading_error(error)}") from error
    check_keys(adapted, result, begin)


def _check_number_of_experts(config: Any, tensors: Iterable[str], name: str, model: str) -> None:
    """Raises ValueError if an adapter with a matrix for each expert has another number of experts than the model.

    Args:
        name, model: what the adapter and the model are called in the error.
    """
    sizes = _sizes(config)
    wanted = next((sizes[key] for key in _EXPERTS if sizes[key] is not None), None)
    found = max((int(match[1]) + 1 for key in tensors if (match := _OF_EXPERT.search(key))), default=None)
    if None not in (wanted, found) and wanted != found:
        raise ValueError(f"{name} has {found} experts in a layer, {model} {wanted}")


def check_against_base(source: Path, given: Layout | None) -> None:
    """Compares an adapter with LoRA on experts with the base model that its config names.

    Nothing is compared if the base is not on this machine, PEFT is not installed, or PEFT cannot read the layout.

    Args:
        source: the directory of the adapter.
        given: its layout, if the adapter does not show it.

    Raises:
        FileNotFoundError, ValueError: a tensor is missing, has another shape or does not belong to the base. The message
            names it.
    """
    saved = SavedAdapter(source, "SOURCE", given)
    base = saved.config.content.get("base_model_name_or_path")
    readable = saved.layout.layout in (Layout.PEFT_FUSED, Layout.PER_EXPERT)
    config = _read_config(base) if base and readable and importlib.util.find_spec("peft") else None
    if config is None:
        return
    from peft import PeftConfig, get_peft_model

    import moe_fused
    from moe_fused.integrations.transformers.forward import IMPLEMENTATION
    from moe_fused.memory import skeleton

    moe_fused.enable()
    model = skeleton(config)
    model.set_experts_implementation(IMPLEMENTATION)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, PeftConfig.from_pretrained(str(source)))
        except (NotImplementedError, RuntimeError, ValueError):
            return  # an adapter that PEFT refuses can still be converted
        _, tensors = read_adapter(str(source), "SOURCE")
        _check_number_of_experts(config, tensors, f"SOURCE {source}", f"its base {base}")
        shapes = {key: header.shape for key, header in tensors.items()}
        _check_tensors(adapted, shapes, f"SOURCE {source} does not fit its base {base}")


def check_keys(adapted: Any, result: Any, begin: str) -> None:
    """Raises ValueError if tensors of an adapter are missing or superfluous.

    Args:
        adapted: the ``PeftModel``.
        result: what PEFT returned when it loaded the adapter.
        begin: how the message begins.
    """
    brought = {name for name, _ in _adapter_parameters(adapted)}
    absent = brought.intersection(result.missing_keys)
    namesakes = _namesakes(adapted, brought, absent)
    missing = [_in_file(name) for name in result.missing_keys if name in absent - namesakes]
    if missing:
        raise ValueError(f"{begin}: {_listed(missing)} {_is(missing)} missing from it")
    if unexpected := [_in_file(name) for name in result.unexpected_keys]:
        raise ValueError(f"{begin}: it has weights for {_listed(unexpected)}, which the model does not have")


def _namesakes(adapted: Any, brought: set[str], absent: set[str]) -> set[str]:
    """Returns the names in ``absent`` that an adapter of separate experts leaves out on purpose.

    The config of such an adapter names experts' linear layers by their last names, which shared experts and dense layers
    have, too. PEFT then adds factors to these as well. If the file has no factors for any layer of such a kind, their
    product stays zero.

    Args:
        brought: the names of all factors that PEFT added.
        absent: those of them that the file lacks.
    """
    config = adapted.peft_config[adapted.active_adapter]
    if config.peft_type.value != "LORA" or config.init_lora_weights not in (True, "gaussian"):
        return set()
    if not any(".experts." in name for name in brought - absent):
        return set()
    kinds: dict[str, set[str]] = {}
    for name in brought:
        if (match := _BESIDE_EXPERTS.search(name)) and ".experts." not in name:
            kinds.setdefault(match[1], set()).add(name)
    return {name for names in kinds.values() if names <= absent for name in names}


def check_saved(adapted: Any, directory: Path) -> None:
    """Raises ValueError unless ``directory``, a checkpoint of a run, holds exactly the tensors that PEFT would save now."""
    from peft import get_peft_model_state_dict

    _, tensors = read_adapter(str(directory), f"checkpoint {directory}")
    wanted = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(adapted).items()}
    begin = f"checkpoint {directory} is not one of this adapter"
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"{begin}: {_listed(missing)} {_is(missing)} missing from it")
    if unexpected := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"{begin}: it has weights for {_listed(unexpected)}, which the adapter does not have")
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            raise ValueError(f"{begin}: {key} must have shape {shape}, got {tensors[key].shape}")


def _adapter_parameters(adapted: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters of the active adapter."""
    active = adapted.active_adapter
    for name, parameter in adapted.named_parameters():
        if f".{active}." in name or name.endswith(f".{active}"):
            yield name, parameter


def adapter_weights(adapted: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters of the active adapter, by the names that files have for them."""
    for name, parameter in _adapter_parameters(adapted):
        yield _in_file(name), parameter


def loading_error(error: BaseException) -> str:
    """Describes in one line an error of PEFT or torch that was raised while weights were loaded."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch's first line says only that there were errors.
    line = next((line for line in lines if line.startswith("size mismatch")), lines[0] if lines else repr(error))
    return _in_file(line.replace("size mismatch for ", "").replace("torch.Size", "").rstrip("."))


def _in_file(name: str) -> str:
    return re.sub(r"\.(modules_to_save\.)?default(?=[.: ]|$)", "", name)


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def other_base(recorded: str | None, model: str, config: Any) -> str | None:
    """Why an adapter that was made for ``recorded`` does not belong to ``model``, or None if nothing speaks against it.

    A directory may have been moved, downloaded or quantized since. So if the base of the adapter can still be read, its
    architecture is compared, and weights that none of this changes. Names are compared if both are names on the Hub.

    Args:
        recorded: the base model that the adapter's config names.
        model: a directory, or a name on the Hub.
        config: the configuration of ``model``.
    """
    if not recorded or _hub_name(recorded) == _hub_name(model):
        return None
    if not Path(recorded).is_dir() and not _is_hub_name(recorded):
        return None  # the directory is gone
    if Path(recorded).is_dir() and Path(model).is_dir() and Path(recorded).samefile(model):
        return None
    base = _read_config(recorded)
    if base is not None:
        before, after = _sizes(base), _sizes(config)
        for key in _SIZES:
            if before.get(key) != after.get(key):
                return f"it was made for {recorded}, whose {key} is {before.get(key)}, not {after.get(key)}"
    if _is_hub_name(_hub_name(recorded)) and _is_hub_name(_hub_name(model)):
        return f"it was made for {recorded}"
    if (name := _differing(recorded, model)) is not None:
        return f"it was made for {recorded}, whose {name} is another"
    return None


def _hub_name(name: str) -> str:
    """Returns the name of a repository if ``name`` is a snapshot of it in the cache, else ``name``."""
    if match := _SNAPSHOT.fullmatch(name.replace("\\", "/")):
        return f"{match[1]}/{match[2]}".lower()
    return name.rstrip("/") if Path(name).exists() else name.lower()


def _is_hub_name(name: str) -> bool:
    path = Path(name)
    return not (path.exists() or path.is_absolute() or name.startswith((".", "~"))) and len(path.parts) == 2


def _read_config(name: str) -> Any:
    """Returns the config of a model that is on this machine, or None."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _sizes(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    return {key: getattr(text, key, None) for key in _SIZES}


def _differing(one: str, other: str) -> str | None:
    """Returns a tensor that differs between two models on this machine by more than roundings, or None."""
    try:
        paths = [find_weights(name, download=False) for name in (one, other)]
        first, second = (read_tensors(path) if path else {} for path in paths)
        for key in _probes(first, second):
            before, after = (_beginning(tensors[key], key) for tensors in (first, second))
            if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
                continue  # loading will raise an error that names the tensor
            if not torch.allclose(before, after, rtol=_TOLERANCE, atol=_TOLERANCE * 1e-3):
                return key
    except (OSError, ValueError):
        pass  # a base that is damaged or gone cannot be compared
    return None


def _probes(first: Mapping[str, Header], second: Mapping[str, Header]) -> list[str]:
    """Returns some tensors that 4-bit quantization leaves alone: norms from the whole model, embeddings and routers."""
    floats = ("BF16", "F16", "F32")
    common = [
        key
        for key in first.keys() & second.keys()
        if first[key].shape == second[key].shape and first[key].dtype in floats and second[key].dtype in floats
    ]
    vectors = sorted(key for key in common if len(first[key].shape) == 1)
    tables = sorted(key for key in common if re.search(r"embed|lm_head|\.gate\.weight$|\.router\.", key))
    return vectors[:: max(1, len(vectors) // _COMPARED)] + tables[:: max(1, len(tables) // _COMPARED)]


def _beginning(header: Header, key: str) -> Tensor:
    """Reads the first values of a tensor, in fp32."""
    begin = getattr(header, "part", None)
    rows = header.shape[0] if header.shape else 1
    if begin is not None and rows > 1 and header.nbytes > _PROBED_BYTES:  # type: ignore[attr-defined]  # of Stored
        count = max(1, rows * _PROBED_BYTES // header.nbytes)  # type: ignore[attr-defined]
        row = begin(0, rows, header.shape[1:])
        whole = type(row)(row.path, row.dtype, (count, *header.shape[1:]), row.start, row.nbytes * count)
        return whole.load(key).float()
    return header.load(key).float()
