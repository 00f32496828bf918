"""The data sheets of GPUs: what ``predict`` and ``simulate_gpus`` know of cards that nobody here has.

The figures are those that the makers publish: NVIDIA's data sheets of L4, A10, A100, L40S, H100, H200 and HGX B200, its
whitepapers on the architectures GA102 (RTX 3090), Ada (RTX 4090) and RTX Blackwell (RTX 5090), and AMD's data sheet of the
MI300X. Products are dense ones in bf16 with sums in fp32: a data sheet that gives the rate with sparsity counts half, and on
GeForce cards sums in fp32 halve the rate of the tensor cores. NVIDIA publishes no clock of the B200; 1.85 GHz is the clock
at which its tensor cores reach the published rate.

What a multiprocessor holds is in ``tests/kernel/offline_compile.py``, from NVIDIA's table of compute capabilities and AMD's
manual of CDNA3.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_fused.benchmark.layers import Ceilings

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it.

    Attributes:
        name: What users call it.
        arch: The compute capability as 10·major + minor, or the gfx name.
        gib: The nominal memory in GiB.
        ceilings: Bytes per second of the memory, and operations per second of dense bf16 products with sums in fp32.
        multiprocessors: The number of multiprocessors, which AMD calls compute units.
        clock: The boost clock in Hz.
    """

    name: str
    arch: int | str
    gib: int
    ceilings: Ceilings
    multiprocessors: int
    clock: float


def _card(
    name: str, arch: int | str, gib: int, gigabytes: float, teraflops: float, multiprocessors: int, megahertz: float
) -> Card:
    return Card(name, arch, gib, Ceilings(gigabytes * GIGA, teraflops * TERA), multiprocessors, megahertz * 1e6)


CARDS = (
    _card("L4", 89, 24, 300, 121, 58, 2040),
    _card("A10", 86, 24, 600, 125, 72, 1695),
    _card("RTX 3090", 86, 24, 936, 71, 82, 1695),
    _card("RTX 4090", 89, 24, 1008, 165, 128, 2520),
    _card("RTX 5090", 120, 32, 1792, 209.5, 170, 2407),
    _card("A100", 80, 80, 2039, 312, 108, 1410),
    _card("L40S", 89, 48, 864, 362, 142, 2520),
    _card("B200", 100, 180, 8000, 2250, 148, 1850),
    _card("MI300X", "gfx942", 192, 5300, 1307, 304, 2100),
)
# What was measured: with these cards the predictions are fitted and checked.
MEASURED_CARDS = (
    _card("H100", 90, 80, 3350, 989, 132, 1830),
    _card("H200", 90, 141, 4800, 989, 132, 1830),
)
BY_NAME = {card.name: card for card in (*CARDS, *MEASURED_CARDS)}
