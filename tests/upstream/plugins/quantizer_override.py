"""``moe_fused`` registers its quantizer by Transformers' public function, and no longer writes into its mapping."""

from __future__ import annotations

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from moe_fused.integrations.quantizer import hf_quantizer

_NAME = "bitsandbytes_4bit"


def _register() -> None:
    register_quantizer(_NAME, override=True)(hf_quantizer.Experts4bitQuantizer)


def _unregister() -> None:
    register_quantizer(_NAME, override=True)(Bnb4BitHfQuantizer)


def pytest_configure(config: pytest.Config) -> None:
    hf_quantizer.register, hf_quantizer.unregister = _register, _unregister
    assert AUTO_QUANTIZER_MAPPING[_NAME] is Bnb4BitHfQuantizer
