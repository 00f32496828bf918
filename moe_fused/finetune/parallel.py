"""The processes of a run on several GPUs: what they tell each other, and how all end when one does.

Each process has a share of each batch, and the whole model unless ``sharding`` divides it. The gradients of whole adapters
are averaged once in a step, after the last backward pass, in flat buckets. Gradients come from replays of CUDA graphs, which
autograd does not see, so that DistributedDataParallel's hooks would never run. Everything that concerns the host alone
(options, flags, random states) goes through a group of gloo, which does not wait for GPUs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from moe_fused.launched import WORD
from moe_fused.memory import BUCKET
from moe_fused.signals import Interrupted

from .endings import Diverged, Lost
from .options import Options, flag
from .precheck import Process

# How long processes wait for the first one to prepare the data or to upload the adapter.
_LONG = timedelta(days=7)
# How often a process looks for the end of others, and how long it then has to end by itself, in seconds.
_INTERVAL, _GRACE = 0.5, 3.0
# After how many seconds a process says that it waits for others to come.
_SOON = 10.0
_ENDED = "ended"


class Peers:
    """The processes of a run. Without an argument, this process is alone, and all methods return what they are given.

    Args:
        process: This process among them, if they are several.
    """

    def __init__(self, process: Process | None = None) -> None:
        self.process = process or Process()
        self._host: Any = None
        self._store: Any = None
        self._others: dict[int, int] = {}  # the ids of the other processes on this machine, by their rank
        self._watch: _Watch | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.process.is_main

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.process.is_alone

    # Beginning and end.

    def connect(self, device: torch.device, options: Options) -> None:
        """Connects this process to the others, and begins to watch them.

        Raises:
            ValueError: torch has no library for collectives of such devices.
            ConnectionError: The others cannot be reached, or do not come.
        """
        process = self.process
        seconds = (options.trainer or {}).get("ddp_timeout", 1800)
        backend = distributed.get_default_backend_for_device(device)
        if not distributed.is_backend_available(backend):
            raise ValueError(f"several processes on {device.type} need {backend}, which this torch was built without")
        if options.shard:
            # NCCL would register buffers of recorded collectives, which fails for memory of expandable segments.
            os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        self._store = PrefixStore("moe-fused", _shared_store(process, timedelta(seconds=seconds)))
        WORD.claim, WORD.is_claimed = self._claim, self._is_claimed
        with self._talking():
            self._meet(seconds)
            distributed.init_process_group(
                backend,
                store=PrefixStore("processes", self._store),
                rank=process.rank,
                world_size=process.world_size,
                timeout=timedelta(seconds=seconds),
                device_id=device if device.type != "cpu" else None,
            )
            self._host = distributed.new_group(backend="gloo", timeout=_LONG)
            if device.type != "cpu":  # so that what fails here fails now, and that the plan sees the memory it takes
                distributed.all_reduce(torch.zeros(1, device=device))
        self._watch = _Watch(self)
        self._watch.start()

    def _meet(self, seconds: float) -> None:
        """Waits until all processes are here, and notes which of them are on this machine.

        Args:
            seconds: How long to wait.

        Raises:
            ConnectionError: A process does not come, or was told another number of processes.
        """
        place, ours = _place(), self.process
        self._store.set(f"here-{ours.rank}", json.dumps([place, os.getpid(), ours.world_size]))
        missing, begin, is_told = set(range(ours.world_size)), time.monotonic(), False
        while True:
            for rank in [each for each in missing if self._store.check([f"here-{each}"])]:
                missing.remove(rank)
                its_place, number, world_size = json.loads(self._store.get(f"here-{rank}"))
                if world_size != ours.world_size:
                    raise ConnectionError(
                        f"the variable WORLD_SIZE is {ours.world_size} for rank {ours.rank} and {world_size} for rank "
                        f"{rank}: it must be the number of all processes"
                    )
                if rank != ours.rank and tuple(its_place) == place and _lives(number):
                    self._others[rank] = number
            if not missing:
                return
            waited = time.monotonic() - begin
            names = f"rank {', '.join(map(str, sorted(missing)))} of {ours.world_size} processes"
            if waited > seconds:
                raise ConnectionError(f"{names} did not come within {seconds:g} s")
            if waited > _SOON and ours.is_main and not is_told:
                is_told = True
                print(f"note: waiting for {names}", file=sys.stderr, flush=True)
            with _says_what(f"waiting for {names}"):
                time.sleep(0.1)

    def leave(self) -> None:
        """Ends the connection once all processes are at their end."""
        if self.is_alone:
            return
        if self._watch is not None:
            self._watch.end()
        self.wait()
        distributed.destroy_process_group()
        WORD.claim = None

    def _claim(self) -> bool:
        return int(self._store.add(_ENDED, 1)) == 1

    def _is_claimed(self) -> bool:
        return bool(self._store.check([_ENDED]))

    def ended(self, wait: float = 0.0) -> str | None:
        """Says which process has ended.

        Args:
            wait: The seconds to wait for the end of one.

        Returns:
            A text that names the process, an empty text if that process has said why it ended, or None if all others live.
        """
        if self._store is None:
            return None
        until = time.monotonic() + wait
        while True:
            with contextlib.suppress(RuntimeError):  # the store has ended, too
                if self._is_claimed():
                    return ""
            for rank, number in self._others.items():
                if not _lives(number):
                    return f"rank {rank} (process {number}) has ended, as if it was killed"
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """Raises Lost if a collective within the block fails."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = self.ended(wait=_GRACE)
            if reason is None:
                reason = f"the connection to the other processes is lost: {str(error).strip().partition(chr(10))[0]}"
            raise Lost(reason) from error

    # What they tell each other.

    def wait(self) -> None:
        """Waits until all processes are here."""
        if not self.is_alone:
            with self._talking():
                distributed.barrier(group=self._host)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Lets the first process of each machine go through the block before the others, which then find its caches."""
        if self.process.local_rank:
            self.wait()
        yield
        if not self.process.local_rank:
            self.wait()

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.process.world_size
        with self._talking():
            distributed.all_gather_object(found, value, group=self._host)
        return found

    def of_main(self, value: Any) -> Any:
        """Returns the first process' value."""
        return self.gather(value)[0]

    def largest(self, values: Sequence[float]) -> list[float]:
        """Returns the largest of the processes' values, element by element."""
        return self._reduced(values, distributed.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """Returns the sums of the processes' values, element by element."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.is_alone:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with self._talking():
            distributed.all_reduce(tensor, operation, group=self._host)
        found: list[float] = tensor.tolist()
        return found

    def least(self, value: int | None) -> int | None:
        """Returns the smallest of the processes' values that is not None."""
        return min((each for each in self.gather(value) if each is not None), default=None)

    def check_options(self, options: Options, switches: Mapping[str, object]) -> None:
        """Raises ValueError if the processes were started with different options.

        Args:
            options: The options of this process.
            switches: Its switches, which are no options of a run, by their names in Python.
        """
        ours = {name: getattr(options, name) for name in vars(options)} | dict(switches)
        self._check_same({flag(name): repr(value) for name, value in ours.items()}, "was started with")

    def check_same(self, found: Mapping[str, str]) -> None:
        """Raises ValueError if the processes have found different data, models or devices.

        Args:
            found: The names of what was found, with what tells it apart from others.
        """
        self._check_same(found, "sees")

    def _check_same(self, ours: Mapping[str, str], verb: str) -> None:
        all_of_them = self.gather(dict(ours))
        first = all_of_them[0]
        for rank, found in enumerate(all_of_them):
            for name in first | found:
                of_first, other = first.get(name, "none"), found.get(name, "none")
                if of_first != other:
                    raise ValueError(
                        f"rank {rank} {verb} {name} {_shortened(other)}, rank 0 {verb} {_shortened(of_first)}: all "
                        "processes of a run must have the same options, model and data"
                    )

    def check_adapters(self, named: Iterable[tuple[str, Tensor]], when: str) -> None:
        """Raises Diverged unless the trained weights of all processes are equal bit for bit.

        Args:
            named: The weights of this process, by their names.
            when: When they are compared, in words.
        """
        if self.is_alone:
            return
        digest = hashlib.sha256()
        for _, value in named:
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        found = self.gather(digest.hexdigest())
        for rank, other in enumerate(found):
            if other != found[0]:
                raise Diverged(f"rank {rank} has other adapters than rank 0 {when}")

    def joined(self, part: Tensor) -> Tensor | None:
        """Returns the parts of all processes, (rows of each, …), one below the other, on the CPU of the first process.

        Other processes get None. All parts have the same shape.
        """
        part = part.detach().cpu().contiguous()
        if self.is_alone:
            return part
        parts = [torch.empty_like(part) for _ in range(self.process.world_size)] if self.is_main else None
        with self._talking():
            distributed.gather(part, parts, dst=0, group=self._host)
        return None if parts is None else torch.cat(parts)

    def add(self, value: Tensor) -> None:
        """Replaces a tensor on the device of the run by its sum over all processes, without waiting for the GPU."""
        if not self.is_alone:
            with self._talking():
                distributed.all_reduce(value)

    # Gradients.

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces the gradients of ``parameters`` by their means over all processes.

        A gradient that only some processes have counts as zero in the others. One that no process has stays None.
        """
        if self.is_alone:
            return
        with self._talking():
            held = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
            distributed.all_reduce(held, distributed.ReduceOp.MAX, group=self._host)
            gradients = []
            for parameter, is_held in zip(parameters, held.tolist(), strict=True):
                if is_held:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    gradients.append(parameter.grad)
            for bucket in buckets(gradients):
                self._average(bucket)

    def _average(self, bucket: list[Tensor]) -> None:
        if len(bucket) == 1 and bucket[0].is_contiguous():
            self._reduce(bucket[0])
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        self._reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view(old.shape) for part, old in zip(parts, bucket, strict=True)])

    def _reduce(self, tensor: Tensor) -> None:
        if distributed.get_backend() == "nccl":
            distributed.all_reduce(tensor, distributed.ReduceOp.AVG)
            return
        distributed.all_reduce(tensor)  # gloo knows no averages
        tensor.div_(self.process.world_size)


def buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields groups of gradients that are averaged together.

    A group has one dtype, and at most ``BUCKET`` bytes unless it is a single gradient.
    """
    found: dict[torch.dtype, list[Tensor]] = {}
    sizes: dict[torch.dtype, int] = {}
    for gradient in gradients:
        held, size = found.setdefault(gradient.dtype, []), gradient.numel() * gradient.element_size()
        if held and sizes[gradient.dtype] + size > BUCKET:
            yield held
            held = found[gradient.dtype] = []
            sizes[gradient.dtype] = 0
        held.append(gradient)
        sizes[gradient.dtype] = sizes.get(gradient.dtype, 0) + size
    yield from filter(None, found.values())


def _shared_store(process: Process, limit: timedelta) -> Any:
    """Connects this process to the store that torchrun holds, or else the process with rank 0.

    torch waits for it without handling signals, so another thread does that.

    Args:
        limit: How long to wait.

    Raises:
        ConnectionError: Nothing can be reached, or this process cannot hold the store.
    """
    found: list[Any] = []

    def connect() -> None:
        try:
            found.append(next(rendezvous("env://", process.rank, process.world_size, timeout=limit))[0])
        except (RuntimeError, ValueError, OSError) as error:
            found.append(error)

    thread = threading.Thread(target=connect, name="connect", daemon=True)
    thread.start()
    others = f"the other processes at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    with _says_what(f"waiting for {others}"):
        thread.join(_SOON)
        if thread.is_alive():
            print(
                f"note: rank {process.rank} of {process.world_size} processes waits for {others}",
                file=sys.stderr,
                flush=True,
            )
        thread.join()
    if isinstance(found[0], Exception):
        reason = str(found[0]).strip().partition("\n")[0]
        raise ConnectionError(f"cannot connect to {others}: {reason}") from found[0]
    return found[0]


@contextlib.contextmanager
def _says_what(doing: str) -> Iterator[None]:
    """Lets an interruption within the block say what it interrupted."""
    try:
        yield
    except Interrupted as error:
        error.args = (f"{error} while {doing}",)
        raise


class _Watch(threading.Thread):
    """Ends this process soon after another has ended, if it does not end by itself.

    A process may wait for ever in a collective of NCCL that another never joins, and cannot handle signals meanwhile.
    """

    def __init__(self, peers: Peers) -> None:
        super().__init__(name="peers", daemon=True)
        self._peers, self._end = peers, threading.Event()

    def run(self) -> None:
        while not self._end.wait(_INTERVAL):
            reason = self._peers.ended()
            if reason is None:
                continue
            if self._end.wait(2 * _GRACE):
                return
            with contextlib.suppress(RuntimeError):
                if reason and self._peers._claim():
                    print(f"error: {reason}; go on with --resume from the last checkpoint", file=sys.stderr, flush=True)
            os._exit(1)

    def end(self) -> None:
        self._end.set()
        self.join()


def _place() -> tuple[str, int]:
    """Names the machine, and the container on it, whose processes this one can see."""
    try:
        return socket.gethostname(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return socket.gethostname(), 0


def _lives(number: int) -> bool:
    """Whether there is a process of this number that has not ended."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # its parent may not have noticed that it has ended
        state = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"
