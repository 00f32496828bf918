"""Launches through Triton's own launcher, compiled from its C, on a machine without a GPU.

``build`` makes a libcuda of the few functions that Triton calls. It runs nothing, and notes what a launch hands to the
driver: the grid and the bytes of each parameter of the kernel, and which of two unlike GPUs is the current one. Run as a
program, with that library in front of any other, this module launches a kernel with every kind of argument through a
``BoundKernel`` and prints what arrived as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tests.kernel.machine import module

SOURCE = r"""
#include "cuda.h"
#include <string.h>

int encoded = 0;             /* tensor maps so far */
int launched = 0;            /* launches so far */
int sizes[64], parameters;   /* of the kernel, in bytes */
unsigned char values[64][128];
unsigned int grid[3];
unsigned long long stream, function;
int current = 0, on = -1;    /* the current GPU now, and in the last launch */
unsigned long long functions = 2;  /* the last handle; each module that is loaded gets the next one */

CUresult cuGetErrorString(CUresult error, const char **text) { *text = "an error of the fake driver"; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice device) { *value = 232448; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return 0; }
CUresult cuModuleLoadData(CUmodule *code, const void *image) { *code = (CUmodule)2; return 0; }
CUresult cuModuleUnload(CUmodule code) { return 0; }
CUresult cuModuleGetFunction(CUfunction *code, CUmodule of, const char *name) {
  *code = (CUfunction)++functions;
  return 0;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute name, CUfunction of) { *value = 1024; return 0; }
CUresult cuFuncSetAttribute(CUfunction of, CUfunction_attribute name, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction of, CUfunc_cache value) { return 0; }
CUresult cuStreamIsCapturing(CUstream of, CUstreamCaptureStatus *status) { *status = 0; return 0; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute name, CUdeviceptr of) {
  *(CUdeviceptr *)value = of;
  return 0;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned long long *words = (unsigned long long *)map;
  memset(map, 0, sizeof *map);
  words[0] = (unsigned long long)base;
  for (cuuint32_t i = 0; i < rank; ++i) {
    words[1 + i] = shape[i];
    words[5 + i] = box[i];
  }
  words[9] = strides[0];
  words[10] = 1000 * type + 10 * swizzle + fill;
  encoded++;
  return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction of, void **parameters_, void **extra) {
  for (int i = 0; i < parameters; ++i)
    memcpy(values[i], parameters_[i], sizes[i]);
  grid[0] = config->gridDimX;
  grid[1] = config->gridDimY;
  grid[2] = config->gridDimZ;
  stream = (unsigned long long)config->hStream;
  function = (unsigned long long)of;
  on = current;
  launched++;
  return 0;
}
"""


def build(folder: Path) -> dict[str, str]:
    """Compiles the library in ``folder``; returns the environment of a process that uses it."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("a C compiler")
    source = folder / "cuda.c"
    source.write_text(SOURCE)
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    for name in ("libcuda.so.1", "libcuda.so"):  # the newer Tritons link the one, 3.5 the other
        command = [compiler, "-shared", "-fPIC", "-w", f"-I{include}", str(source), "-o", str(folder / name)]
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "LD_LIBRARY_PATH": ":".join(paths),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_INTERPRET": "0",
    }


class Scales(NamedTuple):
    absmax: Any
    offset: Any


class Weights(NamedTuple):
    codes: Any
    scales: Scales


class Rows(NamedTuple):
    offsets: Any
    slots: Any


class Formula(NamedTuple):
    function: Any
    bias: float
    digest: str = ""


@triton.jit
def double(x):
    return 2 * x


