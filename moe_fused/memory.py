"""Predicts the GPU memory that fine-tuning a model needs, part by part, from its architecture alone.

``skeleton`` makes a model of a config, without weights. ``sizes_of`` reads the sizes of a model, and ``predict``
computes the memory from them. Nothing is fitted to a measurement except ``CONTEXT``, the memory that the driver and the
libraries need.

A step has three moments at which it may need the most memory. The prediction is that of the largest:

    loss        what every layer keeps for backward, a tile of logits, and the gradient of the hidden states
    layer       backward through one layer, whose forward runs again under checkpointing: what its operators keep, and what
                the experts' backward makes (``moe_experts``' memory plan). At the first layer to go backward, all others
                still keep theirs; at the last, all adapters have gradients
    optimizer   all gradients, and the optimizer's state

Letters as in ARCHITECTURE.md: T tokens of a batch, S = T·K rows, E experts, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .recurrent import Recurrent, recurrent_layers, uncounted_types

MIB, GIB = 2**20, 2**30

# What a process needs on a GPU before its first tensor, with cuBLAS loaded. Measured on an H100; torch's allocator does not
# count it.
CONTEXT = 600 * MIB
# What NCCL takes beside torch's allocator to connect the GPUs of a run. It is an estimate, which was not measured.
CONNECTIONS = 512 * MIB
# The largest part of the gradients that several processes copy together to average it.
BUCKET = 32 * MIB
# What cuBLAS asks torch's allocator for, for each handle and stream, on Hopper; it asks for less on other GPUs. The
# thread of the backward has a handle of its own. Graphs are recorded on a stream of their own, and share one workspace.
CUBLAS_WORKSPACE = 32 * MIB
# The largest allocation that torch's allocator counts as small. Small allocations have memory of their own.
SMALL_ALLOCATION = MIB
# The workspace of packed experts. The kernel's WORKSPACE_BYTES holds the same number, but does not load without Triton.
EXPERT_WORKSPACE = 256 * MIB
# The tiles, in tokens and words, in which TRL's loss computes the logits, and the tiles that ``finetune`` sets beside CUDA
# graphs.
LOSS_TILE, LOSS_TILE_BESIDE_GRAPHS = (4096, 32768), (2048, 8192)
# For flash attention over documents: the multiple of tokens to which each document is rounded up, and the mean number of
# tokens of a document in the batch with the shortest documents.
FLASH_ROWS, DOCUMENT_TOKENS = 128, 32
# bitsandbytes' sizes: weights of a 4-bit block, blocks of a group, and elements of a block of optimizer state. Parameters
# below SMALLEST_8BIT have a state of 32 bits, and only those from SMALLEST_PAGED on have a state in paged memory.
BLOCK, GROUP, STATE_BLOCK = 64, 256, 256
SMALLEST_8BIT, SMALLEST_PAGED = 4096, 100_000


@dataclass(frozen=True)
class Stack:
    """A stacked weight of a layer's experts.

    Attributes:
        experts, out_features, in_features: its shape.
        projections: the number of matrices of one expert in it, 2 for gate and up.
        packable: whether it can be held in 4 bits.
        transposed: whether its out features are contiguous, as those of gpt-oss.
    """

    experts: int
    out_features: int
    in_features: int
    projections: int
    packable: bool
    transposed: bool = False

    @property
    def numel(self) -> int:
        return self.experts * self.out_features * self.in_features


@dataclass(frozen=True)
class Linear:
    """A linear layer: its name in the model, and its shape."""

    name: str
    out_features: int
    in_features: int

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Whole:
    """A tensor of the model that is trained in full, in a copy of its own.

    Attributes:
        numel: its number of elements.
        embeds, scores: whether it belongs to the embedding, or to the head.
    """

    numel: int
    embeds: bool = False
    scores: bool = False


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    Attributes:
        stacks: all stacked weights of experts, up and down projections.
        linears: all linear layers except the head.
        others: the number of elements of all other parameters, including the embeddings and the head.
        layers, hidden, heads: the number of decoder layers, the hidden size, and the number of attention heads.
        queries, keys: the number of features of the queries and of the keys, of all heads.
        norms_queries: whether queries and keys are normalized.
        experts, top_k: the number of experts of a layer and of experts for each token; 0 for a model without experts.
        vocabulary: the number of rows of the head.
        mlp: the number of output features of the linear layers in a decoder layer outside attention, recurrent mixers and
            experts, the largest of all layers.
        recurrent: the recurrent layers. All other layers count as attention.
        uncounted: the types of other layers that may have a state. The plan does not count what they keep for it.
    """

    stacks: tuple[Stack, ...]
    linears: tuple[Linear, ...]
    others: int
    layers: int
    hidden: int
    heads: int
    queries: int
    keys: int
    norms_queries: bool
    experts: int
    top_k: int
    vocabulary: int
    mlp: int
    recurrent: tuple[Recurrent, ...] = ()
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workload:
    """How a model is trained.

    Attributes:
        batch, length: the number of sequences in a batch, and the number of tokens in each.
        accumulation: the number of batches in a step.
        quantized: whether experts and linear layers are in 4 bits with double quantization.
        itemsize: bytes of an element of activations, and of weights that are not in 4 bits.
        adapter_itemsize: bytes of an element of adapters, and of their gradients.
        factors: the number of elements of each factor of the adapters; None for those that ranks and modules give. The ranks
            then say only what a pass makes.
        attention_rank, attention_modules: the rank of adapters on linear layers, and the names of these layers.
        expert_rank: the rank of adapters on experts.
        shared_expert_rank, shared_expert_modules: the rank of adapters on the linear layers of shared experts, and the names
            of these layers.
        whole, whole_modules: the tensors that are trained in full, and the names of their modules, which have no adapters.
        whole_itemsize: bytes of an element of these tensors, and of their gradients.
        dropout: whether adapters drop some of their input.
        optimizer: Transformers' name for the optimizer.
        checkpointing: whether layers are computed again in backward.
        masked: whether attention takes a mask of all pairs of tokens, which SDPA needs for packed documents.
        eager: whether attention makes a number for each pair of tokens and head, as Transformers' "eager" does. It takes a
            mask, too.
        flash: whether attention is torch's flash attention over sequences of several lengths, which takes the boundaries of
            documents, windows and sinks instead of a mask.
        documents: whether the boundaries are those of documents, and not of whole sequences.
        fused_norms: whether norms keep their input in its dtype, and not in fp32.
        gpu: whether the memory that a GPU's libraries need is counted.
        graphs: whether the decoder's passes are CUDA graphs, which keep the memory that they need at their worst moment.
        reference: whether the model without its adapters computes each batch as well, without gradients.
        processes: the number of processes that share a step, each with its GPU.
        packages: the packages that compute recurrent layers, of those in ``recurrent.FUNCTIONS``. Without its package, a
            layer runs in plain torch.
    """

    batch: int = 1
    length: int = 4096
    accumulation: int = 1
    quantized: bool = True
    itemsize: int = 2
    adapter_itemsize: int = 2
    factors: tuple[int, ...] | None = None
    attention_rank: int = 16
    attention_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    expert_rank: int = 8
    shared_expert_rank: int = 0
    shared_expert_modules: tuple[str, ...] = ()
    whole: tuple[Whole, ...] = ()
    whole_modules: tuple[str, ...] = ()
    whole_itemsize: int = 2
    dropout: bool = False
    optimizer: str = "paged_adamw_8bit"
    checkpointing: bool = True
    masked: bool = False
    eager: bool = False
    flash: bool = False
    documents: bool = False
    fused_norms: bool = True
    gpu: bool = True
    graphs: bool = False
    reference: bool = False
    packages: frozenset[str] = frozenset()
    processes: int = 1

    @property
    def mask_itemsize(self) -> int:
        """Bytes that dropout keeps for each element, to know whether it was dropped."""
        return 1 if self.gpu else self.itemsize

    @property
    def tokens(self) -> int:
        """The number of tokens in a batch."""
        return self.batch * self.length

    @property
    def pairs(self) -> int:
        """The number of pairs of tokens within the sequences of a batch."""
        return self.batch * self.length**2


