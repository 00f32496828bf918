"""Finds the experts among the tensors of a saved model, by the headers of its files."""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

from .architecture import Architecture
from .quant_state import check_fields, dtype_of, read_json
from .stacks import LAYOUTS, DenseCheckpointStack, Found, Latest, PackedCheckpointStack, find_stack
from .tensor_files import Output, Stored

Layout = Literal["per-expert", "fused", "original"]

# The text between the name of a 4-bit matrix and its quant_type.
STATE = ".quant_state.bitsandbytes__"


class Checkpoint:
    """The tensors of a checkpoint, with its experts joined to stacks.

    Attributes:
        stacks: the experts' parameters.
        layout: the layout of all of them.
        packed: whether any tensor is in 4 bits.
        notes: what the user should know about the conversion.
    """

    def __init__(self, architecture: Architecture, tensors: dict[str, Stored], quantized: bool) -> None:
        self.architecture = architecture
        self.tensors = tensors
        self.notes: list[str] = []
        # The tensors that belong to each 4-bit matrix, of linear layers and of separate experts.
        self.matrices: dict[str, list[str]] = {_matrix(key): [] for key in tensors if STATE in key}
        for key in tensors:
            if _matrix(key) in self.matrices:
                self.matrices[_matrix(key)].append(key)
        self.packed = bool(self.matrices) or any(key.endswith("_proj_format") for key in tensors)
        # For each tensor of experts, the stack that it belongs to.
        self.owners: dict[str, str] = {}
        found: dict[str, list[Found]] = {}
        ignored = []
        for key, stored in tensors.items():
            name = architecture.in_model(key)
            role = architecture.names.locate(name)
            if role is not None:
                if role.part and not quantized:
                    raise ValueError(f"{key} belongs to 4-bit weights, but config.json has no quantization_config")
                self.owners[key] = role.target
                found.setdefault(role.target, []).append(Found(key, role, stored))
            elif architecture.is_ignored(name):
                ignored.append(key)
            elif ".experts." in name:
                raise ValueError(f"{key} belongs to experts that {type(architecture.model).__name__} does not have")
        if experts := [key for key in ignored if ".experts." in key]:
            self.notes.append(
                f"{experts[0]} and {len(experts) - 1} more belong to layers that Transformers ignores, and stay"
            )
        latest = Latest()
        self.by_name = {
            name: find_stack(architecture.names, architecture.target(parts[0].role), parts, latest)
            for name, parts in found.items()
        }
        self._check(found)
        self.stacks = list(self.by_name.values())
        self.layout = LAYOUTS[self.stacks[0].layout]
        self.blocks = {name.rpartition(".experts.")[0] for name in self.by_name}

    def _check(self, found: dict[str, list[Found]]) -> None:
        """Raises ValueError unless the checkpoint has all experts, in a single layout."""
        names = self.architecture.names
        prefix = f"{names.base_model_prefix}."
        for name in names.targets:
            if not {name, name.removeprefix(prefix), prefix + name} & self.by_name.keys():
                raise ValueError(f"{name} is missing from the checkpoint, in every layout that is known")
        first = next(iter(self.by_name))
        modules: dict[str, str] = {}
        for name, stack in self.by_name.items():
            if stack.layout != self.by_name[first].layout:
                raise ValueError(f"experts must be in one layout, got {found[first][0].key} and {found[name][0].key}")
            other = modules.setdefault(name.rpartition(".")[0], name)
            if type(self.by_name[other]) is not type(stack):
                raise ValueError(f"{other} and {name} must both be of 4-bit weights, or neither")

    def outputs(self, layout: Layout, dtype: torch.dtype | None, dequantize: bool) -> dict[str, Output]:
        """Returns all tensors of the result by name, in the order of the source."""
        same = layout == self.layout
        result: dict[str, Output] = {}
        written: set[str] = set()
        for key, stored in self.tensors.items():
            owner = self.owners.get(key)
            if owner is None:
                outputs = self._other(key, stored, same, dtype, dequantize)
            elif same and not (dequantize and isinstance(self.by_name[owner], PackedCheckpointStack)):
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
        stack: DenseCheckpointStack | PackedCheckpointStack,
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
        self, key: str, stored: Stored, same: bool, dtype: torch.dtype | None, dequantize: bool
    ) -> dict[str, Output]:
        """Returns what becomes of a tensor that does not belong to experts.

        If matrices are dequantized, nothing becomes of the tensors that only describe a 4-bit matrix.
        """
        name = self.architecture.in_model(key)
        # Other layouts have other names for the tensors beside experts, so those get the names of the Hub.
        renamed = self.architecture.in_checkpoint(name) if not same and self._beside_experts(name) else key
        if dequantize and key in self.matrices:
            return {renamed: self._dequantized(key, name, dtype)}
        if dequantize and _matrix(key) in self.matrices:
            return {}
        return {renamed: Output.of_stored(stored, self._dtype(name, dtype))}

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
