"""What the compiler makes of the project's kernels for each GPU: resources, and the instructions of the main loop.

    python -m benchmarks.compiled              compiles for all GPUs of ``gpus`` and writes results/compiled.json
    python -m benchmarks.compiled --arch 86    for one compute capability (or gfx name), whose entries it replaces

No GPU is needed: ``tests.kernel.offline_compile`` compiles the launches of a Qwen3-30B-A3B layer for any of them. Registers,
spills and shared memory are what the assembler reports. The main loop is the innermost loop of the machine code that does
the most work on the tensor cores; of the instructions in it, ``Loop`` counts what ``predict`` needs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fused.staging import replace_file

PATH = Path(__file__).resolve().parent / "results" / "compiled.json"
# The stage that stands for a kernel family, by family: without adapters, and with them.
PLAIN = {
    "up": "up, train",
    "gemm": "gemm, up transposed",
    "gemm_short": "gemm, down",
    "down_backward": "down backward",
    "wgrad": "wgrad, gather b",
    "up_4bit": "up 4bit, train",
    "gemm_4bit": "gemm 4bit, down",
    "transposed_4bit": "gemm 4bit, up transposed",
    "down_backward_4bit": "down backward 4bit",
}
ADAPTED = {
    "up": "up, adapter",
    "gemm": "gemm, up transposed, adapter",
    "gemm_short": "gemm, down, adapter",
    "down_backward": "down backward, adapter, in place",
    "shrink": "shrink, gather",
    "wgrad_thin": "wgrad, grad b",
    "up_4bit": "up_4bit, adapter",
    "gemm_4bit": "gemm_4bit, down, adapter",
    "transposed_4bit": "gemm_4bit, up transposed, adapter",
    "down_backward_4bit": "down backward_4bit, adapter, in place",
}
HEIGHTS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel.

    Attributes:
        instructions: The instructions of a warp in one turn.
        products: Those of them for the tensor cores.
        flops: The operations of these instructions, of all warps of a program; 0 if the code does not tell.
        copies: Those that bring data from global memory.
        trips: How often in a turn a warp waits for data that it loads to registers: loads of which one needs the other's
            data make several trips, independent ones make one.
        shared: Those that load from or store to shared memory.
        shared_bytes: The bytes that these move for all warps of a program.
        conversions: Those that convert numbers or take bytes apart.
    """

    instructions: int
    products: int
    flops: int
    copies: int
    trips: int
    shared: int
    shared_bytes: int
    conversions: int


@dataclass(frozen=True)
class Facts:
    """What a launch takes on a GPU.

    Attributes:
        arch: The compute capability as 10·major + minor, or the gfx name.
        family, height: The kernel family, and the tile height of the bucket.
        adapted: Whether an adapter's product is added.
        config: The launch configuration: the fields of ``LaunchConfig``.
        shared, registers, spills: Bytes of shared memory, registers a thread, bytes of spills a thread.
        warps, programs: Warps of a program, and how many programs a multiprocessor holds.
        loop: The main loop, or None with an adapter where the kernel has the loop that it has without: the adapter's
            product stands behind it.
    """

    arch: int | str
    family: str
    height: int
    adapted: bool
    config: dict[str, Any]
    shared: int
    registers: int
    spills: int
    warps: int
    programs: int
    loop: Loop | None


# A warp's operations in a tensor-core instruction: twice M·N·K of the shape in its name.
_HMMA = re.compile(r"HMMA\.(\d+?)(8|16)(8|16)\.F32")
_HGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.F32")
_MFMA = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?bf16")
_TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
_COPIES = ("LDG.", "LDGSTS", "UTMALDG", "UBLKCP", "global_load", "buffer_load")
_ASYNCHRONOUS = ("LDGSTS", "LDGDEPBAR", "UTMALDG", "UBLKCP")
_SHARED = ("LDS", "STS", "ds_", "LDSM", "STSM")
_CONVERSIONS = ("F2F", "I2F", "F2I", "PRMT", "LOP3", "SHF", "BFE", "v_cvt", "v_perm", "v_bfe", "v_lshr", "v_and")


def _operations(instruction: str, warps: int) -> int:
    """The operations of one instruction of all warps of a program; 0 where its name does not say."""
    if found := _HGMMA.search(instruction):  # four warps together
        m, n, k = map(int, found.groups())
        return 2 * m * n * k * warps // 4
    if found := _HMMA.search(instruction) or _MFMA.search(instruction):
        m, n, k = map(int, found.groups())
        return 2 * m * n * k * warps
    return 0


