"""Whole models of any family with random weights in 4 bits, made where they are used; nothing is downloaded.

A model is what ``from_pretrained`` gives with ``BitsAndBytesConfig(load_in_4bit=True)``, or with the config of mxfp4 or
nvfp4, while ``moe_fused`` is enabled. It is made with the quantizer's own steps around a loop that draws a weight, quantizes
it, and goes on to the next.

bitsandbytes quantizes each stack of experts as one matrix. Experts then share the mean of their scales, which
``Packed4bitWeights`` has room for and bitsandbytes needs to dequantize the stack: both multiply with the same bytes. Stacks
whose scales would not be apart by expert, as those of gpt-oss, are drawn and quantized one matrix at a time instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AutoHfQuantizer

import moe_fused
from moe_fused.checkpoints.converter import attach, turn
from moe_fused.checkpoints.names import Target
from moe_fused.checkpoints.quant_state import quantize_matrix
from moe_fused.finetune.attention import chosen
from moe_fused.integrations.quantizer.configs import config_for
from moe_fused.integrations.quantizer.packed_experts import get_packed, pin, target_of
from moe_fused.integrations.transformers import forward
from moe_fused.integrations.transformers.experts_module import is_experts, is_packed, projections_of
from moe_fused.integrations.transformers.forward import IMPLEMENTATION
from moe_fused.quantized import PUBLISHED

from . import experts_lora
from .experts_4bit import BLOCKSIZE, QUANT_TYPE, BitsandbytesStack
from .experts_lora import Adapters, Factors
from .model import Model, quantized_as_one

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

DTYPE = torch.bfloat16
NESTED_BLOCKSIZE = 256
# As the models' own initialization has it; norms are ones.
STD = 0.02


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=DTYPE).mul_(STD)


def _published_experts(kernel: Any, target: Target, quant_type: str, generator: torch.Generator) -> Any:
    """A random stack as ``Packed4bitWeights`` in a format that is kept as it is published."""
    form = kernel.Format4bit(target.shape, quant_type, projections=target.projections, dtype=DTYPE)
    matrices = (_random(target.matrix_shape, generator) for _ in range(target.shape[0] * target.projections))
    parts = (form.weight_format.quantize(matrix, form) for matrix in matrices)
    return kernel.Packed4bitWeights.of_parts(parts, form)


def _experts_in_4bit(kernel: Any, shape: Sequence[int], name: str, projections: int, generator: torch.Generator) -> Any:
    """A random stack (E, out, in) as ``Packed4bitWeights`` over the bytes that bitsandbytes makes of it."""
    form = kernel.Format4bit(tuple(shape), QUANT_TYPE, BLOCKSIZE, True, projections, DTYPE)
    if not quantized_as_one(tuple(shape), name):
        experts, rows, columns = shape
        matrices = (_random((rows // projections, columns), generator) for _ in range(experts * projections))
        pieces = (quantize_matrix(matrix, QUANT_TYPE, BLOCKSIZE, True) for matrix in matrices)
        return kernel.interchange.stack_of_pieces(pieces, form)
    stack = BitsandbytesStack.quantize(_random(shape, generator))
    state, experts = stack.state, shape[0]
    parts = {
        "packed": stack.packed,
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "nested_offset": state.offset.expand(experts * projections).contiguous(),
    }
    return kernel.Packed4bitWeights(
        form, **{part: value.view(torch.uint8).view(experts, -1) for part, value in parts.items()}
    )


def _quant_state(form: Any, piece: Any, shape: torch.Size) -> QuantState:
    """What bitsandbytes needs beside the bytes of one of its matrices, ``piece`` of our packed weights, to dequantize it."""
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    device = piece.packed.device
    nested = QuantState(
        absmax=piece.nested_absmax,
        code=create_dynamic_map().to(device),
        blocksize=NESTED_BLOCKSIZE,
        dtype=torch.float32,
    )
    return QuantState(
        absmax=piece.absmax,
        shape=shape,
        code=get_4bit_type(form.quant_type, device=device),
        blocksize=form.blocksize,
        quant_type=form.quant_type,
        dtype=form.dtype,
        offset=piece.nested_offset,
        state2=nested,
    )


def as_bitsandbytes(weights: Any) -> BitsandbytesStack:
    """The same memory as one matrix of bitsandbytes.

    Raises:
        ValueError: experts whose scales have means of their own.
    """
    offsets = weights.nested_offset.view(torch.float32).flatten()
    if not torch.equal(offsets, offsets[:1].expand_as(offsets)):
        raise ValueError("weights must have been quantized as one matrix, got an offset for each expert")
    whole = moe_fused.get_kernel().Piece(
        packed=weights.packed.view(-1, 1),
        absmax=weights.absmax.flatten(),
        nested_absmax=weights.nested_absmax.view(torch.float32).flatten(),
        nested_offset=offsets[0],
    )
    experts, out_features, in_features = weights.format.shape
    state = _quant_state(weights.format, whole, torch.Size((experts * out_features, in_features)))
    return BitsandbytesStack(whole.packed, state, weights.shape)


@dataclass(frozen=True)
class DequantizedStack:
    """A stack of expert matrices that bitsandbytes dequantized, once."""

    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def dequantize(self) -> Tensor:
        return self.weight


def dequantized(weights: Any) -> DequantizedStack:
    """What bitsandbytes makes of the matrices of ``weights``, which as a rule are quantized one by one, projections too."""
    from bitsandbytes.functional import dequantize_4bit

    form = weights.format
    experts, out_features, in_features = form.shape
    shape = torch.Size((out_features // form.projections, in_features))
    matrices = []
    for expert in range(experts):
        for projection in range(form.projections):
            piece = moe_fused.get_kernel().interchange.piece_of(weights, expert, projection)
            matrices.append(dequantize_4bit(piece.packed, _quant_state(form, piece, shape)))
    return DequantizedStack(torch.cat(matrices).view(weights.shape))


StackOf = Callable[[Any], Any]
"""From packed weights to a stack that plain torch multiplies with, by its ``dequantize()``."""


def build(
    model: Model,
    device: torch.device,
    *,
    dense_experts: bool = False,
    quant_type: str = QUANT_TYPE,
    seed: int = 0,
    processes: int = 1,
) -> Any:
    """A causal language model on ``device``, in bf16 but for its experts in 4 bits and, with nf4, its linear layers.

    Matrices are drawn as Transformers initializes them. All else (norms, biases, states of recurrent layers, buffers) is
    what Transformers initializes it to.

    Args:
        dense_experts: leaves the experts in bf16, run by Transformers' ``grouped_mm``.
        quant_type: the format of experts, and whether linear layers are in 4 bits.
        processes: makes the packed experts that the first of so many processes holds, which divide them. Its passes do not
            run before ``finetune.sharding`` has had it.
    """
    kernel = moe_fused.get_kernel()
    (moe_fused.disable if dense_experts else moe_fused.enable)()
    config = model.config()
    # Without experts to pack, Transformers' own quantizers for the published formats would refuse the model.
    quantizes = not (dense_experts and quant_type in PUBLISHED)
    quantization = config_for(quant_type, model.skeleton, DTYPE)
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False) if quantizes else None
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=DTYPE,
            attn_implementation=chosen("auto", config),
            experts_implementation="grouped_mm" if dense_experts else IMPLEMENTATION,
        )
    made.config.use_cache = False
    dtypes = {name: parameter.dtype for name, parameter in made.named_parameters()}
    if quantizer is not None:
        quantizer.preprocess_model(model=made, dtype=DTYPE, device_map={"": device})
    generator = torch.Generator(device).manual_seed(seed)
    tied: dict[
        int, tuple[nn.Parameter, nn.Parameter]
    ] = {}  # by identity, with the parameter that must not go meanwhile
    for path, module in made.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in tied:
                setattr(module, name, tied[id(parameter)][1])
                continue
            if is_experts(module) and parameter.dim() == 3 and not dense_experts:
                target = target_of(path, module, name, quant_type)
                target = replace(target, shape=(-(-parameter.shape[0] // processes), *target.shape[1:]))
                if quant_type in PUBLISHED:
                    weights = _published_experts(kernel, target, quant_type, generator)
                else:
                    weights = _experts_in_4bit(kernel, target.shape, name, target.projections, generator)
                attach(module, name, weights, DTYPE)
            elif parameter.dim() == 1:
                # The quantizer's linear layers have biases in fp32 until weights are loaded.
                dtype = dtypes[f"{path}.{name}"]
                setattr(module, name, nn.Parameter(torch.ones(parameter.shape, dtype=dtype, device=device)))
                continue
            else:
                setattr(module, name, _matrix(quantizer, made, f"{path}.{name}", parameter, generator))
            made_parameter = getattr(module, name)
            made_parameter._is_hf_initialized = True  # Transformers' initialization leaves it alone
            tied[id(parameter)] = parameter, made_parameter
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
        if is_packed(module):
            if quant_type in PUBLISHED and getattr(module, "is_transposed", False):
                turn(module)
            pin(module)
    with torch.no_grad():
        made.apply(made._init_weights)
    if quantizer is not None:
        quantizer.postprocess_model(made)
        made.hf_quantizer = quantizer
    return made.eval()


def _matrix(quantizer: Any, model: Any, name: str, parameter: Tensor, generator: torch.Generator) -> nn.Parameter:
    """A random parameter in the place of one on the meta device, in 4 bits if it is that of a linear layer."""
    # This serves Linear4bit, too, whose weight still has its dense shape here.
    value = _random(parameter.shape, generator)
    if quantizer is None or not quantizer.param_needs_quantization(model, name):
        return nn.Parameter(value.to(parameter.dtype))
    operation = quantizer.get_quantize_ops()
    (packed,) = operation.convert({name: value}, model=model, full_layer_name=name).values()
    made: nn.Parameter = packed
    return made


def storage(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that ``model`` holds: parameters, buffers, and the scales of linear layers in 4 bits."""
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        for quant_state in (state, getattr(state, "state2", None)):
            if quant_state is not None:
                yield quant_state.absmax
    yield from model.buffers()


