"""Lets PEFT's registry choose our layer for experts, instead of our tuner, and gives that layer another name than PEFT's."""

from __future__ import annotations

from typing import Any

from torch import nn


def _supports(cls: type, module: Any, parameter_name: str) -> bool:
    from moe_fused.integrations.peft.wrapper import ARGUMENTS, takes_adapters

    return parameter_name in ARGUMENTS and takes_adapters(module)


def pytest_sessionstart() -> None:
    """Runs once the conftest of the tests has built the kernel, without which our layer cannot be imported."""
    from peft.tuners import lora

    from moe_fused.integrations.peft import tuner, wrapper

    del tuner.LoraModel._create_new_module
    ours: Any = wrapper.ParamWrapper
    ours.__name__ = ours.__qualname__ = "FusedParamWrapper"
    ours.supports_parameter = classmethod(_supports)
    # Which modules run in the kernel depends on the model's config, so all classes are asked.
    lora.register_param_wrapper(nn.Module, ours)