def _moved(name: str, warps: int) -> int:
    """The bytes that an instruction moves between registers and shared memory, for all warps."""
    if name.startswith("ds_"):  # 64 lanes
        width = 2 if "2" in name.split("_")[1] else 1
        return warps * 64 * width * int((re.findall(r"b(\d+)", name) or ["32"])[0]) // 8
    if name.startswith(("LDSM", "STSM")):  # one to four 8×8 matrices of 16 bits
        return warps * 128 * int((re.findall(r"\.(?:M\d+)\.([24])", name) or re.findall(r"\.([24])\b", name) or [1])[0])
    bits = re.findall(r"\.(?:U|S)?(8|16|64|128)\b", name)
    return warps * 32 * (int(bits[0]) if bits else 32) // 8


def _name(line: str) -> str:
    """The name of the instruction in a line of machine code, or ""."""
    text = line.partition("\t")[2] if "\t" in line else line
    words = text.split(";")[0].split()
    if words and words[0].startswith("@"):
        words = words[1:]
    return words[0] if words else ""


def _trips(lines: list[str]) -> int:
    """How often the instructions wait for loads to registers that were issued since the last wait for such a load.

    In NVIDIA's machine code an instruction names the barrier that it will set and the mask of those that it waits for; in
    AMD's, ``s_waitcnt vmcnt`` waits.
    """
    pending: set[int] = set()
    trips, issued = 0, False
    for line in lines + lines:  # a load may be waited for a turn later: the second round counts
        name, control = _name(line), line.partition("\t")[0].split(":")
        if name.startswith("s_waitcnt") and "vmcnt" in line and issued:
            trips, issued = trips + 1, False
        if len(control) == 5 and control[0].strip("-"):
            waited = {index for index in pending if int(control[0], 16) >> index & 1}
            trips, issued = (trips + 1, False) if waited and issued else (trips, issued)
            pending -= waited
        if name.startswith(_COPIES) and not name.startswith(_ASYNCHRONOUS):
            issued = True
            if len(control) == 5 and control[2].strip("-"):
                pending.add(int(control[2]))
    return trips // 2


def _loops(text: str) -> Iterator[list[str]]:
    """The lines of the instructions of each loop with tensor-core instructions, from a label to a jump back to it.

    Only of innermost ones: a block that waits for a copy and is laid out behind the kernel jumps back into a loop, too, and
    the code between holds other loops. The whole kernel counts as a loop if the compiler has unrolled its only one.
    """
    labels: dict[str, int] = {}
    names: list[str] = []
    lines: list[str] = []
    found: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.?LBB[\d_]+):", line):
            labels[label[1].lstrip(".")] = len(names)
            continue
        name = _name(line)
        if not re.match(r"[A-Z][\w.]+$|[a-z]+_\w+$", name):
            continue
        names.append(name)
        lines.append(line)
        # Some jumps name an address, at which there is an instruction every 16 bytes.
        jump = re.search(r"(?:BRA|branch)\S*\s.*?(LBB[\d_]+|\b0x[\da-f]+)", line)
        if jump is None:
            continue
        to = jump[1]
        start = int(to, 16) // 16 if to.startswith("0x") else labels.get(to, len(names))
        if start < len(names):
            found.append((start, len(names)))
    found = [(start, end) for start, end in found if any(name.startswith(_TENSOR_CORES) for name in names[start:end])]
    for start, end in found:
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in found):
            yield lines[start:end]
    if not found:
        yield lines


def main_loop(text: str, warps: int) -> Loop:
    """The main loop in the machine code of a kernel; one without products if the kernel does not use the tensor cores."""
    best = Loop(0, 0, 0, 0, 0, 0, 0, 0)
    for lines in _loops(text):
        names = [_name(line) for line in lines]

        def count(prefixes: tuple[str, ...], names: list[str] = names) -> int:
            return sum(name.startswith(prefixes) for name in names)

        loop = Loop(
            instructions=len(names),
            products=count(_TENSOR_CORES),
            flops=sum(_operations(name, warps) for name in names),
            copies=count(_COPIES),
            trips=_trips(lines),
            shared=sum(name.startswith(_SHARED) for name in names),
            shared_bytes=sum(_moved(name, warps) for name in names if name.startswith(_SHARED)),
            conversions=count(_CONVERSIONS),
        )
        if (loop.flops, loop.products, -loop.instructions) > (best.flops, best.products, -best.instructions):
            best = loop
    return best


