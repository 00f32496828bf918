"""Finds the experts among the tensors of a saved model, by the headers of its files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from moe_fused.quantized import COMPRESSED_TENSORS, CheckpointQuantization, compressed_content, mxfp4_content

from .architecture import Architecture
from .entries import PUBLISHED
from .names import MATRIX_PARTS
from .published_stacks import PublishedCheckpointStack, PublishedMatrix, find_matrices, find_published_stack
from .quant_state import check_fields, dtype_of, read_json
from .stacks import LAYOUTS, DenseCheckpointStack, Found, Latest, PackedCheckpointStack, find_stack, named
from .tensor_files import Output, Stored

Layout = Literal["per-expert", "fused", "original"]
CheckpointStack: TypeAlias = DenseCheckpointStack | PackedCheckpointStack | PublishedCheckpointStack

# The text between the name of a 4-bit matrix and its quant_type.
STATE = ".quant_state.bitsandbytes__"


class Checkpoint:
    """The tensors of a checkpoint, with its experts joined to stacks.

    Args:
        architecture: the model.
        tensors: the headers of its tensors.
        quantization: how its config says that it is quantized; None for a dense one.
        dtype: the dtype of the model, which weights in a published format get when they are dequantized.

    Attributes:
        stacks: the experts' parameters.
        layout: the layout of all of them. In a checkpoint in a published format it is that of the experts in 4 bits.
        packed: whether any tensor is in 4 bits.
        published: those of ``stacks`` that are in a published format.
        linears: the matrices of linear layers that compressed-tensors quantized, by the names of the layers.
        notes: what the user should know about the conversion.
    """

    def __init__(
        self,
        architecture: Architecture,
        tensors: dict[str, Stored],
        quantization: CheckpointQuantization | None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.architecture = architecture
        self.tensors = tensors
        self.quantization = quantization
        self.dtype = dtype
        self.notes: list[str] = []
        # The tensors that belong to each 4-bit matrix, of linear layers and of separate experts.
        self.matrices: dict[str, list[str]] = {_matrix(key): [] for key in tensors if STATE in key}
        for key in tensors:
            if _matrix(key) in self.matrices:
                self.matrices[_matrix(key)].append(key)
        # For each tensor of experts, the stack that it belongs to.
        self.owners: dict[str, str] = {}
        found: dict[str, list[Found]] = {}
        ignored = []
        for key, stored in tensors.items():
            name = architecture.in_model(key)
            role = architecture.names.locate(name)
            if role is not None:
                if role.part and quantization is None:
                    raise ValueError(f"{key} belongs to 4-bit weights, but config.json has no quantization_config")
                self.owners[key] = role.target
                found.setdefault(role.target, []).append(Found(key, role, stored))
            elif architecture.is_ignored(name):
                ignored.append(key)
            elif ".experts." in name and not architecture.has(name):
                raise ValueError(f"{key} belongs to experts that {type(architecture.model).__name__} does not have")
        if experts := [key for key in ignored if ".experts." in key]:
            self.notes.append(
                f"{experts[0]} and {len(experts) - 1} more belong to layers that Transformers ignores, and stay"
            )
        self.linears: dict[str, PublishedMatrix] = {}
        if quantization is not None and quantization.method == COMPRESSED_TENSORS:
            others = {key: stored for key, stored in tensors.items() if key not in self.owners}
            self.linears = find_matrices(others, quantization.quant_type)
        latest = Latest()
        self.by_name = {name: self._find(parts, latest) for name, parts in found.items()}
        self._check(found)
        self.stacks = list(self.by_name.values())
        self.published = [stack for stack in self.stacks if isinstance(stack, PublishedCheckpointStack)]
        in_4bit = [stack for stack in self.stacks if not isinstance(stack, DenseCheckpointStack)]
        self.packed = bool(self.matrices or self.linears or in_4bit)
        self.layout = LAYOUTS[[*in_4bit, *self.stacks][0].layout]
        self.blocks = {name.rpartition(".experts.")[0] for name in self.by_name}

    def _find(self, found: list[Found], latest: Latest) -> CheckpointStack:
        """Joins the tensors of one parameter."""
        names, target = self.architecture.names, self.architecture.target(found[0].role)
        if self.quantization is None or found[0].role.layout not in PUBLISHED:
            return find_stack(names, target, found, latest)
        return find_published_stack(names, target, found, self.quantization.quant_type, self.dtype)

    def _check(self, found: dict[str, list[Found]]) -> None:
        """Raises ValueError unless the checkpoint has all experts, in a single layout.

        In a checkpoint in a published format, experts that stayed dense may be in a layout of their own.
        """
        names = self.architecture.names
        for name in names.targets:
            if self.by_name.keys().isdisjoint(names.spellings(name)):
                raise ValueError(f"{name} is missing from the checkpoint, in every layout that is known")
        first: dict[bool, str] = {}
        modules: dict[str, str] = {}
        published = self.quantization is not None and self.quantization.is_published
        for name, stack in self.by_name.items():
            kind = published and isinstance(stack, DenseCheckpointStack)
            if stack.layout != self.by_name[first.setdefault(kind, name)].layout:
                raise ValueError(
                    f"experts must be in one layout, got {found[first[kind]][0].key} and {found[name][0].key}"
                )
            other = modules.setdefault(name.rpartition(".")[0], name)
            if type(self.by_name[other]) is not type(stack):
                raise ValueError(f"{other} and {name} must both be of 4-bit weights, or neither")

    def outputs(self, layout: Layout, dtype: torch.dtype | None, dequantize: bool) -> dict[str, Output]:
        """Returns all tensors of the result by name, in the order of the source."""
        result: dict[str, Output] = {}
        written: set[str] = set()
        for key, stored in self.tensors.items():
            owner = self.owners.get(key)
            if owner is None:
                outputs = self._other(key, stored, layout, dtype, dequantize)
            elif layout == LAYOUTS[self.by_name[owner].layout] and not (
                dequantize and not isinstance(self.by_name[owner], DenseCheckpointStack)
            ):
                outputs = {key: Output.of_stored(stored, dtype)}
            elif owner in written:
                continue
            else:
                written.add(owner)
                outputs = self._experts(self.by_name[owner], layout, dtype, dequantize)
            for name, output in outputs.items():
                if name in result:
                    raise ValueError(f"{name} would be written twice, the second time for {key}")
                result[name] = output
        return result

    def _experts(
        self,
        stack: CheckpointStack,
        layout: Layout,
        dtype: torch.dtype | None,
        dequantize: bool,
    ) -> dict[str, Output]:
        if isinstance(stack, DenseCheckpointStack):
            outputs = stack.outputs(self.architecture.names, layout, dtype)
        else:
            outputs = stack.dequantized(layout, dtype) if dequantize else stack.outputs(layout)
        return {self.architecture.in_checkpoint(name): output for name, output in outputs.items()}

    def _other(
        self, key: str, stored: Stored, layout: Layout, dtype: torch.dtype | None, dequantize: bool
    ) -> dict[str, Output]:
        """Returns what becomes of a tensor that does not belong to experts.

        If matrices are dequantized, nothing becomes of the tensors that only describe a 4-bit matrix.
        """
        module, _, part = key.rpartition(".")
        linear = self.linears.get(module) if dequantize or self.changes_method(layout) else None
        if linear is not None:
            key = f"{module}.weight"
        name = self.architecture.in_model(key)
        # Other layouts have other names for the tensors beside experts, so those get the names of the Hub.
        other = layout != self.layout and self._beside_experts(name)
        renamed = self.architecture.in_checkpoint(name) if other else key
        if linear is not None:
            wanted = self._dtype(name, dtype or self.dtype) or self.dtype
            return {renamed: linear.dequantized(wanted)} if part == MATRIX_PARTS[0] else {}
        if dequantize and key in self.matrices:
            return {renamed: self._dequantized(key, name, dtype)}
        if dequantize and _matrix(key) in self.matrices:
            return {}
        return {renamed: Output.of_stored(stored, self._dtype(name, dtype))}

    def changes_method(self, layout: Layout) -> bool:
        """Whether experts in a published format have another ``quant_method`` in ``layout``.

        That of stacks, mxfp4, has linear layers dense.
        """
        return bool(self.published) and layout != self.layout

    def content_of(self, layout: Layout) -> dict[str, Any]:
        """Returns the ``quantization_config`` of the result in ``layout``, if that changes the method."""
        dense = [name for name, stack in self.by_name.items() if isinstance(stack, DenseCheckpointStack)]
        dense += [self.architecture.in_checkpoint(name) for name in dense]
        paths, modules = sorted({name.rpartition(".")[0] for name in dense}), self.architecture.dense_modules()
        if layout == "fused":
            return mxfp4_content([*modules, *paths])
        quant_type = self.published[0].format.quant_type
        return compressed_content(quant_type, [*modules, *(rf"re:{re.escape(path)}\..*" for path in paths)])

    def losses(self, layout: Layout, dequantize: bool) -> Iterator[str]:
        """Yields notes about what the result lacks, and who reads it."""
        if not dequantize and layout != self.layout:
            yield from self._losses_of_layout(layout)
        scales = sum(stack.activation_scales for stack in self.published)
        scales += sum(matrix.has_activation_scale for matrix in self.linears.values())
        if scales and (dequantize or self.changes_method(layout)):
            yield f"{scales} scales of activations (input_global_scale) are left out, as the result has no place for them"

    def _losses_of_layout(self, layout: Layout) -> Iterator[str]:
        lossy = [one for one in self.stacks if isinstance(one, PackedCheckpointStack) and one.loses_double_quantization]
        if lossy:
            yield (
                f"double quantization is lost in {len(lossy)} of {len(self.stacks)} stacks, as {lossy[0].target.name}: its "
                "groups run over from one expert to the next, so that absmaxes become fp32; the weights stay the same bit "
                "for bit"
            )
        if not self.changes_method(layout):
            return
        if self.linears:
            yield (
                f"{len(self.linears)} linear layers, as {next(iter(self.linears))}, become {named(self.dtype)}: a "
                "checkpoint of quant_method mxfp4 has nothing but experts in 4 bits"
            )
        if layout == "fused":
            yield (
                "Transformers alone makes (E, in, out) of stacks in mxfp4, as gpt-oss has its dense experts, and not "
                f"(E, out, in): load this {type(self.architecture.model).__name__} after moe_fused.enable()"
            )

    def _beside_experts(self, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:count]) in self.blocks for count in range(1, len(parts)))

    def _dtype(self, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
        """Returns the dtype to cast the model's tensor ``name`` to. Models keep some tensors in fp32."""
        if dtype is None:
            return None
        for pattern, kept in self.architecture.model._get_dtype_plan(dtype).items():
            if re.search(pattern.replace("*", ".*"), name):
                dtype = kept
        return dtype

    def _dequantized(self, key: str, name: str, dtype: torch.dtype | None) -> Output:
        """Makes the dense matrix of a linear layer that is in 4 bits."""
        parts = {part.removeprefix(f"{key}."): self.tensors[part] for part in self.matrices[key]}
        (state,) = (part for part in parts if part.startswith("quant_state."))
        fields = read_json(f"{key}.{state}", parts[state].load(f"{key}.{state}"))
        check_fields(f"{key}.{state}", fields, {"shape": list, "dtype": str})
        wanted = self._dtype(name, dtype or dtype_of(f"{key}.{state}", fields["dtype"]))

        def make() -> Tensor:
            from bitsandbytes.functional import QuantState, dequantize_4bit

            values = {part: stored.load(f"{key}.{part}") for part, stored in parts.items()}
            packed = self.tensors[key].load(key).view(torch.uint8)
            state = QuantState.from_dict(values, device=torch.device("cpu"))
            state.dtype = wanted  # so that values are rounded only once
            dense: Tensor = dequantize_4bit(packed, state)
            return dense

        return Output.of_tensor(torch.empty(fields["shape"], dtype=wanted, device="meta"), make)


def _matrix(key: str) -> str:
    """Returns the name of the 4-bit matrix that a tensor called ``key`` would belong to."""
    return key.partition(STATE)[0] if STATE in key else key.rpartition(".")[0]
