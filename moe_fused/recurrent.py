"""What each kind of recurrent layer keeps for its backward, and which package computes it.

``KINDS`` has the kinds that the memory plan knows. Each is read from the mixer of a layer, on any device, and says what
the mixer keeps from its forward until its backward, and what exists beside that at the worst moment of either. Both follow
from the source: from Transformers' functions in plain torch, or from what the autograd functions of the package save
that Transformers takes instead of them. Nothing is fitted to a measurement.

Letters: T tokens of a batch, and P the same with each sequence padded to whole chunks of C tokens; h heads. Gated DeltaNet
has keys and values of k and v features, Mamba-2 has heads of p features, n features of state and g groups. States and all
that is computed within a chunk are in fp32.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import nn

if TYPE_CHECKING:
    from .memory import Workload

# Transformers' names for the types of layers without a state: attention over all earlier tokens or over the last of them,
# and layers that see one token at a time.
STATELESS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention", "mlp", "moe"})
# The functions that Transformers takes from packages in place of its own, by the package: where they are, and their name.
FUNCTIONS = {
    "fla": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "mamba_ssm": ("mamba_ssm.ops.triton.ssd_combined", "mamba_split_conv1d_scan_combined"),
    "causal_conv1d": ("causal_conv1d", "causal_conv1d_fn"),
}
# The number of tokens in a chunk of the gated delta rule, in Transformers and in fla.
CHUNK = 64
FP32 = 4


def packages() -> frozenset[str]:
    """The packages among ``FUNCTIONS`` that Transformers runs on a GPU. It asks as here: whether the function can be had."""
    return frozenset(package for package, (module, name) in FUNCTIONS.items() if _has(module, name))


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except Exception:  # noqa: BLE001 - whatever a broken package raises, Transformers falls back
        return False


def layer_types(text: Any) -> list[str]:
    """The types of a decoder's layers, by Transformers' names for them; empty if its config has none."""
    return list(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())


class Mixer(Protocol):
    """The sizes of a recurrent layer's mixer.

    Attributes:
        title: The name of the kind.
        package: The package that computes it on a GPU, and that ``pip`` installs under the name ``distribution``.
        needs_dense: Whether that package takes dense weights only.
    """

    title: ClassVar[str]
    package: ClassVar[str]
    distribution: ClassVar[str]
    needs_dense: ClassVar[bool]

    def kept(self, work: Workload) -> int:
        """Bytes that the mixer keeps from its forward until its backward, without the inputs of adapters."""

    def made(self, work: Workload) -> int:
        """Bytes that exist beside what the mixer keeps, at the worst moment of its forward and backward."""


@dataclass(frozen=True)
class GatedDeltaNet:
    """The linear attention of Qwen3-Next and Qwen3.5.

    Attributes:
        key_heads, value_heads, key_features, value_features: The numbers of heads, and of features of one.
        kernel: The number of tokens that the short convolution sees.
        is_joined: Whether one layer projects to queries, keys, values and gate, which are then copied apart.
    """

    title: ClassVar[str] = "Gated DeltaNet"
    package: ClassVar[str] = "fla"
    distribution: ClassVar[str] = "flash-linear-attention"
    needs_dense: ClassVar[bool] = False

    key_heads: int
    value_heads: int
    key_features: int
    value_features: int
    kernel: int
    is_joined: bool

    @classmethod
    def of(cls, module: Any) -> GatedDeltaNet:
        return cls(
            module.num_k_heads,
            module.num_v_heads,
            module.head_k_dim,
            module.head_v_dim,
            module.conv_kernel_size,
            hasattr(module, "in_proj_qkvz"),
        )

    @property
    def _values(self) -> int:
        return self.value_heads * self.value_features

    @property
    def _mixed(self) -> int:
        """The number of features of queries, keys and values, which the convolution mixes."""
        return 2 * self.key_heads * self.key_features + self._values

    @property
    def _is_repeated(self) -> bool:
        return self.value_heads > self.key_heads

    def kept(self, work: Workload) -> int:
        convolved = _convolution_kept(self._mixed, self.kernel, work)
        return convolved + self._rule_kept(work) + self._norm_kept(work)

    def _norm_kept(self, work: Workload) -> int:
        """The norm with a gate keeps its input in fp32, what is normalized, and the gate before and after SiLU in fp32."""
        gate = self._values
        if work.itemsize == FP32 and self.is_joined and not self._is_repeated:  # no copy, but a part of the projection
            gate += self._mixed
        return work.tokens * (gate * FP32 + self._values * (2 * FP32 + work.itemsize))

    def _rule_kept(self, work: Workload) -> int:
        k, v, item = self.key_features, self.value_features, work.itemsize
        rows = work.tokens * self.value_heads
        if self.package in work.packages:
            # q and k after their norms, v, and the inverse of a chunk's triangle; the norms' factors and decay in fp32.
            return rows * ((2 * k + v + CHUNK) * item + 3 * FP32 + 2 * item)
        padded = _padded(work, CHUNK) * self.value_heads
        # In fp32: q, k and v with padding, k times beta, the solutions for keys and values, the new values, and q and k
        # with their decay.
        features = 6 * k + 3 * v
        # Within each chunk: decay, k·k before and after it, and q·k before and after it.
        pairs = 5 * CHUNK
        states = padded // CHUNK * k * v
        # q and k before their norms. They are copies in fp32, or what they are copied from.
        before = 2 * rows * k * FP32
        if item == FP32:
            if not self._is_repeated:
                before = work.tokens * self._mixed * FP32
            if work.length % CHUNK == 0:  # unpadded, they are not contiguous, and each product with them copies
                features += 4 * k
        scalars = rows * (8 * FP32 + item)
        return before + (padded * (features + pairs) + states) * FP32 + scalars

    def made(self, work: Workload) -> int:
        return max(self._forward(work), self._backward(work), 0)

    def _forward(self, work: Workload) -> int:
        """At the end of the forward, what the function of the layer still refers to, and what the norm makes."""
        item, values = work.itemsize, self._values
        size = FP32 * values  # the norm's output in fp32
        if item < FP32:  # the gate, the rule's output and the norm's, and q and k for each head of the values
            size += item * (3 * values + self._is_repeated * 2 * self.value_heads * self.key_features)
        if item < FP32 or self._is_repeated:  # the convolution's output and the projection, which are not kept then
            size += item * (self._mixed + self.is_joined * (self._mixed + values))
        return work.tokens * size

    def _backward(self, work: Workload) -> int:
        """In the rule's backward. The norm has freed what it kept by then."""
        k, v, rows = self.key_features, self.value_features, work.tokens * self.value_heads
        if self.package in work.packages:
            # w, u, the new values and the gradients of all but the states; the states and their gradients.
            states = _padded(work, CHUNK) * self.value_heads // CHUNK * k * v
            return (5 * rows * (k + v) + 2 * states) * work.itemsize - self._norm_kept(work)
        # The gradients of three keys or queries, of values and output, and of a chunk's pairs. Each chunk's part of a
        # gradient has the size of the whole, and is added to the others out of place.
        padded = _padded(work, CHUNK) * self.value_heads
        return padded * (3 * k + 2 * v + 2 * max(k, v) + CHUNK) * FP32 - self._norm_kept(work)


