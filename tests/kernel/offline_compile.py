"""Compiles the kernels' real launches for any GPU, on a machine without one.

A stage of ``launch`` is called on meta tensors while ``JITFunction.run`` compiles for the wanted target instead of
launching, so what is checked is what a user's call would compile: same arguments, specialisation and configuration.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.kernel.machine import module


@dataclass(frozen=True)
class Resources:
    """What a compiled launch takes: bytes of shared memory, registers a thread, bytes of spills a thread, and warps.

    And how many of its instructions store a single 16-bit number, where eight side by side fit into one: of NVIDIA GPUs.
    ``programs`` is how many programs a multiprocessor (an AMD compute unit) holds at a time.
    """

    kernel: str
    shared: int
    registers: int
    spills: int
    warps: int
    programs: int
    narrow_stores: int = 0


# Threads that a multiprocessor holds, by compute capability; 2048 elsewhere.
_MOST_THREADS = {86: 1536, 87: 1536, 89: 1536, 110: 1536, 101: 1536, 120: 1536, 121: 1536}
_REGISTERS = 65536  # of a multiprocessor, 32 bits each
_RESERVED = 1024  # bytes of shared memory that CUDA keeps of each program
_TENSOR_MEMORY = 512  # columns of a multiprocessor's memory of sums, on data-center Blackwell GPUs


def programs(arch: int | str, limit: int, shared: int, registers: int, warps: int, tensor_memory: int = 0) -> int:
    """How many programs fit a multiprocessor at a time: by shared memory, registers, threads and tensor memory.

    Args:
        limit: bytes of shared memory that a single program may use, as in ``tuning.Target``.
        shared, registers, warps: what a program takes: bytes, registers a thread, warps (wavefronts on AMD GPUs).
        tensor_memory: columns of tensor memory that it takes.
    """
    if not isinstance(arch, int):
        # A compute unit has 4 SIMDs of 512 registers a lane, given out by eights, and holds 8 wavefronts on each.
        each = math.ceil(warps / 4)
        waves = min(8, 512 // (8 * math.ceil(max(registers, 1) / 8)))
        return min(waves // each, limit // max(shared, 1))
    # Registers are given out by 256 to a warp, a quarter of them to each of four schedulers.
    of_warp = 256 * math.ceil(32 * registers / 256)
    by_registers = 4 * (_REGISTERS // 4 // of_warp) // warps
    by_threads = _MOST_THREADS.get(arch, 2048) // (32 * warps)
    fitting = [by_registers, by_threads, (limit + _RESERVED) // (shared + _RESERVED)]
    return min(*fitting, *([_TENSOR_MEMORY // tensor_memory] if tensor_memory else []))


# Thor by the name that CUDA 12 has for it, which the assembler of Triton 3.6 is part of.
CUDA_12_NAMES = {110: 101}


@functools.cache
def _assembler_help() -> str:
    """What the assembler for Blackwell says about its options, with the names of the GPUs that it knows.

    Triton 3.5 has one assembler for all GPUs.
    """
    knobs = triton.knobs.nvidia
    assembler = getattr(knobs, "ptxas_blackwell", knobs.ptxas).path
    return subprocess.run([assembler, "--help"], capture_output=True, text=True, check=True).stdout


def gpu_target(arch: int | str) -> GPUTarget:
    """The compiler's target for a compute capability (90) or a gfx name."""
    if not isinstance(arch, int):
        return GPUTarget("hip", arch, 64)
    if arch in CUDA_12_NAMES and f"sm_{arch}" not in _assembler_help():
        arch = CUDA_12_NAMES[arch]
    return GPUTarget("cuda", arch, 32)


def source_of(function: JITFunction, args: tuple, kwargs: dict, target: GPUTarget) -> tuple[ASTSource, dict]:
    """What Triton compiles for a launch with ``args``, and the options with which it does."""
    backend = make_backend(target)
    kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attrs = function._pack_args(backend, kwargs, bound, specialization, options)
    return ASTSource(function, signature, constants, attrs), options.__dict__


def _compile(function: JITFunction, args: tuple, kwargs: dict, target: GPUTarget) -> triton.compiler.CompiledKernel:
    source, options = source_of(function, args, kwargs, target)
    return triton.compile(source, target=target, options=options)


def _resources(kernel: triton.compiler.CompiledKernel, name: str, target: GPUTarget, arch: int | str) -> Resources:
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    columns = getattr(kernel.metadata, "tmem_size", 0) or 0

    def fitting(registers: int) -> int:
        return programs(arch, module("tuning").TARGETS[arch].shared_memory, shared, registers, warps, columns)

    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        return Resources(name, shared, registers, spills, warps, fitting(registers))
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    # The stack frame holds what did not fit into registers; these kernels have no arrays of their own.
    narrow_stores = len(re.findall(r"st\.global(?:\.\w+)*\.b16\b", kernel.asm["ptx"]))
    spills = int(re.search(r"STACK:(\d+)", usage)[1])
    return Resources(name, shared, registers, spills, warps, fitting(registers), narrow_stores)


@contextlib.contextmanager
def compiling_for(
    arch: int | str, kernels: list[triton.compiler.CompiledKernel] | None = None
) -> Iterator[list[Resources]]:
    """Within it, launches compile for ``arch`` and append what they take to the list it gives.

    The compiled kernels are appended to ``kernels``, if that is given.
    """
    target = gpu_target(arch)
    compiled: list[Resources] = []

    def run(function: JITFunction, *args, grid, warmup, **kwargs) -> None:
        kernel = _compile(function, args, kwargs, target)
        compiled.append(_resources(kernel, function.fn.__name__, target, arch))
        if kernels is not None:
            kernels.append(kernel)

    with mock.patch.object(JITFunction, "run", run):
        yield compiled
