"""Checks that a checkpoint holds every tensor that a model needs, in the right shape, and no others.

Transformers initializes missing tensors with random values and ignores tensors that it does not know. Here the headers of
the files are compared with the model on meta before anything is loaded. First, experts and 4-bit weights are replaced by
dense tensors on meta. Then Transformers loads these onto meta. It knows which tensors may be missing (such as tied
weights), which may be superfluous, and how tensors are renamed, merged and split.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from moe_fused.hub import get_kernel
from moe_fused.quantized import COMPRESSED_TENSORS, CheckpointQuantization

from .architecture import Architecture
from .entries import (
    PUBLISHED,
    Entry,
    by_matrix,
    by_projection,
    check_published,
    check_published_matrix,
    layout_of,
    read_packed,
)
from .files import Header
from .names import Target, TensorRole, part_of_matrix, published_matrices
from .quant_state import check_fields, read_json
from .safetensors_file import DTYPES

_STATE = "quant_state.bitsandbytes__"
# The tensors beside a 4-bit matrix and its state.
_SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_SHOWN = 3


@dataclass
class Problems:
    """The tensors of a checkpoint that do not fit a model, by their names in checkpoints.

    Attributes:
        missing, unexpected: names of tensors.
        mismatched: for each tensor of another shape, its name and both shapes.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = (
            ("missing", self.missing),
            ("of another shape", self.mismatched),
            ("without a place in the model", self.unexpected),
        )
        return "; ".join(f"{what}: {_listed(names)}" for what, names in kinds if names)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


class _Found(NamedTuple):
    key: str
    role: TensorRole
    header: Header

    def entry(self) -> Entry:
        """Makes an entry whose tensor is on meta, except for the JSON that describes the others."""
        real = self.role.part == "format" or self.role.part.startswith(_STATE) or "quant_map" in self.role.part
        return Entry(self.key, self.role, partial(self.header.load if real else self._empty, self.key))

    def _empty(self, key: str) -> Tensor:
        return torch.empty(self.header.shape, dtype=DTYPES.get(self.header.dtype, torch.uint8), device="meta")


def _nbytes(header: Header) -> int:
    return prod(header.shape) * DTYPES.get(header.dtype, torch.uint8).itemsize


def _check_parts(name: str, parts: Mapping[str, Header], numel: int) -> None:
    """Raises ValueError unless ``parts`` make up a 4-bit matrix of ``numel`` weights; ``""`` is the packed tensor."""
    states = [part for part in parts if part.startswith(_STATE)]
    if len(states) != 1:
        raise ValueError(
            f"{name} must have one quant_state, got {' and '.join(sorted(states))}"
            if states
            else f"{name}.{_STATE}nf4 (or fp4) is missing, without which 4-bit weights cannot be read"
        )
    nested = any(part.startswith("nested_") for part in parts)
    for part in ("", *(_SCALES if nested else _SCALES[:2])):
        if part not in parts:
            key = f"{name}.{part}" if part else name
            raise ValueError(f"{key} is missing, without which 4-bit weights cannot be read")
    for part in parts:
        if part and part not in _SCALES and part not in states:
            raise ValueError(f"{name}.{part} is not a tensor of 4-bit weights")
    if _nbytes(parts[""]) != ceil(numel / 2):
        raise ValueError(f"{name} must have {ceil(numel / 2)} bytes for {numel} weights, got {_nbytes(parts[''])}")


