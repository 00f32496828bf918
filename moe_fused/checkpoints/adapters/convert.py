"""Converts the directory of an adapter: reads layer by layer, checks everything, then writes layer by layer."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moe_fused.checkpoints.finite import is_finite
from moe_fused.checkpoints.places import check_adapter_replaceable
from moe_fused.checkpoints.safetensors_file import TensorSpec, as_bytes, safetensors_writer
from moe_fused.staging import check_writable, staged_directory

from .by_expert import by_expert_refusal, model_type_of
from .config import B_LAYOUT, CONFIG, DETAILS, repattern, retarget
from .detect import MARKER
from .factors import DOWN, GATE, UP, Block, Factors, Scaling, complete, fold, fuse, pad, split
from .layouts import LAYOUTS, Fused, Grouped, unprefixed
from .names import Layout, ScalingChoice
from .saved import WEIGHTS, SavedAdapter

Progress = Callable[[str, int, int], None]


# The files that `moe-fused finetune` writes beside the adapter of a run.
_OF_A_RUN = ("finetune.yaml", "log.jsonl")


@dataclass(frozen=True)
class AdapterConversionPlan:
    """What the conversion of an adapter will do. It is made by converting everything without writing it.

    Attributes:
        source, target: the layouts.
        layers, experts: the number of layers with experts, and of experts in each.
        ranks: the ranks of the experts' projections in the target.
        tensors: the tensors of the target.
        config: the content of the target's ``adapter_config.json``.
        files: the other files that are copied.
        notes: what else the user should know, one sentence each.
    """

    source: Layout
    target: Layout
    layers: int
    experts: int
    ranks: dict[str, int]
    tensors: dict[str, TensorSpec]
    config: dict[str, Any]
    files: list[str]
    notes: list[str]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())


def _finite(file: Any, key: str) -> torch.Tensor:
    """Reads the tensor ``key`` of a file. Raises ValueError if it holds NaN or infinite values."""
    tensor: torch.Tensor = file.get_tensor(key)
    if not is_finite(tensor):
        raise ValueError(f"{key} holds NaN or infinite values")
    return tensor


class _Conversion(SavedAdapter):
    """The conversion of one adapter to another layout.

    Tensors are read twice: the first time to check that everything can be converted and to find the size of the result,
    the second time to write it. In between only shapes are kept, as tensors on the meta device.
    """

    def __init__(
        self, source: Path, to: Layout, given: Layout | None, scaling: ScalingChoice | None, widen: bool
    ) -> None:
        super().__init__(source, "SOURCE", given)
        self._check_pairs()
        self.to = LAYOUTS[to]
        self.widen = widen
        self.fold = to is Layout.PER_EXPERT if scaling is None else scaling is ScalingChoice.FOLD
        interleaved = self.config.interleaved or Layout.GPT_OSS_INVERTED in (self.layout.layout, to)
        if interleaved and not (self.layout.fused and self.to.fused):
            raise ValueError(
                f"gate and up of gpt-oss take turns in gate_up_proj, no tool reads them apart: {to.value} is not possible "
                f"from {self.layout.layout.value}"
            )
        model_type = model_type_of(str(self.config.content.get("base_model_name_or_path")))
        reason = None if model_type is None else by_expert_refusal(model_type)
        if to is Layout.PER_EXPERT and reason is not None:
            raise ValueError(f"{to.value} is not possible: {reason}; `moe-fused merge` makes a model of the adapter")
        self.rank = 0  # the rank that all LoRA gets; 0 keeps each rank
        self.exports = self.fold and to is Layout.PER_EXPERT  # for tools that read less than PEFT
        self.filled: set[str] = set()  # the projections that get factors of zeros in some layer

    def _check_pairs(self) -> None:
        """Raises ValueError if a module that does not belong to experts has only one of lora_A and lora_B."""
        for key in self.others:
            for factor, other in (("A", "B"), ("B", "A")):
                partner = re.sub(rf"lora_(embedding_)?{factor}(?=\.|$)", rf"lora_\g<1>{other}", key)
                if partner != key and partner not in self.shapes:
                    raise ValueError(f"{partner} is missing, although it belongs to {key}")

    def convert(self, group: Grouped) -> Block:
        # The file is opened for each layer, because what was read from a mapped file stays in memory until it is closed.
        with safe_open(self.directory / WEIGHTS, "pt") as file:
            block = self.layout.read(group, self.config, partial(_finite, file))
        if self.to.fused:
            return fuse(block, self.widen)
        down = block.projections.get(DOWN)
        block = split(block, down.rank if down else self.config.rank, self.widen)
        if not self.exports:
            return block
        whole = complete(block)
        self.filled |= whole.projections.keys() - block.projections.keys()
        return whole

    def finish(self, block: Block) -> Block:
        """Gives the factors of a layer the scaling and the rank that they have in the target."""
        if not self.fold:
            return block
        return Block(
            block.name,
            {
                projection: Factors(
                    pad(factors.a, 1, self.rank),
                    pad(fold(factors.b, factors.scaling.value(factors.rank)), 2, self.rank),
                    Scaling(self.rank, False),
                )
                for projection, factors in block.projections.items()
            },
        )

    def other(self, key: str) -> torch.Tensor:
        """Reads a tensor that does not belong to experts. It changes only if scaling and rank become the same for all."""
        tensor = _finite(self.file, key)
        module = self.others[key]
        if module is None:
            return tensor
        rank = self.config.rank_of(module)
        dim = 0 if "lora_A." in key or key.endswith("lora_embedding_A") else 1
        if tensor.dim() < 2 or tensor.shape[dim] != rank:
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)}, but needs rank {rank} of the config in dimension {dim}"
            )
        if not self.fold:
            return tensor
        if dim == 1:
            tensor = fold(tensor, self.config.scaling_of(module).value(rank))
        return pad(tensor, dim, self.rank)

    def tensors(self, blocks: Iterable[Block]) -> Iterator[tuple[str, torch.Tensor]]:
        for block in blocks:
            yield from self.to.write(self.finish(block))
            del block  # freed before the next one is read
        for key in self.others:
            yield key, self.other(key)

    def plan(self, progress: Progress) -> AdapterConversionPlan:
        groups = list(self.groups())
        blocks: list[Block] = []
        for done, group in enumerate(groups):
            progress("checking", done, len(groups))
            block = _shapes_only(self.convert(group))
            for projection, factors in block.projections.items():
                first = blocks[0].projections if blocks else block.projections
                expected = next(iter(first.values())).experts
                if factors.experts != expected:
                    raise ValueError(
                        f"{block.name}: {projection}_proj has {factors.experts} experts, {expected} are in "
                        f"{(blocks[0] if blocks else block).name}"
                    )
            blocks.append(block)
        progress("checking", len(groups), len(groups))
        ranks = {name: factors.rank for block in blocks for name, factors in block.projections.items()}
        all_ranks = {factors.rank for block in blocks for factors in block.projections.values()}
        all_ranks |= {self.config.rank_of(module) for module in self.others.values() if module}
        notes = []
        if self.fold:
            self.rank = max(all_ranks)
            ranks = dict.fromkeys(ranks, self.rank)
            notes += self._notes_on_folding(blocks, all_ranks)
        if self.exports:
            notes += self._notes_on_readers()
        tensors: dict[str, TensorSpec] = {}
        for key, tensor in self.tensors(blocks):
            if key in tensors:
                raise ValueError(f"{key} would be written twice")
            tensors[key] = TensorSpec.of(key, tensor)
        if self.to.layout is Layout.PER_EXPERT and ranks.keys() not in ({DOWN}, {GATE, UP, DOWN}):
            notes.append("PEFT under Transformers 5 loads gate_proj and up_proj only together, and with down_proj.")
        if self.to.fused and self.config.content.get("lora_dropout"):
            notes.append("lora_dropout becomes 0: PEFT has no dropout on target_parameters.")
        files, left = self._files()
        notes += [f"{name} is not copied: it belongs to the source's layout." for name in left]
        if any(name.startswith("optimizer.") for name in left):
            notes.append("moe-fused convert optimizer brings an optimizer's state into another layout.")
        experts = next(iter(blocks[0].projections.values())).experts
        return AdapterConversionPlan(
            self.layout.layout,
            self.to.layout,
            len(blocks),
            experts,
            ranks,
            tensors,
            self._config(blocks),
            files,
            notes,
        )

    def _notes_on_folding(self, blocks: list[Block], ranks: set[int]) -> list[str]:
        notes = []
        values = {factors.scaling.value(factors.rank) for block in blocks for factors in block.projections.values()}
        values |= {
            self.config.scaling_of(name).value(self.config.rank_of(name)) for name in self.others.values() if name
        }
        if values != {1.0}:
            exact = all(value > 0 and math.frexp(value)[0] == 0.5 for value in values)
            how = "which is exact" if exact else "which rounds lora_B once to its dtype"
            words = ", ".join(f"{value:.4g}" for value in sorted(values))
            notes.append(f"The scaling ({words}) is multiplied into lora_B, {how}.")
        if len(ranks) > 1:
            words = ", ".join(map(str, sorted(ranks)))
            notes.append(f"The adapters of ranks {words} all get rank {self.rank}; zeros fill the smaller ones up.")
        return notes

    def _notes_on_readers(self) -> list[str]:
        notes = []
        if self.filled:
            names = ", ".join(f"{name}_proj" for name in (GATE, UP, DOWN) if name in self.filled)
            notes.append(
                f"{names} get factors of zeros: vLLM, SGLang and llama.cpp read the three projections only together."
            )
        if whole := [unprefixed(key) for key, module in self.others.items() if module is None]:
            notes.append(
                f"{', '.join(whole)} {'is' if len(whole) == 1 else 'are'} no LoRA: vLLM and llama.cpp refuse the adapter "
                "for that, SGLang does not apply it; moe-fused merge makes a model with it."
            )
        return notes

    def _config(self, blocks: list[Block]) -> dict[str, Any]:
        others = {module for module in self.others.values() if module}
        adapted = {unprefixed(block.name): tuple(block.projections) for block in blocks}
        content = {**self.config.content, **retarget(self.config, others, adapted, self.to.fused)}
        if self.fold:
            content |= {"r": self.rank, "lora_alpha": self.rank, "use_rslora": False}
            content |= {"rank_pattern": {}, "alpha_pattern": {}}
        else:
            experts = {}
            for block in blocks:
                for projection, module in self.to.modules(block):
                    factors = block.projections[projection]
                    experts[module] = (self.to.kind(projection), factors.rank, factors.scaling.alpha)
            content |= repattern(self.config, others, experts, self.to.fused)
        for mark in (B_LAYOUT, DETAILS):
            content.pop(mark, None)
        if isinstance(self.to, Fused):
            content["lora_dropout"] = 0.0
            if self.to.layout is not self.layout.layout:
                content.pop("peft_version", None)  # it would suggest the source's layout
            if self.to.grouped:
                content[B_LAYOUT] = "grouped_by_expert"
        return content

    def _files(self) -> tuple[list[str], list[str]]:
        """Returns the names of the files to copy, and of those that no longer fit."""
        paths = (path for path in self.directory.iterdir() if path.is_file() and not path.name.startswith("."))
        names = sorted(path.name for path in paths)
        left = [name for name in names if name.startswith(("optimizer.", "adapter_model.")) and name != WEIGHTS]
        # The files of a run are left out, because a directory with them looks like a run that can be resumed.
        return [name for name in names if name not in {CONFIG, WEIGHTS, *_OF_A_RUN, *left}], left

    def write(self, plan: AdapterConversionPlan, directory: Path, progress: Progress) -> None:
        groups = list(self.groups())

        def blocks() -> Iterator[Block]:
            for done, group in enumerate(groups):
                progress("writing", done, len(groups))
                yield self.convert(group)
            progress("writing", len(groups), len(groups))

        metadata = {"format": "pt", **(self.file.metadata() or {}), MARKER: plan.target.value}
        with safetensors_writer(directory / WEIGHTS, plan.tensors, metadata) as write:
            for key, tensor in self.tensors(blocks()):
                write(key, [as_bytes(tensor)])
        text = json.dumps(plan.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (directory / CONFIG).write_text(text, encoding="utf-8")
        for name in plan.files:
            shutil.copyfile(self.directory / name, directory / name)


def _shapes_only(block: Block) -> Block:
    return Block(
        block.name,
        {
            name: replace(factors, a=factors.a.to("meta"), b=factors.b.to("meta"))
            for name, factors in block.projections.items()
        },
    )


def _no_progress(step: str, done: int, total: int) -> None:
    pass


def plan_conversion(
    source: Path,
    *,
    to: Layout,
    given: Layout | None = None,
    scaling: ScalingChoice | None = None,
    widen: bool = False,
    progress: Progress = _no_progress,
) -> AdapterConversionPlan:
    """Reads and checks an adapter as ``convert_adapter`` does, and returns what it would write."""
    return _Conversion(source, to, given, scaling, widen).plan(progress)


def convert_adapter(
    source: Path,
    target: Path,
    *,
    to: Layout,
    given: Layout | None = None,
    scaling: ScalingChoice | None = None,
    widen: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = _no_progress,
) -> AdapterConversionPlan:
    """Converts an adapter with LoRA on experts from one layout to another.

    Only one layer's tensors are in memory at a time. ``target`` appears when all of it is written.

    Args:
        source: the directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        target: the directory to make.
        to: the layout of the target.
        given: the layout of the source, if its files do not show it.
        scaling: ``FOLD`` multiplies every lora_B of the adapter by its scaling, pads all ranks to the largest and writes
            alpha = r, which every reader's rule for the scaling takes for 1. ``KEEP`` leaves alpha, rsLoRA and ranks as they
            are. The default is ``FOLD`` for ``Layout.PER_EXPERT``, else ``KEEP``.
        widen: whether a rank may become larger than in the source, and whether zeros may stand for a projection without
            LoRA, if the target cannot compute the same otherwise.
        overwrite: whether an adapter at ``target`` may be replaced.
        dry_run: whether to read and check everything, but write nothing.
        progress: called with the name of the step, the number of layers done, and the number of all layers.

    Returns:
        What was done, or with ``dry_run`` what would be done.

    Raises:
        FileNotFoundError: ``source`` is not an adapter in safetensors.
        FileExistsError: ``target`` exists and may not be replaced.
        OSError: ``target`` cannot be written.
        ValueError: the source is wrong, or its layout is mixed or unknown, or the target's layout cannot hold it exactly.
    """
    conversion = _Conversion(source, to, given, scaling, widen)

    def check(path: Path) -> None:
        check_adapter_replaceable(source, path, overwrite)

    check(target.resolve())
    plan = conversion.plan(progress)
    if dry_run:
        check_writable(target, "TARGET", plan.nbytes)
    else:
        with staged_directory(target, "TARGET", check, plan.nbytes) as staging:
            conversion.write(plan, staging, progress)
    return plan
