"""Which of two launch configurations is faster on an H100, as it was measured: what predictions of an order are held to.

``MEASURED`` are the alternatives that lost, from the docstrings of the kernel. ``shipped`` are the entries of
``tuning/configs/sm_90.json``, which were measured to be faster than the analytic defaults of Hopper GPUs; how much faster
was not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from .choose import TOKENS, judged_launch
from .compiled import PLAIN, Facts, compiled, fields_of, key_of
from .gpus import BY_NAME
from .predict import Constants, constants, demand, seconds_of

ARCH, CARD = 90, "H100"
# Predictions nearer to each other than this say nothing about an order.
CLEAR = 0.05


@dataclass(frozen=True)
class Order:
    """Two configurations of a kernel.

    Attributes:
        family, height: The kernel family, and the tile height of the bucket.
        tokens: Those of the layer of Qwen3-30B-A3B that was timed.
        faster, slower: The two.
        ratio: How many times as long the slower one takes, or None if that was not kept.
        what: In what they differ.
    """

    family: str
    height: int
    tokens: int
    faster: Any
    slower: Any
    ratio: float | None
    what: str


# Family, height, tokens, changes of the configuration in use that make the slower and the faster one, and how much slower.
MEASURED: tuple[tuple[str, int, int, dict[str, Any], dict[str, Any], float, str], ...] = (
    ("wgrad", 128, 16384, {"num_warps": 8}, {}, 1.12, "eight warps instead of four"),
    (
        "down_backward", 128, 16384, {"block_n": 128, "slices": 1}, {"block_n": 128, "slices": 2}, 2.0,
        "the epilogue at once, which spills 1 KiB a thread, instead of in slices",
    ),
    ("down_backward_4bit", 64, 512, {"slices": 1}, {}, 253 / 184, "the epilogue at once instead of in slices"),
    (
        "up_4bit", 128, 4096, {"block_n": 128, "num_warps": 8, "num_stages": 3}, {}, 751 / 615,
        "one program a multiprocessor, of tiles twice as wide",
    ),
    ("up", 128, 16384, {"descriptor": False}, {}, 622 / 584, "pointers instead of descriptors"),
)  # fmt: skip


def measured(tuning: Any) -> Iterator[Order]:
    """Yields the pairs of ``MEASURED``. ``tuning`` is the kernel's module of that name."""
    for family, height, tokens, slower, faster, ratio, what in MEASURED:
        used = tuning.launch_config(family, height, tuning.TARGETS[ARCH], 2)
        yield Order(family, height, tokens, replace(used, **faster), replace(used, **slower), ratio, what)


def shipped(tuning: Any) -> Iterator[Order]:
    """Yields the entries of the table for the H100, each with the default that it replaces."""
    target = tuning.TARGETS[ARCH]
    for family in tuning.KERNELS:
        for height in tuning.BUCKETS:
            used = tuning.launch_config(family, height, target, 2)
            default = tuning.default_config(family, height, target, 2)
            changed = {name for name, value in asdict(used).items() if value != getattr(default, name)}
            # What half tiles gain depends on the routing alone.
            if changed - {"half_tiles"}:
                tokens = TOKENS[family in tuning.KERNELS_4BIT][height][0]
                yield Order(family, height, tokens, used, default, None, ", ".join(sorted(changed)))


def compiled_configs(tuning: Any) -> Iterator[Facts]:
    """Compiles the configurations of all pairs that are not in use."""
    done: set[tuple[Any, ...]] = set()
    for order in (*measured(tuning), *shipped(tuning)):
        for config in (order.faster, order.slower):
            used = tuning.launch_config(order.family, order.height, tuning.TARGETS[ARCH], 2)
            place = (order.family, order.height)
            if config == used or (*place, config) in done:
                continue
            done.add((*place, config))
            yield from compiled(ARCH, [place], adapted=order.family not in PLAIN, configs={place: config})


def predicted_ratio(order: Order, facts: dict[Any, Facts], fitted: Constants | None = None) -> float:
    """Returns how many times as long the slower configuration takes by the prediction.

    Args:
        order: The pair.
        facts: What launches take, by ``compiled.key_of``.
        fitted: What no data sheet says; by default the constants of the H200.

    Raises:
        KeyError: One of them was not compiled.
    """
    launch = judged_launch(order.family, order.tokens)

    def seconds(config: Any) -> float:
        adapted = order.family not in PLAIN
        empty = Facts(ARCH, order.family, order.height, adapted, fields_of(config), 0, 0, 0, 0, 0, None)
        found = facts[key_of(empty)]
        return seconds_of(demand(launch, found), BY_NAME[CARD], fitted or constants())[0]

    return seconds(order.slower) / seconds(order.faster)