def compiled(
    arch: int | str,
    chosen: Iterable[tuple[str, int]] | None = None,
    *,
    adapted: bool = False,
    configs: dict[tuple[str, int], Any] | None = None,
) -> Iterator[Facts]:
    """Compiles kernels for a GPU and yields what they take.

    Args:
        arch: The compute capability as 10·major + minor, or the gfx name.
        chosen: Kernel families and tile heights; all by default.
        adapted: Whether to compile them with an adapter.
        configs: Launch configurations to compile instead of those of the tables, by family and height.

    Raises:
        RuntimeError: Triton runs as an interpreter, or a kernel does not compile.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET must not be set: the interpreter compiles nothing")
    provide_kernel()
    from unittest import mock

    import torch

    from tests.kernel import compile_launches
    from tests.kernel.machine import module
    from tests.kernel.offline_compile import compiling_for

    tuning = module("tuning")
    target, dtype = tuning.TARGETS[arch], torch.bfloat16
    stages = ADAPTED if adapted else PLAIN
    wanted = list(chosen) if chosen is not None else [(family, height) for family in stages for height in HEIGHTS]
    of_form = compile_launches.adapted if adapted else compile_launches.plain
    kernels: list[Any] = []
    with mock.patch.object(tuning, "target_of", return_value=target), compiling_for(arch, kernels) as resources:
        for height in sorted({height for _, height in wanted}):
            for stage, family, call in of_form(dtype, height):
                if (family, height) not in wanted or stages[family] != stage:
                    continue
                config = (configs or {}).get((family, height))
                if config is None:
                    config = tuning.launch_config(family, height, target, dtype.itemsize)
                resources.clear()
                kernels.clear()
                with tuning.trying(family, height, dtype.itemsize, config):
                    call()
                # Small kernels beside the product have no loop that uses the tensor cores.
                took, loop = max(
                    (
                        (took, main_loop(_code(kernel), took.warps))
                        for took, kernel in zip(resources, kernels, strict=True)
                    ),
                    key=lambda pair: pair[1].products,
                )
                if not loop.products:
                    raise RuntimeError(f"{stage} has no loop that uses the tensor cores of {arch}")
                yield Facts(
                    arch, family, height, adapted, fields_of(config), took.shared, took.registers, took.spills,
                    took.warps, took.programs, None if adapted and family in PLAIN else loop,
                )  # fmt: skip


def _code(kernel: Any) -> str:
    """The machine code of a compiled kernel as text."""
    text: str = kernel.asm["amdgcn"] if "amdgcn" in kernel.asm else kernel.asm["sass"]
    return text


def provide_kernel() -> None:
    """Points ``LOCAL_KERNELS`` at a build of the kernel's sources, as the tests do."""
    from tests import conftest

    assert conftest.KERNEL


# Fields of a configuration that kernels of row tiles do not have.
_OF_FEW_ROWS = ("split_k", "registers", "prefetch")


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of a configuration of row tiles."""
    return {name: value for name, value in asdict(config).items() if name not in _OF_FEW_ROWS}


def key_of(facts: Facts) -> tuple[str, str, int, bool, str]:
    """What there is one entry of in a file: GPU, family, height, adapters and configuration."""
    return str(facts.arch), facts.family, facts.height, facts.adapted, json.dumps(facts.config, sort_keys=True)


def read_facts(path: Path = PATH) -> list[Facts]:
    """Returns what a file holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It has not the fields of ``Facts``.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Facts(**{**row, "loop": row["loop"] and Loop(**row["loop"])}) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold what kernels take: {error}") from error


def write_facts(facts: Iterable[Facts], path: Path = PATH) -> None:
    """Writes facts as a JSON list with one launch on each line."""
    unique = {key_of(each): each for each in facts}
    lines = ",\n".join(json.dumps(asdict(unique[key])) for key in sorted(unique, key=lambda key: (*key[:4], key[4])))
    replace_file(path, f"[\n{lines}\n]\n".encode())


def main(
    arch: Annotated[list[str] | None, typer.Option(help="Compute capability or gfx name, such as 86.")] = None,
) -> None:
    """Compiles the kernels for GPUs and keeps what they take in benchmarks/results/compiled.json."""
    from .gpus import BY_NAME

    known = list(dict.fromkeys(card.arch for card in BY_NAME.values()))
    chosen = [each for each in known if arch is None or str(each) in arch]
    kept = [facts for facts in (read_facts() if PATH.exists() else []) if facts.arch in set(known) - set(chosen)]
    for each in chosen:
        for adapted in (False, True):
            kept += compiled(each, adapted=adapted)
        typer.echo(f"{each}: {sum(facts.arch == each for facts in kept)} launches")
    write_facts(kept)
    # The other configurations of an H100 are judged by constants that the file must hold the rows for.
    from . import orders

    if orders.ARCH in chosen:
        from tests.kernel.machine import module

        write_facts([*kept, *orders.compiled_configs(module("tuning"))])


if __name__ == "__main__":
    # As the module that others import: its classes are theirs.
    from benchmarks.compiled import main as command

    typer.run(command)
