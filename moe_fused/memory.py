"""Predicts the GPU memory that fine-tuning a model needs, part by part, from its architecture alone.

``predict`` computes the memory from the sizes that ``sizes.sizes_of`` reads of a model. Nothing is fitted to a measurement
except ``CONTEXT``, the memory that the driver and the libraries need.

A step has some moments at which it may need the most memory. The prediction is that of the largest:

    loss        what every layer keeps for backward, a tile of logits, and the gradient of the hidden states
    layer       backward through one layer, whose forward runs again under checkpointing: what its operators keep, and what
                the experts' backward makes (``moe_experts``' memory plan). At the first layer to go backward, all others
                still keep theirs; at the last, all adapters have gradients
    optimizer   all gradients, and the optimizer's state

N processes that share the weights (``Workload.sharded``) hold ⌈E/N⌉ experts of each stack, 1/N of the adapters with their
gradients and optimizer state, and 1/N of the rows of an embedding that is frozen. All else is whole on each. The layer that
is computed is whole. What is gathered arrives in buffers, of which two exist at once. Buffers and scattered gradients belong
to streams of their own, so that torch's allocator keeps their memory for them. The plan is that of the first process, whose
shares are the largest.

Letters as in ARCHITECTURE.md: T tokens of a batch, S = T·K rows, E experts, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .quantized import PUBLISHED
from .recurrent import Recurrent
from .sizes import Linear, Sizes, Stack, Whole, is_named, most_beside_mixers, sizes_of, skeleton

__all__ = [
    "BUCKET", "CONNECTIONS", "CONTEXT", "GIB", "LOSS_TILE", "LOSS_TILE_BESIDE_GRAPHS", "MIB", "Linear", "Prediction",
    "Sizes", "Stack", "Whole", "Workload", "adapter_numels", "gathered_layer", "is_named", "loss_bytes", "predict",
    "sizes_of", "skeleton",
]  # fmt: skip

MIB, GIB = 2**20, 2**30

# What a process needs on a GPU before its first tensor, with cuBLAS loaded. Measured on an H100; torch's allocator does not
# count it.
CONTEXT = 600 * MIB
# What NCCL takes beside torch's allocator to connect the GPUs of a run. For two H200s, 282 MiB were measured. More GPUs take
# more, since each needs buffers for all others. How much they take was not measured.
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
# How many layers' outputs of attention may be on the GPU and on their way to the host before the computation waits for the
# oldest, see ``finetune/kept_attention.py``.
COPIES = 2
# bitsandbytes' sizes: weights of a 4-bit block, blocks of a group, and elements of a block of optimizer state. Parameters
# below SMALLEST_8BIT have a state of 32 bits, and only those from SMALLEST_PAGED on have a state in paged memory.
BLOCK, GROUP, STATE_BLOCK = 64, 256, 256
SMALLEST_8BIT, SMALLEST_PAGED = 4096, 100_000


@dataclass(frozen=True)
class Workload:
    """How a model is trained.

    Attributes:
        batch, length: the number of sequences in a batch, and the number of tokens in each.
        accumulation: the number of batches in a step.
        quantized: whether experts are in 4 bits, and linear layers as well if ``quant_type`` is of bitsandbytes.
        quant_type: the format of 4-bit weights. Those of bitsandbytes have double quantization.
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
        kept_attention: where attention's output is kept for that: "none" if it is computed again as well, "device" or
            "host".
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
        sharded: whether the processes also divide the experts, the adapters and a frozen embedding among them. It changes
            nothing for a single process.
        packages: the packages that compute recurrent layers, of those in ``recurrent.FUNCTIONS``. Without its package, a
            layer runs in plain torch.
    """

    batch: int = 1
    length: int = 4096
    accumulation: int = 1
    quantized: bool = True
    quant_type: str = "nf4"
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
    kept_attention: str = "none"
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
    sharded: bool = False

    @property
    def shards(self) -> int:
        """The number of processes among which weights are divided, 1 if each process holds all of them."""
        return self.processes if self.sharded else 1

    @property
    def linears_in_4bit(self) -> bool:
        """Whether linear layers are in 4 bits, but for those that stay dense."""
        return self.quantized and self.quant_type not in PUBLISHED

    def packs_linear(self, linear: Linear) -> bool:
        """Whether a linear layer is held in 4 bits."""
        return self.linears_in_4bit and linear.packable

    def packs(self, stack: Stack) -> bool:
        """Whether a stack of experts is held in 4 bits."""
        in_rows = self.quant_type in PUBLISHED
        return self.quantized and (self.quant_type in stack.in_rows if in_rows else stack.packable)

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
        moment: "loss", "layer", "optimizer" or "reference".
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


def predict(sizes: Sizes, work: Workload) -> Prediction:
    """Predicts the largest memory that a step needs."""
    adapters = list(adapter_numels(sizes, work))
    tensors = [_Trained(_share(numel, work), work.adapter_itemsize) for numel in adapters]
    tensors += [_Trained(whole.numel, work.whole_itemsize, whole.embeds) for whole in work.whole]
    moments = _moments(sizes, work, tensors, sum(adapters) * work.adapter_itemsize)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size for name, size in (_resident(sizes, work, tensors) | moments[moment]).items() if size}
    outside = {"optimizer state, paged", "CUDA context", *(["NCCL"] if "NCCL" in parts else [])}
    trainable = sum(adapters) + sum(whole.numel for whole in work.whole)
    return Prediction(parts, moment, trainable, frozenset(outside))


def _resident(sizes: Sizes, work: Workload, tensors: list[_Trained]) -> dict[str, int]:
    """Returns the parts that a process holds all the time. ``tensors`` are its shares of all that is trained."""
    states = [_state_bytes(tensor, work) for tensor in tensors]
    paged = sum(size for tensor, size in zip(tensors, states, strict=True) if _is_paged(tensor.numel, work))
    whole = sum(whole.numel for whole in work.whole) * work.whole_itemsize
    trained = sum(tensor.nbytes for tensor in tensors)
    others = sizes.others - _sharded_embedding(sizes, work) + _share_of_rows(sizes, work)
    # The gradients of shards are averaged while they are scattered.
    averaged = trained if work.shards == 1 else whole
    return {
        "experts": sum(_stack_bytes(_local(stack, work), work) for stack in sizes.stacks),
        "other weights": sum(_linear_bytes(linear, work) for linear in sizes.linears) + others * work.itemsize,
        "adapters": trained - whole,
        "modules trained in full": whole,
        "optimizer state": sum(states) - paged,
        "optimizer state, paged": paged,
        "cuBLAS": CUBLAS_WORKSPACE * (3 if work.graphs else 2) if work.gpu else 0,
        "CUDA context": CONTEXT if work.gpu else 0,
        "NCCL": CONNECTIONS if work.gpu and work.processes > 1 else 0,
        "gradient buckets": min(BUCKET, averaged) if work.processes > 1 else 0,
    }


def _moments(sizes: Sizes, work: Workload, tensors: list[_Trained], adapters: int) -> dict[str, dict[str, int]]:
    """Returns the parts that exist only at a moment, by the name of the moment.

    Args:
        tensors: the process's shares of all that is trained.
        adapters: the bytes of all adapters, those of other processes included.
    """
    gradients = sum(tensor.nbytes for tensor in tensors)
    # The gradient of the head comes first, and that of the embedding last.
    head = sum(whole.numel for whole in work.whole if whole.scores) * work.whole_itemsize
    layers = list(_layers(sizes, work))
    kept = sum(each.number * each.kept for each in layers) + _mask_bytes(work)
    # All gradients of a layer exist before they are added to those of earlier batches.
    accumulated = gradients if work.accumulation > 1 else 0
    early = (0 if work.graphs else accumulated) + head
    one_layer = adapters // sizes.layers
    layer = gathered_layer(sizes, work)
    buffers = 2 * layer
    gathered = {"gathered weights": buffers + layer}
    if work.shards > 1:
        early = max(early, gradients)
    moments = {
        "loss": {
            "gradients": early, "activations": kept, "loss": loss_bytes(sizes, work), "gathered weights": buffers,
        },
        # During backward, layers free what they kept and adapters get gradients.
        "optimizer": {
            "gradients": gradients, "optimizer step": _optimizer_step(gradients, work), "gathered weights": buffers,
        },
    }  # fmt: skip
    late = max(gradients, early + one_layer)
    if work.shards > 1:
        # The gradient of a layer is whole until it is scattered, and the buffer for that is as large.
        late = max(gradients, early) + 2 * one_layer
        one_layer *= 2
    backwards = []
    for each in layers:
        first = {"gradients": early + one_layer, "activations": kept, **each.backward}
        last = {"gradients": late, "activations": each.kept + _mask_bytes(work), **each.backward}
        backwards += [first | gathered, last | gathered]
    moments["layer"] = max(backwards, key=lambda parts: sum(parts.values()))
    if work.kept_attention == "host":
        # At the end of the forward pass those of the last layers, and later those of two layers that are computed again.
        under_way = min(COPIES, attention_layers(sizes)) * attention_results(sizes, work)
        copies = {"copies of attention": under_way}
        moments["loss"] |= copies
        moments["layer"] |= copies
    # A pass without gradients takes less than the backward of a layer does.
    largest = max(sum(each.backward.values()) for each in layers)
    reference = 2 * work.tokens * sizes.hidden * work.itemsize + largest if work.reference else 0
    if work.reference:
        # It comes between the forward and the backward pass of the batch.
        moments["reference"] = moments["loss"] | {"reference pass": reference} | gathered
    if work.graphs:
        # Graphs keep the memory of their worst moment, their inputs and outputs, and the gradients that are so small that
        # torch's allocator keeps them apart. The accumulated gradients and the loss come on top.
        held = moments["layer"]
        small = sum(tensor.nbytes for tensor in tensors if tensor.nbytes <= SMALL_ALLOCATION)
        # The first batch, which is not recorded, leaves the memory of its scattered gradients to their stream.
        held["gradients"] = max(held["gradients"], small) + accumulated * (1 if work.shards == 1 else 2)
        held["activations"] += 2 * work.tokens * sizes.hidden * work.itemsize
        # The graph of the reference keeps memory of its own.
        moments = {"layer": held | {"loss": loss_bytes(sizes, work), "reference pass": reference}}
    return moments


def _share(numel: int, work: Workload) -> int:
    """Returns the largest number of elements that a process has of a tensor that is divided evenly."""
    return -(-numel // work.shards)


def _local(stack: Stack, work: Workload) -> Stack:
    """Returns the first process's part of a stack, (⌈E/N⌉, out, in): no other process has more experts."""
    return replace(stack, experts=_share(stack.experts, work))


