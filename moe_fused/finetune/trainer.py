"""Trains with TRL's trainers, writes checkpoints whole or not at all, and ends at a loss that is not finite.

``Finetuning`` has what all runs share. ``Finetuner``, ``PairFinetuner`` and ``RatedFinetuner`` put it on TRL's SFTTrainer,
DPOTrainer and KTOTrainer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import SCALER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from moe_fused.checkpoints.adapters.fits import check_saved
from moe_fused.checkpoints.finite import not_finite
from moe_fused.checkpoints.share import local
from moe_fused.memory import LOSS_TILE_BESIDE_GRAPHS
from moe_fused.staging import staged_directory

from . import attention, kept_attention, preferences, projections
from .adapters import adapting, check_adapted, lora_config
from .arguments import LOSS, trl_config
from .batches import Answers, Documents, Sequences, is_full, lengths_of
from .checkpoints import CHECKPOINTS, checkpoint_of
from .endings import CannotResume, NotFinite, resuming, writing
from .evaluation import EvaluateLast, StopEarly, TokenMean, evaluations, waited
from .graphs import GraphedDecoder
from .host import queued, without_walks
from .model import apply_liger
from .parallel import Peers
from .progress import perplexity
from .several import OfSeveral, shared
from .stream import BadRows

if TYPE_CHECKING:
    from datasets import IterableDataset

    from .options import Method
    from .resolve import ResolvedRun
    from .sharding import Sharding


def make_trainer(
    model: Any,
    tokenizer: Any,
    dataset: Dataset | IterableDataset,
    run: ResolvedRun,
    evaluation: Dataset | None = None,
    first: list[int] | None = None,
    peers: Peers | None = None,
    sharding: Sharding | None = None,
) -> Finetuning:
    """Makes the trainer of a run.

    Args:
        model: PEFT's model with the adapters, on the device of the run. For preferences, the model without adapters.
        tokenizer: The tokenizer of the run.
        dataset: The sequences that ``data.prepare`` or ``data.fit`` returns. Training does not change them.
        run: The record of the run.
        evaluation: The sequences that the adapter is evaluated on, if the run has an evaluation.
        first: The number of tokens of each of the first sequences, if ``dataset`` is the stream of ``stream``.
        peers: The processes of the run. The default is a process that is alone.
        sharding: How the model is divided among them, if it is.
    """
    peers, fillers = peers or Peers(), 0
    if not peers.is_alone:
        share = run.batching.batch_size * run.process.world_size
        dataset, fillers = shared(dataset, share)
        evaluation = None if evaluation is None else shared(evaluation, share)[0]
    base = model if run.options.has_preferences else model.get_base_model()
    if run.liger:
        apply_liger(base)
    if run.maskless:
        attention.use(base, run.kernel)
    arguments = {"train_dataset": dataset, "eval_dataset": evaluation, "processing_class": tokenizer}
    if run.options.has_preferences:
        # TRL then takes the model without its adapters as the reference. Of a model that has adapters, it would keep a copy
        # of these.
        arguments["peft_config"] = lora_config(run, model)
    with adapting():
        trainer = _TRAINERS[run.options.method](model, run, peers, args=trl_config(run), **arguments)
    trainer.fillers, trainer.sharding = fillers, sharding
    check_adapted(trainer.model, run)
    batches: Any = trainer.train_dataset
    if run.graphs:  # the evaluation runs as graphs, too
        lengths = _lengths(batches, run) if first is None else first
        others = [] if evaluation is None else _lengths(evaluation, run)
        trainer.shape = _shape(run, lengths + others, run.batching.length if first is not None else None)
    _set_collators(trainer, run, batches, evaluation)
    trainer.remove_callback(PrinterCallback)
    if evaluation is not None:
        trainer.add_callback(EvaluateLast())
    if run.options.early_stopping is not None:
        trainer.add_callback(StopEarly(run.options.early_stopping))
    return trainer


def _lengths(dataset: Any, run: ResolvedRun) -> list[int]:
    """Returns the number of tokens of each sequence."""
    if run.options.has_preferences:
        return preferences.lengths_of(dataset, run.batching.length)
    return lengths_of(dataset)


def _set_collators(trainer: Finetuning, run: ResolvedRun, batches: Any, evaluation: Dataset | None) -> None:
    """Sets the collators of the training and of the evaluation."""
    collate: Any = trainer.data_collator
    padding, shape = collate.pad_token_id, trainer.shape
    if run.options.has_preferences:
        if shape is not None:
            trainer.data_collator = Answers(collate, shape[1], padding)
        return
    if not (run.batching.has_documents and run.maskless):
        if shape is not None:
            trainer.data_collator = Sequences(collate, shape, padding)
        return
    tokens = shape and shape[1]
    documents = functools.partial(
        Documents.of, collate, batch_size=run.batching.batch_size, tokens=tokens, padding=padding
    )
    others = [] if evaluation is None else list(evaluation["seq_lengths"])
    if run.options.streaming:
        trainer.data_collator = Documents(collate, None, run.batching.length, tokens, padding)
        if shape is None and others:
            trainer.eval_collator = documents(others)
        return
    lengths = list(batches["seq_lengths"])
    if shape is not None:
        trainer.data_collator = documents(lengths + others)
        return
    trainer.data_collator = documents(lengths)
    if others:
        trainer.eval_collator = documents(others)


def _shape(run: ResolvedRun, lengths: list[int], longest: int | None = None) -> tuple[int, int] | None:
    """Returns the shape of the batches that run as CUDA graphs, or None if too much of them would be padding.

    Args:
        run: The record of the run.
        lengths: The number of tokens of each sequence, those of the evaluation included.
        longest: The number of tokens that a sequence may have, if ``lengths`` has only the first sequences of a stream.
    """
    if not run.graphs_asked_for and not is_full(lengths):
        return None
    size, tokens = run.batching.sequences, longest or max(lengths)
    return (1, size * tokens) if run.batching.has_documents else (size, tokens)


@contextlib.contextmanager
def narrow_tiles() -> Iterator[None]:
    """Makes TRL's loss, within the block, use tiles with an eighth of the usual 256 MiB of logits.

    CUDA graphs leave no room for larger tiles, and TRL has no option for their size.
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


