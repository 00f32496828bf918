"""TRL's SFTTrainer with checkpoints that are whole or absent, and an end at the first loss that is not finite."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from moe_fused.memory import LOSS_TILE_BESIDE_GRAPHS
from moe_fused.staging import is_partial, staged_directory

from .graphs import GraphedDecoder
from .host import queued, without_walks
from .model import adapter_dtype, compute_dtype, optimizer_of
from .options import Options

CHECKPOINTS = "checkpoints"


@contextlib.contextmanager
def narrow_tiles() -> Iterator[None]:
    """TRL's loss through an eighth of its tile of logits, 256 MiB, for which there is no room in the memory of graphs.

    TRL has no option for it.
    """
    places = ((chunked_logprob, "TOKEN_CHUNK_SIZE"), (trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE"))
    before = [getattr(module, name) for module, name in places]
    try:
        for (module, name), size in zip(places, LOSS_TILE_BESIDE_GRAPHS, strict=True):
            setattr(module, name, size)
        yield
    finally:
        for (module, name), size in zip(places, before, strict=True):
            setattr(module, name, size)


class _AllocateStates(TrainerCallback):
    """Makes the optimizer's states before there are activations and gradients.

    Between those they would leave holes for good, which the graphs' memory cannot use: 190 MiB for Qwen3-30B-A3B.
    """

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]  # of accelerate, around ours
        allocate = getattr(getattr(optimizer, "optimizer", optimizer), "allocate", None)
        if allocate is not None:
            allocate()


class NotFinite(RuntimeError):
    """A loss or a gradient that is not a number, or infinite."""


def sft_config(
    options: Options, device: torch.device, packing: str, length: int, accumulation: int, *, random: bool
) -> SFTConfig:
    """TRL's arguments for a run.

    Args:
        packing: not "auto".
        length: of sequences.
        accumulation: batches to a step.
        random: whether recomputation must repeat random numbers.
    """
    dtype = compute_dtype(options, device)
    # Weights and adapters of one dtype need no autocast, which costs time on the host at every operator.
    mixed = dtype is not torch.float32 and adapter_dtype(options, device) is not dtype
    checkpointing = {"use_reentrant": False, "preserve_rng_state": random}
    arguments = SFTConfig(
        output_dir=str(options.output_directory / CHECKPOINTS),
        use_cpu=device.type == "cpu",
        bf16=mixed and dtype is torch.bfloat16,
        fp16=mixed and dtype is torch.float16,
        max_length=length,
        packing=packing != "none",
        packing_strategy=packing if packing != "none" else "bfd",
        assistant_only_loss=options.assistant_only_loss,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=optimizer_of(options, device),
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs=checkpointing if options.gradient_checkpointing else None,
        router_aux_loss_coef=options.router_aux_loss,
        seed=options.seed,
        save_strategy="steps",
        save_steps=options.save_steps,
        logging_steps=options.log_steps,
        logging_nan_inf_filter=False,  # it would put an average in the place of a loss that is not finite
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # where several are visible, Trainer would replicate the model to all of them
    return arguments


class Finetuner(SFTTrainer):
    """Trains adapters; see the module.

    Args:
        model: of PEFT.
        options: of the run.
        device: where the model is.
        other arguments: SFTTrainer's.

    Attributes:
        shape: of the batches that run as CUDA graphs; None runs everything eagerly.
        graphs: of the decoder, while it trains.
    """

    def __init__(self, model: Any, options: Options, device: torch.device, **kwargs: Any) -> None:
        self._options = options
        self.shape: tuple[int, int] | None = None
        self.graphs: GraphedDecoder | None = None
        self._adapter_dtype = adapter_dtype(options, device)
        arguments = kwargs["args"]
        if "8bit" in arguments.optim or "paged" in arguments.optim:
            optimizer_class, optimizer_options = self.get_optimizer_cls_and_kwargs(arguments)
            kwargs["optimizer_cls_and_kwargs"] = queued(optimizer_class), optimizer_options
        self._staging: Path | None = None
        self._grad_norm: Tensor | float | None = None
        super().__init__(model=model, **kwargs)
        self.add_callback(_AllocateStates())
        self._trained: list[nn.Parameter] = []
        self._take_adapters()

    def _take_adapters(self) -> None:
        # TRL makes adapters of 4-bit models bf16 and PEFT makes loaded ones fp32, whatever they are to be.
        # In place: those who were handed the list go on with it.
        self._trained[:] = (own for own in self._base_model().parameters() if own.requires_grad)
        for parameter in self._trained:
            parameter.data = parameter.data.to(self._adapter_dtype)

    def _base_model(self) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model()

    @property
    def tokens(self) -> int:
        """Tokens that went through the model, in this process and those before."""
        return int(self._total_train_tokens)

    @property
    def total_steps(self) -> int:
        """Steps of the run, those before it was resumed included."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = len(self.get_train_dataloader())
        return math.ceil(self.args.num_train_epochs * -(-batches // self.args.gradient_accumulation_steps))

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains to the end, from the beginning or from a checkpoint.

        Raises:
            NotFinite: see the class.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.global_step >= self.total_steps:  # Trainer would go one step too far
                self.state, self._total_train_tokens = state, state.num_input_tokens_seen
                self._load_from_checkpoint(str(checkpoint))
                return
        model: Any = self.model
        tiles: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.shape is not None:
            # What TRL's loss calls for hidden states.
            self.graphs = GraphedDecoder(self._base_model().base_model, self.shape)
            tiles = narrow_tiles()
        try:
            with tiles, without_walks(model, self._trained):
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            self.check_finite()
        finally:
            if self.graphs is not None:
                self.graphs.close()
                self.graphs = None

    # Without walks through the model in each step.

    def floating_point_ops(self, inputs: Any) -> int:
        """None, of a number that nobody reads and for which Trainer would count the model's parameters."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    # An end at what is not finite.

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        # TRL has just waited for the forward, so this waits for nothing, nor does the norm of the step before.
        self.check_finite()
        loss = result[0] if isinstance(result, tuple) else result
        if not math.isfinite(loss.item()):
            raise NotFinite(f"the loss of step {self.state.global_step + 1} is {loss.item()}")
        return result

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._grad_norm = norm = super()._get_grad_norm(*args, **kwargs)
        return norm

    def check_finite(self) -> None:
        """Raises NotFinite if the last step's gradient norm was not finite."""
        norm, self._grad_norm = self._grad_norm, None
        # In fp16 the loss scale starts too high on purpose, and steps that overflow are skipped.
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise NotFinite(f"the gradient norm of step {self.state.global_step} is {float(norm)}")

    # Whole checkpoints.

    def _get_output_dir(self, trial: Any) -> str:
        directory: str = str(self._staging) if self._staging is not None else super()._get_output_dir(trial)
        return directory

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_finite()
        self.state.num_input_tokens_seen = self.tokens
        directory = self._options.output_directory / CHECKPOINTS
        directory.mkdir(parents=True, exist_ok=True)
        name = f"checkpoint-{self.state.global_step}"
        with staged_directory(directory / name, "checkpoint", _replaceable, needed_bytes=0) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            for path in (staging / name).iterdir():
                path.rename(staging / path.name)
            (staging / name).rmdir()
        for old in map(Path, sort_checkpoints(str(directory))[: -self._options.keep_checkpoints]):
            aside = old.rename(old.with_name(f".{old.name}.partial"))
            shutil.rmtree(aside, ignore_errors=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for checkpoints: the card is written once, with the adapter."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self._take_adapters()  # others than before, if PEFT had them in another dtype

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self._total_train_tokens = self.state.num_input_tokens_seen  # TRL would count from 0


def _replaceable(target: Path) -> None:
    """Any checkpoint may be replaced by one of the same step."""


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of a run; removes what was left behind by one that was killed while it saved."""
    directory = output / CHECKPOINTS
    if not directory.is_dir():
        return None
    for path in filter(is_partial, list(directory.iterdir())):
        shutil.rmtree(path, ignore_errors=True)
    last = get_last_checkpoint(str(directory))
    return None if last is None else Path(last)
