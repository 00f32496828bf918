"""Divides a model among the processes of a run with torch's FSDP2 (``--shard``).

A decoder layer is a unit. Its packed experts and its adapters are divided among the processes. They are gathered before a
pass through the layer and freed after it. Gradients are reduced to the shares, so the optimizer holds and changes these
alone. The rows of the embedding are divided without FSDP2, see ``divided_embedding``. What is small stays whole in each
process: attention in 4 bits, norms and routers. The head also stays whole: the loss reads its weight directly, so FSDP2's
hooks would not run.

A model is divided in three steps. First, ``moe_fused.checkpoints.share`` loads only the experts of this process. Second,
``Sharding`` replaces them by tensors that have the whole shapes and no memory, so that PEFT can make its layers around
them, on their device, and Trainer can load adapters. Third, ``Sharding.apply`` hands everything to FSDP2.

Transformers 5.22 can shard a model itself (``DistributedConfig(fsdp_size=…)``). It is not used, because 5.17 lacks it, and
because it shards the linear layers of bitsandbytes, whose state FSDP2 does not know.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from moe_fused.checkpoints.share import is_divided, local
from moe_fused.hub import get_kernel
from moe_fused.integrations.quantizer.packed_experts import get_packed, packed_modules
from moe_fused.integrations.transformers.experts_module import projections_of
from moe_fused.memory import SMALLEST_8BIT, STATE_BLOCK

from .divided_embedding import divide, is_divisible

if TYPE_CHECKING:
    from qwen3_moe_fused import Packed4bitWeights

    from .parallel import Peers
    from .resolve import ResolvedRun


@dataclass(frozen=True)
class _Stack:
    """A stack of a model's experts.

    Attributes:
        module: The experts module.
        name: The name of the stack in it.
        share: The experts of this process.
        whole: The stack of all experts, on meta.
    """

    module: Any
    name: str
    share: Packed4bitWeights
    whole: Packed4bitWeights


class Sharding:
    """The division of one model.

    Args:
        model: The model with the share of the packed experts that this process has loaded. Afterwards its experts have the
            whole shapes, and no memory.
        run: The record of the run.
        peers: The processes of the run.
    """

    def __init__(self, model: nn.Module, run: ResolvedRun, peers: Peers) -> None:
        self._run, self._peers = run, peers
        self._stacks = list(_put_whole(model))
        # For each trained parameter that is divided, another one over the memory of this process' part.
        self._parts: dict[nn.Parameter, nn.Parameter] = {}
        self._collected: dict[str, Any] | None = None
        # What FSDP2 adds to modules, and what they had before.
        self._hooks: dict[nn.Module, Any] = {}

    def apply(self, model: Any) -> None:
        """Divides the model, which has its adapters, and gives it the experts of this process."""
        base = model.get_base_model()
        self._hooks = {module: module._load_state_dict_post_hooks.copy() for module in base.modules()}
        decoder, layers = base.base_model, _layers_of(base, [stack.module for stack in self._stacks])
        mesh = init_device_mesh(self._run.device.type, (self._run.process.world_size,))
        dtype = storage_dtype(self._run.dtype)
        modules = get_kernel().modules
        divided = set()
        for stack in self._stacks:
            divided |= set(modules.attach(stack.whole, stack.module, stack.name, dtype).values())
        divided |= {parameter for layer in layers for parameter in layer.parameters() if self._is_divisible(parameter)}
        units = [layer for layer in layers if not divided.isdisjoint(layer.parameters())]
        for layer in units:
            fully_shard(layer, mesh=mesh, ignored_params={each for each in layer.parameters() if each not in divided})
        # Without a common root, each unit would be its own root and would not know which unit comes next.
        fully_shard(decoder, mesh=mesh, ignored_params={each for each in decoder.parameters() if not is_divided(each)})
        for layer, following in itertools.pairwise(units):
            layer.set_modules_to_forward_prefetch([following])
        if _is_apart(embedding := base.get_input_embeddings(), base):
            divide(embedding, mesh)
        for stack in self._stacks:
            _fill(stack, dtype)
        self._stacks = []
        if self._run.device.type == "cuda":
            torch.cuda.empty_cache()  # the tensors that were whole have left holes in the memory

    def _is_divisible(self, parameter: nn.Parameter) -> bool:
        """Whether a trained parameter is divided. A division must not cut a block of the optimizer's 8-bit state.

        A module that is trained in full may have another dtype than the adapters. It stays whole, because FSDP2 reduces
        only gradients of one dtype.
        """
        processes = self._run.process.world_size
        if not parameter.requires_grad or parameter.dtype is not self._run.adapter_dtype:
            return False
        if not parameter.shape or parameter.shape[0] % processes:
            return False
        part = parameter.numel() // processes
        in_blocks = "8bit" in self._run.optimizer and parameter.numel() >= SMALLEST_8BIT
        return not in_blocks or (part >= SMALLEST_8BIT and part % STATE_BLOCK == 0)

    # The step.

    def optimize(self, optimizer: Any, model: nn.Module) -> None:
        """Divides the model, and lets an optimizer of its whole parameters change the parts of this process instead.

        Args:
            optimizer: The optimizer, before its first step.
            model: The model, which has its adapters.
        """
        names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.apply(model)
        after = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [self._part(after[names[parameter]]) for parameter in group["params"]]
        optimizer.register_step_pre_hook(self._give_gradients)
        optimizer.register_step_post_hook(self._take_gradients)
        load, state_of = optimizer.load_state_dict, optimizer.state_dict
        optimizer.load_state_dict = lambda state: load(self._share_of_state(optimizer, state))
        optimizer.state_dict = lambda: state_of() if self._collected is None else self._collected

    def _part(self, parameter: nn.Parameter) -> nn.Parameter:
        if not is_divided(parameter):
            return parameter
        return self._parts.setdefault(parameter, nn.Parameter(local(parameter).detach()))

    def _give_gradients(self, *_: Any) -> None:
        for parameter, part in self._parts.items():
            part.grad = None if parameter.grad is None else local(parameter.grad)

    def _take_gradients(self, *_: Any) -> None:
        for part in self._parts.values():
            part.grad = None

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scales the gradients of all processes so that their common norm is at most ``limit``, and returns the norm."""
        mine = [local(each.grad) for each in parameters if each.grad is not None and is_divided(each)]
        shared = [each.grad for each in parameters if each.grad is not None and not is_divided(each)]
        squares = _squares(mine, self._run.device)
        self._peers.add(squares)
        norm = (squares + _squares(shared, self._run.device)).sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        if mine or shared:
            torch._foreach_mul_([*mine, *shared], scale)
        return norm

    # Checkpoints, whose files are those of a run that is not sharded.

    def collect(self, model: nn.Module, optimizer: Any) -> dict[str, Tensor] | None:
        """Gathers the adapters and the optimizer's state in the first process. All processes must call it.

        ``optimizer.state_dict()`` then returns the whole state, until ``drop``.

        Returns:
            The model's state with whole adapters, on the CPU, in the first process, and None in others.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's optimizer holds ours
        is_main, found = self._peers.is_main, {}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, value in model.state_dict().items():
            found[name] = value
            if name in trained and is_divided(value):
                found[name] = self._peers.joined(local(value))
        state, held = optimizer.state_dict(), set(self._parts.values())
        for index, part in _numbered(optimizer):
            if part in held and index in state["state"]:
                state["state"][index] = _changed(state["state"][index], part.numel(), self._peers.joined)
        self._collected = state if is_main else None
        return found if is_main else None

    def drop(self) -> None:
        """Forgets what ``collect`` has gathered."""
        self._collected = None

    def _share_of_state(self, optimizer: Any, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what this process needs of the state in a checkpoint."""
        processes, rank = self._run.process.world_size, self._run.process.rank
        shares, held = dict(state["state"]), set(self._parts.values())

        def share(value: Tensor) -> Tensor:
            return value.chunk(processes)[rank].clone()

        for index, part in _numbered(optimizer):
            if part in held and index in shares:
                shares[index] = _changed(shares[index], part.numel() * processes, share)
        return {**state, "state": shares}

    def end(self, model: nn.Module) -> None:
        """Makes the adapters whole in all processes, so that others can be loaded into them. No pass may follow."""
        self._parts.clear()
        for module, hooks in self._hooks.items():
            module._load_state_dict_post_hooks = hooks  # without FSDP2's hooks, which expect sharded values
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.requires_grad and is_divided(parameter):
                    value: Any = parameter
                    module._parameters[name] = nn.Parameter(value.full_tensor().detach())


