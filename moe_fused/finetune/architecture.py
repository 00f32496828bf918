"""Facts about a model's architecture that decide how a run may train it.

``resolve`` asks them, and nobody else: which linear layers are those of attention, whether rows may lie side by side in
a sequence, whether something in the model is random or waits for the GPU, and which layouts an adapter of it can have.
They are read from the config and from the model on the meta device.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # first: `moe_fused.enable` waits for this import, with modules that the next imports are parts of
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_fused.checkpoints.adapters.by_expert import by_expert_refusal
from moe_fused.checkpoints.adapters.names import names_gpt_oss
from moe_fused.integrations.peft.targets import ExpertLayer, expert_layers
from moe_fused.memory import Whole, is_named

from .attention import APART, layer_types
from .precheck import INTERLEAVED

# Any name that Transformers makes no masks for.
_WITHOUT_MASKS = "moe_fused_without_masks"
# The implementations of attention that keep rows apart by a mask. Others are given the boundaries of the rows.
_MASKED = frozenset({"eager", "sdpa", "flex_attention"})
# The functions of Transformers that make masks for the types of layers in ``APART``.
_MAKERS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")
# Parts of attention that choose which tokens it looks at. They get no adapters, for no gradient flows through a choice.
_SELECTORS = frozenset({"indexer", "scorer"})
# The names of modules that weigh experts, shared ones included, such as gate, router and shared_expert_gate.
_ROUTER = re.compile(r"(\w+_)?(gate|router)")


def why_rows_mix(model: Any) -> str | None:
    """Why rows that lie side by side in a sequence would see each other; None if they would not.

    Args:
        model: The model on the meta device, with the attention of the run.
    """
    if others := sorted(layer_types(model.config) - APART):
        return f"its layers of type {' and '.join(others)} take no boundaries of rows"
    attn = model.config.get_text_config()._attn_implementation
    if attn in _MASKED and not _masks_by_position(model):
        return f"its masks for {attn} attention are made without positions, which begin anew in each row"
    return None


class _Reached(Exception):
    """Ends a forward pass when it reaches the first layer, or its attention."""


def boundaries_arrive(model: Any) -> bool:
    """Whether a model hands the boundaries of documents, which TRL gives it, over to its attention.

    A forward pass up to the attention of the first layer shows it. No norm runs, because Liger may have replaced it by a
    kernel, which would read the memory that a tensor on meta does not have.

    Args:
        model: The model on the meta device.
    """

    def reach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(kwargs.get("cu_seq_lens_q") is not None)

    tokens = torch.zeros((1, 2), dtype=torch.long, device="meta")
    boundaries = torch.zeros(2, dtype=torch.int32, device="meta")
    text = model.config.get_text_config()
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, text, "_attn_implementation", text._attn_implementation)
        text._attn_implementation = _WITHOUT_MASKS
        for layer in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
            for child in layer.children():
                if any(isinstance(module, nn.Linear) for module in child.modules()):
                    stack.callback(child.register_forward_pre_hook(reach, with_kwargs=True).remove)
                else:
                    child.forward = _first_argument
                    stack.callback(vars(child).pop, "forward")
        try:
            model(input_ids=tokens, position_ids=tokens, cu_seq_lens_q=boundaries, use_cache=False)
        except _Reached as reached:
            return bool(reached.args[0])
        except (RuntimeError, TypeError, ValueError):  # the model reads values of a meta tensor, or takes no boundaries
            return False
    return False


def _first_argument(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def _masks_by_position(model: Any) -> bool:
    """Whether a model passes the positions of tokens to the functions that make its masks.

    These positions are the only thing by which Transformers tells apart rows that lie side by side. A forward pass up
    to the first layer shows whether they arrive, in every version of Transformers.

    Args:
        model: The model on the meta device.
    """
    given: list[bool] = []

    def maker(original: Callable[..., Any]) -> Callable[..., None]:
        signature = inspect.signature(original)

        def note(*args: Any, **kwargs: Any) -> None:
            given.append(signature.bind(*args, **kwargs).arguments.get("position_ids") is not None)

        return note

    def stop(*_: Any) -> None:
        raise _Reached

    modules = [sys.modules[name] for name in {type(module).__module__ for module in model.modules()}]
    makers = [(module, name, getattr(module, name)) for module in modules for name in _MAKERS if hasattr(module, name)]
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(stop) for layer in layers]
    tokens = torch.zeros((1, 2), dtype=torch.long, device="meta")
    try:
        for module, name, original in makers:
            setattr(module, name, maker(original))
        model(input_ids=tokens, position_ids=tokens, use_cache=False)
    except _Reached:
        return bool(given) and all(given)
    except (RuntimeError, TypeError, ValueError):  # the model reads values of a meta tensor, or takes no positions
        return False
    finally:
        for module, name, original in makers:
            setattr(module, name, original)
        for hook in hooks:
            hook.remove()
    return False


def attention_modules(model: nn.Module) -> tuple[str, ...]:
    """Names for PEFT of all linear layers of a model's attention, linear attention included.

    A name is the layer's own name if all layers of that name belong to attention. Otherwise it has as many of the names
    before it as tell these layers apart. Layers with a name that projections of experts had, such as ``gate_proj``, are left
    out: PEFT would take that name for the experts', whatever stands before it.
    """
    experts = names_of_experts(model)
    return _names(model, lambda path: path.rpartition(".")[2] not in experts and _is_attention(model, path))


def all_linear_modules(model: nn.Module, *, shared: bool = True) -> tuple[str, ...]:
    """Names of all plain linear layers of a model but its head, its routers and the parts that choose tokens.

    Args:
        model: The model, on any device, meta included.
        shared: Whether shared experts are among them.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # a model of Transformers

    def is_chosen(path: str) -> bool:
        if model.get_submodule(path) is head or not _SELECTORS.isdisjoint(path.split(".")):
            return False
        owner, _, leaf = path.rpartition(".")
        if leaf == "out_proj" and "Mamba" in type(model.get_submodule(owner)).__name__:
            return False  # Mamba's kernels take its weight, and an adapter would have no effect
        return _is_attention(model, path) or (not _is_router(path) and (shared or not _is_shared(path)))

    return _names(model, is_chosen)