# How Trainer begins its warnings about options that may change while a run goes on, and about a path of a checkpoint that
# it notes although nobody reads it.
_EXPECTED = (
    "Warning: The following arguments do not match the ones in the `trainer_state.json`",
    "The best checkpoint ",
)


@contextlib.contextmanager
def _without_expected_warnings() -> Iterator[None]:
    """Drops, within the block, Trainer's warnings about changes that ``--resume`` allows."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_EXPECTED)

    loggers = [logging.getLogger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]
    for logger in loggers:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)


class _AllocateStates(TrainerCallback):
    """Allocates the optimizer's states before there are activations and gradients.

    States that are allocated among those would leave gaps in memory that graphs cannot use: 190 MiB for Qwen3-30B-A3B.
    """

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]  # accelerate's optimizer, which holds ours
        allocate = getattr(getattr(optimizer, "optimizer", optimizer), "allocate", None)
        if allocate is not None:
            allocate()


class _KeepAttention(TrainerCallback):
    """Makes gradient checkpointing keep what attention computed. Trainer turns it on after the trainer is made."""

    def __init__(self, place: kept_attention.Place) -> None:
        self._place = place

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        kept_attention.use(kwargs["model"], self._place)


class Finetuning(OfSeveral):
    """Trains the adapters of a run. A subclass adds one of TRL's trainers.

    Args:
        model: The model on the device of the run, as ``make_trainer`` gets it.
        run: The record of the run.
        peers: The processes of the run.
        kwargs: The trainer's own arguments.

    Attributes:
        shape: The shape of the batches that run as CUDA graphs. If it is None, everything runs eagerly.
        graphs: The decoder with its graphs during the training, else None.
        eval_collator: The collator of the evaluation, if it needs another one than TRL's.
    """

    def __init__(self, model: Any, run: ResolvedRun, peers: Peers, **kwargs: Any) -> None:
        self._resolved, self._peers = run, peers
        self.shape: tuple[int, int] | None = None
        self.graphs: GraphedDecoder | None = None
        self.eval_collator: Any = None
        self._staging: Path | None = None
        self._grad_norm: Tensor | float | None = None
        # TRL rounds what is trained on a 4-bit model to bf16, also values that were loaded.
        keeps = bool(run.whole.names) or run.start is not None
        loaded = {value: value.data for value in model.parameters() if value.requires_grad} if keeps else {}
        super().__init__(model=model, **kwargs)
        for parameter, value in loaded.items():
            parameter.data = value
        if "8bit" in self.args.optim or "paged" in self.args.optim:
            optimizer_class, optimizer_options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer_cls_and_kwargs = queued(optimizer_class), optimizer_options
        self.add_callback(_AllocateStates())
        self._kept = kept_attention.place_for(run.options.keep_attention, run.device)
        if self._kept is not None:
            self.add_callback(_KeepAttention(self._kept))
        self._take_adapters()

    def _take_adapters(self) -> None:
        """Lists the parameters that are trained, and casts them to their data type.

        TRL casts the adapters of 4-bit models to bf16, and PEFT casts loaded adapters to fp32. Modules that are trained in
        full keep the data type of the model.
        """
        run, named = self._resolved, dict(self._base_model().named_parameters())
        named = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        self._trained[:] = named.values()  # in place, because other objects hold the list
        for name, parameter in named.items():
            parameter.data = parameter.data.to(run.dtype if ".modules_to_save." in name else run.adapter_dtype)

    @property
    def tokens(self) -> int:
        """The number of tokens that went through the model, including those before the run was resumed."""
        return int(self._total_train_tokens)

    @property
    def total_steps(self) -> int:
        """The number of steps of the run, including those before it was resumed."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = len(self.get_train_dataloader())
        return math.ceil(self.args.num_train_epochs * -(-batches // self.args.gradient_accumulation_steps))

    @property
    def has_ended(self) -> bool:
        """Whether the run has made its last step, or the evaluation has ended it early."""
        return self.state.global_step >= self.total_steps or self._has_stopped(self.state)

    def _has_stopped(self, state: TrainerState) -> bool:
        patience = self._resolved.options.early_stopping
        return patience is not None and waited(state) >= patience

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains to the end, from the beginning or from a checkpoint.

        Raises:
            NotFinite: A loss, a gradient or a weight is not finite.
            CannotResume: The checkpoint does not fit the run.
            CannotWrite: A checkpoint or the log cannot be written.
            CannotRecord: The decoder cannot run as CUDA graphs.
        """
        if checkpoint is not None:
            if self.accelerator.scaler is not None and not (checkpoint / SCALER_NAME).is_file():
                raise CannotResume(f"{checkpoint} lacks {SCALER_NAME}, the scale of the gradients in fp16")
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.global_step >= self.total_steps or self._has_stopped(state):  # Trainer would make another step
                self.state, self._total_train_tokens = state, state.num_input_tokens_seen
                self._load_from_checkpoint(str(checkpoint))
                self.check_adapters()
                self._take_best(checkpoint)
                return
        model: Any = self.model
        self._peers.check_adapters(self._named(), "before the first step")
        tiles: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.shape is not None:
            # TRL's loss calls this module to get hidden states.
            self.graphs = GraphedDecoder(self._base_model().base_model, self.shape, self._kept)
            tiles = narrow_tiles()
        # FSDP2 gathers and frees the weights of adapters around a layer, which was not tried with these functions.
        together = projections.wanted() and self.sharding is None
        try:
            with (
                tiles,
                projections.joined(model) if together else contextlib.nullcontext(),
                without_walks(model, self._trained),
                _without_expected_warnings(),
            ):
                self._train_to_the_end(checkpoint)
            self.check_finite()
            self.check_adapters()
            if self.sharding is not None:
                self.sharding.end(model)
                self._trained[:] = [value for _, value in self._named()]
            self._peers.check_adapters(self._named(), "at the end")
            if self.has_ended and self._peers.is_main:  # which writes them
                self._take_best(None)
        finally:
            if self.graphs is not None:
                self.graphs.close()
                self.graphs = None

    def _train_to_the_end(self, checkpoint: Path | None) -> None:
        """Trains as Trainer does. It saves a checkpoint if the stream of rows comes to rows that are bad."""
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except BadRows:
            # Rows are fetched before a step begins, so the state is that of the last whole step.
            step = self.state.global_step
            if step and not checkpoint_of(self._resolved.output, step).is_dir():
                model: Any = self.model
                self._save_checkpoint(model, None)
            raise

    # The evaluation.

    def _take_best(self, loaded: Path | None) -> None:
        """Loads the adapters with the lowest evaluation loss, with ``--keep-best``.

        Args:
            loaded: The checkpoint that is loaded, if one is.

        Raises:
            CannotResume: The checkpoint of these adapters is missing or damaged.
        """
        best = self.state.best_global_step
        if not self._resolved.options.keep_best or not best or best == self.state.global_step:
            return
        checkpoint = checkpoint_of(self._resolved.output, best)
        if checkpoint == loaded:
            return
        if not checkpoint.is_dir():
            raise CannotResume(f"{checkpoint}, which has the adapter with the lowest evaluation loss, is missing")
        self._load_from_checkpoint(str(checkpoint))
        self.check_adapters()

    def ending(self) -> list[str]:
        """Says if the run has ended early, and which adapter is written if it is not the last one."""
        state, lines = self.state, []
        if state.global_step < self.total_steps and self._has_stopped(state):
            lines.append(
                f"ended early after step {state.global_step} of {self.total_steps}: the last {waited(state)} evaluations "
                "had no lower loss than the one before"
            )
        best = state.best_global_step
        if self._resolved.options.keep_best and best and best != state.global_step:
            lines.append(f"the adapter is that of step {best}, whose evaluation had the lowest loss")
        return lines

    def evaluation_facts(self) -> dict[str, str]:
        """Describes the evaluation of the adapter that is written, for the card of the run."""
        losses = evaluations(self.state)
        if not losses:
            return {}
        step = max(losses)
        if self._resolved.options.keep_best:
            step = self.state.best_global_step or step
        words = f"loss {losses[step]:.4f}"
        if not self._resolved.options.has_preferences:
            words += f", perplexity {perplexity(losses[step]):.2f}"
        return {"evaluation": f"{words}, of the adapter of step {step}"}

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        before: Any = self.data_collator
        self.data_collator = before if self.eval_collator is None else self.eval_collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = before

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as Trainer does.

        Going through the rows takes a random number, so the state is put back: the training is as without an evaluation.
        """
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, **kwargs)
        metrics: Any = output.metrics
        if LOSS in metrics:
            metrics[LOSS] = loss = self._evaluation_loss(metrics[LOSS])
            if not math.isfinite(loss):
                raise NotFinite(f"the loss of the evaluation after step {self.state.global_step} is {loss}")
        return output

    def _evaluation_loss(self, of_batches: float) -> float:
        """Returns the loss of an evaluation. ``of_batches`` is Trainer's, the mean over batches."""
        return of_batches

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        is_best: bool = super()._determine_best_metric(*args, **kwargs)
        if is_best and self._resolved.options.keep_best:
            self.control.should_save = True
        return is_best

    # A step without walks through the model.

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns 0. Nobody reads this number, and Trainer would count the model's parameters for it in each step."""
        return 0

    # The end at a value that is not finite.

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        result = super().compute_loss(*args, **kwargs)
        if not model.training:
            return result
        # TRL has just waited for the forward pass, so reading the loss and the last step's norm does not wait again.
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

    def check_adapters(self) -> None:
        """Raises NotFinite if a trained weight is NaN or infinite. It is called before weights are written."""
        if names := list(not_finite((name, local(value)) for name, value in self._named())):
            raise NotFinite(f"{names[0]} holds NaN or infinite values after step {self.state.global_step}")

    # Whole checkpoints.

    def _get_output_dir(self, trial: Any) -> str:
        directory: str = str(self._staging) if self._staging is not None else super()._get_output_dir(trial)
        return directory

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_finite()
        self.check_adapters()
        self.state.num_input_tokens_seen = self.tokens
        name = f"checkpoint-{self.state.global_step}"
        if self.sharding is not None:
            self._whole = self.sharding.collect(self.accelerator.unwrap_model(model), self.optimizer)
        if not self._peers.is_main:
            super()._save_checkpoint(model, trial)  # which tells the first process what it needs, and writes nothing
            return
        try:
            with writing(name):
                self._save_whole(name, model, trial)
        finally:
            self._whole = None
            if self.sharding is not None:
                self.sharding.drop()

    def _save_whole(self, name: str, model: nn.Module, trial: Any) -> None:
        """Saves a checkpoint that appears whole or not at all, and removes the oldest ones."""
        directory = self._resolved.output / CHECKPOINTS
        directory.mkdir(parents=True, exist_ok=True)
        with staged_directory(directory / name, "checkpoint", _replaceable, needed_bytes=0) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            for path in (staging / name).iterdir():
                path.rename(staging / path.name)
            (staging / name).rmdir()
        options = self._resolved.options
        best = checkpoint_of(self._resolved.output, self.state.best_global_step or 0) if options.keep_best else None
        for old in map(Path, sort_checkpoints(str(directory))[: -options.keep_checkpoints]):
            if old == best:
                continue
            aside = old.rename(old.with_name(f".{old.name}.partial"))
            shutil.rmtree(aside, ignore_errors=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing. Checkpoints have no card; the card is written once, with the adapter."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with resuming():
            # PEFT only reports tensors that are missing, and Trainer ignores the report.
            check_saved(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self._take_adapters()  # because PEFT makes new parameters if the checkpoint has another dtype

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule: Any = self.lr_scheduler
        if checkpoint is None or not hasattr(schedule, "lr_lambdas"):
            return
        # The checkpoint has the learning rate of its own length, which is 0 at the end. This run may be longer.
        for group, base, function in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * function(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.state.compute_steps(self.args, self.total_steps)  # otherwise those of the checkpoint would go on to count
        self._total_train_tokens = self.state.num_input_tokens_seen  # otherwise TRL counts from 0


class Finetuner(Finetuning, SFTTrainer):
    """Learns to imitate the rows.

    The loss of an evaluation is the mean over all tokens. Trainer's is the mean over batches, which have different numbers
    of tokens to learn from, so it would depend on the packing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._evaluated = TokenMean(self._peers)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = TokenMean(self._peers)
        return super().evaluation_loop(*args, **kwargs)

    def _evaluation_loss(self, of_batches: float) -> float:
        loss = self._evaluated.value()
        return of_batches if loss is None else loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        model: Any = self.model
        if not model.training:
            inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
            self._evaluated.add(result[0] if isinstance(result, tuple) else result, inputs["labels"])
        return result


class PairFinetuner(Finetuning, DPOTrainer):
    """Learns to prefer the chosen answers to the rejected ones."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """Returns the data set, which ``preferences`` has prepared."""
        return dataset


class RatedFinetuner(Finetuning, KTOTrainer):
    """Learns from answers that are wanted and others that are not."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *_: Any, **__: Any) -> Any:
        """Returns the data set, which ``preferences`` has prepared, with an answer to another prompt of the batch for each.

        TRL estimates its KL term with these answers, which it takes from the row before, within a batch.
        """

        def with_others(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            answers = rows["completion_ids"]
            return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

        size = args.per_device_train_batch_size
        return dataset.map(with_others, batched=True, batch_size=size, desc="Pairing")


_TRAINERS: dict[Method, type[Any]] = {
    "sft": Finetuner,
    "dpo": PairFinetuner,
    "ipo": PairFinetuner,
    "kto": RatedFinetuner,
}


def _replaceable(target: Path) -> None:
    """Does nothing, because a checkpoint may always be replaced by one of the same step."""
