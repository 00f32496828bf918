"""The layer around an experts module that holds the LoRA factors of one parameter.

PEFT's ``ParamWrapper`` adds B·A of all experts to the parameter on every pass. The one here hands the factors to the
experts' forward as arguments, through any wrapper in between, and the kernel multiplies with them. Names, shapes and order
of the factors are PEFT's: ``lora_A`` (E·r, in) with the expert slowest, ``lora_B`` (out, r·E) with the expert fastest.

Where the kernel does not run, because the model is set to another experts implementation, this layer does what PEFT's does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import layer as stock
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_fused.hub import get_kernel, submodule
from moe_fused.integrations.quantizer.packed_experts import are_divided
from moe_fused.integrations.transformers.experts_module import Experts, is_experts, is_packed, serves
from moe_fused.integrations.transformers.forward import IMPLEMENTATION, implementation, with_adapters

from .targets import Linear, linears_of

if TYPE_CHECKING:
    from qwen3_moe_fused import LoraWeights, Packed4bitWeights

# Looked up once, at module level, where tracers find them.
_KERNEL = get_kernel()
_weights_of, _attach = _KERNEL.modules.weights_of, _KERNEL.modules.attach
_WRAPPERS = submodule(_KERNEL, "param_wrappers")
_factors: Callable[[Any, str], tuple[Tensor, Tensor]] = _WRAPPERS.factors
_active_loras: Callable[[Any], list[LoraWeights]] = _WRAPPERS.active_loras
# For each parameter, the argument of the experts' forward that takes its adapters.
ARGUMENTS: dict[str, str] = _WRAPPERS.ARGUMENTS
is_kernelized: Callable[..., bool] = _WRAPPERS.is_kernelized

_INITIALIZATIONS = (True, False, "gaussian")
# Options that are refused, beside the fields of LoraConfig that PEFT marks as variants.
_OPTIONS = ("lora_bias", "fan_in_fan_out", "use_qalora", "layer_replication")
# How PEFT's own layer for parameters ends the ValueError with which it refuses an option. It refuses every other variant as
# an "unsupported variant combination".
_PEFTS_REFUSALS = {
    "use_dora": "does not work with use_dora=True.",
    "lora_bias": "does not work with lora_bias=True.",
    "fan_in_fan_out": "does not work with fan_in_fan_out.",
    "velora_config": "does not work when `velora_config` is set.",
    "kasa_config": "does not work when `kasa_config` is set.",
}


def takes_adapters(module: Experts) -> bool:
    """Whether a pass through ``module`` runs in the kernel, so that it takes adapters as arguments."""
    if not is_experts(module):
        return False
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return (chosen == IMPLEMENTATION or is_kernelized(module)) and serves(module)


def refuse_unsupported(config: Any) -> None:
    """Refuses options of ``LoraConfig`` that are not supported for experts.

    Raises:
        ValueError: PEFT refuses the option for parameters as well. The message begins as PEFT's does.
        NotImplementedError: PEFT accepts the option for parameters, or fails without giving a reason.
    """
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for option in (*variants, *_OPTIONS):
        if value := getattr(config, option, None):
            reason = (
                f"{option}={value!r} is not supported for LoRA on experts: leave it out, or leave the experts out of "
                "target_modules and target_parameters"
            )
            if option in _PEFTS_REFUSALS:
                raise ValueError(f"lora.ParamWrapper {_PEFTS_REFUSALS[option]} {reason}")
            if option in variants:
                raise ValueError(f"Invalid or unsupported variant combination: {(option,)}. {reason}")
            raise NotImplementedError(reason)
    if config.init_lora_weights not in _INITIALIZATIONS:
        raise NotImplementedError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported for LoRA on experts: use one of "
            f"{', '.join(map(repr, _INITIALIZATIONS))}, or leave the experts out of target_modules and target_parameters"
        )


class ParamWrapper(stock.ParamWrapper):
    """LoRA of one parameter of an experts module. The name is PEFT's, because PEFT recognizes such layers by name.

    Attributes:
        linears: for each adapter, the linear layers of an expert by which the config asked for the parameter; empty if the
            config named the parameter itself. With linear layers, gate and up have separate factors, ``lora_A``
            (E·2r, in) holds the gate's rows first in each expert, and files have a matrix for each expert.
        unmerged: the packed weights before adapters were merged into them, on the CPU.
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
        # PEFT's __init__ is left out, because it refuses dropout.
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        self.linears: dict[str, tuple[Linear, ...]] = {}
        self.unmerged: Packed4bitWeights | None = None
        self.fan_in_fan_out = False
        stock.LoraLayer.__init__(self, base_layer, **kwargs)
        if self._did_swap_in_out_features:
            self.in_features, self.out_features = self.out_features, self.in_features
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Adds an adapter.

        Raises:
            NotImplementedError, ValueError: an option is not supported for experts, see ``refuse_unsupported``.
            ValueError: the rank is below 1.
        """
        refuse_unsupported(config)
        if r <= 0:
            raise ValueError(
                f"`r` should be a positive integer value but the value passed is {r}, for {self.parameter_name}"
            )
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

    @property
    def _did_swap_in_out_features(self) -> bool:  # type: ignore[override]  # PEFT sets it once
        """Whether the parameter is (E, out, in). PEFT's methods ask for it under this name.

        It is asked anew each time, because dense weights of gpt-oss are (E, in, out), and its weights in mxfp4 and nvfp4 are
        not. They become dense while adapters are there.
        """
        return not getattr(self.get_base_layer(), "is_transposed", False)

    def get_base_layer(self) -> nn.Module:
        # PEFT's version asks every layer for an attribute that the innermost one lacks, and nn.Module is slow to say so.
        layer = self.base_layer
        while isinstance(layer, stock.ParamWrapper):
            layer = layer.base_layer
        base: nn.Module = layer
        return base

    def get_param(self) -> Tensor | Packed4bitWeights:
        """Returns the adapted weights. PEFT reads their shape, dtype and device."""
        weights: Tensor | Packed4bitWeights = _weights_of(self.get_base_layer(), self.parameter_name)
        return weights

    @property
    def weight(self) -> Tensor:
        """The parameter itself. If it is packed, these are its packed bytes."""
        parameter: Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return parameter

    def forward(  # PEFT's takes any arguments, but kernels.kernelize compares their number and kinds
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        gate_up_lora: Sequence[LoraWeights] = (),
        down_lora: Sequence[LoraWeights] = (),
        adapter_names: list[str] | None = None,
    ) -> Tensor:
        """The output of the experts with their adapters, like hidden_states (…, H).

        Args:
            hidden_states, top_k_index, top_k_weights: what Transformers calls experts with.
            gate_up_lora, down_lora: what layers around this one have added.
            adapter_names: refused, as PEFT does: a batch cannot mix adapters.
        """
        arguments = (hidden_states, top_k_index, top_k_weights)
        base = self.get_base_layer()
        # If a layer around this one has already added adapters, the kernel is known to take them.
        outer = len(gate_up_lora) + len(down_lora) > 0
        if not (outer or takes_adapters(base)):
            self._check_composable()
            return super().forward(*arguments, adapter_names=adapter_names)
        self._check_forward_args(hidden_states, adapter_names=adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        loras = {"gate_up_lora": gate_up_lora, "down_lora": down_lora}
        if own := _active_loras(self):
            loras[ARGUMENTS[self.parameter_name]] = own
        given = {name: value for name, value in loras.items() if len(value) > 0}
        # A layer that kernelize put there takes its module's arguments only, so it takes no adapters.
        if self.base_layer is base and given:
            if is_kernelized(base):
                return _experts_forward()(base, *arguments, **given)
            if is_kernelized(base, "_old_forward"):
                return _within_hooks(base, *arguments, **given)
            if are_divided(base):
                return with_adapters(base, arguments, **given)
        return self.base_layer(*arguments, **given)

    def _check_composable(self) -> None:
        """Raises ValueError if an active adapter computes something else than B·A added to the parameter."""
        if any(lora.dropout for lora in _active_loras(self)):
            raise ValueError(  # the message begins as PEFT's does
                f"lora.ParamWrapper does not work with lora_dropout != 0. lora_dropout on {self.parameter_name} needs "
                f"experts_implementation={IMPLEMENTATION!r}: set it to 0 for other implementations"
            )

    # The sum of parameter and B·A, which is needed outside the kernel and for merging.

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        if not self._is_separate(adapter_name):
            return super().get_delta_factors(adapter_name)
        a, b = _factors(self, adapter_name)
        # One product serves gate and up: each half of the features has zeros for the other half's ranks.
        gate, up = b.chunk(2, dim=1)
        b = torch.cat([nn.functional.pad(gate, (0, gate.shape[2])), nn.functional.pad(up, (up.shape[2], 0))], dim=1)
        dtype = self.get_param().dtype
        return b.to(dtype), a.to(dtype), self.scaling[adapter_name]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Returns what the adapter adds to the parameter, in the shape and the dtype of the parameter."""
        if not self._is_separate(adapter_name):
            return super().get_delta_weight(adapter_name, *args, **kwargs)
        param = self.get_param()
        a, b = _factors(self, adapter_name)
        halves = [
            torch.einsum("e o r, e r i -> e o i", half_b, half_a) * self.scaling[adapter_name]
            for half_a, half_b in zip(a.chunk(2, dim=1), b.chunk(2, dim=1), strict=True)
        ]
        return torch.cat(halves, dim=1).to(param.device, param.dtype)

    def expert_deltas(self, adapter_name: str) -> Callable[[int], Tensor]:
        """Returns a function from an expert to what the adapter adds to its packed weights, (out, in) fp32."""
        a, b = (factor.detach().float() for factor in _factors(self, adapter_name))
        scaling, halves = self.scaling[adapter_name], 2 if self._is_separate(adapter_name) else 1

        def delta(expert: int) -> Tensor:
            pairs = zip(b[expert].chunk(halves), a[expert].chunk(halves), strict=True)
            return torch.cat([half_b @ half_a for half_b, half_a in pairs]) * scaling

        return delta

    def _is_separate(self, adapter_name: str) -> bool:
        """Whether gate and up have separate factors."""
        return len(self.linears[adapter_name]) == 2

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the parameter. Packed weights are dequantized first, and the sum is quantized as they were.

        Raises:
            ValueError: with ``safe_merge``, an adapter holds infinite or undefined values. Packed weights stay as they are.
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
            raise ValueError(  # the message begins as PEFT's does
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: it must have "
                f"finite values to be merged, got others in {self.parameter_name}"
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
        _attach(merged, self.get_base_layer(), self.parameter_name)
        self.unmerged = original.to("cpu")
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Removes merged adapters from the parameter. Packed weights get back the bits that they had before."""
        original, self.unmerged = self.unmerged, None
        if original is None or not is_packed(self.get_base_layer()):  # the experts may have become dense meanwhile
            super().unmerge()
            return
        _attach(original.to(self.weight.device), self.get_base_layer(), self.parameter_name)
        self.merged_adapters.clear()


def _within_hooks(experts: Experts, *args: Any, **kwargs: Any) -> Tensor:
    """Calls the experts' forward between the hooks that Accelerate has put around ``experts``, which move tensors."""
    args, kwargs = experts._hf_hook.pre_forward(experts, *args, **kwargs)
    y: Tensor = experts._hf_hook.post_forward(experts, _experts_forward()(experts, *args, **kwargs))
    return y


def _experts_forward() -> Any:
    if IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS:
        return ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]
    return implementation()
