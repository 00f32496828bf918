"""The GPUs that launch configurations are chosen for: families of GPUs, and the limits of each GPU.

A *target* is one GPU model: its compute capability (or gfx name) and the shared memory that a program may use. A *family* is
a group of targets that run the same instructions well, so that what was measured on one of them is a good choice for the
others. ``FAMILIES`` has one line for each family and ``TARGETS`` one line for each known GPU; adding a GPU is adding its
line. A GPU that is not listed gets the family of the nearest relative and the shared memory that its driver reports.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

KIB = 1024


@dataclass(frozen=True)
class Family:
    """A group of GPUs that share the analytic defaults and a table of measurements.

    Attributes:
        name: also the name of the family's table, ``configs/<name>.json``.
        descriptors: the default configurations load through tensor descriptors (TMA).
        large_tiles: the default tiles of many rows are made for tensor cores that read operands from shared memory, and for
            more than 200 KiB of it.
        tensor_memory: its tensor cores keep sums in a memory of their own, which leaves registers for a second program.
        from_registers: its tensor cores read operands from registers, so that tiles have few warps with many registers each.
        most_stages: the most pipeline stages of a default configuration, or None for no limit.
    """

    name: str
    descriptors: bool = False
    large_tiles: bool = False
    tensor_memory: bool = False
    from_registers: bool = False
    most_stages: int | None = None


FAMILIES = {
    family.name: family
    for family in (
        Family("ampere", from_registers=True),
        # Ada has the tensor-core instructions and the shared memory of the smaller Ampere GPUs.
        Family("ampere-consumer", from_registers=True),
        Family("hopper", descriptors=True, large_tiles=True),
        Family("blackwell", descriptors=True, large_tiles=True, tensor_memory=True),
        # Compute capability 12.x has descriptors too, but whether they pay there has not been measured: they are allowed,
        # and the defaults do without. Its tensor cores read registers, as Ampere's do.
        Family("blackwell-consumer", from_registers=True),
        Family("cdna3", most_stages=2),
        Family("xpu"),
    )
}


@dataclass(frozen=True)
class Target:
    """The properties of a GPU that the choice of a configuration depends on.

    Attributes:
        backend: "cuda", "hip" or "xpu".
        arch: compute capability as 10·major + minor, or the gfx name, or "xpu".
        shared_memory: bytes a program may use.
    """

    backend: str
    arch: int | str
    shared_memory: int

    def __hash__(self) -> int:  # every launch asks; the hash of all fields takes twice as long
        return hash(self.arch)

    @property
    def family(self) -> Family:
        """The family of this GPU."""
        return family_of(self.arch)

    @property
    def has_descriptors(self) -> bool:
        """Whether the hardware has tensor descriptors (TMA)."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 90


# The shared memory is what CUDA calls the opt-in limit of a block; a driver reports the same on a GPU of that kind.
_KNOWN = (
    (Target("cuda", 80, 163 * KIB), "ampere"),  # A100, A30
    (Target("cuda", 86, 99 * KIB), "ampere-consumer"),  # A10, A40, RTX 3090
    (Target("cuda", 87, 163 * KIB), "ampere"),  # Jetson Orin
    (Target("cuda", 89, 99 * KIB), "ampere-consumer"),  # L4, L40S, RTX 4090
    (Target("cuda", 90, 227 * KIB), "hopper"),  # H100, H200, GH200
    (Target("cuda", 100, 227 * KIB), "blackwell"),  # B200, GB200
    (Target("cuda", 103, 227 * KIB), "blackwell"),  # B300, GB300
    (Target("cuda", 110, 227 * KIB), "blackwell"),  # Jetson Thor, which CUDA 12 calls 10.1
    (Target("cuda", 120, 99 * KIB), "blackwell-consumer"),  # RTX 5090, RTX PRO 6000
    (Target("cuda", 121, 99 * KIB), "blackwell-consumer"),  # GB10 (DGX Spark)
    (Target("hip", "gfx942", 64 * KIB), "cdna3"),  # MI300X, MI325X
    (Target("xpu", "xpu", 128 * KIB), "xpu"),
)
TARGETS: dict[int | str, Target] = {target.arch: target for target, _ in _KNOWN}
_FAMILY_NAMES: dict[int | str, str] = {target.arch: name for target, name in _KNOWN}


@functools.cache
def nearest_relative(arch: int | str) -> Target:
    """The known target that ``arch`` is treated as: itself, or the nearest relative of a GPU that nobody has listed.

    Compute capabilities are compared within a major version; between two that are equally near, the one with less shared
    memory counts. A major version that is newer than all known ones counts as the newest family, whose defaults need
    the least of the hardware, and one that is older as the smallest Ampere GPU. Every AMD GPU counts as CDNA3.
    """
    if arch in TARGETS:
        return TARGETS[arch]
    if isinstance(arch, str):
        return TARGETS["gfx942" if arch.startswith("gfx") else "xpu"]
    capabilities = [known for known in TARGETS if isinstance(known, int)]
    same_major = [known for known in capabilities if known // 10 == arch // 10]
    if not same_major:
        return TARGETS[max(capabilities) if arch > max(capabilities) else 86]
    return TARGETS[min(same_major, key=lambda known: (abs(known - arch), TARGETS[known].shared_memory))]


@functools.cache
def family_of(arch: int | str) -> Family:
    """The family of a compute capability (10·major + minor) or a gfx name, also of one that is not in ``TARGETS``."""
    return FAMILIES[_FAMILY_NAMES[nearest_relative(arch).arch]]


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target that describes ``device``; a CPU (Triton's interpreter) counts as compute capability 8.0."""
    if device.type == "xpu":
        return TARGETS["xpu"]
    if device.type == "cpu":
        return TARGETS[80]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        # The name ends in features that are switched on or off, as in "gfx942:sramecc+:xnack-".
        name = getattr(properties, "gcnArchName", "gfx942").partition(":")[0]
        return replace(nearest_relative(name), arch=name)
    arch = properties.major * 10 + properties.minor
    relative = nearest_relative(arch)
    # Not every build of torch says how much shared memory a program may ask for.
    shared: int = getattr(properties, "shared_memory_per_block_optin", relative.shared_memory)
    return replace(relative, arch=arch, shared_memory=shared)
