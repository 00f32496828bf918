"""Measures loading a saved model into 4 bits, against loading it as it is: time, and memory of device and host.

    python -m benchmarks.loading                         four layers of Qwen3-30B-A3B, 5 GB of temporary files
    python -m benchmarks.loading --processes 2           also in two processes, each with its part of the experts
    python -m benchmarks.loading --layers 12 --cold      from the disk, 16 GB of temporary files
    python -m benchmarks.loading --quick --device cpu    smoke-tests the benchmark itself, writes nothing

The checkpoint has random bf16 weights, in shards as on the Hub, and experts per expert. Each load has a process of its own,
with its imports and the device's context behind it before anything is measured:

- ``moe_fused``: `load_in_4bit=True`, NF4 with double quantization, experts and all.
- ``transformers``: bf16, without us: what quantizing on the way costs is the difference.
- ``moe_fused_shared_by_N``: as ``moe_fused``, in N processes at once, each on a GPU of its own and with its part of the
  experts, as ``finetune --shard`` loads them. A row has the largest value of any process.

The files were just written, so they are read from the page cache: seconds are those of everything but the disk. With
``--cold``, the page cache forgets them before each load, and there is one more implementation:

- ``moe_fused_without_readahead``: as ``moe_fused``, without the thread of ``moe_fused/checkpoints/readahead.py``.

``gb_per_second`` then is the checkpoint's bytes by the seconds of a load. ``disk_gb_per_second`` is the same for reading the
files and doing nothing else, in one thread or in several, whichever is faster.

Host memory
is the growth of what is anonymous (``RssAnon``), sampled every few milliseconds: mapped files are not in it, for the kernel
takes their pages back whenever it likes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
import typer
from rich.table import Table

from moe_fused.benchmark.harness import MIB, Environment, current_environment
from moe_fused.benchmark.layers import LAYERS, Layer
from moe_fused.checkpoints import readahead
from moe_fused.checkpoints.loading import share_of
from moe_fused.checkpoints.share import taking

from . import runner
from .rows import OURS, slug, write_rows

NAME = "loading"
NEEDED = ("moe_fused", "transformers", "accelerate", "bitsandbytes")
# By implementation, how its weights are stored.
WEIGHTS = {OURS: "nf4", "transformers": "bf16"}
SHARED = "moe_fused_shared_by"
WITHOUT_READAHEAD = "moe_fused_without_readahead"
# The threads that read the files at once where the disk itself is measured, and the bytes of a read.
DISK_THREADS, DISK_READ = (1, 4), 8 * 2**20
# The part of a file that the page cache may still have when it was told to forget it.
REMEMBERED = 0.01
# A fifth of the real one: with so few layers, embeddings would be most of the model.
VOCABULARY = 32000
HEAD_DIM = 128
SHARD_BYTES = 2 * 10**9
SAMPLE_SECONDS = 0.003

T = TypeVar("T")


@dataclass(frozen=True)
class LoadingRow:
    """One load; sizes in MiB.

    ``device_mib`` is what torch has allocated on the device afterwards, ``device_peak_mib`` the most of it while loading,
    None on a CPU. ``host_peak_mib`` is the most that anonymous memory of the process grew by, None where the system does
    not tell. ``footprint_mib`` is the model's own ``get_memory_footprint()``.
    """

    benchmark: str
    gpu: str
    date: str
    torch: str
    triton: str
    layer: str
    layers: int
    implementation: str
    weights: str
    seconds: float
    footprint_mib: float
    device_mib: float | None
    device_peak_mib: float | None
    host_peak_mib: float | None
    gb_per_second: float | None = None
    disk_gb_per_second: float | None = None


class Load(NamedTuple):
    """What one load took; as in ``LoadingRow``."""

    seconds: float
    footprint_mib: float
    device_mib: float | None
    device_peak_mib: float | None
    host_peak_mib: float | None


def anonymous_mib() -> float | None:
    """The anonymous memory that this process has in RAM, None where there is no /proc."""
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    return None


@contextlib.contextmanager
def anonymous_growth() -> Iterator[Callable[[], float | None]]:
    """Samples this process's anonymous memory in a thread.

    Yields:
        A function that gives the most MiB that it grew by up to then, or until the end.
    """
    start = anonymous_mib()
    most = start or 0.0
    ended = threading.Event()

    def sample() -> None:
        nonlocal most
        most = max(most, anonymous_mib() or 0.0)

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: None if start is None else most - start
    finally:
        ended.set()
        thread.join()
        sample()


def quiet() -> None:
    """None of Transformers' bars and warnings, from here on."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def save_model(directory: Path, layer: Layer, layers: int, device: torch.device) -> int:
    """Saves a Qwen3-MoE of ``layers`` such layers with random bf16 weights in shards; returns the bytes of its weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    quiet()
    heads = max(1, layer.hidden // (HEAD_DIM // 2))
    sizes: dict[str, Any] = {
        "hidden_size": layer.hidden,
        "moe_intermediate_size": layer.intermediate,
        "num_experts": layer.experts,
        "num_experts_per_tok": layer.top_k,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 8),
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
    }
    config = Qwen3MoeConfig(norm_topk_prob=True, dtype="bfloat16", **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM._from_config(config)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(directory, max_shard_size=min(SHARD_BYTES, nbytes // 3))
    return nbytes


def load_model(
    directory: Path, implementation: str, device: torch.device, share: tuple[int, int] | None = None
) -> Load:
    """Loads the model in ``directory`` and tells what that took.

    Args:
        share: The number of this process and the number of processes, if each loads a part of the experts.

    Raises:
        RuntimeError: experts that were to be in 4 bits are not.
    """
    from transformers import Qwen3MoeForCausalLM

    quiet()
    options: dict[str, Any] = {}
    taken: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if implementation == WITHOUT_READAHEAD:
        quantizers: Any = importlib.import_module("moe_fused.integrations.quantizer.experts_quantizer")
        quantizers.is_possible = lambda: False
    packs = implementation in (OURS, WITHOUT_READAHEAD)
    if packs:
        import bitsandbytes  # noqa: F401  imported here, it is not part of what is measured

        import moe_fused
        from moe_fused.integrations.quantizer.packed_experts import four_bit_config

        moe_fused.enable()
        options["quantization_config"] = four_bit_config(torch.bfloat16, WEIGHTS[OURS])
        if share is not None:
            taken = taking(share_of(str(directory), "the model", *share, device=device, dtype=torch.bfloat16))
    torch.zeros(1, device=device)  # makes the device's context
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with taken, anonymous_growth() as host_growth:
        start = time.perf_counter()
        model: Any = Qwen3MoeForCausalLM.from_pretrained(
            directory, device_map={"": device}, dtype=torch.bfloat16, **options
        )
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    experts = model.model.layers[-1].mlp.experts
    if (experts.down_proj.dtype == torch.uint8) != packs:
        raise RuntimeError(
            f"{implementation} must load experts in {WEIGHTS[implementation]}, got {experts.down_proj.dtype}"
        )
    return Load(
        seconds,
        model.get_memory_footprint() / MIB,
        (torch.cuda.memory_allocated() - before) / MIB if on_gpu else None,
        (torch.cuda.max_memory_allocated() - before) / MIB if on_gpu else None,
        host_growth(),
    )


def load_shared(directory: Path, processes: int, device: torch.device) -> Load:
    """Loads the model in several processes at once, each with its part of the experts, and gives the largest values."""
    places = [device if device.type == "cpu" else torch.device("cuda", rank) for rank in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        loads = list(
            pool.map(
                lambda rank: in_new_process(load_model, directory, OURS, places[rank], (rank, processes)),
                range(processes),
            )
        )
    largest = (max((each for each in values if each is not None), default=None) for values in zip(*loads, strict=True))
    return Load(*largest)  # type: ignore[arg-type]


def forget(directory: Path) -> int:
    """Lets the page cache forget the weights in ``directory``, and returns their bytes.

    Raises:
        RuntimeError: It still has more than a few of them.
    """
    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if (share := _cached_share(file.fileno())) > REMEMBERED:
                raise RuntimeError(f"the page cache still has {share:.0%} of {path}")
        total += path.stat().st_size
    return total


def _cached_share(file: int) -> float:
    """The part of a file that the page cache has."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        found = libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), resident)
        del start  # which keeps the mapping open
        if found != 0:
            raise OSError(ctypes.get_errno(), "mincore failed")
        return sum(page & 1 for page in resident) / pages


