"""Records that kernels take as arguments.

Each record is a NamedTuple, whose fields Triton reads by name. A record of tensors is an ordinary argument: a launch puts
tensors into it, and the kernel sees their pointers. A record of constants, with fields in capitals, is one ``tl.constexpr``
argument. A kernel that needs one more value takes one more field, and no call changes.

Shapes use the letters of ``ARCHITECTURE.md``: T tokens, S routed rows, E experts, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# ----------------------------------------------------------------------------------------------------- records of tensors


class RoutingTensors(NamedTuple):
    """Which rows belong to which expert, as the routing kernels wrote it.

    Attributes:
        offsets: (E+1,) int32; the rows of expert e are offsets[e]:offsets[e+1].
        row_to_slot: (S,) int32; read where rows are gathered from tokens.
        tile_expert: (tiles,) int32; the expert of a row tile, E for rows of no expert, -1 for an unused tile.
        tile_row: (tiles,) int32; the first row of a row tile.
    """

    offsets: Any
    row_to_slot: Any
    tile_expert: Any
    tile_row: Any


class LowRankTensors(NamedTuple):
    """The factors of an adapter's product left[row] · right[expert of row]ᵀ.

    Attributes:
        left: (S, R), or (S, 2·R) with the gate's columns before the up's; from this product's first column on.
        right: (E, N, R); from this product's first feature on.
    """

    left: Any
    right: Any


class PackedTensors(NamedTuple):
    """A stack of 4-bit weights.

    Attributes:
        packed: (E, out·in/2) uint8, two weights a byte.
        scales: a record that belongs to the format.
        code: (16,) fp32, the values of the nibbles.
    """

    packed: Any
    scales: Any
    code: Any


class MatrixTensors(NamedTuple):
    """One 4-bit matrix of a product of few rows.

    Attributes:
        weight: ``PackedTensors`` of a stack of one matrix (1, N, K).
        bias: (N,).
        out: (T, N) out.
    """

    weight: Any
    bias: Any
    out: Any


class Outputs(NamedTuple):
    """What an up projection writes; a plain product writes ``h`` alone.

    Attributes:
        h: (S, I or N).
        gate_up: (S, COLUMNS), before the gate.
    """

    h: Any
    gate_up: Any


class BackwardTensors(NamedTuple):
    """What goes through the epilogue of ``down_backward``.

    Attributes:
        gate_up: (S, COLUMNS), as the forward saved it.
        weights: (S,) routing weights by slot.
        grad_gate_up: (S, COLUMNS) out.
        weighted_h: (S, I) out.
        grad_weights: (S, PARTS) fp32 out, by slot: parts of the routing weights' gradient.
    """

    gate_up: Any
    weights: Any
    grad_gate_up: Any
    weighted_h: Any
    grad_weights: Any


# --------------------------------------------------------------------------------------------------- records of constants


class DenseLayout(NamedTuple):
    """How a dense stack (E, N, K) is read.

    Attributes:
        STRIDE_E, STRIDE_N, STRIDE_K: in elements.
        MODE: "pointer", or how a descriptor sees the stack: "rows" of (E·N, K), "columns" of (E·K, N).
    """

    STRIDE_E: int
    STRIDE_N: int
    STRIDE_K: int
    MODE: str


class RowsLayout(NamedTuple):
    """How the rows of a product's left side are read, and whether the product is scaled.

    Attributes:
        STRIDE: from a row to the next.
        GATHER: rows come from the tokens of their slots.
        DESCRIPTOR: rows are read through a descriptor.
        SCALED: the product is multiplied with a factor.
    """

    STRIDE: int
    GATHER: bool
    DESCRIPTOR: bool = False
    SCALED: bool = False


class GateLayout(NamedTuple):
    """The gate, and how gate and up features stand in the weights and in gate_up.

    Attributes:
        I: features of the product's output.
        COLUMNS: of gate_up: 2·I when gated, else I.
        COLUMN_STRIDE: from a gate feature to the next.
        UP_OFFSET: from a gate feature to its up feature.
        ACTIVATION: a name of ``activations.ACTIVATIONS``; "none" for a plain product.
        GATED: there are gate and up features.
        ALPHA, LIMIT: of ``swiglu_oai``.
    """

    I: int  # noqa: E741
    COLUMNS: int
    COLUMN_STRIDE: int
    UP_OFFSET: int
    ACTIVATION: str
    GATED: bool
    ALPHA: float
    LIMIT: float


class OutputLayout(NamedTuple):
    """How ``Outputs`` lie, and which are wanted.

    Attributes:
        H_STRIDE: of the rows of h, which may have more columns than this launch computes.
        GATE_UP_STRIDE: of the rows of gate_up.
        GATE_UP_OFFSET: from a gate column of gate_up to its up column.
        SAVE_H, SAVE_GATE_UP: which of them is written.
    """

    H_STRIDE: int
    GATE_UP_STRIDE: int
    GATE_UP_OFFSET: int
    SAVE_H: bool
    SAVE_GATE_UP: bool


class BackwardLayout(NamedTuple):
    """How ``BackwardTensors`` lie, and which are wanted.

    Attributes:
        H_STRIDE: of the rows of weighted_h, which may have more columns than this launch computes.
        PARTS: columns of grad_weights.
        FIRST_PART: the column of this launch's first column tile.
        SAVE_WEIGHTED_H: weighted_h is written.
        IN_PLACE: grad_gate_up is gate_up.
    """

    H_STRIDE: int
    PARTS: int
    FIRST_PART: int
    SAVE_WEIGHTED_H: bool
    IN_PLACE: bool


class LowRankLayout(NamedTuple):
    """How ``LowRankTensors`` lie.

    Attributes:
        RANK: R, or 0 where there is no adapter.
        BLOCK_R: ranks that are multiplied at a time.
        LEFT_STRIDE: of the rows of left.
        UP_COLUMN: the first column of left that belongs to the up features; 0 where gate and up share all columns.
        STRIDE_E, STRIDE_N, STRIDE_R: of right.
    """

    RANK: int
    BLOCK_R: int
    LEFT_STRIDE: int
    UP_COLUMN: int
    STRIDE_E: int
    STRIDE_N: int
    STRIDE_R: int


class Tile(NamedTuple):
    """The tile of a program.

    Attributes:
        M, N, K: rows, columns, and elements of the inner dimension a step; a gated product has 2·N columns.
        PRECISION: of tl.dot in fp32.
        HALF: an expert's last tile is computed at half the height where its rows fit in that.
        SLICES: parts of the tile that the epilogue works on one after the other; a power of two.
    """

    M: int
    N: int
    K: int
    PRECISION: str
    HALF: bool = False
    SLICES: int = 1


class FewRowsTile(NamedTuple):
    """The tile of a program of few rows. It has a warp for each part of the columns and each part of the inner dimension.

    Attributes:
        M: rows, from 8 on.
        N: columns of a part.
        K: elements of the inner dimension a step, in each of its parts.
        PARTS: parts of the columns.
        SPLIT: parts of the inner dimension, whose products are summed.
        PRECISION: of tl.dot in fp32.
        PREFETCH: a program asks for all of its weights at once, where words are dequantized in PTX.
    """

    M: int
    N: int
    K: int
    PARTS: int
    SPLIT: int
    PRECISION: str
    PREFETCH: bool


class MatrixLayout(NamedTuple):
    """One matrix of ``few_rows_kernel``.

    Attributes:
        N: out features; 0 where there is no such matrix.
        FORMAT: ``FormatCode``.
        HAS_BIAS: a bias is added.
    """

    N: int
    FORMAT: Any
    HAS_BIAS: bool


class ByteRuns(NamedTuple):
    """Which bytes of an expert are dequantized: groups of runs, as many as it takes.

    Attributes:
        TOTAL: bytes in all.
        SIZE: bytes of a run.
        PER_GROUP: runs of a group.
        START: the first byte of the first run.
        STRIDE, GROUP_STRIDE: bytes from a run to the next of its group, and from a group to the next.
    """

    TOTAL: int
    SIZE: int
    PER_GROUP: int = 1
    START: int = 0
    STRIDE: int = 0
    GROUP_STRIDE: int = 0


class FormatCode(NamedTuple):
    """A 4-bit format as kernels see it: its device functions and constants.

    Attributes:
        prepare: ``(scales, expert, start, K, FORMAT)`` to what the scales of K weights from each of ``start`` (rows,) on
            share, loaded once before a loop; None if there is nothing.
        block_scale: ``(scales, expert, block, prepared, FORMAT)`` to the fp32 scale of each ``block``, of any shape.
        pair: ``(code, packed, scale, dtype, FORMAT)`` to the weights at even and at odd places, from loaded elements and the
            scale of each.
        in_order: the same arguments, with TRANSPOSED at the end, to the weights side by side.
        LAYOUT: what ``prepare`` and ``block_scale`` want to know of the stack; a record that belongs to the format.
        BLOCK: weights that share a scale.
        RUN: weights of a row that have one scale, of those that a tile reads side by side.
        PER_ELEMENT: weights that a loaded element holds: 8 in a 32-bit word, or 2 in a byte.
        HIGH_FIRST: a byte's first weight is in its high nibble.
        TABLE: PTX from a scale to the table of its 16 weights; "" where bytes are looked up in ``code``.
        PAIR_PTX, IN_ORDER_PTX: PTX from a word and a table to eight weights, even and odd apart, or in order.
        digest: of the device functions' source, which Triton's cache on disk would not see inside a record.
    """

    prepare: Any
    block_scale: Any
    pair: Any
    in_order: Any
    LAYOUT: Any
    BLOCK: int
    RUN: int
    PER_ELEMENT: int
    HIGH_FIRST: bool
    TABLE: str
    PAIR_PTX: str
    IN_ORDER_PTX: str
    digest: str = ""
