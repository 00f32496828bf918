"""The neutral form of LoRA on experts, and operations on it that do not change what it computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

GATE_UP, GATE, UP, DOWN = "gate_up", "gate", "up", "down"
PROJECTIONS = (GATE_UP, GATE, UP, DOWN)


@dataclass(frozen=True)
class Scaling:
    """The number that the product of the factors is multiplied by: alpha / rank, or alpha / √rank with rsLoRA."""

    alpha: float
    rslora: bool

    def value(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def at(self, old: int, new: int) -> Scaling:
        """Returns the scaling that has the same value at rank ``new`` as this one has at rank ``old``."""
        if old == new:
            return self
        alpha = self.alpha * (math.sqrt(new / old) if self.rslora else new / old)
        # Roots of two that cancel leave a rounding error, which an integer should not have.
        whole = round(alpha)
        return Scaling(whole if math.isclose(alpha, whole, rel_tol=1e-12) else alpha, self.rslora)


@dataclass(frozen=True)
class Factors:
    """LoRA of one projection of all experts in a layer: ``W + scaling · b @ a``.

    Attributes:
        a: (E, rank, in).
        b: (E, out, rank).
        scaling: the scaling at the rank of ``a`` and ``b``.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: Scaling

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def experts(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Block:
    """LoRA of the experts in a layer.

    Attributes:
        name: the experts' module, with the prefix of the adapter's keys: ``base_model.model.….mlp.experts``.
        projections: the factors of the adapted projections: of "down", and of "gate_up" or "gate" and "up".
    """

    name: str
    projections: Mapping[str, Factors] = field(default_factory=dict)


def fold(b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns ``scaling · b``, rounded once to the dtype of ``b``, or ``b`` itself if ``scaling`` is 1."""
    return b if scaling == 1 else (b.double() * scaling).to(b.dtype)


def pad(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Appends zeros to ``tensor`` so that ``dim`` has ``size``. These are ranks that contribute nothing."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def fuse(block: Block, widen: bool) -> Block:
    """Joins gate and up under one pair of factors, with one ``a`` for both.

    Args:
        block: the layer as read. It is returned unchanged if gate and up are not separate.
        widen: whether gate and up that have different ``a`` may get rank 2r, with a block-diagonal ``b``, and whether zeros
            may stand for one of them if only the other is adapted.

    Raises:
        ValueError: widening would be needed and is not allowed, or scalings or ranks differ.
    """
    separate = {name: block.projections[name] for name in (GATE, UP) if name in block.projections}
    if not separate:
        return block
    rest = {name: factors for name, factors in block.projections.items() if name not in separate}
    if len(separate) == 1:
        ((name, only),) = separate.items()
        if not widen:
            raise ValueError(
                f"{block.name}: only {name}_proj is adapted, a fused gate_up_proj adapts both "
                "(--widen adds zeros for the other)"
            )
        zeros = torch.zeros_like(only.b)
        b = torch.cat([only.b, zeros] if name == GATE else [zeros, only.b], 1)
        return Block(block.name, {GATE_UP: Factors(only.a, b, only.scaling), **rest})
    gate, up = separate[GATE], separate[UP]
    if (gate.scaling, gate.rank) != (up.scaling, up.rank):
        raise ValueError(
            f"{block.name}: gate_proj has rank {gate.rank} and alpha {gate.scaling.alpha}, up_proj rank {up.rank} and "
            f"alpha {up.scaling.alpha}: factors for both need one rank and one alpha"
        )
    if torch.equal(gate.a, up.a):
        return Block(block.name, {GATE_UP: Factors(gate.a, torch.cat([gate.b, up.b], 1), gate.scaling), **rest})
    if not widen:
        raise ValueError(
            f"{block.name}: gate_proj and up_proj have different lora_A, a fused gate_up_proj has one of rank "
            f"{gate.rank} for both (--widen makes it exact with rank {2 * gate.rank})"
        )
    a = torch.cat([gate.a, up.a], 1)
    b = torch.cat([pad(gate.b, 2, a.shape[1]), torch.cat([torch.zeros_like(up.b), up.b], 2)], 1)
    return Block(block.name, {GATE_UP: Factors(a, b, gate.scaling.at(gate.rank, 2 * gate.rank)), **rest})


def split(block: Block, rank: int, widen: bool) -> Block:
    """Splits gate_up into gate and up with separate factors.

    Args:
        block: the layer as read. It is returned unchanged if gate and up are separate.
        rank: the rank of the other factors. A gate_up of twice this rank with a block-diagonal ``b`` gets this rank back.
        widen: whether gate and up may keep twice this rank if ``b`` is no longer block-diagonal.

    Raises:
        ValueError: widening would be needed and is not allowed, or the number of out features is odd.
    """
    if GATE_UP not in block.projections:
        return block
    factors = block.projections[GATE_UP]
    rest = {name: other for name, other in block.projections.items() if name != GATE_UP}
    half, odd = divmod(factors.b.shape[1], 2)
    if odd:
        raise ValueError(f"{block.name}: {factors.b.shape[1]} out features are not those of gate_proj and up_proj")
    gate_b, up_b = factors.b[:, :half], factors.b[:, half:]
    if factors.rank == 2 * rank:
        if not gate_b[..., rank:].any() and not up_b[..., :rank].any():
            scaling = factors.scaling.at(factors.rank, rank)
            gate = Factors(factors.a[:, :rank], gate_b[..., :rank], scaling)
            up = Factors(factors.a[:, rank:], up_b[..., rank:], scaling)
            return Block(block.name, {GATE: gate, UP: up, **rest})
        if not widen:
            raise ValueError(
                f"{block.name}: gate_up_proj has rank {factors.rank}, twice that of the rest, and in its lora_B the blocks "
                f"off the diagonal are trained: gate_proj and up_proj cannot have rank {rank} each "
                f"(--widen gives them rank {factors.rank})"
            )
    gate = Factors(factors.a, gate_b, factors.scaling)
    up = Factors(factors.a, up_b, factors.scaling)
    return Block(block.name, {GATE: gate, UP: up, **rest})


def complete(block: Block) -> Block:
    """Gives gate, up and down factors of zeros where they have none, because other tools read the three only together.

    Args:
        block: a layer with gate and up apart.
    """
    present = next(iter(block.projections.values()))
    outs, ins = present.b.shape[1], present.a.shape[2]
    if DOWN in block.projections:
        other = block.projections[DOWN]
        outs, ins = other.a.shape[2], other.b.shape[1]

    def zeros(outs: int, ins: int) -> Factors:
        a = present.a.new_zeros(present.experts, present.rank, ins)
        return Factors(a, present.b.new_zeros(present.experts, outs, present.rank), present.scaling)

    missing = {GATE: (outs, ins), UP: (outs, ins), DOWN: (ins, outs)}
    return Block(block.name, {name: block.projections.get(name) or zeros(*sizes) for name, sizes in missing.items()})
