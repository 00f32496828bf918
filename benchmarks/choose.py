"""Chooses launch configurations for GPUs that nobody here has, by what ``predict`` says of each.

    python -m benchmarks.choose --arch 86           lists what spills or leaves room for one program a multiprocessor
    python -m benchmarks.choose --arch 86 --search  compiles other configurations for these and says which is fastest

A configuration is chosen if it does not spill, if a multiprocessor holds two programs of it, with an adapter and without,
and if no other that was tried is predicted to be faster by more than a few percent. The time is the geometric mean over the
cards of the family, and over two numbers of tokens where tiles are 128 rows high. A search takes some ten minutes for
each GPU.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from moe_fused.benchmark.layers import FORWARD_BACKWARD

from .compiled import ADAPTED, HEIGHTS, PLAIN, Facts, compiled, provide_kernel
from .gpus import CARDS, Card
from .predict import BF16, NF4, QWEN3, Launch, constants, demand, products, seconds_of

# Tokens of a layer of Qwen3-30B-A3B whose rows fall into the bucket of a tile height, over dense and over packed weights.
TOKENS = {False: {16: (64,), 32: (256,), 64: (768,), 128: (4096, 16384)}}
TOKENS[True] = {16: (128,), 32: (208,), 64: (1024,), 128: (2304, 3072)}
RANK = 16
SHOWN = 4  # configurations that are listed for each that is replaced
# The launch of a layer's step that a family is judged by.
JUDGED = {
    "up": "up", "up_4bit": "up", "gemm": "back through up", "gemm_short": "down", "gemm_4bit": "down",
    "transposed_4bit": "back through up", "down_backward": "back through down",
    "down_backward_4bit": "back through down", "wgrad": "grad of up", "shrink": "shrink, x", "wgrad_thin": "grad B of up",
}  # fmt: skip


def judged_launch(family: str, tokens: int) -> Launch:
    """Returns the launch that a kernel family is judged by."""
    thin = family in ("shrink", "wgrad_thin")
    layer = replace(QWEN3, lora_rank=RANK if thin else 0)
    weights = NF4 if family.endswith("_4bit") else BF16
    found = products(layer, tokens, FORWARD_BACKWARD, weights, in_product=lambda *_: True)
    return next(each for each in found if each.name == JUDGED[family] and each.family == family)


def milliseconds(facts: Facts, cards: Sequence[Card]) -> float:
    """Returns the geometric mean of the predicted milliseconds over cards and numbers of tokens."""
    times = [
        seconds_of(demand(judged_launch(facts.family, tokens), facts), card, constants())[0]
        for card in cards
        for tokens in TOKENS[facts.family.endswith("_4bit")][facts.height]
    ]
    return 1e3 * math.exp(statistics.fmean(map(math.log, times)))


def cards_like(arch: int | str) -> list[Card]:
    """Returns the cards that share the analytic defaults of a GPU: those of its family, and all whose tensor cores read
    registers and that have 99 KiB of shared memory for a program."""
    alike = (86, 89, 120)
    return [card for card in CARDS if card.arch == arch or (arch in alike and card.arch in alike)]


def is_short(facts: Facts) -> bool:
    """Whether a launch spills, or leaves room for one program only."""
    return facts.spills > 0 or facts.programs < 2


def candidates(tuning: Any, family: str, height: int, config: Any, target: Any) -> Iterator[Any]:
    """Yields valid configurations with tiles as large or half as large, four or eight warps, and up to four stages."""
    columns, depths = ((value, value // 2) for value in (config.block_n, config.block_k))
    fewest = target.family.most_stages or 4
    for block_n, block_k, warps, stages in itertools.product(columns, depths, (4, 8), range(2, fewest + 1)):
        for slices in {1, block_n // 64, block_n // 32} if family in tuning.DOWN_BACKWARDS else {1}:
            tried = replace(
                config, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages, slices=max(1, slices)
            )  # fmt: skip
            try:
                tuning.check_bucket(family, height, tried, 2)
                tuning.check(family, tried, target, 2)
            except ValueError:
                continue
            yield tried


class Compiler:
    """Compiles launches for one GPU, each once.

    Args:
        arch: The compute capability as 10·major + minor, or the gfx name.
    """

    def __init__(self, arch: int | str) -> None:
        self._arch = arch
        self._known: dict[tuple[str, int, bool, str], Facts | None] = {}

    def facts(self, family: str, height: int, adapted: bool, config: Any) -> Facts | None:
        """Returns what a launch takes, or None if it does not compile."""
        from triton.errors import TritonError

        key = (family, height, adapted, str(config))
        if key not in self._known:
            try:
                (self._known[key],) = compiled(
                    self._arch, [(family, height)], adapted=adapted, configs={(family, height): config}
                )
            except (RuntimeError, TritonError):
                self._known[key] = None
        return self._known[key]

    def fits(self, family: str, height: int, config: Any) -> Facts | None:
        """Returns what a launch without an adapter takes, or None if it, or one with an adapter, is too large."""
        found = [self.facts(family, height, adapted, config) for adapted in forms(family)]
        return None if any(facts is None or is_short(facts) for facts in found) else found[0]


def forms(family: str) -> list[bool]:
    """Whether a kernel family is launched with an adapter: both, or one of them."""
    return [adapted for adapted, stages in ((False, PLAIN), (True, ADAPTED)) if family in stages]


def main(
    arch: Annotated[list[str], typer.Option(help="Compute capability or gfx name, such as 86.")],
    search: Annotated[bool, typer.Option("--search", help="Compile others and say which are fastest.")] = False,
    family: Annotated[list[str] | None, typer.Option(help="Only these kernel families.")] = None,
) -> None:
    """Lists the configurations that spill or have fewer than two programs a multiprocessor, and chooses others."""
    provide_kernel()
    from tests.kernel.machine import module

    tuning = module("tuning")
    for each in (int(name) if name.isdigit() else name for name in arch):
        target, cards, compiler = tuning.TARGETS[each], cards_like(each), Compiler(each)
        for name, height in itertools.product(family or tuning.KERNELS, HEIGHTS):
            config = tuning.launch_config(name, height, target, 2)
            now = [facts for adapted in forms(name) if (facts := compiler.facts(name, height, adapted, config))]
            if not any(map(is_short, now)):
                continue
            before = milliseconds(now[0], cards)
            took = ", ".join(f"{facts.programs} programs, {facts.spills} bytes spilled" for facts in now)
            typer.echo(f"{each} {name} {height}: {before:.4f} ms, {took}: {config}")
            if not search:
                continue
            fitting = [
                (milliseconds(facts, cards), other)
                for other in candidates(tuning, name, height, config, target)
                if (facts := compiler.fits(name, height, other)) is not None
            ]
            for ms, other in sorted(fitting, key=lambda pair: pair[0])[:SHOWN]:
                typer.echo(f"    {ms:.4f} ms ({ms / before - 1:+.0%}) {other}")


if __name__ == "__main__":
    typer.run(main)
