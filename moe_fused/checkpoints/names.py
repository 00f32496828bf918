"""Finds the experts parameter that a checkpoint's tensor belongs to, and the names of a parameter in each layout."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .fused import PARTS

_FUSED = re.compile(rf"(?P<name>.+\.(?:gate_up_proj|up_proj|down_proj))(?:_(?P<part>{'|'.join(PARTS)}))?")
_STACKED = re.compile(r"(?P<block>.+)\.(?P<projection>gate|up|down)_proj\.weight(?:\.(?P<part>.+))?")
_MATRIX = re.compile(r"(?P<name>.+\.weight)\.(?P<part>.+)")
# The tensors of formats that are kept as they are published: stacks of gpt-oss, and matrices of compressed-tensors.
STACK_PARTS = ("blocks", "scales")
_PUBLISHED_STACK = re.compile(rf"(?P<name>.+\.(?:gate_up_proj|up_proj|down_proj))_(?P<part>{'|'.join(STACK_PARTS)})")
# compressed-tensors also has the scale of activations, which nothing here multiplies with.
ACTIVATION_SCALE = "input_global_scale"
MATRIX_PARTS = ("weight_packed", "weight_scale", "weight_global_scale", ACTIVATION_SCALE)
_PUBLISHED_MATRIX = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(MATRIX_PARTS)})")
# For each matrix in the original project's checkpoints, the stack that it belongs to and its position there.
_STACKED_POSITIONS = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", 0)}


@dataclass(frozen=True)
class Target:
    """A stacked parameter of an experts module that is to be held in 4 bits.

    Attributes:
        name: its name in the model.
        shape: (E, out, in).
        projections: the number of equal parts of the out features that are quantized separately.
        transposed: whether the dense weights are (E, in, out).
    """

    name: str
    shape: tuple[int, int, int]
    projections: int
    transposed: bool = False

    @property
    def dense_shape(self) -> tuple[int, int, int]:
        """The shape of the dense weights."""
        experts, rows, columns = self.shape
        return (experts, columns, rows) if self.transposed else self.shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape (out, in) of one expert's projection."""
        return self.shape[1] // self.projections, self.shape[2]


class TensorRole(NamedTuple):
    """What a tensor of a checkpoint is for the experts parameter that it belongs to.

    Attributes:
        target: the name of the parameter, with the checkpoint's prefix.
        layout: "per expert", "fused", "stacked", "published" for the stacks of gpt-oss, "published per expert" for the
            matrices of compressed-tensors, or "other" for dense tensors that only Transformers can join.
        expert, projection: the position of a matrix.
        part: the part of the matrix or stack, such as "absmax"; "" is the weights themselves.
        pattern: the source pattern of Transformers' converter for the tensor, if there is one.
        converter: the index of that converter.
    """

    target: str
    layout: str
    expert: int = 0
    projection: int = 0
    part: str = ""
    pattern: str = ""
    converter: int = -1


def is_per_expert(converter: WeightConverter) -> bool:
    """Whether ``converter`` does nothing but stack the matrices of experts, and join their gate and up projections."""
    kinds = [type(op) for op in converter.operations]
    return kinds in ([MergeModulelist], [MergeModulelist, Concatenate]) and all(
        "*." in source for source in converter.source_patterns
    )