@dataclass(frozen=True)
class Prediction:
    """The GPU memory that a step needs, in bytes, at the moment that needs the most.

    Attributes:
        parts: the bytes of each part. Parts that are not needed at that moment are left out.
        moment: "loss", "layer" or "optimizer".
        trainable: the number of parameters that are trained.
        outside: the names of the parts that torch's allocator does not count.
    """

    parts: dict[str, int]
    moment: str
    trainable: int
    outside: frozenset[str]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """The part of ``total`` that ``torch.cuda.max_memory_allocated`` counts."""
        return sum(size for part, size in self.parts.items() if part not in self.outside)


def skeleton(config: Any, attention: str | None = None) -> Any:
    """Makes the causal language model that a config of Transformers describes, on meta, without memory for its weights.

    Args:
        attention: Transformers' name for an attention implementation. None lets Transformers choose.

    Raises:
        ValueError, ImportError: there is no such model, or it does not support that attention.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(f"Transformers has no causal language model of type {config.model_type}")
    chosen = copy.deepcopy(config)  # because Transformers writes the attention that it chooses into the config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            chosen, **({} if attention is None else {"attn_implementation": attention})
        )


def is_named(path: str, names: Iterable[str]) -> bool:
    """Whether one of ``names`` is ``path`` or the last parts of it, which is how PEFT matches the names of modules."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def sizes_of(model: Any) -> Sizes:
    """Reads the sizes of a causal language model of Transformers with dense weights, on any device, including meta.

    Raises:
        ValueError: the config lacks the sizes of a decoder.
    """
    text = model.config.get_text_config()
    hidden, heads = _setting(text, "hidden_size"), _setting(text, "num_attention_heads")
    if not hidden or not heads:
        raise ValueError(
            f"no memory plan for {type(model).__name__}: its config lacks hidden_size or num_attention_heads"
        )
    queries, keys = _attention_features(text)
    experts = 0
    stacks: list[Stack] = []
    inside = set()
    for module in model.modules():
        if hasattr(type(module), "_apply_gate"):
            found = list(_stacks(module))
            experts, stacks = found[0].experts, [*stacks, *found]
            inside |= {id(getattr(module, name)) for name in _projections(module)}
    head = model.get_output_embeddings()
    linears = tuple(
        Linear(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside | weights)
    recurrent = recurrent_layers(model)
    return Sizes(
        stacks=tuple(stacks),
        linears=linears,
        others=others,
        layers=text.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        queries=queries,
        keys=keys,
        norms_queries=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        experts=experts,
        top_k=(_setting(text, "num_experts_per_tok") or _setting(text, "top_k_experts")) if experts else 0,
        vocabulary=text.vocab_size,
        mlp=_most_beside_mixers(linears, recurrent, lambda linear: linear.out_features),
        recurrent=recurrent,
        uncounted=uncounted_types(text, recurrent),
    )


def _setting(text: Any, name: str) -> int:
    """Returns a number in the config of a decoder: the largest if layers differ, and 0 if there is none."""
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    values = [getattr(layer, name, None) or 0 for layer in layers]
    return max(int(max(value) if isinstance(value, (list, tuple)) else value) for value in values)


def _attention_features(text: Any) -> tuple[int, int]:
    """Returns the number of features of the queries of all heads, and of the keys."""
    heads = _setting(text, "num_attention_heads")
    if latent := _setting(text, "qk_nope_head_dim"):  # multi-head latent attention has keys for each head
        features = heads * (latent + _setting(text, "qk_rope_head_dim"))
        return features, features
    head_dim = _setting(text, "head_dim") or text.hidden_size // heads
    return heads * head_dim, (_setting(text, "num_key_value_heads") or heads) * head_dim


def _projections(module: nn.Module) -> tuple[str, ...]:
    from .integrations.transformers.experts_module import projections_of

    return projections_of(module)


def _stacks(module: nn.Module) -> Iterator[Stack]:
    from .integrations.quantizer.packed_experts import BLOCKSIZE, packing_refusal

    packable = packing_refusal(module, BLOCKSIZE) is None
    for name in _projections(module):
        experts, rows, columns = getattr(module, name).shape
        transposed = bool(getattr(module, "is_transposed", False))
        if transposed:
            rows, columns = columns, rows
        yield Stack(experts, rows, columns, 2 if name == "gate_up_proj" else 1, packable, transposed)


def _most_beside_mixers(
    linears: Iterable[Linear], recurrent: Iterable[Recurrent], count: Callable[[Linear], int]
) -> int:
    """Counts something of the linear layers beside attention, recurrent mixers and experts, in the layer with the most."""
    layers: dict[str, int] = {}
    for linear in linears:
        layer, _, rest = linear.name.partition(".layers.")[2].partition(".")
        if "attn" not in rest and "attention" not in rest and not any(kind.has(linear.name) for kind in recurrent):
            layers[layer] = layers.get(layer, 0) + count(linear)
    return max(layers.values(), default=0)


def predict(sizes: Sizes, work: Workload) -> Prediction:
    """Predicts the largest memory that a step needs."""
    adapters = list(_adapters(sizes, work))
    tensors = [_Trained(numel, work.adapter_itemsize) for numel in adapters]
    tensors += [_Trained(whole.numel, work.whole_itemsize, whole.embeds) for whole in work.whole]
    states = [_state_bytes(tensor, work) for tensor in tensors]
    gradients = sum(tensor.nbytes for tensor in tensors)
    paged = sum(size for tensor, size in zip(tensors, states, strict=True) if _is_paged(tensor.numel, work))
    resident = {
        "experts": sum(_stack_bytes(stack, work) for stack in sizes.stacks),
        "other weights": sum(_linear_bytes(linear, work) for linear in sizes.linears) + sizes.others * work.itemsize,
        "adapters": sum(adapters) * work.adapter_itemsize,
        "modules trained in full": sum(whole.numel for whole in work.whole) * work.whole_itemsize,
        "optimizer state": sum(states) - paged,
        "optimizer state, paged": paged,
        "cuBLAS": CUBLAS_WORKSPACE * (3 if work.graphs else 2) if work.gpu else 0,
        "CUDA context": CONTEXT if work.gpu else 0,
        "NCCL": CONNECTIONS if work.gpu and work.processes > 1 else 0,
        "gradient buckets": min(BUCKET, gradients) if work.processes > 1 else 0,
    }
    # The gradient of the head comes first, and that of the embedding last.
    head = sum(whole.numel for whole in work.whole if whole.scores) * work.whole_itemsize
    layers = list(_layers(sizes, work))
    kept = sum(each.number * each.kept for each in layers) + _mask_bytes(work)
    # All gradients of a layer exist before they are added to those of earlier batches.
    accumulated = gradients if work.accumulation > 1 else 0
    early = (0 if work.graphs else accumulated) + head
    one_layer = sum(adapters) * work.adapter_itemsize // sizes.layers
    moments = {
        "loss": {"gradients": early, "activations": kept, "loss": loss_bytes(sizes, work)},
        # During backward, layers free what they kept and adapters get gradients.
        "optimizer": {"gradients": gradients, "optimizer step": _optimizer_step(gradients, work)},
    }
    backwards = []
    for each in layers:
        first = {"gradients": early + one_layer, "activations": kept, **each.backward}
        last = {"gradients": max(gradients, early + one_layer), "activations": each.kept + _mask_bytes(work)}
        backwards += [first, last | each.backward]
    moments["layer"] = max(backwards, key=lambda parts: sum(parts.values()))
    # A pass without gradients takes less than the backward of a layer does.
    largest = max(sum(each.backward.values()) for each in layers)
    reference = 2 * work.tokens * sizes.hidden * work.itemsize + largest if work.reference else 0
    if work.reference:
        # It comes between the forward and the backward pass of the batch.
        moments["reference"] = moments["loss"] | {"reference pass": reference}
    if work.graphs:
        # Graphs keep the memory of their worst moment, their inputs and outputs, and the gradients that are so small that
        # torch's allocator keeps them apart. The accumulated gradients and the loss come on top.
        held = moments["layer"]
        small = sum(tensor.nbytes for tensor in tensors if tensor.nbytes <= SMALL_ALLOCATION)
        held["gradients"] = max(held["gradients"], small) + accumulated
        held["activations"] += 2 * work.tokens * sizes.hidden * work.itemsize
        # The graph of the reference keeps memory of its own.
        moments = {"layer": held | {"loss": loss_bytes(sizes, work), "reference pass": reference}}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size for name, size in (resident | moments[moment]).items() if size}
    trainable = sum(tensor.numel for tensor in tensors)
    outside = {"optimizer state, paged", "CUDA context", *(["NCCL"] if "NCCL" in parts else [])}
    return Prediction(parts, moment, trainable, frozenset(outside))


