"""The layer that PEFT puts around a module whose parameter it adapts, for experts that the kernel serves.

PEFT's own ``ParamWrapper`` adds B·A of all experts to the parameter on every pass. Ours hands the factors to the experts'
forward as arguments, through the wrappers in between, and the kernel multiplies with them. Names, shapes and order of the
factors are PEFT's: ``lora_A`` (E·r, in) with the expert slowest, ``lora_B`` (out, r·E) with the expert fastest.

Where the kernel does not run, because the model was set to another experts implementation, it does what PEFT's does.
"""

from __future__ import annotations

import dataclasses
import math
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import layer as stock
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_fused.experts import IMPLEMENTATION, Experts, implementation, is_packed, serves
from moe_fused.hub import get_kernel

from .targets import Linear, linears_of

if TYPE_CHECKING:
    from qwen3_moe_fused.lora import LoraWeights
    from qwen3_moe_fused.quantization import Packed4bitWeights

# Once, and where tracers find them.
_KERNEL = get_kernel()
_LoraWeights = _KERNEL.LoraWeights
_LAYERS = _KERNEL.layers.__name__
_of_module = _KERNEL.Packed4bitWeights.of_module

# The argument of the experts' forward that takes the adapters of a parameter.
ARGUMENTS = {"gate_up_proj": "gate_up_lora", "up_proj": "gate_up_lora", "down_proj": "down_lora"}

_INITIALIZATIONS = (True, False, "gaussian")
# Beside the fields of LoraConfig that PEFT marks as variants.
_OPTIONS = ("lora_bias", "fan_in_fan_out", "use_qalora", "layer_replication")


def is_kernelized(module: Experts) -> bool:
    """Whether ``moe_fused.kernelize`` replaced the forward of ``module``."""
    forward = vars(module).get("forward")
    return isinstance(forward, MethodType) and forward.__func__.__module__ == _LAYERS


def takes_adapters(module: Experts) -> bool:
    """Whether a pass through ``module`` runs in the kernel, which then takes adapters."""
    if not hasattr(type(module), "_apply_gate"):
        return False
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return (chosen == IMPLEMENTATION or is_kernelized(module)) and serves(module)


def refuse_unsupported(config: Any) -> None:
    """Raises NotImplementedError for options of ``LoraConfig`` that cannot hold for experts."""
    variants = [own.name for own in dataclasses.fields(config) if own.metadata.get("is_lora_variant")]
    for option in (*variants, *_OPTIONS):
        if value := getattr(config, option, None):
            raise NotImplementedError(
                f"{option}={value!r} is not supported for LoRA on experts: leave it out, or leave the experts out of "
                "target_modules and target_parameters"
            )
    if config.init_lora_weights not in _INITIALIZATIONS:
        raise NotImplementedError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported for LoRA on experts: use one of "
            f"{', '.join(map(repr, _INITIALIZATIONS))}, or leave the experts out of target_modules and target_parameters"
        )


