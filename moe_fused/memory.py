"""What fine-tuning a model takes of a GPU's memory, part by part, from its architecture alone.

``sizes_of`` reads the sizes of a model, ``skeleton`` makes one of a config, without weights; ``predict`` is arithmetic.
Nothing here is fitted to a measurement but ``CONTEXT``, what the driver and the libraries take for themselves.

A step has three moments in which it may need the most, and the prediction is of the largest:

    loss        what every layer keeps for backward; a tile of logits; the gradient of the hidden states
    layer       backward through one, computed again under checkpointing: what its operators keep, and what the experts'
                backward makes meanwhile (``moe_experts``' memory plan). In the first, all layers before it keep what they
                do; in the last, all adapters have their gradients
    optimizer   all gradients, its state

Letters as in ARCHITECTURE.md: T tokens of a batch, S = T·K rows, E experts, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MIB, GIB = 2**20, 2**30

# Of a process on a GPU before its first tensor, with cuBLAS loaded: measured on an H100, outside of torch's allocator.
CONTEXT = 600 * MIB
# What cuBLAS asks torch's allocator for, on Hopper; less elsewhere. For each handle and stream: the thread that goes
# backward has a handle of its own, graphs are recorded on a stream of their own, and share one.
CUBLAS_WORKSPACE = 32 * MIB
# The most that torch's allocator takes for small; the memory of those is apart.
SMALL_ALLOCATION = MIB
# Of packed experts, ``launch.packed.WORKSPACE_BYTES`` of the kernel, which does not load without Triton.
EXPERT_WORKSPACE = 256 * MIB
# Tokens and words of the tiles in which TRL's loss goes through the logits, and those that ``finetune`` gives it beside CUDA
# graphs.
LOSS_TILE, LOSS_TILE_BESIDE_GRAPHS = (4096, 32768), (2048, 8192)
# Of flash attention over documents: what each is rounded up to, and tokens of one, on the average of the batch with the
# shortest.
FLASH_ROWS, DOCUMENT_TOKENS = 128, 32
# bitsandbytes: 4-bit blocks, their groups, blocks of optimizer state; smaller parameters have a state of 32 bits, and only
# larger ones a state in paged memory.
BLOCK, GROUP, STATE_BLOCK = 64, 256, 256
SMALLEST_8BIT, SMALLEST_PAGED = 4096, 100_000


@dataclass(frozen=True)
class Stack:
    """A stacked weight of a layer's experts.

    Attributes:
        experts, out_features, in_features: its shape.
        projections: matrices of an expert in it, 2 for gate and up.
        packable: whether it can be held in 4 bits.
    """

    experts: int
    out_features: int
    in_features: int
    projections: int
    packable: bool

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
class Sizes:
    """A model without its weights.

    Attributes:
        stacks: all stacked weights of experts, up and down projections.
        linears: all linear layers but the head.
        others: elements of all other parameters, the embeddings and the head among them.
        layers, hidden, heads, queries, keys: of the decoder; queries and keys are features, of all heads.
        norms_queries: whether queries and keys are normalized.
        experts, top_k: of a layer; 0 for a model without experts.
        vocabulary: rows of the head.
        mlp: features that the linear layers of a decoder layer outside attention and experts make, the most of any layer.
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


@dataclass(frozen=True)
class Workload:
    """How a model is trained.

    Attributes:
        batch, length: sequences that go through the model at once, and their tokens.
        accumulation: batches to a step.
        quantized: experts and linear layers in 4 bits with double quantization.
        itemsize: bytes of what is computed with, and of weights outside 4 bits.
        adapter_itemsize: bytes of an adapter's element, and of its gradient.
        attention_rank, attention_modules: of adapters on linear layers of these names.
        expert_rank: of adapters on experts.
        dropout: adapters drop some of their input.
        optimizer: a name of Transformers'.
        checkpointing: layers are computed again in backward.
        masked: attention takes a mask of all pairs of tokens, as documents side by side need with SDPA.
        documents: it takes the boundaries of documents instead, as flash attention does.
        fused_norms: norms keep their input as it is, not in fp32.
        gpu: whether what a GPU's libraries take counts.
        graphs: the decoder's passes are CUDA graphs, which keep the memory that they need at their worst moment.
    """

    batch: int = 1
    length: int = 4096
    accumulation: int = 1
    quantized: bool = True
    itemsize: int = 2
    adapter_itemsize: int = 2
    attention_rank: int = 16
    attention_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    expert_rank: int = 8
    dropout: bool = False
    optimizer: str = "paged_adamw_8bit"
    checkpointing: bool = True
    masked: bool = False
    documents: bool = False
    fused_norms: bool = True
    gpu: bool = True
    graphs: bool = False

    @property
    def mask_itemsize(self) -> int:
        """Bytes that dropout keeps for an element to know whether it was dropped."""
        return 1 if self.gpu else self.itemsize

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.length


