"""Training through the trainer of ``moe-fused finetune``, over random tokens."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from moe_fused.finetune import projections
from moe_fused.finetune.adapters import adapt
from moe_fused.finetune.data import fit
from moe_fused.finetune.options import Options
from moe_fused.finetune.plan import plan_run
from moe_fused.finetune.resolve import Batching, ModelSetup, set_up
from moe_fused.finetune.trainer import Finetuning, make_trainer

from .documents import packed_lengths
from .training import Meter, Recipe, compile_layers, trained

NO_LIMIT_GIB = 1e6
END = "<end>"


class _Steps(TrainerCallback):
    """Tells a meter of the trainer's steps."""

    def __init__(self, trainer: Finetuning, model: Any, meter: Meter) -> None:
        self._trainer, self._model, self._meter = trainer, model, meter

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self._meter.begin(self._model, kwargs["optimizer"], self._trainer.graphs)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._meter.end()


@contextlib.contextmanager
def _environment(variable: str, on: bool | None) -> Iterator[None]:
    """Sets a variable of the environment to 1 or to nothing within the block. None leaves it as it is."""
    before = os.environ.get(variable)
    if on is not None:
        os.environ[variable] = "1" if on else ""
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before


class Finetune:
    """See ``Training``. A length has a trainer, and with it an optimizer, of its own."""

    predicted: int | None = None

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model, self.has_parts, self.has_graphs = model, not recipe.compile_layers, recipe.cuda_graphs
        # What of it concerns documents and attention may be changed between two calls of ``train``.
        self.recipe, self._device = recipe, model.device
        self._adapted = adapt(model, self._set_up())
        if recipe.compile_layers:
            compile_layers(model)

    def train(self, tokens: Tensor, meter: Meter) -> list[float]:
        with tempfile.TemporaryDirectory() as output:
            plan = plan_run(self._set_up(output, tokens.shape[1], len(tokens)), plain_text=True)
            self.predicted = plan.prediction.allocated
            dataset = self._dataset(tokens, plan.run.batching)
            trainer = make_trainer(self._adapted, tokenizer(), dataset, plan.run)
            trainer.args.save_strategy = SaveStrategy.NO
            trainer.add_callback(_Steps(trainer, self.model, meter))
            try:
                with _environment(projections.VARIABLE, self.recipe.joined):
                    trainer.train_from(None)
            finally:  # a step that ran out of memory leaves gradients behind
                for parameter in trained(self.model):
                    parameter.grad = None
            return [record["loss"] for record in trainer.state.log_history if "loss" in record]

    def _dataset(self, tokens: Tensor, batching: Batching) -> Dataset:
        """The sequences of the run."""
        columns = {"input_ids": tokens.tolist(), "labels": tokens.tolist()}
        if not self.recipe.documents:
            return fit(Dataset.from_dict(columns), batching)
        # As ``fit`` packs documents, but with the same tokens in each sequence as without documents.
        return Dataset.from_dict({**columns, "seq_lengths": packed_lengths(tokens.shape[1], len(tokens))})

    def _set_up(self, output: str = "", length: int | None = None, steps: int | None = None) -> ModelSetup:
        return _resolved(self.model.config, self.recipe, self._device, output, length, steps)


def random_options(device: torch.device, output: str, length: int | None, steps: int | None, **options: Any) -> Options:
    """The options of a run of the command over random tokens, a sequence in a step; others may be given by name."""
    given: dict[str, Any] = {
        "model": "random",
        "dataset": "random",
        "output": output,
        "device": "cpu" if device.type == "cpu" else "cuda",
        "dtype": "bfloat16",
        "sequence_length": length,
        "gradient_accumulation": 1,
        "max_steps": steps,
        "scheduler": "constant",
        "warmup": 0.0,
        "optimizer": "auto" if device.type == "cpu" else "adamw_8bit",
        "memory_limit": NO_LIMIT_GIB,  # what does not fit is to be seen, not refused
    }
    return Options(**given | options)


def _resolved(
    config: Any, recipe: Recipe, device: torch.device, output: str, length: int | None, steps: int | None
) -> ModelSetup:
    options = random_options(
        device,
        output,
        length,
        steps,
        cuda_graphs=recipe.cuda_graphs,
        attention_rank=recipe.attention_rank,
        expert_rank=recipe.expert_rank,
        learning_rate=recipe.learning_rate,
        attn=recipe.attn,
        keep_attention=recipe.keep_attention,
        packing="bfd" if recipe.documents else "auto",
        **({"optimizer": "auto"} if recipe.paged else {}),
    )
    return set_up(options, config, device)


def check(config: Any, recipe: Recipe, device: torch.device, length: int) -> None:
    """Raises ValueError if a model of this config cannot run the recipe on ``device`` with sequences of that length."""
    _resolved(config, recipe, device, "", length, None)


def graphs_refusal(config: Any, recipe: Recipe, device: torch.device) -> str | None:
    """Why the decoder of a model of this config cannot run as CUDA graphs on ``device``; None if it can."""
    try:
        plan_run(_resolved(config, recipe, device, "", None, None), plain_text=True)
    except ValueError as error:
        if "--cuda-graphs" not in str(error):
            raise
        return str(error).partition("--cuda-graphs: ")[2]
    return None


def tokenizer() -> PreTrainedTokenizerFast:
    """The trainer wants one, though all is tokens already."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({END: 0}, unk_token=END)), eos_token=END, pad_token=END
    )


def set_up_finetune(model: Any, recipe: Recipe) -> Finetune:
    """Adapters and all else as ``moe-fused finetune`` has them by default, but for what the recipe says.

    Raises:
        ValueError: a part of the recipe that its trainer does not have.
    """
    disable_progress_bars()
    if recipe.recompute != "layers":
        raise ValueError("the trainer of finetune recomputes whole layers: use the plain loop")
    return Finetune(model, recipe)