class ParamWrapper(stock.ParamWrapper):
    """LoRA of one parameter of an experts module. PEFT knows such layers by this name.

    Attributes:
        linears: by adapter, the linear layers of an expert that it was asked for by, empty if it was asked for by the name
            of the parameter. Gate and up have factors of their own then, ``lora_A`` (E·2r, in) with the gate's rows first
            in each expert, and files have a matrix for each expert.
        unmerged: packed weights as they were before adapters were merged into them, on the CPU.
    """

    in_features: int
    out_features: int
    num_experts: int

    other_param_names = (*stock.ParamWrapper.other_param_names, "linears")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        # Not PEFT's, which refuses dropout.
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        self.linears: dict[str, tuple[Linear, ...]] = {}
        self.unmerged: Packed4bitWeights | None = None
        self.fan_in_fan_out = False
        self._did_swap_in_out_features = False
        stock.LoraLayer.__init__(self, base_layer, **kwargs)
        if not getattr(self.get_base_layer(), "is_transposed", False):
            self.in_features, self.out_features = self.out_features, self.in_features
            self._did_swap_in_out_features = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Adds an adapter.

        Raises:
            NotImplementedError: an option that cannot hold for experts.
            ValueError: a rank below 1.
        """
        refuse_unsupported(config)
        if r <= 0:
            raise ValueError(f"r must be positive, got {r} for {self.parameter_name}")
        linears = linears_of(config)
        self.linears[adapter_name] = linears
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(self.in_features, self.num_experts * max(len(linears), 1) * r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(self.num_experts * r, self.out_features, bias=False)
        if config.init_lora_weights:
            self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_base_layer(self) -> nn.Module:
        # PEFT's asks every layer for an attribute that the last one has not, which nn.Module takes its time to say.
        layer = self.base_layer
        while isinstance(layer, stock.ParamWrapper):
            layer = layer.base_layer
        base: nn.Module = layer
        return base

    def get_param(self) -> Tensor | Packed4bitWeights:
        """The adapted weights, whose shape, dtype and device PEFT asks for."""
        weights: Tensor | Packed4bitWeights = _of_module(self.get_base_layer(), self.parameter_name)
        return weights

    @property
    def weight(self) -> Tensor:
        """The parameter itself, packed bytes if it is packed."""
        parameter: Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return parameter

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (E, r, in), or (E, 2r, in) with separate gate and up factors, and B (E, out, r)."""
        a: Any = self.lora_A[adapter_name].weight
        b: Any = self.lora_B[adapter_name].weight
        experts = self.num_experts
        return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)

    def active_loras(self) -> list[LoraWeights]:
        """The adapters that count on this pass, as the kernel takes them."""
        if self.disable_adapters or self.merged:
            return []
        loras = []
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            a, b = self.factors(name)
            scaling = self.scaling[name]
            if isinstance(scaling, Tensor):  # so that swapping adapters does not recompile
                b, scaling = b * scaling, 1.0
            dropout = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
            loras.append(_LoraWeights(a, b, scaling, dropout))
        return loras

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        # What a wrapper around this one found out need not be asked again. One name at a time, for torch 2.11 cannot trace
        # operators of sets on the keys of a dict.
        if not ("gate_up_lora" in kwargs or "down_lora" in kwargs or takes_adapters(base)):
            self._check_composable()
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        loras = self.active_loras()
        if loras:
            kwargs[ARGUMENTS[self.parameter_name]] = loras
        if self.base_layer is base and kwargs and is_kernelized(base):
            # The layers that kernelize puts there have their module's arguments and no others.
            return _experts_forward()(base, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def _check_composable(self) -> None:
        """Raises NotImplementedError where adding B·A to the parameter is not what the adapters compute."""
        if any(lora.dropout for lora in self.active_loras()):
            raise NotImplementedError(
                f"lora_dropout on {self.parameter_name} needs experts_implementation={IMPLEMENTATION!r}: "
                "set it to 0 for other implementations"
            )

    # Outside the kernel, and for merging.

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        if not self._is_separate(adapter_name):
            return super().get_delta_factors(adapter_name)
        a, b = self.factors(adapter_name)
        # One product for both halves: each half of the features with zeros for the other's ranks.
        gate, up = b.chunk(2, dim=1)
        b = torch.cat([nn.functional.pad(gate, (0, gate.shape[2])), nn.functional.pad(up, (up.shape[2], 0))], dim=1)
        dtype = self.get_param().dtype
        return b.to(dtype), a.to(dtype), self.scaling[adapter_name]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """(E, out, in), or as the parameter lies: what the adapter adds to it, in its dtype."""
        if not self._is_separate(adapter_name):
            return super().get_delta_weight(adapter_name, *args, **kwargs)
        param = self.get_param()
        a, b = self.factors(adapter_name)
        halves = [
            torch.einsum("e o r, e r i -> e o i", own_b, own_a) * self.scaling[adapter_name]
            for own_a, own_b in zip(a.chunk(2, dim=1), b.chunk(2, dim=1), strict=True)
        ]
        return torch.cat(halves, dim=1).to(param.device, param.dtype)

    def _is_separate(self, adapter_name: str) -> bool:
        return len(self.linears[adapter_name]) == 2

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the parameter. Packed weights are dequantized for it, and the sum is quantized as they were.

        Raises:
            ValueError: with ``safe_merge``, an adapter with infinite or undefined values; packed weights stay as they are.
        """
        packed: Any = self.get_param()
        if isinstance(packed, Tensor):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        original: Any = packed if self.unmerged is None else self.unmerged.to(packed.device)
        with torch.no_grad():
            dense = original.dequantize(torch.float32)
            for name in (*self.merged_adapters, *names):
                dense += self.get_delta_weight(name)
        if safe_merge and not torch.isfinite(dense).all():
            raise ValueError(
                f"{', '.join(names)} must have finite values to be merged, got others in {self.parameter_name}"
            )
        form = original.format
        merged = original.quantize(
            dense,
            quant_type=form.quant_type,
            blocksize=form.blocksize,
            double_quant=form.double_quant,
            projections=form.projections,
            dtype=form.dtype,
        )
        merged.attach(self.get_base_layer(), self.parameter_name)
        self.unmerged = original.to("cpu")
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Takes merged adapters out again; packed weights are, bit for bit, what they were before."""
        original, self.unmerged = self.unmerged, None
        if original is None or not is_packed(self.get_base_layer()):  # which may have become dense meanwhile
            super().unmerge()
            return
        original.to(self.weight.device).attach(self.get_base_layer(), self.parameter_name)
        self.merged_adapters.clear()


def _experts_forward() -> Any:
    if IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS:
        return ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]
    return implementation(_KERNEL)
