"""Fused mixture-of-experts kernels in Transformers models.

    import moe_fused

    moe_fused.enable()
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", experts_implementation="moe_fused")

Importing this package changes nothing and imports neither torch nor transformers; ``enable`` does, ``disable`` undoes.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from kernels import Mode
    from torch import nn

__all__ = ["__version__", "disable", "enable", "get_kernel", "kernelize", "save_format"]

__version__ = "0.1.0"


def get_kernel() -> ModuleType:
    """The kernel module: ``moe_experts``, ``moe_fused_linear``, ``layers`` and more, loaded once through ``kernels``.

    Taken from the directory that ``LOCAL_KERNELS`` names, else from the build that ships with this package, else from
    the Hub.

    Raises:
        RuntimeError: torch, transformers or kernels is missing or does not fit.
        FileNotFoundError: there is no build of the kernel for this machine.
    """
    from . import hub

    return hub.get_kernel()


def enable(*, recompute: bool = False) -> None:
    """Registers with Transformers and PEFT what this package adds; a second call changes nothing but ``recompute``.

    From then on ``from_pretrained(..., experts_implementation="moe_fused")`` and
    ``model.set_experts_implementation("moe_fused")`` work, for every model whose experts Transformers can exchange, and
    ``BitsAndBytesConfig(load_in_4bit=True)`` holds the weights of such experts in 4 bits, too. LoRA that PEFT adds to
    experts of such a model runs inside the kernel. PEFT need not be installed, nor be imported first.

    Args:
        recompute: whether backward computes the experts' up projection again instead of keeping its output, (T·top_k, 2·I)
            for each layer. Under gradient checkpointing, which computes everything again, leave it off.

    Raises:
        RuntimeError: torch, transformers or kernels is missing or does not fit.
        FileNotFoundError: there is no build of the kernel for this machine.
    """
    kernel = get_kernel()
    from . import experts, peft, quantizer

    experts.register(kernel, recompute)
    quantizer.register()
    peft.register()


def disable() -> None:
    """Undoes ``enable``: a model still set to ``"moe_fused"`` raises Transformers' error for what is not registered."""
    import sys

    for name in ("experts", "quantizer", "peft"):
        module = sys.modules.get(f"{__name__}.{name}")
        if module is not None:
            module.unregister()


def save_format(model: nn.Module, layout: Literal["per_expert", "fused"]) -> None:
    """Chooses how ``model.save_pretrained`` writes 4-bit experts.

    Args:
        model: loaded with 4-bit experts.
        layout: ``"per_expert"``, the default, writes a 4-bit matrix for each expert as Transformers 4 did, what every
            tool reads; experts that never were separate in any checkpoint are written fused. ``"fused"`` writes a few
            large tensors for each layer, which load faster and which only this package reads.

    Raises:
        ValueError: no such layout; a model without 4-bit experts.
    """
    from . import quantizer

    quantizer.save_format(model, layout)


def kernelize(
    model: nn.Module,
    mode: Mode | None = None,
    device: str | torch.device | None = None,
    layer: str = "Qwen3MoeExperts",
) -> nn.Module:
    """Puts the kernel's layers on a model through ``kernels.kernelize``; needs no ``enable``.

    Serves every experts module that computes what ``Qwen3MoeExperts`` does: most of Transformers' MoE models, but not
    those with biases, transposed weights or a gate of their own, which ``enable`` serves. Touches nothing else in the
    model. A replaced forward wins over ``experts_implementation``.

    Args:
        model: changed in place.
        mode: ``kernels.Mode``, ``Mode.TRAINING`` by default; the layers serve every mode.
        device: the device type to load the kernel for; that of the model's experts by default.
        layer: ``"Qwen3MoeExperts"``, or ``"Qwen3MoeSparseMoeBlock"`` to replace the block around the experts of
            Qwen3-MoE. The block reads the experts' weights itself: whatever wraps or hooks its experts, such as PEFT's
            ``target_parameters``, is passed by without a word.

    Returns:
        ``model``.

    Raises:
        ValueError: nothing in the model that the layer could serve; something, such as Accelerate's hooks, that wraps
            what it could serve; no such layer.
        RuntimeError, FileNotFoundError: as ``get_kernel``.
    """
    get_kernel()
    from . import layers

    return layers.kernelize(model, mode, device, layer)
