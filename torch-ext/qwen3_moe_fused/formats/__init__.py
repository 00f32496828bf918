"""4-bit weight formats, one class per file; ``base`` has the interface of a format."""

from .base import (
    ROW_UNIT,
    DeviceFunctions,
    Format4bit,
    PublishedTensor,
    WeightFormat,
    named,
    names,
    register,
    unregister,
)
from .fp4 import Fp4
from .mxfp4 import Mxfp4
from .nf4 import Nf4
from .nvfp4 import Nvfp4

register(Nf4())
register(Fp4())
register(Mxfp4())
register(Nvfp4())

__all__ = [
    "ROW_UNIT",
    "DeviceFunctions",
    "Format4bit",
    "PublishedTensor",
    "WeightFormat",
    "named",
    "names",
    "register",
    "unregister",
]