# Recordings of CUDA graphs. FSDP2 has no public way to its streams, which are the same in torch 2.11 and 2.13.


def forget_gathered(decoder: Any) -> None:
    """Lets FSDP2 make gathered parameters of a decoder anew, so that the next pass has leaves of autograd of its own."""
    for module in decoder.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for each in group.fsdp_params if group is not None else ():
            each.all_gather_outputs = []
            if hasattr(each, "_unsharded_param"):
                del each._unsharded_param


@contextlib.contextmanager
def gathering(decoder: Any) -> Iterator[None]:
    """Makes the streams on which FSDP2 gathers a decoder's layers part of what is recorded within the block.

    The decoder's own hooks would do this, but they run before the recording begins and after it has ended. A decoder
    that is not divided has no such streams.
    """
    if not isinstance(decoder, FSDPModule):
        yield
        return
    communication = decoder._get_fsdp_state()._comm_ctx
    recording = communication.device_handle.current_stream()
    for stream in (communication.all_gather_copy_in_stream, communication.all_gather_stream):
        stream.wait_stream(recording)
    yield
    # This holds the buffer of the layer that was gathered last, and an event that may not be waited for outside.
    communication.all_gather_state = None


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which FSDP2 takes the bytes of packed experts. Before torch 2.13, it takes only floating-point dtypes.

    Args:
        dtype: The dtype of activations, which mixed precision would leave as it is.
    """
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    return torch.uint8 if release >= (2, 13) else dtype


def _put_whole(model: nn.Module) -> Iterator[_Stack]:
    """Puts tensors of the whole shape without memory in the place of each stack of packed experts."""
    modules = get_kernel().modules
    for _, module in list(packed_modules(model)):
        for name in projections_of(module):
            share = get_packed(module, name)
            form = replace(share.format, shape=(module.num_experts, *share.format.shape[1:]))
            parts = {
                part: torch.empty(shape, dtype=torch.uint8, device="meta") for part, shape in form.storage().items()
            }
            whole = get_kernel().Packed4bitWeights(form, **parts)
            modules.attach(get_kernel().Packed4bitWeights(form, **_without_memory(parts, share.device)), module, name)
            yield _Stack(module, name, share, whole)


def _without_memory(like: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Returns tensors of the shapes of ``like`` and frees their memory. Their device tells PEFT where to make adapters."""
    made = {name: torch.empty_like(value, device=device) for name, value in like.items()}
    for value in made.values():
        value.untyped_storage().resize_(0)
    return made


