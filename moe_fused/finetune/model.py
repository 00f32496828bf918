"""The model that is trained: 4-bit weights, experts in the kernel, adapters on what the options name."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moe_fused
from moe_fused.devices import choose_device

from . import attention
from .options import Optimizer, Options

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def device_of(options: Options) -> torch.device:
    """Where to train: one device, with its number if it is a GPU.

    Raises:
        ValueError: no such device here; one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "finetune trains on one GPU: start it without accelerate launch or torchrun; examples/qlora_ddp.py takes several"
        )
    device = choose_device(options.device)
    if device.type == "cpu" or ":" in options.device:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def compute_dtype(options: Options, device: torch.device) -> torch.dtype:
    if options.dtype != "auto":
        dtype: torch.dtype = getattr(torch, options.dtype)
        return dtype
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def adapter_dtype(options: Options, device: torch.device) -> torch.dtype:
    """Of the adapters' parameters, gradients and optimizer; fp16 would need its gradients unscaled, which torch refuses."""
    if options.adapter_dtype != "auto":
        dtype: torch.dtype = getattr(torch, options.adapter_dtype)
        return dtype
    return torch.bfloat16 if compute_dtype(options, device) is torch.bfloat16 else torch.float32


def optimizer_of(options: Options, device: torch.device) -> Optimizer:
    if options.optimizer != "auto":
        return options.optimizer
    return "adamw_torch" if device.type == "cpu" else "paged_adamw_8bit"


def load_config(options: Options) -> Any:
    """The model's config, without its weights.

    Raises:
        FileNotFoundError: no such model.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, options)


def load_tokenizer(options: Options) -> Any:
    """The model's tokenizer, with the chat template that was asked for.

    Raises:
        FileNotFoundError: none comes with the model, or there is no such template.
    """
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, options)
    if options.chat_template is not None:
        tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
    if tokenizer.eos_token is None:
        raise ValueError(f"--model {options.model}: its tokenizer has no end-of-sequence token")
    return tokenizer


def _load(auto: Any, options: Options) -> Any:
    path = Path(options.model)
    if not path.is_dir() and (path.is_absolute() or options.model.startswith(".")):
        raise FileNotFoundError(f"--model {options.model} is not a directory")
    try:
        return auto.from_pretrained(options.model, revision=options.revision)
    except (OSError, ValueError) as error:
        what = "config" if auto.__name__ == "AutoConfig" else "tokenizer"
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"--model {options.model} has no {what} that can be loaded: {reason}") from error


def quantizes(options: Options, config: Any) -> bool:
    """Whether experts and linear layers are in 4 bits, from the checkpoint or by the options."""
    return options.quantization != "none" or getattr(config, "quantization_config", None) is not None


def quantizes_on_loading(options: Options, config: Any) -> bool:
    """Whether the run puts into 4 bits what the checkpoint has not."""
    return options.quantization != "none" and getattr(config, "quantization_config", None) is None


def quantization_of(options: Options, config: Any, dtype: torch.dtype) -> Any:
    """What ``from_pretrained`` takes as ``quantization_config``: None for a checkpoint that is in 4 bits already."""
    if not quantizes_on_loading(options, config):
        return None
    from moe_fused.quantizer import four_bit_config

    return four_bit_config(dtype, options.quantization)


def load_model(options: Options, config: Any, device: torch.device) -> Any:
    """The model with its experts in the kernel, on ``device``, without adapters."""
    from transformers import AutoModelForCausalLM

    moe_fused.enable()
    dtype = compute_dtype(options, device)
    quantization = quantization_of(options, config, dtype)
    return AutoModelForCausalLM.from_pretrained(
        options.model,
        revision=options.revision,
        dtype=dtype,
        attn_implementation=options.attn,
        experts_implementation="moe_fused",
        **({} if quantization is None else {"quantization_config": quantization}),
        **({} if device.type == "cpu" else {"device_map": {"": device}}),
    )


def _suffix(path: str) -> str:
    """The name of a module within a layer: what follows the last number."""
    return re.split(r"(?:^|\.)\d+\.", path)[-1]


def _experts_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names within a layer of the experts modules, with the names of their projections."""
    from moe_fused.quantizer import projections_of

    return {
        _suffix(path): projections_of(module)
        for path, module in model.named_modules()
        if hasattr(type(module), "_apply_gate")
    }


def lora_config(options: Options, model: nn.Module) -> Any:
    """PEFT's config for the adapters that the options name.

    Args:
        model: a model of the architecture, on any device, meta included.

    Raises:
        ValueError: the model has no layer of a name that the options give, or no experts.
    """
    from peft import LoraConfig

    modules = list(options.attention_modules or ATTENTION) if options.attention_rank else []
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [name for name in modules if name not in names]:
        has = ", ".join(sorted(names))
        raise ValueError(f"--attention-modules: {type(model).__name__} has no linear layer {missing[0]}, it has {has}")
    experts = _experts_of(model)
    ranks, alphas = {}, {}
    if options.expert_rank:
        if not experts:
            raise ValueError(f"--expert-rank: {type(model).__name__} has no experts that could be adapted, set it to 0")
        for target in (f"{path}.{name}" for path, names in experts.items() for name in names):
            ranks[target] = options.expert_rank
            alphas[target] = _alpha(options.expert_alpha, options.expert_rank)
    if options.router_rank:
        for target in _routers(model, experts):
            ranks[target] = options.router_rank
            alphas[target] = 2.0 * options.router_rank
    return LoraConfig(
        r=options.attention_rank or options.expert_rank or options.router_rank,
        lora_alpha=_alpha(options.attention_alpha, options.attention_rank or 1),  # type: ignore[arg-type]  # any number
        lora_dropout=options.lora_dropout,
        target_modules=modules,
        target_parameters=list(ranks) or None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        task_type="CAUSAL_LM",
    )


