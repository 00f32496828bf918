"""``KERNEL_MAPPING``: the kernel's layers as a mapping of ``kernels``. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

EXPERTS = "MoeExperts"
QWEN3_EXPERTS = "Qwen3MoeExperts"
QWEN3_BLOCK = "Qwen3MoeSparseMoeBlock"
LINEAR = "MoeFusedLinear"
LORA_LINEAR = "LoraMoeFusedLinear"
LORA_EXPERTS = "LoraMoeExperts"
LORA_WRAPPER = "LoraParamWrapper"

DEVICES = ("cpu", "cuda", "rocm", "xpu")


@dataclass(frozen=True)
class KernelLayer:
    """An entry of a mapping of ``kernels`` whose layer comes from the kernel that ``get_kernel`` finds.

    ``kernels.LayerRepository`` would ask the Hub even where a build of the kernel is on this machine.
    """

    layer_name: str

    def load(self) -> type[nn.Module]:
        from moe_fused.hub import get_kernel  # whoever imports moe_fused imports this file

        layer: type[nn.Module] = getattr(get_kernel().layers, self.layer_name)
        return layer


def _entry(layer_name: str) -> dict[str, KernelLayer]:
    return dict.fromkeys(DEVICES, KernelLayer(layer_name))


KERNEL_MAPPING: dict[str, dict[str, KernelLayer]] = {
    EXPERTS: _entry(EXPERTS),  # every experts class of Transformers
    QWEN3_EXPERTS: _entry(QWEN3_EXPERTS),  # the same, for those who decorate Qwen3-MoE's class by its own name
    QWEN3_BLOCK: _entry(QWEN3_BLOCK),  # Qwen3-MoE's router and experts
    LINEAR: _entry(LINEAR),  # a grouped linear layer: weight (E, out, in), forward(input, m_sizes)
    LORA_LINEAR: _entry(LORA_LINEAR),  # a grouped linear layer under LoRA
    LORA_EXPERTS: _entry(LORA_EXPERTS),  # the layer that moe_fused puts around experts in PEFT
    LORA_WRAPPER: _entry(LORA_WRAPPER),  # PEFT's own layer around a parameter of experts
}
"""The kernel's layers in the format of ``kernels.use_kernel_mapping``: by layer name and device type.

The names are those with which ``register_layers`` decorates the classes of Transformers and PEFT. A class of your own that
you decorate by ``kernels.use_kernel_forward_from_hub`` with one of these names gets the layer, too. The kernel comes from
where ``get_kernel`` finds it.
"""
