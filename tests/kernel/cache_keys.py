"""Prints the keys by which Triton looks for the kernels of one layer in its cache: ``python -m tests.kernel.cache_keys``.

A program of its own, so that it can run several times, with other seeds of Python's hashes.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import JITFunction

from tests.kernel import compile_launches
from tests.kernel.machine import module
from tests.kernel.offline_compile import gpu_target, make_backend, source_of

ARCH, HEIGHT = 90, 128


def keys() -> list[tuple[str, str]]:
    """The name and the key of each kernel, in the order of the launches."""
    target, tuning, found = gpu_target(ARCH), module("tuning"), []
    backend = make_backend(target)

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        source, options = source_of(function, args, kwargs, target)
        parsed = backend.parse_options({**options, **source.parse_options()})
        found.append((function.fn.__name__, get_cache_key(source, backend, parsed, {})))

    with (
        mock.patch.object(tuning, "target_of", return_value=tuning.TARGETS[ARCH]),
        mock.patch.object(JITFunction, "run", run),
    ):
        stages = [*compile_launches.tiled(torch.bfloat16, HEIGHT), *compile_launches.untiled(torch.bfloat16)]
        for _, _, call in stages:
            call()
    return found


if __name__ == "__main__":
    print(json.dumps(keys()))