class Names:
    """The names of the experts' tensors in checkpoints of one model.

    Args:
        targets: the parameters to be held in 4 bits.
        converters: Transformers' converters that make these parameters from the tensors of a dense checkpoint.
        base_model_prefix: the model's. A checkpoint of a model with another head may lack it, or have it in addition.
    """

    def __init__(
        self, targets: Iterable[Target], converters: Iterable[WeightConverter] = (), base_model_prefix: str = ""
    ) -> None:
        self.targets = {target.name: target for target in targets}
        self.converters = list(converters)
        self.base_model_prefix = base_model_prefix
        self._known = {name for target in self.targets for name in self.spellings(target)}

    def spellings(self, name: str) -> tuple[str, str, str]:
        """Returns a name as it is, and with and without the prefix of the base model."""
        prefix = f"{self.base_model_prefix}." if self.base_model_prefix else ""
        return name, prefix + name, name.removeprefix(prefix)

    def locate(self, key: str) -> TensorRole | None:
        """Returns the role of the checkpoint's tensor ``key``, or None if it belongs to no target."""
        match = _FUSED.fullmatch(key)
        # Packed and dense weights can have the same name. A converter of Transformers then reads the dense ones.
        if match and match["name"] in self._known and (match["part"] or not self._by_converter(key, "")):
            return TensorRole(match["name"], "fused", part=match["part"] or "")
        if (match := _PUBLISHED_STACK.fullmatch(key)) and match["name"] in self._known:
            return TensorRole(match["name"], "published", part=match["part"])
        if match := _PUBLISHED_MATRIX.fullmatch(key):
            role = self._by_converter(f"{match['module']}.weight", match["part"])
            if role and role.layout == "per expert":
                return role._replace(layout="published per expert")
        matrix = _MATRIX.fullmatch(key)
        name, part = (matrix["name"], matrix["part"]) if matrix else (key, "")
        if role := self._by_converter(name, part):
            return role
        if match := _STACKED.fullmatch(key):
            stack, projection = _STACKED_POSITIONS[match["projection"]]
            target = f"{match['block']}.experts.{stack}"
            if target in self._known:
                return TensorRole(target, "stacked", projection=projection, part=match["part"] or "")
        return None

    def _by_converter(self, name: str, part: str) -> TensorRole | None:
        for index, converter in enumerate(self.converters):
            target, pattern = converter.rename_source_key(name)
            if pattern is None or target not in self._known:
                continue
            projection = converter.source_patterns.index(pattern)
            if not is_per_expert(converter):
                return TensorRole(target, "other", 0, projection, part, pattern, index)
            match = re.search(pattern.replace("*.", r"(?P<expert>\d+)\."), name)
            if match is not None:
                return TensorRole(target, "per expert", int(match["expert"]), projection, part, pattern, index)
        return None

    def per_expert(self, target: Target) -> list[str] | None:
        """Returns the names of the target's matrices, one for each projection, with ``*`` for the expert.

        Returns None if checkpoints of this model have no matrix for each expert.
        """
        for converter in self.converters:
            # The reverse transform has the names without the anchors and escapes of regular expressions.
            reverse = converter.reverse_transform()
            stack = converter.target_patterns[0]
            if is_per_expert(converter) and target.name.endswith(stack):
                return [target.name.removesuffix(stack) + pattern for pattern in reverse.target_patterns]
        return None


def published_matrices(keys: Iterable[str]) -> dict[str, list[str]]:
    """Returns the tensors of compressed-tensors among the names ``keys``, by the names of their modules."""
    found: dict[str, list[str]] = {}
    for key in keys:
        module, _, part = key.rpartition(".")
        if part in MATRIX_PARTS:
            found.setdefault(module, []).append(key)
    return found


def part_of_matrix(key: str) -> TensorRole:
    """Returns the role of a tensor that ``published_matrices`` has found, for a matrix that stands alone."""
    return TensorRole(key, "published per expert", part=key.rpartition(".")[2])


def stacked_names(target: Target) -> list[str] | None:
    """Returns the names of the target's stacks in the original project's layout, one for each projection, or None."""
    block, experts, stack = target.name.rpartition(".experts.")
    found = {position: projection for projection, position in _STACKED_POSITIONS.items()}
    names = [found.get((stack, projection)) for projection in range(target.projections)]
    return [f"{block}.{name}_proj.weight" for name in names] if experts and None not in names else None


def rename_expert(key: str, old: int, new: int) -> str:
    """Returns the name of the same tensor of another expert."""
    head, number, tail = key.rpartition(f".{old}.")
    return f"{head}.{new}.{tail}" if number else key