def _sharded_embedding(sizes: Sizes, work: Workload) -> int:
    """Returns the number of elements of the embedding if processes share it, else 0: one that is trained stays whole."""
    return 0 if work.shards == 1 or any(whole.embeds for whole in work.whole) else sizes.embedding


def _share_of_rows(sizes: Sizes, work: Workload) -> int:
    """Returns the number of elements of ⌈V/N⌉ rows of an embedding (V, H) that processes share."""
    return _share(sizes.vocabulary, work) * (_sharded_embedding(sizes, work) // sizes.vocabulary)


def gathered_layer(sizes: Sizes, work: Workload) -> int:
    """Returns the bytes of the largest decoder layer's sharded weights while they are whole; 0 if nothing is sharded.

    These are its experts, N·⌈E/N⌉ of them because shares are padded to the largest, and its adapters, of which each layer
    with experts is taken to have as many.
    """
    if work.shards == 1:
        return 0
    stacks = [work.shards * _stack_bytes(_local(stack, work), work) for stack in sizes.stacks]
    adapters = sum(adapter_numels(sizes, work)) * work.adapter_itemsize // (len(stacks) // 2 or sizes.layers)
    return max(map(sum, zip(stacks[::2], stacks[1::2], strict=True)), default=0) + adapters


def _stack_bytes(stack: Stack, work: Workload) -> int:
    if not work.packs(stack):
        return stack.numel * work.itemsize
    from .hub import get_kernel

    shape = (stack.experts, stack.out_features, stack.in_features)
    storage = get_kernel().Format4bit(shape, work.quant_type, projections=stack.projections).storage()
    return sum(rows * columns for rows, columns in storage.values())


def _linear_bytes(linear: Linear, work: Workload) -> int:
    if not work.packs_linear(linear):
        return linear.numel * work.itemsize
    blocks = -(-linear.numel // BLOCK)
    # The packed weights, one byte for each block, four for each group of blocks, the two code books, and the offset.
    return linear.numel // 2 + blocks + 4 * -(-blocks // GROUP) + 4 * (16 + 256 + 1)


def adapter_numels(sizes: Sizes, work: Workload) -> Iterator[int]:
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
    copy = max((linear.numel for linear in sizes.linears if work.packs_linear(linear)), default=0) * work.itemsize
    with_attention = attention_layers(sizes)
    if with_attention > 0 or not sizes.recurrent:
        # Beside attention's gradients, a dense copy of the 4-bit layer that is multiplied with.
        made = {"attention": _attention_made(sizes, work) + copy}
        each = _layer(sizes, work, with_attention, _attention_kept(sizes, work), made)
        yield (
            replace(each, kept=each.kept + attention_results(sizes, work)) if work.kept_attention == "device" else each
        )
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


def attention_results(sizes: Sizes, work: Workload) -> int:
    """Returns the bytes of what attention computes in a layer and its backward pass needs: output and log-sum-exp."""
    return work.tokens * (sizes.queries * work.itemsize + sizes.heads * 4)


def attention_layers(sizes: Sizes) -> int:
    """Returns the number of layers with attention."""
    return sizes.layers - sum(kind.layers for kind in sizes.recurrent)


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

    return most_beside_mixers(sizes.linears, sizes.recurrent, features)


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
    packed = any(map(work.packs, sizes.stacks)) and work.gpu  # those of some layers may stay dense
    transposed = (up.transposed or down.transposed) and work.quant_type not in PUBLISHED
    decoded = not transposed and _decoded(up, down, rows)
    workspace = 0 if not packed or decoded else min(EXPERT_WORKSPACE, max(up.numel, down.numel) * item)
    return kept, made, workspace


def _decoded(up: Stack, down: Stack, rows: int) -> bool:
    """Whether no product of packed experts needs the workspace. Measured GPUs may do without it for more rows.

    The kernel's ``stages/triton/paths.py`` decides it. Experts that are packed transposed always need the workspace.
    """
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