class _DenseView:
    """The tensors of a checkpoint on meta, as if none were in 4 bits.

    Their shapes come from the headers and from the JSON beside 4-bit matrices.

    Attributes:
        tensors: the tensors, by their names in the checkpoint; experts by their names in the model.

    Raises:
        ValueError: experts or 4-bit weights are incomplete or do not fit. The message names the tensor and says why.
    """

    def __init__(
        self,
        architecture: Architecture,
        tensors: Mapping[str, Header],
        quantization: CheckpointQuantization | None,
        packs: bool,
    ) -> None:
        self.architecture = architecture
        self.quantization = quantization
        self.packs = packs
        self.tensors: dict[str, Tensor] = {}
        experts: dict[str, list[_Found]] = {}
        others: dict[str, Header] = {}
        for key, header in tensors.items():
            role = architecture.names.locate(architecture.in_model(key))
            if role is None:
                others[key] = header
                continue
            if role.part and quantization is None:
                raise ValueError(f"{key} belongs to 4-bit weights, but config.json has no quantization_config")
            experts.setdefault(role.target, []).append(_Found(key, role, header))
        for found in experts.values():
            self._add_experts(found)
        self._check_modules({name: any(one.role.part for one in found) for name, found in experts.items()})
        self._add_others(others)

    @staticmethod
    def _check_modules(in_4bit: Mapping[str, bool]) -> None:
        """Raises ValueError if the experts of a module are in 4 bits in part.

        Args:
            in_4bit: for the name of each parameter whether it is in 4 bits.
        """
        packed = {name.rpartition(".")[0] for name, is_packed in in_4bit.items() if is_packed}
        for name, is_packed in in_4bit.items():
            if not is_packed and name.rpartition(".")[0] in packed:
                raise ValueError(f"{name} must be of 4-bit weights like the rest of its module, but is dense")

    def _put(self, key: str, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> None:
        if key in self.tensors:
            raise ValueError(f"{key} is in the checkpoint twice, in two layouts")
        self.tensors[key] = torch.empty(tuple(shape), dtype=dtype, device="meta")

    def _add_experts(self, found: list[_Found]) -> None:
        role = found[0].role
        target = self.architecture.target(role)
        entries = [one.entry() for one in found]
        layout = layout_of(role.target, entries)
        if layout == "other" and not any(one.role.part for one in found):
            for one in found:  # only Transformers can join these tensors
                self._put(one.key, one.header.shape)
            return
        if any(one.role.part for one in found):
            if layout not in PUBLISHED and layout != "other":
                self._check_method(next(one.key for one in found if one.role.part))
            if layout in PUBLISHED:
                check_published(self.architecture.names, target, layout, entries, self._format(target))
            elif layout == "per expert":
                self._check_packed_matrices(target, found, entries)
            else:
                read_packed(self.architecture.names, target, layout, entries)
        else:
            self._check_dense(target, layout, found, entries)
        self._put(role.target, target.dense_shape)

    def _check_method(self, key: str) -> None:
        """Raises ValueError if the config names another method than bitsandbytes, whose tensor ``key`` is."""
        assert self.quantization is not None
        if self.quantization.is_published:
            raise ValueError(
                f"{key} belongs to 4-bit weights of bitsandbytes, but config.json has the quantization_config of "
                f"{self.quantization.method} in {self.quantization.quant_type}"
            )

    def _format(self, target: Target) -> Any:
        """Returns the ``Format4bit`` of a stack that the checkpoint has as its config says."""
        assert self.quantization is not None
        return get_kernel().Format4bit(target.shape, self.quantization.quant_type, projections=target.projections)

    def _check_packed_matrices(self, target: Target, found: list[_Found], entries: list[Entry]) -> None:
        headers = {one.key: one.header for one in found}
        for parts in by_matrix(self.architecture.names, target, entries):
            stored = {part: headers[entry.key] for part, entry in parts.items()}
            _check_parts(parts[""].key, stored, prod(target.matrix_shape))

    def _check_dense(self, target: Target, layout: str, found: list[_Found], entries: list[Entry]) -> None:
        headers = {one.key: one.header for one in found}
        names = self.architecture.names
        wanted: tuple[int, ...] = target.matrix_shape
        if layout == "fused":
            keys, wanted = [entry.key for entry in entries], target.dense_shape
        elif layout == "stacked":
            keys, wanted = [entry.key for entry in by_projection(names, target, entries)], (target.shape[0], *wanted)
            if not self.packs:
                raise ValueError(
                    f"{keys[0]} is in the original project's layout, in which Transformers reads no dense experts: "
                    "convert it first, `moe-fused convert model SOURCE TARGET --to per-expert`"
                )
        else:
            keys = [parts[""].key for parts in by_matrix(names, target, entries)]
        for key in keys:
            _check_floating(key, headers[key])
            # Transformers 5.17 drops dimensions of size 1 when it splits stacks.
            if _without_ones(headers[key].shape) != _without_ones(wanted):
                raise ValueError(f"{key} must have shape {wanted}, got {headers[key].shape}")

    def _add_others(self, others: dict[str, Header]) -> None:
        if self.quantization is not None and self.quantization.method == COMPRESSED_TENSORS:
            others = self._without_published_matrices(others)
        matrices: dict[str, dict[str, Header]] = {}
        for key, header in others.items():
            name, _, part = key.rpartition(".quant_state.")
            if name:
                part = f"quant_state.{part}"
            else:
                name, _, part = key.rpartition(".")
            if (part in _SCALES or part.startswith("quant_state.")) and (name in others or name.endswith(".weight")):
                if self.quantization is None:
                    raise ValueError(f"{key} belongs to 4-bit weights, but config.json has no quantization_config")
                self._check_method(key)
                matrices.setdefault(name, {})[part] = header
        for name, parts in matrices.items():
            if name in others:
                parts[""] = others[name]
            self._put(name, self._shape_of(name, parts))
        beside = {f"{name}.{part}" for name, parts in matrices.items() for part in parts if part}
        floating = {name for name, value in self.architecture.model.state_dict().items() if value.is_floating_point()}
        for key, header in others.items():
            if key not in matrices and key not in beside:
                if self.architecture.in_model(key) in floating:
                    _check_floating(key, header)
                self._put(key, header.shape, DTYPES.get(header.dtype, torch.float32))

    def _without_published_matrices(self, others: dict[str, Header]) -> dict[str, Header]:
        """Puts the dense weights of linear layers that compressed-tensors quantized; returns the other tensors."""
        state = self.architecture.model.state_dict()
        matrices = published_matrices(others)
        for module, keys in matrices.items():
            name = f"{module}.weight"
            weight = state.get(self.architecture.in_model(name))
            if weight is None:  # it has no place in the model, which the comparison with the model will say
                self._put(keys[0], others[keys[0]].shape)
                continue
            entries = [_Found(key, part_of_matrix(key), others[key]).entry() for key in keys]
            check_published_matrix(module, entries, self._format(Target(name, (1, *weight.shape), 1)))
            self._put(name, weight.shape)
        beside = set(chain.from_iterable(matrices.values()))
        return {key: header for key, header in others.items() if key not in beside}

    def _shape_of(self, name: str, parts: Mapping[str, Header]) -> tuple[int, ...]:
        """Returns the shape of a linear layer's 4-bit weight, which its state holds."""
        states = [part for part in parts if part.startswith(_STATE)]
        fields: dict[str, Any] = {"shape": [0]}
        if len(states) == 1:
            key = f"{name}.{states[0]}"
            fields = read_json(key, parts[states[0]].load(key))
            check_fields(key, fields, {"shape": list, "blocksize": int})
        numel = prod(fields["shape"])
        _check_parts(name, parts, numel)
        blocks = ceil(numel / fields["blocksize"])
        if prod(parts["absmax"].shape) != blocks:
            raise ValueError(f"{name}.absmax must have {blocks} values, got {prod(parts['absmax'].shape)}")
        return tuple(fields["shape"])


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _check_floating(key: str, header: Header) -> None:
    if header.dtype not in ("BF16", "F16", "F32", "F64"):
        raise ValueError(
            f"{key} must be bfloat16, float16 or float32, or be in a checkpoint whose config.json has the "
            f"quantization_config for it, got {header.dtype}"
        )


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Switches off Transformers' progress bar and its table of what does not fit, which becomes an error here."""
    logger = logging.getLogger("transformers.modeling_utils")
    shown, disabled = transformers_logging.is_progress_bar_enabled(), logger.disabled
    transformers_logging.disable_progress_bar()
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = disabled
        if shown:
            transformers_logging.enable_progress_bar()


def _load_on_meta(model: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Loads ``tensors``, all on meta, into a model like ``model``, and returns Transformers' ``output_loading_info``.

    Raises:
        ValueError: Transformers cannot join some of the tensors.
    """
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    options: dict[str, Any] = {"device_map": {"": "meta"}, "dtype": torch.float32, "config": config}
    try:
        with _without_report():
            _, info = type(model).from_pretrained(
                None, state_dict=tensors, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
    except RuntimeError as error:
        raise ValueError(f"Transformers cannot make a {type(model).__name__} of its tensors: {error}") from error
    return dict(info)


def problems_of(model: Any, info: Mapping[str, Any], keys: Iterable[str] = ()) -> Problems:
    """Turns Transformers' ``output_loading_info`` into problems. Layers that the config announces are no problem.

    Args:
        model: the model, on any device.
        keys: the names of the checkpoint's tensors, by which unexpected tensors are called.
    """
    architecture = Architecture.of(model)
    unexpected = [name for name in sorted(info["unexpected_keys"]) if not architecture.is_ignored(name)]
    conversions = get_model_conversion_mapping(model) if unexpected else []
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    originals: dict[str, str] = {}
    for key in keys if unexpected else ():
        originals.setdefault(rename_source_key(key, renamings, converters)[0], key)
    return Problems(
        [architecture.in_checkpoint(name) for name in sorted(info["missing_keys"])],
        sorted({originals.get(name, name) for name in unexpected}),
        [
            f"{architecture.in_checkpoint(name)} {tuple(got)} instead of {tuple(wanted)}"
            for name, got, wanted in sorted(info["mismatched_keys"])
        ],
    )


def check_complete(
    model: Any,
    tensors: Mapping[str, Header],
    source: str,
    *,
    quantization: CheckpointQuantization | None = None,
    packs: bool = False,
) -> None:
    """Compares a checkpoint with the model that is to be loaded from it.

    Args:
        model: the model that Transformers makes of the config, dense and on meta.
        tensors: the tensors of the checkpoint.
        source: what the checkpoint is called in errors.
        quantization: how its config says that it is quantized; None for a dense one.
        packs: whether our quantizer will load it. The quantizer also reads dense experts in the original project's layout.

    Raises:
        ValueError: a tensor is missing, has another shape or does not belong to the model. The message names it.
    """
    try:
        published = quantization is not None and quantization.is_published
        architecture = Architecture.of(model, in_rows=published)
        view = _DenseView(architecture, tensors, quantization, packs or quantization is not None)
        if importlib.util.find_spec("accelerate") is None:  # loading will fail then, and say so
            return
        info = _load_on_meta(model, view.tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    check_problems(source, model, problems_of(model, info, view.tensors))


def check_problems(source: str, model: Any, problems: Problems) -> None:
    """Raises ValueError if there are any problems."""
    if problems:
        raise ValueError(f"{source} does not hold the tensors of a {type(model).__name__}: {problems}")
