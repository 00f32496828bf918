"""Fused mixture-of-experts kernels in Transformers models.

    import moe_fused

    moe_fused.enable()
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", experts_implementation="moe_fused")

Importing this package changes nothing and imports neither torch nor transformers; ``enable`` does, ``disable`` undoes.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Literal

from .integrations.kernelize.mapping import KERNEL_MAPPING

if TYPE_CHECKING:
    import torch
    from kernels import Mode
    from torch import nn
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from .generation import FastGeneration

__all__ = [
    "KERNEL_MAPPING",
    "__version__",
    "disable",
    "enable",
    "fast_generation",
    "get_kernel",
    "kernelize",
    "quantization_config",
    "register_layers",
    "save_format",
]

__version__ = "0.1.0"


def get_kernel() -> ModuleType:
    """Returns the kernel module (``moe_experts``, ``moe_fused_linear``, ``layers`` and more), which is loaded once.

    ``kernels`` loads it from the directory that ``LOCAL_KERNELS`` names, else from the build that ships with this
    package, else from the Hub.

    Raises:
        RuntimeError: torch, transformers or kernels is missing, or its version does not fit.
        FileNotFoundError: there is no build of the kernel for this machine.
    """
    from . import hub

    return hub.get_kernel()


def enable(*, recompute: bool = False) -> None:
    """Registers this package with Transformers and PEFT. A second call changes nothing but ``recompute``.

    From then on ``from_pretrained(..., experts_implementation="moe_fused")`` and
    ``model.set_experts_implementation("moe_fused")`` work, for every model whose experts Transformers can exchange, and
    ``BitsAndBytesConfig(load_in_4bit=True)`` holds the weights of such experts in 4 bits, too. Experts of checkpoints in
    mxfp4, as gpt-oss, and in mxfp4 or nvfp4 of compressed-tensors are held as they are published. LoRA that PEFT adds to
    experts of such a model runs inside the kernel. PEFT need not be installed, and need not be imported first. With kernels
    0.17 and newer, ``kernels.kernelize`` finds the kernel's layers (see ``register_layers``). On a CPU,
    bitsandbytes' linear layers compute the same on every processor from then on
    (see ``moe_fused.integrations.quantizer.bitsandbytes_cpu``).

    Args:
        recompute: whether the backward computes the experts' up projection again instead of keeping its output,
            (T·top_k, 2·I) for each layer. Leave it off under gradient checkpointing, which computes everything again.

    Raises:
        RuntimeError: torch, transformers or kernels is missing or does not fit.
        FileNotFoundError: there is no build of the kernel for this machine.
    """
    get_kernel()
    from .integrations import peft
    from .integrations.kernelize import registration
    from .integrations.quantizer import bitsandbytes_cpu, hf_quantizer, published
    from .integrations.transformers import forward

    bitsandbytes_cpu.register()
    forward.register(recompute)
    hf_quantizer.register()
    published.register()
    peft.register()
    if registration.has_conditions():
        registration.register()


def disable() -> None:
    """Undoes ``enable``. A model that is still set to ``"moe_fused"`` raises Transformers' error for unknown names.

    Save adapters on experts before. Without ``enable``, PEFT cannot write adapters that have factors for each linear layer
    of an expert.
    """
    import sys

    for name in (
        "kernelize.registration",
        "transformers.forward",
        "quantizer.hf_quantizer",
        "quantizer.published",
        "peft",
        "quantizer.bitsandbytes_cpu",
    ):
        module = sys.modules.get(f"{__name__}.integrations.{name}")
        if module is not None:
            module.unregister()


def quantization_config(quant_type: Literal["mxfp4", "nvfp4"]) -> QuantizationConfigMixin:
    """Makes the config with which ``from_pretrained`` holds the experts of a dense checkpoint in a published format.

    ``enable`` must have been called. All other layers stay dense. ``save_pretrained`` writes a checkpoint as
    compressed-tensors would. A checkpoint that is in 4 bits already must be in this format, or ``from_pretrained`` raises
    ValueError. Models without names for the matrices of single experts, as gpt-oss, cannot be saved so: for
    these, give Transformers' ``Mxfp4Config()``. For nf4 and fp4, give ``BitsAndBytesConfig(load_in_4bit=True)``.

    Raises:
        ValueError: there is no such format.
        RuntimeError: ``enable`` has not been called, without which Transformers cannot read the config.
    """
    if quant_type not in ("mxfp4", "nvfp4"):
        raise ValueError(f"quant_type must be mxfp4 or nvfp4, got {quant_type!r}")
    from .integrations.quantizer.published import compressed_config, is_registered

    if not is_registered():
        raise RuntimeError("call moe_fused.enable() first, without which Transformers cannot read this config")
    return compressed_config(quant_type)


def save_format(model: nn.Module, layout: Literal["per_expert", "fused"]) -> None:
    """Chooses how ``model.save_pretrained`` writes 4-bit experts.

    Args:
        model: a model that was loaded with 4-bit experts.
        layout: ``"per_expert"``, the default, writes a 4-bit matrix for each expert, as Transformers 4 did. Every tool reads
            this. Experts that were never separate in any checkpoint are written fused. ``"fused"`` writes a few large
            tensors for each layer, which load faster, but which only this package reads. Experts in mxfp4 and nvfp4 are
            always written as they are published.

    Raises:
        ValueError: there is no such layout, or the model has no 4-bit experts.
    """
    from .integrations.quantizer import hf_quantizer

    hf_quantizer.save_format(model, layout)


def register_layers() -> None:
    """Lets ``kernels.kernelize`` put the kernel's layers on any model. ``enable`` does this, too; ``disable`` undoes it.

    It gives Transformers' experts classes, the block of Qwen3-MoE and PEFT's layers around experts the names of their
    layers, those that are imported later included, and registers ``KERNEL_MAPPING`` with ``kernels``. A module that a layer
    cannot serve keeps its forward, and a warning names it.

    Raises:
        RuntimeError: as for ``get_kernel``, or ``kernels`` is older than 0.17. ``kernelize`` works with that, too.
        FileNotFoundError: as for ``get_kernel``.
    """
    get_kernel()
    from .integrations.kernelize import registration

    registration.register()


def kernelize(
    model: nn.Module,
    mode: Mode | None = None,
    device: str | torch.device | None = None,
    layer: str | None = None,
) -> nn.Module:
    """Puts the kernel's layers on a loaded model through ``kernels.kernelize``. ``enable`` is not needed for it.

    It replaces the forward of every module under Transformers' experts interface that the kernel serves, with dense or
    4-bit weights, and of PEFT's layers around them, so that adapters are multiplied in the kernel and not merged on every
    pass. Nothing else in the model changes. A module for which there is a layer, but which the kernel cannot serve, keeps
    its forward, and a warning names it and says why. A replaced forward takes precedence over ``experts_implementation``.

    Adapters that are added afterwards count as well. PEFT merges them on every pass until ``kernelize`` is called again,
    unless ``enable`` was called before they were added.

    Args:
        model: the model, which is changed in place.
        mode: a ``kernels.Mode``, by default ``Mode.TRAINING``. The layers support every mode.
        device: the device type to load the kernel for, by default that of the model's experts. A model on the meta device
            needs it.
        layer: the name of one layer of ``KERNEL_MAPPING``, to put that one alone on the model. The layer
            ``"Qwen3MoeSparseMoeBlock"``, which replaces the block around the experts of Qwen3-MoE, is used only if it is
            named here.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has nothing that the layers serve, there is no such layer, or no such device.
        TypeError: an argument is of another type.
        RuntimeError, FileNotFoundError: as for ``get_kernel``.
    """
    get_kernel()
    from .integrations.kernelize import apply

    return apply.kernelize(model, mode, device, layer)


def fast_generation(model: nn.Module) -> FastGeneration:
    """Lets ``model.generate`` launch each decoding step as one CUDA graph. ``enable`` is not needed for it.

    Without graphs, the host launches every kernel of a step, and the GPU waits for it. ``generate`` serves greedy search and
    sampling of up to 64 sequences with graphs, with streaming, stopping criteria, padded prompts and adapters. What it
    cannot serve runs as before, and the reason is logged once. Keys and values of a prompt and its answer take memory for
    the next power of two of their tokens; those of the last two shapes are kept for further calls.

    Args:
        model: a model of Transformers, or PEFT's model around one, on a GPU. It is changed in place.

    Returns:
        An object whose ``disable()`` undoes it, and whose ``forget()`` frees the memory of caches and graphs. A second call
        for the same model returns the same one.

    Raises:
        TypeError: the model cannot generate.
    """
    from . import generation

    return generation.fast_generation(model)