@dataclass(frozen=True)
class Mamba2:
    """The Mamba-2 of Granite-4, Nemotron-H and Bamba.

    Attributes:
        heads, features: The number of heads, and of features of one.
        groups, state: The number of groups that share B and C, and of features of the state.
        chunk: The number of tokens in a chunk.
        kernel: The number of tokens that the short convolution sees.
        has_einsum: Whether Transformers sums products as einsum does. Before, it made each product of two tokens whole.
    """

    title: ClassVar[str] = "Mamba-2"
    package: ClassVar[str] = "mamba_ssm"
    distribution: ClassVar[str] = "mamba-ssm"
    needs_dense: ClassVar[bool] = True

    heads: int
    features: int
    groups: int
    state: int
    chunk: int
    kernel: int
    has_einsum: bool

    @classmethod
    def of(cls, module: Any) -> Mamba2:
        source = inspect.getsource(sys.modules[type(module).__module__])
        return cls(
            module.num_heads,
            module.head_dim,
            module.n_groups,
            module.ssm_state_size,
            module.chunk_size,
            module.conv_kernel_size,
            "torch.einsum(" in source,
        )

    @property
    def _inner(self) -> int:
        return self.heads * self.features

    @property
    def _mixed(self) -> int:
        """The number of features of x, B and C, which the convolution mixes."""
        return self._inner + 2 * self.groups * self.state

    def kept(self, work: Workload) -> int:
        tokens, item = work.tokens, work.itemsize
        projected = tokens * (self._inner + self._mixed + self.heads) * item
        if self.package in work.packages:  # the projection, the scan's output, and the norm's factors
            return projected + tokens * (self._inner * item + self.groups * FP32)
        # The convolution's input is a part of the projection.
        convolved = _convolution_kept(self._mixed, self.kernel, work) - tokens * self._mixed * item
        # x in fp32, or the convolution's output in fp32 that it is a part of.
        x = tokens * (self._inner if item < FP32 else self._mixed) * FP32
        scalars = tokens * self.heads * (2 * item + 3 * FP32)
        return projected + convolved + x + self._scan_kept(work) + self._norm_kept(work) + scalars

    def _norm_kept(self, work: Workload) -> int:
        """The norm with a gate keeps its input, the gate after SiLU, their product, and the gate if it is a copy in fp32."""
        return work.tokens * self._inner * FP32 * (4 if work.itemsize < FP32 else 3)

    def _scan_kept(self, work: Workload) -> int:
        n, p, chunks = self.state, self.features, _padded(work, self.chunk) // self.chunk
        # Decay, C·B before and after it; C, B and B with its decay; x with its step, and the states' part of the output.
        features = 3 * self.chunk + 3 * n + 2 * p
        if (
            self.has_einsum and chunks > 1
        ):  # products over several chunks copy C and x, which another product keeps, too
            features += 2 * n + p
        borders = 2 * chunks + work.batch  # the states before and after each chunk
        return (chunks * self.chunk * features + borders * n * p) * self.heads * FP32

    def made(self, work: Workload) -> int:
        return max(self._forward(work), self._backward(work), 0)

    def _forward(self, work: Workload) -> int:
        """At the end of the scan, before the norm."""
        if self.package in work.packages:
            return 0
        n, p, chunks = self.state, self.features, _padded(work, self.chunk) // self.chunk
        # C, B with its decay, x with its step and with D; the output of a chunk, of the states, their sum, and its copy.
        rows = chunks * self.chunk * (2 * n + 6 * p)
        states = (chunks + 2 * work.batch) * n * p
        convolved = work.tokens * self._mixed * work.itemsize if work.itemsize < FP32 else 0
        return (rows + states) * self.heads * FP32 + convolved - self._norm_kept(work)

    def _backward(self, work: Workload) -> int:
        n, p, item = self.state, self.features, work.itemsize
        rows = _padded(work, self.chunk)
        if self.package in work.packages:
            # The convolution's output and its gradient, the projection's gradient, the norm's output and gradients; the
            # states and their gradients in fp32 and in the dtype, and C·B with its gradient.
            features = 3 * self._mixed + 4 * self._inner + self.heads
            states = rows // self.chunk * self.heads * n * p * (FP32 + 2 * item)
            return work.tokens * features * item + states + 2 * rows * self.groups * self.chunk * FP32
        if not self.has_einsum:  # two gradients of a product of C and B, a number for each pair of tokens and feature
            return 2 * rows * self.heads * self.chunk * max(n, p) * FP32 - self._norm_kept(work)
        norm = 5 * work.tokens * self._inner * FP32
        # The gradients of C·B after and before the decay, and of the decay, one of which takes the place of a factor.
        pairs = 2 * rows * self.heads * self.chunk * FP32 - self._norm_kept(work)
        return max(norm, pairs)