def _alpha(alpha: float | None, rank: int) -> float:
    return 2.0 * rank if alpha is None else alpha


def _routers(model: nn.Module, experts: dict[str, tuple[str, ...]]) -> list[str]:
    """The names within a layer of the routers' matrices, which lie beside the experts."""
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        beside = any(_suffix(path).rpartition(".")[0] == name.rpartition(".")[0] for name in experts)
        if beside and not isinstance(module, nn.Linear) and weight is not None and weight.dim() == 2:
            found[f"{_suffix(path)}.weight"] = None
    if not found:
        raise ValueError(f"--router-rank: {type(model).__name__} has no routers that could be adapted, set it to 0")
    return list(found)


def adapt(model: Any, options: Options) -> Any:
    """``model`` with new adapters, the only part of it that is trained; the same for the same seed."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(options.seed)
    with warnings.catch_warnings():
        # PEFT looks for patterns among modules only, not among the parameters that ours name.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        adapted = get_peft_model(model, lora_config(options, model))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    if options.expert_rank and not any(".experts." in name for name in trained):
        raise RuntimeError(f"no experts of {type(model).__name__} were adapted, only {', '.join(trained[:3])}, …")
    return adapted


def liger_serves(options: Options, config: Any, device: torch.device) -> bool:
    """Whether Liger's rope and norms are used: if asked for, or on GPUs where it knows the model.

    Raises:
        ValueError: asked for, but Liger does not know the model, or has no kernels for the device.
    """
    if options.liger is False or (options.liger is None and device.type != "cuda"):
        return False
    if device.type == "cpu":
        raise ValueError("--liger: Liger's kernels need a GPU")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    known = config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN
    if options.liger and not known:
        raise ValueError(f"--liger: Liger does not know models of type {config.model_type}")
    return known


def is_random(options: Options, config: Any) -> bool:
    """Whether two passes over the same batch differ: something is dropped, or jittered."""
    if options.lora_dropout:
        return True
    values = config.get_text_config().to_dict()
    words = ("dropout", "pdrop", "layerdrop", "jitter_noise")
    return any(
        any(word in name for word in words) and isinstance(value, (int, float)) and value > 0
        for name, value in values.items()
    )


def is_packed(packing: str) -> bool:
    """Whether documents lie side by side; ``packing`` is not "auto"."""
    return packing.startswith("bfd")


def attends_packed(options: Options, config: Any, device: torch.device, packing: str) -> bool:
    """Whether ``attention`` computes what ``--attn`` would; ``packing`` is not "auto"."""
    dtype = compute_dtype(options, device)
    return attention.serves(options.attn, config, device, dtype, packed=is_packed(packing))


def _waits_for_lengths(config: Any) -> bool:
    """Whether the rotary embedding looks at the positions, on the GPU, to see how it is scaled."""
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # One for all layers, or one for each type of them.
    return any(isinstance(rope, Mapping) and rope.get("rope_type") == "dynamic" for rope in (ropes, *ropes.values()))


def graphs_serve(options: Options, config: Any, device: torch.device, packing: str) -> bool:
    """Whether the decoder runs as CUDA graphs: if asked for, or on NVIDIA GPUs where packing makes batches alike.

    Args:
        packing: not "auto".

    Raises:
        ValueError: asked for, but something in the run cannot be recorded.
    """
    if options.cuda_graphs is False:
        return False
    dtype = compute_dtype(options, device)
    reasons = {
        "it needs a GPU of NVIDIA or AMD": device.type != "cuda",
        "what dropout drops could not be dropped again when layers are computed anew": is_random(options, config),
        "--router-aux-loss takes more than hidden states out of the decoder": options.router_aux_loss > 0,
        "adapters of another dtype than the weights need autocast": adapter_dtype(options, device) is not dtype,
        "the model's rotary embedding waits for the GPU": _waits_for_lengths(config),
        f"--attn {options.attn} waits for the GPU, or the model's layers do not attend to all that is before them": not (
            attends_packed(options, config, device, packing)
        ),
    }
    reason = next((text for text, applies in reasons.items() if applies), None)
    if options.cuda_graphs and reason is not None:
        raise ValueError(f"--cuda-graphs: {reason}")
    by_itself = packing != "none" and torch.version.hip is None
    return reason is None and (bool(options.cuda_graphs) or by_itself)


def apply_liger(model: Any) -> None:
    """Puts Liger's rope and norms into ``model``.

    Not its loss: TRL has a fused head of its own, and refuses Liger's. Not its experts, which would replace ours.
    """
    from transformers.integrations.liger import apply_liger_kernel

    parts = {"rope": True, "rms_norm": True}
    others = {"swiglu": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    apply_liger_kernel(model, parts | others)
