"""The PTX that looks nibbles up, run by an emulation of its instructions: Triton's interpreter runs no PTX."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernel.machine import module

ptx, formats = module("formats.ptx"), module("formats")
FORMATS = [formats.named(name) for name in formats.names()]

DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16}
SCALES = (1.0, 0.0, -0.25, 3.1e-3, 1e-40, 2.0**-24, 1.3e5, 7.7e-8)


def permuted(a: int, b: int, selector: int) -> int:
    """``prmt.b32``: four of eight bytes, or their signs."""
    both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = [(both[selector >> 4 * i & 7], selector >> 4 * i & 8) for i in range(4)]
    return int.from_bytes(bytes((255 if byte & 128 else 0) if sign else byte for byte, sign in chosen), "little")


def logic(a: int, b: int, c: int, table: int) -> int:
    """``lop3.b32``."""
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32))
    return sum((table >> index & 1) << i for i, index in enumerate(bits))


def half(value: np.float32, dtype: torch.dtype) -> int:
    return int(torch.tensor(float(value)).to(dtype).view(torch.int16)) & 0xFFFF


def run(code: str, dtype: torch.dtype, outputs: int, *inputs: object) -> list[int]:
    """The output registers, which come before the inputs in the numbering of operands."""
    registers: dict[str, object] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def operand(name: str) -> object:
        if name.startswith("0f"):
            return np.float32(struct.unpack(">f", bytes.fromhex(name[2:]))[0])
        return registers[name] if name in registers else int(name, 0)

    for statement in code.replace("{", "").replace("}", "").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        values = [operand(source) for source in sources]
        registers[target] = {
            "mul": lambda a, b: a * b,
            "cvt": lambda upper, lower: half(upper, dtype) << 16 | half(lower, dtype),
            "prmt": lambda a, b, selector: permuted(a, b, selector & 0xFFFF),
            "and": lambda a, b: a & b,
            "xor": lambda a, b: a ^ b,
            "mov": lambda a: a,
            "shr": lambda a, b: a >> b,
            "lop3": logic,
        }[name.split(".")[0]](*values)
    return [int(registers[f"${i}"]) for i in range(outputs)]  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("high_first", [True, False], ids=["high-first", "low-first"])
@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda weight_format: weight_format.name)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_words_are_looked_up(weight_format: Any, high_first: bool, dtype: str) -> None:
    of_scale = ptx.table(weight_format.codes, DTYPES[dtype])
    half_table = ptx.mirrored(weight_format.codes)
    assert half_table == (weight_format.name != "nf4"), "the other formats' fourth bit is a sign"
    words = random.Random(0)
    for scale in SCALES:
        table = run(of_scale, DTYPES[dtype], 8, np.float32(scale))
        exact = torch.tensor(weight_format.codes) * torch.tensor(scale)
        weights = [int(value) & 0xFFFF for value in exact.to(DTYPES[dtype]).view(torch.int16)]
        for word in (0x76543210, 0xFEDCBA98, *(words.getrandbits(32) for _ in range(5))):
            shifts = (4, 0) if high_first else (0, 4)
            inside = [weights[byte >> shift & 15] for byte in word.to_bytes(4, "little") for shift in shifts]
            pairs = [inside[i] | inside[i + 1] << 16 for i in range(0, 8, 2)]
            assert run(ptx.in_order(high_first, half_table), DTYPES[dtype], 4, word, *table) == pairs
            even, odd = inside[::2], inside[1::2]
            apart = [values[i] | values[i + 1] << 16 for values in (even, odd) for i in (0, 2)]
            assert run(ptx.even_odd(high_first, half_table), DTYPES[dtype], 4, word, *table) == apart
