"""The layouts of LoRA on experts in adapter files, a class for each: its keys, reading and writing."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from .config import LEAVES, AdapterConfig
from .factors import DOWN, GATE_UP, Block, Factors
from .names import Layout

Shapes = Mapping[str, tuple[int, ...]]
Load = Callable[[str], torch.Tensor]

_PREFIX = "base_model.model."
_PROJECTIONS = {leaf: name for name, leaf in LEAVES.items()}
_PER_EXPERT = re.compile(
    r"(?P<block>.+\.experts)\.(?P<expert>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)\.lora_(?P<factor>[AB])\.weight"
)
_FUSED = re.compile(r"(?P<block>.+\.experts)(?P<inner>\.base_layer)?\.lora_(?P<factor>[AB])\.weight")
_STACKED = re.compile(r"(?P<block>.+)\.(?P<leaf>gate_proj|up_proj|down_proj)\.lora_(?P<factor>[AB])\.weight")


class FactorRole(NamedTuple):
    """What a tensor of experts is: which factor of which projection, and of which expert if each has a tensor of its own."""

    block: str
    projection: str
    factor: str
    expert: int = 0


class Grouped(NamedTuple):
    """The tensors of a layer's experts in a file, each key by its role."""

    name: str
    keys: Mapping[FactorRole, str]
    projections: tuple[str, ...]


def unprefixed(name: str) -> str:
    """Returns ``name`` as PEFT's config has it, without the prefix of keys."""
    return name.removeprefix(_PREFIX)


class ExpertLayout(ABC):
    """A layout of LoRA on experts. ``write`` after ``read`` gives the same tensors under the same keys, bit for bit.

    Attributes:
        layout: the name of the layout.
        fused: whether gate and up are one projection.
    """

    fused = False

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @abstractmethod
    def locate(self, key: str, shapes: Shapes, config: AdapterConfig) -> FactorRole | None:
        """Returns the role of the tensor ``key``, or None if it does not belong to experts in this layout."""

    @abstractmethod
    def module(self, block: str, projection: str, expert: int) -> str:
        """Returns the name that PEFT's config has for the adapted module or parameter."""

    @abstractmethod
    def kind(self, projection: str) -> str:
        """Returns a regular expression for the names of the projection in all layers."""

    @abstractmethod
    def read(self, group: Grouped, config: AdapterConfig, load: Load) -> Block:
        """Reads a layer into the neutral form.

        Raises:
            ValueError: a tensor is missing, or its rank or size contradicts the config or the other tensors.
        """

    @abstractmethod
    def write(self, block: Block) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields keys and tensors of a layer. Its gate and up must be fused if and only if ``fused`` is true."""

    def modules(self, block: Block) -> Iterator[tuple[str, str]]:
        """Yields projection and name of every module or parameter that is adapted in ``block``."""
        for projection, factors in block.projections.items():
            for name in dict.fromkeys(
                self.module(unprefixed(block.name), projection, expert) for expert in range(factors.experts)
            ):
                yield projection, name

    def _pairs(self, group: Grouped) -> Iterator[tuple[str, int, str, str]]:
        """Yields projection, expert and the keys of both factors. Raises ValueError if one of them is missing."""
        for projection in group.projections:
            for expert in range(1 + max(role.expert for role in group.keys)):
                keys = [group.keys.get(FactorRole(group.name, projection, factor, expert)) for factor in "AB"]
                if keys[0] is None or keys[1] is None:
                    missing = "A" if keys[0] is None else "B"
                    other = keys[0] or keys[1] or next(iter(group.keys.values()))
                    what = f"lora_{missing} of {self.module(group.name, projection, expert)}"
                    raise ValueError(f"{what} is missing, although it belongs to {other}")
                yield projection, expert, keys[0], keys[1]


def _expect(condition: bool, key: str, shape: tuple[int, ...], need: str) -> None:
    if not condition:
        raise ValueError(f"{key} has shape {shape}, but needs {need}")


class PerExpert(ExpertLayout):
    """``experts.{i}.{gate,up,down}_proj.lora_{A,B}.weight``: an ordinary LoRA of every expert's linear layers."""

    def locate(self, key: str, shapes: Shapes, config: AdapterConfig) -> FactorRole | None:
        match = _PER_EXPERT.fullmatch(key)
        return match and FactorRole(match["block"], _PROJECTIONS[match["leaf"]], match["factor"], int(match["expert"]))

    def module(self, block: str, projection: str, expert: int) -> str:
        return f"{block}.{expert}.{LEAVES[projection]}"

    def kind(self, projection: str) -> str:
        return rf"experts\.\d+\.{LEAVES[projection]}"

    def read(self, group: Grouped, config: AdapterConfig, load: Load) -> Block:
        factors: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for projection, expert, key_a, key_b in self._pairs(group):
            a, b = load(key_a), load(key_b)
            module = unprefixed(self.module(group.name, projection, expert))
            first = unprefixed(self.module(group.name, projection, 0))
            rank = config.rank_of(module)
            if (rank, config.scaling_of(module)) != (config.rank_of(first), config.scaling_of(first)):
                raise ValueError(f"{key_a}: the config gives this expert another rank or alpha than {first}")
            stacks = factors.setdefault(projection, ([], []))
            for key, tensor, dim, stack in ((key_a, a, 0, stacks[0]), (key_b, b, 1, stacks[1])):
                shape = tuple(tensor.shape)
                _expect(
                    len(shape) == 2 and shape[dim] == rank, key, shape, f"rank {rank} of the config in dimension {dim}"
                )
                if stack:
                    _expect(
                        stack[0].shape == tensor.shape and stack[0].dtype == tensor.dtype,
                        key,
                        shape,
                        f"{tuple(stack[0].shape)} in {stack[0].dtype} like expert 0",
                    )
                stack.append(tensor)
        return Block(
            group.name,
            {
                projection: Factors(
                    torch.stack(a),
                    torch.stack(b),
                    config.scaling_of(unprefixed(self.module(group.name, projection, 0))),
                )
                for projection, (a, b) in factors.items()
            },
        )

    def write(self, block: Block) -> Iterator[tuple[str, torch.Tensor]]:
        for projection, factors in block.projections.items():
            for expert in range(factors.experts):
                module = self.module(block.name, projection, expert)
                yield f"{module}.lora_A.weight", factors.a[expert]
                yield f"{module}.lora_B.weight", factors.b[expert]