@dataclass(frozen=True)
class ShortConvolution:
    """The short convolution with gates of LFM2.

    Attributes:
        features: The number of features of the hidden states.
        kernel: The number of tokens that the convolution sees.
    """

    title: ClassVar[str] = "short convolution"
    package: ClassVar[str] = "causal_conv1d"
    distribution: ClassVar[str] = "causal-conv1d"
    needs_dense: ClassVar[bool] = False

    features: int
    kernel: int

    @classmethod
    def of(cls, module: Any) -> ShortConvolution:
        return cls(module.conv.in_channels, module.conv_kernel_size)

    def kept(self, work: Workload) -> int:
        """B, C and x, and what the convolution takes and gives, which is multiplied by C."""
        inputs = (3 + 1) * work.tokens * self.features * work.itemsize
        return inputs + work.batch * (work.length + self.kernel - 1) * self.features * work.itemsize

    def made(self, work: Workload) -> int:
        """The gradients of B, C and x, one after the other, and their sum."""
        return (3 + 1) * work.tokens * self.features * work.itemsize


# The kinds by the ends of the names of Transformers' classes.
KINDS: dict[str, type[GatedDeltaNet | Mamba2 | ShortConvolution]] = {
    "GatedDeltaNet": GatedDeltaNet,
    "HybridMambaLayer": Mamba2,
    "Mamba2Mixer": Mamba2,
    "BambaMixer": Mamba2,
    "ShortConv": ShortConvolution,
}