def composed_forward(model: nn.Module, stack_of: StackOf = as_bitsandbytes) -> Callable[..., Tensor]:
    """The experts' forward in plain torch, for those of ``model``; adapters come as PEFT's layers hand them to ours.

    Args:
        stack_of: makes of packed weights what is multiplied with.
    """
    stacks = {
        module: tuple(stack_of(get_packed(module, name)) for name in projections_of(module))
        for module in model.modules()
        if hasattr(module, "gate_up_proj_format")
    }

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        gate_up_lora: Sequence[Any] = (),
        down_lora: Sequence[Any] = (),
    ) -> Tensor:
        gate_up, down = stacks[self]
        adapters = None
        if gate_up_lora and down_lora:
            if any(lora.scaling != experts_lora.SCALING for lora in (*gate_up_lora, *down_lora)):
                raise ValueError(f"adapters must be scaled by {experts_lora.SCALING}, as plain torch does here")
            # Grouped products want factors whose rows or columns are contiguous; PEFT keeps experts innermost.
            adapters = Adapters(*(Factors(lora.a, lora.b.contiguous()) for (lora,) in (gate_up_lora, down_lora)))
        # Routers of some models compute in fp32.
        routing = top_k_weights.to(hidden_states.dtype)
        return experts_lora.composed(
            hidden_states, top_k_index, routing, False, gate_up, down, adapters, gate_up.shape[0]
        )

    return forward


def run_composed(model: nn.Module, stack_of: StackOf = as_bitsandbytes) -> None:
    """Makes ``model`` multiply with its experts in plain torch: PEFT's layers and all else stay as they are for ours."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, composed_forward(model, stack_of))


def run_fused(recompute: bool = False) -> None:
    """Makes models with 4-bit experts run them in the kernel, making the up projection again in backward if asked to."""
    forward.register(recompute)