class Original(ExpertLayout):
    """``{gate,up,down}_proj.lora_{A,B}.weight`` beside the router, (E, r, in) and (E, out, r)."""

    def locate(self, key: str, shapes: Shapes, config: AdapterConfig) -> FactorRole | None:
        match = _STACKED.fullmatch(key)
        if not match or len(shapes[key]) != 3:  # with two dimensions, it is of a dense layer or a shared expert
            return None
        return FactorRole(f"{match['block']}.experts", _PROJECTIONS[match["leaf"]], match["factor"])

    def module(self, block: str, projection: str, expert: int) -> str:
        return f"{block.removesuffix('.experts')}.{LEAVES[projection]}"

    def kind(self, projection: str) -> str:
        return LEAVES[projection]

    def read(self, group: Grouped, config: AdapterConfig, load: Load) -> Block:
        projections = {}
        for projection, _, key_a, key_b in self._pairs(group):
            a, b = load(key_a), load(key_b)
            module = unprefixed(self.module(group.name, projection, 0))
            rank = config.rank_of(module)
            _expect(a.shape[1] == rank, key_a, tuple(a.shape), f"(E, {rank}, in) with the rank of the config")
            _expect(
                b.dim() == 3 and (b.shape[0], b.shape[2]) == (a.shape[0], rank),
                key_b,
                tuple(b.shape),
                f"({a.shape[0]}, out, {rank})",
            )
            projections[projection] = Factors(a, b, config.scaling_of(module))
        return Block(group.name, projections)

    def write(self, block: Block) -> Iterator[tuple[str, torch.Tensor]]:
        for projection, factors in block.projections.items():
            module = self.module(block.name, projection, 0)
            yield f"{module}.lora_A.weight", factors.a
            yield f"{module}.lora_B.weight", factors.b