@triton.jit(do_not_specialize=["n"])
def flat_kernel(x, n, factor, out, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (1,): out = FORMULA(x) * factor."""
    at = tl.arange(0, BLOCK)
    value = FORMULA.function(tl.load(x + at, mask=at < n)) + FORMULA.bias
    tl.store(out + at, value * factor, mask=at < n)


@triton.jit(do_not_specialize=["n"])
def kernel(x, unread, first, weights, rows, n, second, factor, out, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (1,): a sum of all but ``unread``, with records between descriptors (of (BLOCK, BLOCK) matrices)."""
    at = tl.arange(0, BLOCK)
    n += tl.load(rows.offsets) + tl.load(rows.slots)
    scale = tl.load(weights.scales.absmax + at) + tl.load(weights.scales.offset + at)
    value = FORMULA.function(tl.load(x + at, mask=at < n) * scale) + tl.load(weights.codes + at).to(tl.float32)
    tiles = first.load([0, 0]).to(tl.float32) + second.load([0, 0]).to(tl.float32)
    tl.store(out + at, value * factor + tl.sum(tiles, 0) + FORMULA.bias, mask=at < n)


CAPABILITIES = ((9, 0), (8, 0))


class Recorder:
    """Triton's driver for two GPUs of ``CAPABILITIES`` on the fake library. The first is the current one."""

    def __init__(self) -> None:
        from triton.backends.nvidia.driver import CudaDriver

        self.library = ctypes.CDLL("libcuda.so.1")
        driver = CudaDriver()
        driver.get_current_device = lambda: self.number("current")
        driver.get_current_stream = lambda index: 77 + index
        driver.get_device_capability = lambda index: CAPABILITIES[index]
        triton.runtime.driver.set_active(driver)
        torch.version.cuda = "13.0"
        torch.get_device_module = lambda _: SimpleNamespace(device=self.on)

    @contextlib.contextmanager
    def on(self, index: int) -> Iterator[None]:
        """GPU ``index`` is the current one within the block."""
        current = ctypes.c_int.in_dll(self.library, "current")
        before, current.value = current.value, index
        try:
            yield
        finally:
            current.value = before

    def expect(self, ptx: str) -> None:
        """Notes the parameters of the kernel in ``ptx`` from now on."""
        (declared,) = re.findall(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
        types = [re.search(r"\.[bfsu](\d+)\s[^\[]*(?:\[(\d+)\])?", parameter) for parameter in declared.split(",")]
        widths = [int(found[2] or int(found[1]) // 8) for found in types if found]
        (ctypes.c_int * 64).in_dll(self.library, "sizes")[: len(widths)] = widths
        self.widths = widths
        ctypes.c_int.in_dll(self.library, "parameters").value = len(widths)

    def number(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.library, name).value

    def launch(self, call: Callable[[], None]) -> dict[str, Any]:
        """What arrived of a call that launches once."""
        launched, encoded = self.number("launched"), self.number("encoded")
        call()
        assert self.number("launched") == launched + 1
        values = (ctypes.c_ubyte * 128 * 64).in_dll(self.library, "values")
        return {
            "grid": list((ctypes.c_uint * 3).in_dll(self.library, "grid")),
            "stream": ctypes.c_ulonglong.in_dll(self.library, "stream").value,
            "on": self.number("on"),
            "parameters": [bytes(value)[:width].hex() for value, width in zip(values, self.widths, strict=False)],
            "encoded": self.number("encoded") - encoded,
        }


def arguments(plan: Any, name: str) -> tuple[Any, ...]:
    """Arguments at new addresses. No kernel reads them."""
    x, absmax, out = (torch.zeros(64) for _ in range(3))
    if name == "flat":
        return x, 40, 0.5, out
    codes, bytes_of_all = torch.zeros(64, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
    offset = plan.View(bytes_of_all, 256, torch.float32)
    matrices = [torch.zeros(rows, 32, dtype=torch.bfloat16) for rows in (64, 96)]
    first, second = (plan.Descriptor(matrix, tuple(matrix.shape), matrix.stride(), (32, 32)) for matrix in matrices)
    rows = plan.Prepared(Rows(*(torch.zeros(64, dtype=torch.int32) for _ in range(2))))
    return x, None, first, Weights(codes, Scales(absmax, offset)), rows, 40, second, 0.5, out


def on_two_gpus(recorder: Recorder, plan: Any) -> list[dict[str, Any]]:
    """One plan, launched on each of the GPUs while the first is the current one: by Triton, then directly."""
    bound = plan.BoundKernel(flat_kernel, {"FORMULA": Formula(double, 0.5), "BLOCK": 32})
    launches = []
    ctypes.c_int.in_dll(recorder.library, "parameters").value = 0  # those of the kernel before may be more
    for index in (1, 0, 1, 0):
        call = functools.partial(bound, torch.device("cuda", index), (1, 1, 1), *arguments(plan, "flat"))
        first = len(launches) < len(CAPABILITIES)
        if first:
            call()
            launcher = list(bound._launchers.values())[-1]
            recorder.expect(launcher.kernel.asm["ptx"])
        arrived = recorder.launch(call)
        handle = ctypes.c_ulonglong.in_dll(recorder.library, "function").value
        arch = next(
            kept.kernel.metadata.target.arch for kept in bound._launchers.values() if kept.kernel.function == handle
        )
        after = recorder.number("current")
        launches.append({"gpu": index, "arch": arch, "kernels": len(bound._launchers), "after": after, **arrived})
    return launches


def main() -> None:
    """Each kernel is launched by a plan for the first time, then again, then at other addresses: there by two plans."""
    recorder, plan = Recorder(), module("stages.triton.bound_kernel")
    results: dict[str, Any] = {"path": module("stages.triton.launcher").launch_path()._asdict()}
    for name, function in (("flat", flat_kernel), ("everything", kernel)):
        constants = {"FORMULA": Formula(double, 0.25), "BLOCK": 32}
        device, grid = torch.device("cuda", 0), (3, 2, 1)
        here, there = arguments(plan, name), arguments(plan, name)
        bound = plan.BoundKernel(function, constants)
        bound(device, grid, *here)
        (launcher,) = bound._launchers.values()
        recorder.expect(launcher.kernel.asm["ptx"])
        results[name] = {
            "path": launcher.path,
            "here, directly": recorder.launch(lambda: bound(device, grid, *here)),  # noqa: B023 - called at once
            "here, by Triton": recorder.launch(lambda: plan.BoundKernel(function, constants)(device, grid, *here)),  # noqa: B023
            "there, directly": recorder.launch(lambda: bound(device, grid, *there)),  # noqa: B023
            "there, by Triton": recorder.launch(lambda: plan.BoundKernel(function, constants)(device, grid, *there)),  # noqa: B023
            "there, again": recorder.launch(lambda: bound(device, grid, *there)),  # noqa: B023
            "x": [here[0].data_ptr(), there[0].data_ptr()],
        }
    results["two GPUs"] = on_two_gpus(recorder, plan)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
