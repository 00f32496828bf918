"""How a trainer differs when several processes train: their data, their gradients, and what they save.

``OfSeveral`` is the part of ``trainer.Finetuning`` for it. ``parallel`` has what the processes tell each other, and
``sharding`` how they divide a model.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler
from transformers.trainer_pt_utils import safe_globals

from moe_fused.checkpoints.share import is_divided

from .batches import lengths_of
from .endings import CannotResume
from .render import IGNORED

if TYPE_CHECKING:
    from trl.trainer.sft_trainer import SFTTrainer

    from .parallel import Peers
    from .sharding import Sharding


def shared(dataset: Any, share: int) -> tuple[Any, int]:
    """Adds sequences to the end of a data set until their number is a multiple of ``share``.

    They are copies of the shortest sequence from which nothing is learned, so that no loss counts them.

    Args:
        dataset: The sequences.
        share: The number of sequences that all processes together take at a time, a batch each.

    Returns:
        The data set, and the number of sequences that were added.
    """
    missing = -len(dataset) % share
    if not missing:
        return dataset, 0
    lengths = lengths_of(dataset)
    row = dataset[lengths.index(min(lengths))]
    row["labels"] = [IGNORED] * len(row["labels"])
    fillers = Dataset.from_dict({name: [value] * missing for name, value in row.items()}, features=dataset.features)
    return concatenate_datasets([dataset, fillers]), missing


class FillersLast(Sampler[int]):
    """Yields the sequences of the data in the order of ``sampler``, and then those that ``shared`` has added.

    Args:
        sampler: A sampler of all sequences. From now on it leaves out those that were added.
        fillers: The number of sequences that were added.
    """

    def __init__(self, sampler: Any, fillers: int) -> None:
        self._sampler, self._fillers = sampler, fillers
        self._count = len(sampler.data_source) - fillers
        sampler.data_source = range(self._count)

    def __iter__(self) -> Iterator[int]:
        yield from self._sampler
        yield from range(self._count, len(self))

    def __len__(self) -> int:
        return self._count + self._fillers

    def set_epoch(self, epoch: int) -> None:
        self._sampler.set_epoch(epoch)


def _random_states(rank: int) -> str:
    """Names the file with the random states of a process. The first process uses the name of a single-process run."""
    return f"rng_state_{rank}.pth" if rank else "rng_state.pth"


# The base class is known to the type checker alone: at run time, each subclass names a trainer of TRL.
if TYPE_CHECKING:
    _Trainer = SFTTrainer
else:
    _Trainer = object


class OfSeveral(_Trainer):
    """The part of a trainer that knows of several processes. With one process, it behaves as Trainer does.

    Attributes:
        fillers: The number of sequences at the end of the data that only fill up the last batches.
        sharding: How the model is divided among the processes, if it is.
    """

    _peers: Peers

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.fillers = 0
        self.sharding: Sharding | None = None
        self._whole: dict[str, Tensor] | None = None
        self._trained: list[nn.Parameter] = []
        super().__init__(*args, **kwargs)
        if not self._peers.is_alone:
            # Not in DistributedDataParallel, which does not see gradients of CUDA graphs. ``peers`` averages them.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leaves the model on the device on which it was loaded. Experts that are divided have no memory yet."""

    def _base_model(self) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model()

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields what is trained, with names."""
        return ((name, value) for name, value in self._base_model().named_parameters() if value.requires_grad)

    def get_train_dataloader(self) -> Any:
        """Returns Trainer's loader. Sequences that only fill up the last batches come last in each epoch."""
        loader: Any = super().get_train_dataloader()
        if not self._peers.is_alone:
            sampler = loader.get_sampler()
            if isinstance(sampler, RandomSampler):
                loader.set_sampler(FillersLast(sampler, self.fillers))
        return loader

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Averages the gradients over all processes after the last batch of a step."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            # FSDP2 has averaged those of parameters that are divided.
            self._peers.average([parameter for parameter in self._trained if not is_divided(parameter)])
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Makes Trainer's optimizer. With ``--shard``, the model is divided here, after adapters have been loaded."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.sharding is not None:
            self.sharding.optimize(optimizer, self.accelerator.unwrap_model(self.model))
            self._trained[:] = [value for _, value in self._named()]
        return optimizer

    def store_flos(self) -> None:
        """Does nothing. Trainer would add up operations over all processes, and ``floating_point_ops`` counts none."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Lets the first process write the random states of all. Its own is in the file that a single process would use."""
        if self._peers.is_alone:
            super()._save_rng_state(output_dir)
            return
        states: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
        }
        if self.args.device.type == "cuda":
            states["cuda"] = torch.cuda.random.get_rng_state()
        states["processes"] = self._peers.process.world_size
        for rank, state in enumerate(self._peers.gather(states)):
            if self._peers.is_main:
                torch.save(state, Path(output_dir) / _random_states(rank))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Loads the state of this process; a process that was not there when it was saved keeps its own."""
        if checkpoint is None or self._peers.is_alone:
            super()._load_rng_state(checkpoint)
            return
        rank = self._peers.process.rank
        file = Path(checkpoint) / _random_states(rank)
        with safe_globals():
            if not file.is_file():
                saved = torch.load(Path(checkpoint) / _random_states(0), weights_only=True).get("processes", 1)
                if rank < saved:
                    raise CannotResume(f"{file} is missing: {saved} processes have saved the checkpoint")
                return
            states = torch.load(file, weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.random.set_rng_state(states["cpu"])
        if "cuda" in states and self.args.device.type == "cuda":
            torch.cuda.random.set_rng_state(states["cuda"])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.sharding is not None:
            return self.sharding.clip(self._trained, self.args.max_grad_norm)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves the model, with the adapters that were gathered from all processes if it is divided."""
        super()._save(output_dir, self._whole if state_dict is None else state_dict)