@dataclass(frozen=True)
class Recurrent:
    """The recurrent layers of a model that are alike.

    Attributes:
        mixer: The sizes of their mixer.
        paths: The names of their mixers in the model.
        is_alone: Whether they have neither experts nor other linear layers beside the mixer.
    """

    mixer: Mixer
    paths: tuple[str, ...]
    is_alone: bool

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.paths)

    def has(self, name: str) -> bool:
        """Whether the linear layer of that name is part of one of these mixers."""
        return name.startswith(tuple(f"{path}." for path in self.paths))


def recurrent_layers(model: nn.Module) -> tuple[Recurrent, ...]:
    """The recurrent layers of a model, of the kinds in ``KINDS``."""
    found: dict[tuple[Mixer, bool], list[str]] = {}
    for path, module in model.named_modules():
        kind = next((kind for end, kind in KINDS.items() if type(module).__name__.endswith(end)), None)
        if kind is not None:
            owner = model.get_submodule(path.rpartition(".")[0])
            inside = {id(part) for part in module.modules()}
            others = (part for part in owner.modules() if id(part) not in inside)
            is_alone = not any(isinstance(part, nn.Linear) or hasattr(type(part), "_apply_gate") for part in others)
            found.setdefault((kind.of(module), is_alone), []).append(path)
    return tuple(Recurrent(mixer, tuple(paths), is_alone) for (mixer, is_alone), paths in found.items())


def uncounted_types(text: Any, known: Iterable[Recurrent]) -> tuple[str, ...]:
    """The types of layers that may have a state, of which the plan does not know what they keep.

    Args:
        text: The config of the decoder.
        known: The layers that it does know.
    """
    paths = [path for layers in known for path in layers.paths]
    indices = {int(part) for path in paths for part in path.split(".") if part.isdecimal()}
    types = enumerate(layer_types(text))
    return tuple(dict.fromkeys(name for index, name in types if name not in STATELESS and index not in indices))


def _padded(work: Workload, chunk: int) -> int:
    """The number of tokens of a batch, each sequence padded to whole chunks."""
    return work.batch * -(-work.length // chunk) * chunk


def _convolution_kept(features: int, kernel: int, work: Workload) -> int:
    """A short convolution keeps its input, and in plain torch its output before SiLU, with the padding that is cut off."""
    kept = work.tokens * features * work.itemsize
    if "causal_conv1d" not in work.packages:
        kept += work.batch * (work.length + kernel - 1) * features * work.itemsize
    return kept