@dataclass(frozen=True)
class Prediction:
    """Bytes of GPU memory by part, at the moment that needs the most.

    Attributes:
        parts: by what they are for; of parts that are not needed at that moment nothing.
        moment: "loss", "layer" or "optimizer".
        trainable: parameters that are trained.
        outside: the parts that torch's allocator does not see.
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


def skeleton(config: Any) -> Any:
    """The causal language model that a config of Transformers describes, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def sizes_of(model: Any) -> Sizes:
    """The sizes of a causal language model of Transformers with dense weights, on any device, meta included.

    Raises:
        ValueError: its config lacks the sizes of a decoder.
    """
    text = model.config.get_text_config()
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    if not hidden or not heads:
        raise ValueError(
            f"no memory plan for {type(model).__name__}: its config lacks hidden_size or num_attention_heads"
        )
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    experts = 0
    stacks: list[Stack] = []
    inside = set()
    for module in model.modules():
        if hasattr(type(module), "_apply_gate"):
            own = list(_stacks(module))
            experts, stacks = own[0].experts, [*stacks, *own]
            inside |= {id(getattr(module, name)) for name in _projections(module)}
    head = model.get_output_embeddings()
    linears = tuple(
        Linear(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    others = sum(own.numel() for own in model.parameters() if id(own) not in inside | weights)
    return Sizes(
        stacks=tuple(stacks),
        linears=linears,
        others=others,
        layers=text.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        queries=heads * head_dim,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        norms_queries=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        experts=experts,
        top_k=int(getattr(text, "num_experts_per_tok", 0) or 0) if experts else 0,
        vocabulary=text.vocab_size,
        mlp=_mlp_features(linears),
    )


def _projections(module: nn.Module) -> tuple[str, ...]:
    from .quantizer import projections_of

    return projections_of(module)


def _stacks(module: nn.Module) -> Iterator[Stack]:
    from .quantizer import BLOCKSIZE, packing_refusal

    packable = packing_refusal(module, BLOCKSIZE) is None
    for name in _projections(module):
        experts, rows, columns = getattr(module, name).shape
        if getattr(module, "is_transposed", False):
            rows, columns = columns, rows
        yield Stack(experts, rows, columns, 2 if name == "gate_up_proj" else 1, packable)


def _mlp_features(linears: tuple[Linear, ...]) -> int:
    layers: dict[str, int] = {}
    for own in linears:
        layer, _, rest = own.name.partition(".layers.")[2].partition(".")
        if "attn" not in rest and "attention" not in rest:
            layers[layer] = layers.get(layer, 0) + own.out_features
    return max(layers.values(), default=0)


def predict(sizes: Sizes, work: Workload) -> Prediction:
    """What a step takes at most."""
    adapters = list(_adapters(sizes, work))
    trainable = sum(adapters)
    states = [_state_bytes(numel, work) for numel in adapters]
    paged = sum(size for numel, size in zip(adapters, states, strict=True) if _is_paged(numel, work))
    resident = {
        "experts": sum(_stack_bytes(own, work) for own in sizes.stacks),
        "other weights": sum(_linear_bytes(own, work) for own in sizes.linears) + sizes.others * work.itemsize,
        "adapters": trainable * work.adapter_itemsize,
        "optimizer state": sum(states) - paged,
        "optimizer state, paged": paged,
        "cuBLAS": CUBLAS_WORKSPACE * (3 if work.graphs else 2) if work.gpu else 0,
        "CUDA context": CONTEXT if work.gpu else 0,
    }
    gradients = trainable * work.adapter_itemsize
    kept_by_layer, layer = _layer(sizes, work)
    kept = kept_by_layer * sizes.layers + _mask_bytes(work)
    # Those of a layer are there as a whole before they are added to those of the batches before.
    accumulated = gradients if work.accumulation > 1 else 0
    early, own = (0 if work.graphs else accumulated), gradients // sizes.layers
    moments = {
        "loss": {"gradients": early, "activations": kept, "loss": loss_bytes(sizes, work)},
        # Going back, layers give up what they keep and adapters get gradients.
        "optimizer": {"gradients": gradients, "optimizer step": _optimizer_step(trainable, work)},
    }
    first = {"gradients": early + own, "activations": kept, **layer}
    last = {"gradients": max(gradients, early + own), "activations": kept_by_layer + _mask_bytes(work), **layer}
    moments["layer"] = max(first, last, key=lambda parts: sum(parts.values()))
    if work.graphs:
        # They keep what their worst moment takes, what goes in and out, and gradients so small that torch's allocator puts
        # them where nothing large goes. Beside it are what was accumulated before, and the loss.
        held = moments["layer"]
        small = sum(size for size in (numel * work.adapter_itemsize for numel in adapters) if size <= SMALL_ALLOCATION)
        held["gradients"] = max(held["gradients"], small) + accumulated
        held["activations"] += 2 * work.tokens * sizes.hidden * work.itemsize
        moments = {"layer": held | {"loss": loss_bytes(sizes, work)}}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size for name, size in (resident | moments[moment]).items() if size}
    return Prediction(parts, moment, trainable, frozenset({"optimizer state, paged", "CUDA context"}))


def _stack_bytes(stack: Stack, work: Workload) -> int:
    if not work.quantized or not stack.packable:
        return stack.numel * work.itemsize
    from .hub import get_kernel

    shape = (stack.experts, stack.out_features, stack.in_features)
    storage = get_kernel().quantization.Format4bit(shape, "nf4", BLOCK, True, stack.projections).storage()
    return sum(rows * columns for rows, columns in storage.values())


def _linear_bytes(linear: Linear, work: Workload) -> int:
    if not work.quantized:
        return linear.numel * work.itemsize
    blocks = -(-linear.numel // BLOCK)
    # Bytes, a byte to a block, 4 to a group of blocks; the two code tables and the offset.
    return linear.numel // 2 + blocks + 4 * -(-blocks // GROUP) + 4 * (16 + 256 + 1)


def _adapters(sizes: Sizes, work: Workload) -> Iterator[int]:
    """The elements of each tensor that is trained."""
    if rank := work.attention_rank:
        for own in sizes.linears:
            if own.name.rpartition(".")[2] in work.attention_modules:
                yield from (rank * own.in_features, rank * own.out_features)
    if rank := work.expert_rank:
        for stack in sizes.stacks:
            yield from (stack.experts * rank * stack.in_features, stack.experts * rank * stack.out_features)


def _state_bytes(numel: int, work: Workload) -> int:
    """Of Adam's two moments of a tensor: torch's in its dtype, bitsandbytes' in 32 bits or 8."""
    if work.optimizer == "sgd":
        return 0
    if work.optimizer.startswith("adamw_torch"):
        return 2 * numel * work.adapter_itemsize
    if "8bit" not in work.optimizer or numel < SMALLEST_8BIT:
        return 2 * numel * 4
    return 2 * (numel + 4 * -(-numel // STATE_BLOCK))


def _is_paged(numel: int, work: Workload) -> bool:
    return work.optimizer.startswith("paged") and numel >= SMALLEST_PAGED


def _optimizer_step(trainable: int, work: Workload) -> int:
    """torch's Adam over all tensors at once makes a denominator for each; bitsandbytes' works in place."""
    return trainable * work.adapter_itemsize if work.optimizer == "adamw_torch" else 0


def _mask_bytes(work: Workload) -> int:
    """A boolean for each pair of tokens, shared by all layers."""
    return work.batch * work.length**2 if work.masked else 0


def _norm_bytes(features: int, work: Workload) -> int:
    """What a norm of T tokens keeps: its input, in fp32 unless it is fused."""
    return work.tokens * features * (work.itemsize if work.fused_norms else 4)


def _layer(sizes: Sizes, work: Workload) -> tuple[int, dict[str, int]]:
    """What a layer keeps from its forward until its backward, and what there is beside that during its backward."""
    tokens, item = work.tokens, work.itemsize
    hidden = tokens * sizes.hidden * item
    experts, rows, workspace = _experts(sizes, work)
    # The inputs of both norms, and of the linear layers beside the experts each output twice: what they made, and what the
    # gate makes of it.
    rest = _attention_kept(sizes, work) + 2 * _norm_bytes(sizes.hidden, work) + 2 * tokens * sizes.mlp * item
    # The gradient of the layer's output, which is that of its residual, too.
    passing = hidden
    # Beside attention's gradients, a dense copy of the 4-bit layer that multiplies.
    copy = max((own.numel for own in sizes.linears), default=0) * item if work.quantized else 0
    attention = _attention_made(sizes, work) + copy
    if experts + rows + workspace >= attention:
        operators = rest + experts
        made = {"expert rows": rows, "expert workspace": workspace}
    else:  # attention goes back when experts have given up what they kept
        operators = rest
        made = {"attention": attention}
    if work.checkpointing:
        # The first norm's input is the layer's, which waited for this; only a fused norm keeps it as it is.
        shared = hidden if work.fused_norms else 0
        return hidden, {"layer": operators - shared + passing, **made}
    return rest + experts, {"layer": passing, **made}


def _attention_kept(sizes: Sizes, work: Workload) -> int:
    tokens, item = work.tokens, work.itemsize
    normed = tokens * sizes.hidden * item  # the adapters' input
    before_norms = _norm_bytes(sizes.queries + sizes.keys, work) if sizes.norms_queries else 0
    keys = sizes.queries if work.masked else sizes.keys  # SDPA with a mask has no grouped keys: one for each head
    inputs_and_output = tokens * (2 * sizes.queries + 2 * keys) * item
    mask = work.batch * work.length**2 * item if work.masked else 0  # as numbers to add
    if work.dropout and work.attention_rank:
        # Each adapter's input, and what was dropped of it: of queries, keys and values, and of the output.
        normed += tokens * (3 * sizes.hidden + sizes.queries) * (item + work.mask_itemsize)
    return normed + before_norms + inputs_and_output + tokens * sizes.heads * 4 + mask


def _attention_made(sizes: Sizes, work: Workload) -> int:
    """The gradients of the output, the queries (which add up in fp32), the keys and the values."""
    whole = work.masked or work.documents  # keys and values have a gradient for each head first
    keys = sizes.queries if whole else sizes.keys
    sums = work.tokens
    if work.documents:  # each of which adds up in blocks of its own
        sums += FLASH_ROWS * work.tokens // DOCUMENT_TOKENS
    return work.tokens * (2 * sizes.queries + 2 * keys) * work.itemsize + 4 * sums * sizes.queries


def _experts(sizes: Sizes, work: Workload) -> tuple[int, int, int]:
    """What the experts of a layer keep, what their backward makes meanwhile, and the workspace of packed ones."""
    if not sizes.stacks:
        return 0, 0, 0
    up, down = sizes.stacks[0], sizes.stacks[1]
    rows, item = work.tokens * sizes.top_k, work.itemsize
    # x, gate_up, the adapters' thin products; the router's probabilities; the routing, three numbers to a row.
    kept = work.tokens * up.in_features * item + rows * up.out_features * item + 2 * rows * work.expert_rank * item
    kept += work.tokens * up.experts * 4 + 3 * rows * 4
    # The gradient of gate_up beside weighted h (S, I), then beside the rows of x's gradient (S, H).
    made = rows * (up.out_features + max(down.in_features, up.in_features)) * item
    if work.dropout and work.expert_rank:
        # Stages with autograd of their own keep both adapters' inputs and what was dropped of them, the gate's factors and
        # the rows of the output, and pass rows back along two ways.
        hidden, inner = up.in_features, down.in_features
        kept += rows * ((hidden + inner) * (item + work.mask_itemsize) + (inner + hidden) * item)
        made += rows * hidden * item
    packed = work.quantized and up.packable and work.gpu
    workspace = 0 if not packed or _decoded(up, down, rows) else min(EXPERT_WORKSPACE, max(up.numel, down.numel) * item)
    return kept, made, workspace


def _decoded(up: Stack, down: Stack, rows: int) -> bool:
    """Whether no product of packed experts needs the workspace; on GPUs that were measured it may be so for more rows."""
    from .hub import get_kernel, submodule

    most = submodule(get_kernel(), "tuning").DEFAULT_DECODE_ROWS
    return rows <= most * up.experts and up.in_features % 64 == 0 and down.in_features % 64 == 0


def loss_bytes(sizes: Sizes, work: Workload) -> int:
    """A tile of logits; the hidden states with a label, before and after the norm, their gradient in fp32 and as it is."""
    tokens, words = LOSS_TILE_BESIDE_GRAPHS if work.graphs else LOSS_TILE
    tile = min(work.tokens, tokens) * words * work.itemsize
    hidden = work.tokens * sizes.hidden
    return tile + 3 * hidden * work.itemsize + _norm_bytes(sizes.hidden, work) + 4 * hidden
