"""Conversion of an adapter's directory: reads layer by layer, checks everything, then writes layer by layer."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moe_fused.checkpoints.safetensors_file import TensorSpec, as_bytes, safetensors_writer
from moe_fused.staging import staged_directory

from .config import B_LAYOUT, CONFIG, DETAILS, repattern, retarget
from .detect import MARKER
from .factors import DOWN, GATE, UP, Block, Factors, Scaling, fold, fuse, pad, split
from .layouts import LAYOUTS, Fused, Grouped, unprefixed
from .names import Layout, ScalingChoice
from .saved import WEIGHTS, SavedAdapter

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What a conversion does, found out by doing all of it but the writing.

    Attributes:
        source, target: layouts.
        layers, experts: how many.
        ranks: of the experts' projections, in the target.
        tensors: of the target.
        config: content of the target's ``adapter_config.json``.
        files: other files that are copied.
        notes: what else the user should know, a sentence each.
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


class _Conversion(SavedAdapter):
    """One adapter on its way to another layout.

    Tensors are read twice: once to find out whether all of it can be converted and how large the result is, and once to
    write it. In between only shapes are kept, as tensors on torch's meta device.
    """

    def __init__(
        self, source: Path, to: Layout, given: Layout | None, scaling: ScalingChoice | None, widen: bool
    ) -> None:
        super().__init__(source, "SOURCE", given)
        self.to = LAYOUTS[to]
        self.widen = widen
        self.fold = to is Layout.PER_EXPERT if scaling is None else scaling is ScalingChoice.FOLD
        interleaved = self.config.interleaved or Layout.GPT_OSS_INVERTED in (self.layout.layout, to)
        if interleaved and not (self.layout.fused and self.to.fused):
            raise ValueError(
                f"gate and up of gpt-oss take turns in gate_up_proj, no tool reads them apart: {to.value} is not possible "
                f"from {self.layout.layout.value}"
            )
        self.rank = 0  # that all LoRA gets; 0: each its own

    def convert(self, group: Grouped) -> Block:
        # Opened for each layer: what a mapped file has read stays in memory until it is closed.
        with safe_open(self.directory / WEIGHTS, "pt") as file:
            block = self.layout.read(group, self.config, file.get_tensor)
        if self.to.fused:
            return fuse(block, self.widen)
        down = block.projections.get(DOWN)
        return split(block, down.rank if down else self.config.rank, self.widen)

    def finish(self, block: Block) -> Block:
        """Scaling and rank as the target has them."""
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
        """A tensor that is none of experts, changed only where scaling and rank become those of the whole adapter."""
        tensor = self.file.get_tensor(key)
        module = self.others[key]
        if module is None:
            return tensor
        rank = self.config.rank_of(module)
        dim = 0 if "lora_A." in key or key.endswith("lora_embedding_A") else 1
        if tensor.dim() < 2 or tensor.shape[dim] != rank:
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)}, needed is rank {rank} of the config in dimension {dim}"
            )
        if not self.fold:
            return tensor
        if dim == 1:
            tensor = fold(tensor, self.config.scaling_of(module).value(rank))
        return pad(tensor, dim, self.rank)

    def tensors(self, blocks: Iterable[Block]) -> Iterator[tuple[str, torch.Tensor]]:
        for block in blocks:
            yield from self.to.write(self.finish(block))
            del block  # before the next one is read
        for key in self.others:
            yield key, self.other(key)

    def plan(self, progress: Progress) -> Plan:
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
        return Plan(
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
            how = "exactly" if exact else "rounded once to its dtype"
            notes.append(f"Scaling {', '.join(f'{value:.4g}' for value in sorted(values))} goes into lora_B, {how}.")
        if len(ranks) > 1:
            notes.append(f"Ranks {', '.join(map(str, sorted(ranks)))} become {self.rank}, filled up with zeros.")
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
                content.pop("peft_version", None)  # would tell the source's layout
            if self.to.grouped:
                content[B_LAYOUT] = "grouped_by_expert"
        return content

    def _files(self) -> tuple[list[str], list[str]]:
        """Names of files that go along, and of those that do not fit any more."""
        names = sorted(path.name for path in self.directory.iterdir() if path.is_file())
        left = [name for name in names if name.startswith(("optimizer.", "adapter_model.")) and name != WEIGHTS]
        return [name for name in names if name not in {CONFIG, WEIGHTS, *left}], left

    def write(self, plan: Plan, directory: Path, progress: Progress) -> None:
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


def _check_replaceable(source: Path, target: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless ``target`` is absent, or an adapter that may be replaced."""
    if target == source.resolve() or target in source.resolve().parents:
        raise FileExistsError(f"TARGET {target} is SOURCE or holds it: choose another path")
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"TARGET {target} exists: choose another path or give --overwrite")
    if not target.is_dir():
        raise FileExistsError(f"TARGET {target} exists and is not a directory: choose another path")
    content = sorted(target.iterdir())
    if content and not (target / CONFIG).is_file():
        raise FileExistsError(f"TARGET {target} has no {CONFIG}: --overwrite replaces adapters only")
    if inner := [path.name for path in content if path.is_dir()]:
        raise FileExistsError(f"TARGET {target} holds the directory {inner[0]}, which would be deleted: move it away")


def _no_progress(step: str, done: int, total: int) -> None:
    pass


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
) -> Plan:
    """Converts an adapter with LoRA on experts from one layout to another.

    At no time are more than one layer's tensors in memory. ``target`` appears when all of it is written.

    Args:
        source: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        target: directory to make.
        to: layout of the target.
        given: layout of the source, if it does not tell.
        scaling: ``FOLD`` multiplies every lora_B of the adapter with its scaling, fills all ranks up to the largest and
            writes alpha = r: right under every reader's rule for scaling. ``KEEP`` leaves alpha, rsLoRA and ranks as they
            are. By default ``FOLD`` for ``Layout.PER_EXPERT``, else ``KEEP``.
        widen: allow a rank larger than the source's, or zeros for a projection without LoRA, where the target cannot
            have the same function otherwise.
        overwrite: replace an adapter at ``target``.
        dry_run: read and check all, write nothing.
        progress: called with the step's name, the layers done and all layers.

    Returns:
        What was, or with ``dry_run`` would be, done.

    Raises:
        FileNotFoundError: ``source`` is not an adapter in safetensors.
        FileExistsError: ``target`` exists and may not be replaced.
        OSError: ``target`` cannot be written.
        ValueError: the source is wrong, mixed, or of an unknown layout; the target's layout cannot hold it exactly.
    """
    conversion = _Conversion(source, to, given, scaling, widen)

    def check(path: Path) -> None:
        _check_replaceable(source, path, overwrite)

    check(target.resolve())
    plan = conversion.plan(progress)
    if not dry_run:
        with staged_directory(target, "TARGET", check, plan.nbytes) as staging:
            conversion.write(plan, staging, progress)
    return plan
