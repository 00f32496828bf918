"""4-bit weight formats, one class in a file each; ``base`` has what a format must offer."""

from .base import ROW_UNIT, DeviceFunctions, Format4bit, WeightFormat, named, names, register, unregister
from .fp4 import Fp4
from .nf4 import Nf4

register(Nf4())
register(Fp4())

__all__ = [
    "ROW_UNIT",
    "DeviceFunctions",
    "Format4bit",
    "WeightFormat",
    "named",
    "names",
    "register",
    "unregister",
]