def _stack_bytes(stack: Stack, work: Workload) -> int:
    if not work.quantized or not stack.packable:
        return stack.numel * work.itemsize
    from .hub import get_kernel

    shape = (stack.experts, stack.out_features, stack.in_features)
    storage = get_kernel().Format4bit(shape, projections=stack.projections).storage()
    return sum(rows * columns for rows, columns in storage.values())


def _linear_bytes(linear: Linear, work: Workload) -> int:
    if not work.quantized:
        return linear.numel * work.itemsize
    blocks = -(-linear.numel // BLOCK)
    # The packed weights, one byte for each block, four for each group of blocks, the two code books, and the offset.
    return linear.numel // 2 + blocks + 4 * -(-blocks // GROUP) + 4 * (16 + 256 + 1)


def _adapters(sizes: Sizes, work: Workload) -> Iterator[int]:
    """Yields the number of elements of each tensor that is trained."""
    if work.factors is not None:
        yield from work.factors
        return
    for linear in sizes.linears:
        if rank := _linear_rank(linear, work):
            yield from (rank * linear.in_features, rank * linear.out_features)
    if rank := work.expert_rank:
        for stack in sizes.stacks:
            yield from (stack.experts * rank * stack.in_features, stack.experts * rank * stack.out_features)


def _linear_rank(linear: Linear, work: Workload) -> int:
    """Returns the rank of the adapter on a linear layer, 0 if it has none."""
    if is_named(linear.name, work.whole_modules):
        return 0
    if work.shared_expert_rank and is_named(linear.name, work.shared_expert_modules):
        return work.shared_expert_rank
    return work.attention_rank if is_named(linear.name, work.attention_modules) else 0


@dataclass(frozen=True)
class _Trained:
    """A tensor that is trained: its number of elements, their bytes, and whether its state is never in 8 bits."""

    numel: int
    itemsize: int
    wide_state: bool = False

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


def _state_bytes(tensor: _Trained, work: Workload) -> int:
    """Returns the size of Adam's two moments of a tensor: torch's in its dtype, bitsandbytes' in 32 or 8 bits."""
    numel = tensor.numel
    if work.optimizer == "sgd":
        return 0
    if work.optimizer.startswith("adamw_torch"):
        return 2 * tensor.nbytes
    if "8bit" not in work.optimizer or numel < SMALLEST_8BIT or tensor.wide_state:
        return 2 * numel * 4
    return 2 * (numel + 4 * -(-numel // STATE_BLOCK))


def _is_paged(numel: int, work: Workload) -> bool:
    return work.optimizer.startswith("paged") and numel >= SMALLEST_PAGED


def _optimizer_step(gradients: int, work: Workload) -> int:
    """Returns what the optimizer's step makes: torch's Adam a denominator for each element, bitsandbytes' nothing."""
    return gradients if work.optimizer == "adamw_torch" else 0


def _mask_bytes(work: Workload) -> int:
    """Returns the size of the mask that all layers share: a boolean or a number to add, for each pair of tokens."""
    return work.pairs * (work.itemsize if work.eager else 1) if work.masked or work.eager else 0


def _norm_bytes(features: int, work: Workload) -> int:
    """Returns what a norm keeps for backward: its input, in fp32 unless the norm is fused."""
    return work.tokens * features * (work.itemsize if work.fused_norms else 4)


@dataclass(frozen=True)
class _Layers:
    """Layers that are alike.

    Attributes:
        number: their number.
        kept: what each keeps from its forward until its backward.
        backward: what exists beside that during the backward of one, by part.
    """

    number: int
    kept: int
    backward: dict[str, int]


def _layers(sizes: Sizes, work: Workload) -> Iterator[_Layers]:
    """Yields the layers with attention, and those of each recurrent kind."""
    copy = max((linear.numel for linear in sizes.linears), default=0) * work.itemsize if work.quantized else 0
    with_attention = sizes.layers - sum(kind.layers for kind in sizes.recurrent)
    if with_attention > 0 or not sizes.recurrent:
        # Beside attention's gradients, a dense copy of the 4-bit layer that is multiplied with.
        made = {"attention": _attention_made(sizes, work) + copy}
        yield _layer(sizes, work, with_attention, _attention_kept(sizes, work), made)
    for kind in sizes.recurrent:
        # The copy is gone when the recurrence is computed.
        made = {"recurrence": max(kind.mixer.made(work), copy)}
        kept = kind.mixer.kept(work) + _inputs_of_adapters(sizes, work, kind)
        yield _layer(sizes, work, kind.layers, kept, made, is_alone=kind.is_alone)


def _layer(
    sizes: Sizes, work: Workload, number: int, mixer_kept: int, mixer_made: dict[str, int], *, is_alone: bool = False
) -> _Layers:
    """Returns layers whose mixer, attention or a recurrent one, keeps and makes so much."""
    tokens, item = work.tokens, work.itemsize
    hidden = tokens * sizes.hidden * item
    experts, rows, workspace = (0, 0, 0) if is_alone else _experts(sizes, work)
    # The inputs of both norms, and for each linear layer beside the experts its output and what the activation makes of it.
    norms = _norm_bytes(sizes.hidden, work)
    rest = mixer_kept + (norms if is_alone else 2 * norms + 2 * tokens * sizes.mlp * item)
    # The gradient of the layer's output, which is also the gradient of its residual.
    passing = hidden
    if experts + rows + workspace >= sum(mixer_made.values()):
        operators = rest + experts
        made = {"expert rows": rows, "expert workspace": workspace}
    else:  # the mixer's backward runs after the experts have freed what they kept
        operators = rest
        made = mixer_made
    if work.checkpointing:
        # The input of the first norm is that of the layer, which is kept anyway. A norm that is not fused keeps it in fp32.
        shared = hidden if work.fused_norms else 0
        return _Layers(number, hidden, {"layer": operators - shared + passing, **made})
    return _Layers(number, rest + experts, {"layer": passing, **made})


def _inputs_of_adapters(sizes: Sizes, work: Workload, kind: Recurrent) -> int:
    """Returns what the adapters in a recurrent mixer keep: their inputs, and with dropout what is left of these."""
    adapted = [
        linear
        for linear in sizes.linears
        if linear.name.startswith(f"{kind.paths[0]}.") and (work.factors is not None or _linear_rank(linear, work))
    ]
    # Layers that read the hidden states share their input.
    reads = {linear.in_features for linear in adapted if not linear.name.endswith(".out_proj")}
    writes = [linear.in_features for linear in adapted if linear.name.endswith(".out_proj")]
    features = (sum(reads) + sum(writes)) * work.itemsize
    if work.dropout:
        features += sum(linear.in_features for linear in adapted) * (work.itemsize + work.mask_itemsize)
    return work.tokens * features


def _attention_kept(sizes: Sizes, work: Workload) -> int:
    tokens, item = work.tokens, work.itemsize
    normed = tokens * sizes.hidden * item  # the input of the adapters
    before_norms = _norm_bytes(sizes.queries + sizes.keys, work) if sizes.norms_queries else 0
    # SDPA with a mask and eager attention repeat grouped keys for each head.
    keys = sizes.queries if work.masked or work.eager else sizes.keys
    inputs_and_output = tokens * (2 * sizes.queries + 2 * keys) * item
    if work.eager:  # the softmax in fp32, and its copy in the dtype of the activations
        pairs = sizes.heads * work.pairs * (4 + (item if item < 4 else 0))
    else:
        pairs = work.pairs * item if work.masked else 0  # the mask, as numbers that are added
    if work.dropout and work.attention_rank:
        # The input of each adapter (queries, keys, values and output) and the mask of what was dropped from it.
        normed += tokens * (3 * sizes.hidden + sizes.queries) * (item + work.mask_itemsize)
    if work.dropout:
        normed += tokens * _adapted_beside_attention(sizes, work) * (item + work.mask_itemsize)
    return normed + before_norms + inputs_and_output + tokens * sizes.heads * 4 + pairs


def _adapted_beside_attention(sizes: Sizes, work: Workload) -> int:
    """Returns the number of input features of the adapters outside attention, in the layer with the most."""

    def features(linear: Linear) -> int:
        return linear.in_features if work.factors is not None or _linear_rank(linear, work) else 0

    return _most_beside_mixers(sizes.linears, sizes.recurrent, features)


def _attention_made(sizes: Sizes, work: Workload) -> int:
    """Returns the size of the gradients of attention's output, queries (summed in fp32), keys and values."""
    whole = work.masked or work.eager or work.flash  # gradients of keys and values first exist for each head
    keys = sizes.queries if whole else sizes.keys
    sums = work.tokens
    if work.flash:  # each document is summed in blocks of its own
        sums += FLASH_ROWS * (work.tokens // DOCUMENT_TOKENS if work.documents else work.batch)
    # Eager attention has gradients of the softmax in fp32, and of the scores before and after it.
    weights = sizes.heads * work.pairs * (4 + 2 * work.itemsize) if work.eager else 0
    return work.tokens * (2 * sizes.queries + 2 * keys) * work.itemsize + 4 * sums * sizes.queries + weights


def _experts(sizes: Sizes, work: Workload) -> tuple[int, int, int]:
    """Returns what the experts of a layer keep, what their backward makes, and the workspace of packed experts."""
    if not sizes.stacks:
        return 0, 0, 0
    up, down = sizes.stacks[0], sizes.stacks[1]
    rows, item = work.tokens * sizes.top_k, work.itemsize
    # x, gate_up and the adapters' low-rank products, the router's probabilities, and three numbers of routing for each row.
    kept = work.tokens * up.in_features * item + rows * up.out_features * item + 2 * rows * work.expert_rank * item
    kept += work.tokens * up.experts * 4 + 3 * rows * 4
    # The gradient of gate_up together with weighted h (S, I), or later with the rows of x's gradient (S, H).
    made = rows * (up.out_features + max(down.in_features, up.in_features)) * item
    if work.dropout and work.expert_rank:
        # With dropout, the stages have separate autograd functions. They keep the inputs of both adapters and the masks of
        # what was dropped, the factors of the activation and the rows of the output, and rows have two gradients.
        hidden, inner = up.in_features, down.in_features
        kept += rows * ((hidden + inner) * (item + work.mask_itemsize) + (inner + hidden) * item)
        made += rows * hidden * item
    packed = work.quantized and up.packable and work.gpu
    workspace = 0 if not packed or _decoded(up, down, rows) else min(EXPERT_WORKSPACE, max(up.numel, down.numel) * item)
    return kept, made, workspace


def _decoded(up: Stack, down: Stack, rows: int) -> bool:
    """Whether no product of packed experts needs the workspace. Measured GPUs may do without it for more rows.

    The kernel's ``stages/triton/paths.py`` decides it. Experts that are packed transposed always need the workspace.
    """
    if up.transposed or down.transposed:
        return False
    from .hub import get_kernel, submodule

    tuning = submodule(get_kernel(), "tuning")
    whole_units = all(stack.in_features % tuning.ROW_UNIT == 0 for stack in (up, down))
    return whole_units and rows <= tuning.DEFAULT_DEQUANTIZE_ROWS * up.experts


def loss_bytes(sizes: Sizes, work: Workload) -> int:
    """Returns the memory of the loss: a tile of logits, the hidden states, and their gradients.

    Hidden states count before and after the norm, their gradients in fp32 and in the dtype of the activations. The
    gradient of a head that is trained is summed in fp32.
    """
    tokens, words = LOSS_TILE_BESIDE_GRAPHS if work.graphs else LOSS_TILE
    tile = min(work.tokens, tokens) * words * work.itemsize
    hidden = work.tokens * sizes.hidden
    head = 4 * sum(whole.numel for whole in work.whole if whole.scores)
    return tile + 3 * hidden * work.itemsize + _norm_bytes(sizes.hidden, work) + 4 * hidden + head
