"""The launches that spill registers, or that are alone on a multiprocessor, and why they are best nevertheless.

``test_compile_matrix.py`` fails for any other launch in 16 bits on a GPU of ``TWO_PROGRAMS``. The percentages are
predictions of ``python -m benchmarks.choose``, against the best configuration that neither spills nor is alone.
"""

from __future__ import annotations

from dataclasses import dataclass

# The targets whose default configurations are chosen so that two programs fit. Those of the H100 and H200 were measured.
TWO_PROGRAMS = (80, 86, 87, 89, 100, 103, 110, 120, 121, "gfx942")


@dataclass(frozen=True)
class Accepted:
    """Launches that may spill, or be alone on a multiprocessor.

    Attributes:
        archs: The GPUs.
        stages: How the names of their stages begin.
        height: The tile height.
        programs: The fewest programs of them on a multiprocessor.
        spills: The most bytes of spills a thread.
        why: What is worse about the alternative.
    """

    archs: tuple[int | str, ...]
    stages: tuple[str, ...]
    height: int
    programs: int
    spills: int
    why: str

    def allows(self, arch: int | str, stage: str, height: int, programs: int, spills: int) -> bool:
        """Whether this is about a launch, and allows what it takes."""
        concerned = arch in self.archs and height == self.height and stage.startswith(self.stages)
        return concerned and programs >= self.programs and spills <= self.spills


ACCEPTED = (
    Accepted(
        (80, 87), ("up, adapter",), 128, 2, 24,
        "the factors of gate and up apart spill 24 bytes once a program; tiles of 32 columns do not, and take 12 % longer",
    ),
    Accepted(
        (80, 87), ("down backward",), 128, 2, 8,
        "8 bytes are spilled once a program; tiles of 64 columns spill nothing, and take 13 % longer",
    ),
    Accepted(
        (80, 86, 87, 89, 120, 121, "gfx942"), ("up_4bit, adapter",), 128, 1, 0,
        "the factors of gate and up apart, which adapters in PEFT's own layout do not have, need eight warps with more than "
        "128 registers; with one factor two programs fit",
    ),
    Accepted(
        (100, 103, 110), ("up, ",), 128, 1, 16,
        "two tiles of 128 columns fill the shared memory, and where gate and up features alternate they spill up to 16 "
        "bytes; half as wide ones, of which two fit, take 28 % longer",
    ),
    Accepted(
        (100, 103, 110), ("down backward, adapter", "down backward_4bit, adapter"), 128, 1, 0,
        "the adapter's product takes the registers of the second program; tiles of 64 columns take 46 % longer over dense "
        "weights and 21 % over 4-bit ones",
    ),
    Accepted(
        ("gfx942",), ("down backward", ), 128, 1, 0,
        "the epilogue takes two registers more than half of them; tiles of 64 columns take 34 % longer",
    ),
)  # fmt: skip