def shared_expert_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers of a model's shared experts, without what weighs them; empty if it has none."""
    return _names(model, lambda path: _is_shared(path) and not _is_router(path))


def names_of_experts(model: nn.Module) -> frozenset[str]:
    """The names of the linear layers that an expert of the model had in Transformers 4, such as ``gate_proj``.

    PEFT takes a module of such a name for the experts', whatever stands before the name. In a LoRA config, layers beside
    the experts are named by their weight instead, among ``target_parameters``.
    """
    layers = _expert_layers(model)
    return frozenset(linear.leaf for layer in layers for linears in layer.linears.values() for linear in linears)


def _names(model: nn.Module, is_chosen: Callable[[str], bool]) -> tuple[str, ...]:
    """Names that match the plain linear layers whose path is chosen, and no other linear layers.

    A name is as short as possible. If the experts have linear layers of that name, it has at least the name before it, too.
    """
    experts = names_of_experts(model)
    found: list[str] = []
    others: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            (found if _is_plain(module) and is_chosen(path) else others).append(path)
    names: dict[str, None] = {}
    for path in found:
        parts = path.split(".")
        shortest = 2 if parts[-1] in experts else 1
        candidates = (".".join(parts[-number:]) for number in range(shortest, len(parts) + 1))
        name = next(short for short in candidates if not any(is_named(other, (short,)) for other in others))
        names[name] = None
    return tuple(names)


@dataclass(frozen=True)
class WholeModules:
    """The modules that are trained in full.

    Attributes:
        names: PEFT's names for them.
        tensors: Their parameters. The embedding and the head share one if they are tied.
        is_tied: Whether the embedding, which is tied to the head, is among them.
    """

    names: tuple[str, ...] = ()
    tensors: tuple[Whole, ...] = ()
    is_tied: bool = False