def _fill(stack: _Stack, dtype: torch.dtype) -> None:
    """Gives the divided parameters of a stack the bytes of this process."""
    modules = get_kernel().modules
    made = modules.attach(stack.share, nn.Module(), stack.name, dtype)
    state = {name: modules.divided_as(getattr(stack.module, name), value.detach()) for name, value in made.items()}
    stack.module.load_state_dict(state, strict=False, assign=True)


def _layers_of(model: nn.Module, experts: Sequence[nn.Module]) -> list[Any]:
    """Returns the decoder layers: the list of modules that holds the most experts."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    wanted = set(experts)
    counts = [sum(module in wanted for module in found.modules()) for found in lists]
    return list(lists[counts.index(max(counts))])


def _is_apart(embedding: Any, model: Any) -> bool:
    """Whether an embedding can be divided, and its weight is not that of the head."""
    head = model.get_output_embeddings()
    return is_divisible(embedding) and (head is None or getattr(head, "weight", None) is not embedding.weight)


def _squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the sum of the squares of all elements, in fp32."""
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(list(gradients), dtype=torch.float32)
    return torch.stack(list(norms)).square().sum()


def _numbered(optimizer: Any) -> Iterator[tuple[int, nn.Parameter]]:
    """Yields an optimizer's parameters with their numbers in its state."""
    return enumerate(parameter for group in optimizer.param_groups for parameter in group["params"])


def _changed(state: Mapping[str, Any], numel: int, change: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Returns a parameter's state with those tensors changed that have a value for each element or block of elements.

    Args:
        state: The state. bitsandbytes keeps a part of it in a mapping of its own.
        numel: The number of elements of the parameter.
        change: Returns another tensor for one that follows the elements.
    """
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            found[name] = _changed(value, numel, change)
        elif (isinstance(value, Tensor) and value.dim() and value.numel() == numel) or (
            name.startswith("absmax") and value.numel() * STATE_BLOCK == numel
        ):
            found[name] = change(value)
        else:
            found[name] = value
    return found