class Fused(ExpertLayout):
    """PEFT's ``target_parameters``: ``experts.base_layer.lora_{A,B}`` is gate_up, ``experts.lora_{A,B}`` is down.

    If only one of them is adapted, there is no ``base_layer``, and only the config says which one it is. lora_A is (E·r, in)
    with the expert as the slowest index. lora_B is (out, ·) with experts and ranks in either order.

    Args:
        layout: the name of the layout.
        swapped: whether ``lora_A`` holds B (E·r, out), and ``lora_B`` holds A (in, ·).
        grouped: whether the expert is the slowest index in ``lora_B``, too.
    """

    fused = True

    def __init__(self, layout: Layout, swapped: bool, grouped: bool) -> None:
        super().__init__(layout)
        self.swapped = swapped
        self.grouped = grouped

    def locate(self, key: str, shapes: Shapes, config: AdapterConfig) -> FactorRole | None:
        match = _FUSED.fullmatch(key)
        if not match:
            return None
        if match["inner"]:
            return FactorRole(match["block"], GATE_UP, match["factor"])
        if any(f"{match['block']}.base_layer.lora_{factor}.weight" in shapes for factor in "AB"):
            return FactorRole(match["block"], DOWN, match["factor"])
        targeted = [
            name
            for name in (GATE_UP, DOWN)
            if config.adapts_parameter(self.module(unprefixed(match["block"]), name, 0))
        ]
        if len(targeted) != 1:
            raise ValueError(
                f"{key} has no base_layer beside it, and target_parameters {config.parameters} do not tell whether it "
                "is gate_up_proj or down_proj"
            )
        return FactorRole(match["block"], targeted[0], match["factor"])

    def module(self, block: str, projection: str, expert: int) -> str:
        return f"{block}.{LEAVES[projection]}"

    def kind(self, projection: str) -> str:
        return rf"experts\.{LEAVES[projection]}"

    def read(self, group: Grouped, config: AdapterConfig, load: Load) -> Block:
        projections = {}
        for projection, _, key_a, key_b in self._pairs(group):
            slow, other = load(key_a), load(key_b)
            module = unprefixed(self.module(group.name, projection, 0))
            rank = config.rank_of(module)
            _expect(
                slow.dim() == 2 and slow.shape[0] % rank == 0,
                key_a,
                tuple(slow.shape),
                f"(E·{rank}, ·) with the rank of the config",
            )
            experts = slow.shape[0] // rank
            _expect(
                other.dim() == 2 and other.shape[1] == slow.shape[0], key_b, tuple(other.shape), f"(·, {slow.shape[0]})"
            )
            slow = slow.reshape(experts, rank, -1)
            if self.grouped:
                other = other.reshape(-1, experts, rank).permute(1, 0, 2)
            else:
                other = other.reshape(-1, rank, experts).permute(2, 0, 1)
            a, b = (other.mT, slow.mT) if self.swapped else (slow, other)
            projections[projection] = Factors(a, b, config.scaling_of(module))
        return Block(group.name, projections)

    def write(self, block: Block) -> Iterator[tuple[str, torch.Tensor]]:
        for projection, factors in block.projections.items():
            inner = ".base_layer" if projection == GATE_UP and DOWN in block.projections else ""
            slow, other = (factors.b.mT, factors.a.mT) if self.swapped else (factors.a, factors.b)
            yield f"{block.name}{inner}.lora_A.weight", slow.reshape(-1, slow.shape[2])
            order = (1, 0, 2) if self.grouped else (1, 2, 0)
            yield f"{block.name}{inner}.lora_B.weight", other.permute(order).reshape(other.shape[1], -1)


# All layouts. There is one instance of each, because they have no state.
LAYOUTS: dict[Layout, ExpertLayout] = {
    Layout.PER_EXPERT: PerExpert(Layout.PER_EXPERT),
    Layout.ORIGINAL: Original(Layout.ORIGINAL),
    Layout.PEFT_FUSED: Fused(Layout.PEFT_FUSED, swapped=False, grouped=False),
    Layout.PEFT_SWAPPED: Fused(Layout.PEFT_SWAPPED, swapped=True, grouped=False),
    # The bytes are those of PEFT_SWAPPED, but gate and up alternate here and cannot be separated.
    Layout.GPT_OSS_INVERTED: Fused(Layout.GPT_OSS_INVERTED, swapped=True, grouped=False),
    Layout.UNSLOTH_GROUPED: Fused(Layout.UNSLOTH_GROUPED, swapped=False, grouped=True),
    Layout.UNSLOTH_SWAPPED: Fused(Layout.UNSLOTH_SWAPPED, swapped=True, grouped=True),
}