def whole_modules(model: Any, names: Iterable[str], option: str, in_4bit: Collection[str]) -> WholeModules:
    """Finds the modules that are to be trained in full.

    Args:
        model: The model, on any device, meta included.
        names: The last parts of their paths, as many as tell them apart from others.
        option: What gave the names, for errors.
        in_4bit: The names of the linear layers that are held in 4 bits.

    Raises:
        ValueError: A name is that of no module, or that of one that cannot be trained in full.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    modules = dict(model.named_modules())
    refusals = {path: _why_not_whole(model, path, path in in_4bit) for path in modules}
    chosen: list[str] = []
    given: list[str] = []
    for name in names:
        paths = [path for path in modules if path and is_named(path, (name,))]
        if not paths:
            free = sorted({path.rpartition(".")[2] for path, refusal in refusals.items() if path and refusal is None})
            raise ValueError(f"{option}: {type(model).__name__} has no module {name}, it can be {', '.join(free)}")
        for path in paths:
            if (refusal := refusals[path]) is not None:
                raise ValueError(f"{option}: {name} {refusal}")
        chosen += paths
        # PEFT takes all modules whose path ends with the name, within a word as well.
        given += [name] if all(path in paths for path in modules if path.endswith(name)) else paths
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    parameters: dict[int, Whole] = {}
    for module in (modules[path] for path in chosen):
        for parameter in module.parameters():
            both = tied and parameter is embedding.weight
            parameters[id(parameter)] = Whole(
                parameter.numel(), embeds=both or isinstance(module, nn.Embedding), scores=both or module is head
            )
    is_tied = tied and id(embedding.weight) in parameters
    return WholeModules(tuple(dict.fromkeys(given)), tuple(parameters.values()), is_tied)


def _why_not_whole(model: nn.Module, path: str, in_4bit: bool) -> str | None:
    """Why a module cannot be trained in full, as the end of a sentence; None if it can."""
    module, parts = model.get_submodule(path), path.split(".")
    owners = [model.get_submodule(".".join(parts[:number])) for number in range(1, len(parts))]
    if any(hasattr(type(each), "_apply_gate") for each in (*owners, *module.modules())):
        return "cannot be trained in full, because it has experts: --expert-rank gives them adapters"
    if any(part in ("gate", "router") for part in parts):
        return "is a router, which cannot be trained in full: --router-rank gives it an adapter"
    if not any(True for _ in module.parameters()):
        return "has no weights"
    if any(True for child in module.children() for _ in child.parameters()):
        return f"has parts, name those instead: {', '.join(name for name, _ in module.named_children())}"
    if in_4bit:
        return (
            "is in 4 bits and cannot be trained in full: use --attention-modules for an adapter, or --quantization none"
        )
    return None


def _is_router(path: str) -> bool:
    return any(map(_ROUTER.fullmatch, path.split(".")))


def _is_shared(path: str) -> bool:
    return any(part.startswith("shared") for part in path.split("."))


def _expert_layers(model: nn.Module) -> list[ExpertLayer]:
    modules = ((name, module) for name, module in model.named_modules() if hasattr(type(module), "_apply_gate"))
    return expert_layers(model, modules)


def _is_attention(model: nn.Module, path: str) -> bool:
    parts = path.split(".")
    if not _SELECTORS.isdisjoint(parts):
        return False
    if any(part.endswith(("attn", "attention")) for part in parts):
        return True
    owners = (model.get_submodule(".".join(parts[:number])) for number in range(1, len(parts)))
    return any(type(owner).__name__.endswith("Attention") for owner in owners)


def _is_plain(module: nn.Linear) -> bool:
    """Whether a layer multiplies as ``nn.Linear`` does, which models' own subclasses of it need not."""
    return not type(module).__module__.startswith("transformers.models.")


def has_random_layers(config: Any) -> bool:
    """Whether a model drops or jitters something while it is trained, so that two passes over a batch differ."""
    values = config.get_text_config().to_dict()
    words = ("dropout", "pdrop", "layerdrop", "jitter_noise")
    return any(
        any(word in name for word in words) and isinstance(value, (int, float)) and value > 0
        for name, value in values.items()
    )


def waits_for_lengths(config: Any) -> bool:
    """Whether the rotary embedding reads the positions from the GPU, to see how it must be scaled."""
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # The parameters of all layers, or those of each type of layer.
    return any(isinstance(rope, Mapping) and rope.get("rope_type") == "dynamic" for rope in (ropes, *ropes.values()))


def apart_refusal(name: str, config: Any, model: nn.Module, layout: str) -> str | None:
    """Why an adapter cannot be had in a layout that has each expert, or gate and up, apart; None if it can.

    Args:
        name: The model's directory, or its name on the Hub.
        config: The model's config.
        model: A model of this architecture, on any device, meta included.
        layout: ``"per-expert"`` or ``"original"``.
    """
    # The conversion may know nothing about a model on the Hub but its name.
    if not Path(name).is_dir() and names_gpt_oss(name):
        return INTERLEAVED
    for module in model.modules():
        if not hasattr(type(module), "_apply_gate"):
            continue
        if not getattr(module, "has_gate", True):
            return f"experts of {type(module).__name__} have no gate, which the layout has"
        if not getattr(module, "is_concatenated", True):
            return INTERLEAVED
    if layout != "per-expert":
        return None
    # Transformers knows the layout of a model with several parts by its own name, or by that of its language model.
    types = [getattr(part, "model_type", None) for part in (config, getattr(config, "text_config", None))]
    refusals = [by_expert_refusal(model_type) for model_type in types if model_type]
    return next(filter(None, refusals), None)