def disk_gb_per_second(directory: Path) -> float:
    """How fast the weights in ``directory`` can be read from the disk if nothing else is done."""
    paths = sorted(directory.glob("*.safetensors"))

    def read(path: Path) -> None:
        buffer = bytearray(DISK_READ)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    fastest = 0.0
    for threads in DISK_THREADS:
        total = forget(directory)
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, paths))
        fastest = max(fastest, total / 1e9 / (time.perf_counter() - start))
    return fastest


def in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """What ``function`` returns or raises in a process that has not done anything before.

    Raises:
        RuntimeError: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"the process of {function.__name__} was killed, for want of memory most likely"
            ) from None


def measure(
    layer: Layer,
    layers: int,
    device: torch.device,
    environment: Environment,
    processes: int = 1,
    cold: bool = False,
) -> Iterator[LoadingRow]:
    """A row for each implementation; the checkpoint is gone once the last was taken."""
    with tempfile.TemporaryDirectory(prefix="loading-") as path:
        directory = Path(path)
        in_new_process(save_model, directory, layer, layers, device)
        disk = round(disk_gb_per_second(directory), 3) if cold else None
        shared = {f"{SHARED}_{processes}": WEIGHTS[OURS]} if processes > 1 else {}
        without = {WITHOUT_READAHEAD: WEIGHTS[OURS]} if cold else {}
        for implementation, weights in (WEIGHTS | without | shared).items():
            total = forget(directory) if cold else 0
            if implementation in shared:
                load = load_shared(directory, processes, device)
            else:
                load = in_new_process(load_model, directory, implementation, device)
            rounded = {key: None if value is None else round(value, 2) for key, value in load._asdict().items()}
            yield LoadingRow(
                benchmark=NAME,
                **asdict(environment),
                layer=layer.name,
                layers=layers,
                implementation=implementation,
                weights=weights,
                **rounded,  # type: ignore[arg-type]
                gb_per_second=round(total / 1e9 / load.seconds, 3) if cold else None,
                disk_gb_per_second=disk,
            )


def results_table(rows: list[LoadingRow]) -> Table:
    """``rows``, which are of one run, for the terminal."""
    table = Table(title=f"{rows[0].layers} layers of {rows[0].layer}; MiB", title_justify="left")
    names = ("implementation", "weights", "seconds", "footprint", "device", "device peak", "host peak")
    cold = rows[0].disk_gb_per_second is not None
    for column in (*names, "GB/s", "of the disk's") if cold else names:
        table.add_column(column, justify="left" if column == "implementation" else "right", no_wrap=True)
    for row in rows:
        sizes = (row.footprint_mib, row.device_mib, row.device_peak_mib, row.host_peak_mib)
        mib = ("–" if size is None else f"{size:.0f}" for size in sizes)
        speeds = []
        if row.gb_per_second is not None and row.disk_gb_per_second is not None:
            speeds = [f"{row.gb_per_second:.2f}", f"{row.gb_per_second / row.disk_gb_per_second:.0%}"]
        table.add_row(row.implementation, row.weights, f"{row.seconds:.1f}", *mib, *speeds)
    return table


def main(
    layer: Annotated[str | None, typer.Option(help="A layer shape.")] = None,
    layers: Annotated[int, typer.Option(help="How many of them.", min=1)] = 4,
    output: Annotated[Path | None, typer.Option(help="The JSON to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
    processes: Annotated[int, typer.Option(help="Processes that share the experts, on as many GPUs.", min=1)] = 1,
    cold: Annotated[bool, typer.Option("--cold", help="From the disk: without the page cache. Linux alone.")] = False,
) -> None:
    """Measures loading a model into 4 bits and writes rows under benchmarks/results, in place of those of the same GPU."""
    runner.check_device(device)
    runner.check_output(output)
    name = layer or ("tiny" if quick else "qwen3-30b-a3b")
    if name not in LAYERS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(LAYERS)}", param_hint="--layer")
    chosen = runner.pick_device(device)
    if chosen.type == "cpu" and name != "tiny":
        raise typer.BadParameter("a CPU is only for smoke tests: give --quick", param_hint="--device")
    if missing := [module for module in NEEDED if importlib.util.find_spec(module) is None]:
        typer.echo(f"Loading in 4 bits needs {', '.join(missing)}, not installed here", err=True)
        raise typer.Exit(2)
    runner.check_gpus(device, processes, "--processes")
    if cold and not readahead.is_possible():
        raise typer.BadParameter("only Linux lets a program empty the page cache of its files", param_hint="--cold")
    environment = current_environment(chosen)
    file = f"{NAME}{'-cold' if cold else ''}_{slug(environment.gpu)}.json"
    shared = None if quick or chosen.type == "cpu" else runner.ROOT / "results" / file
    path = output or shared
    console = runner.make_console()
    console.print(f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}")
    try:
        rows = list(measure(LAYERS[name], layers, chosen, environment, processes, cold))
        console.print(results_table(rows))
        if path is not None:
            write_rows(path, rows)
            console.print(f"Wrote {path}")
    except (OSError, RuntimeError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
