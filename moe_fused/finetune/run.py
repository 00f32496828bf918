"""A run from its options to its adapter: what is checked when, and what is said about it."""

from __future__ import annotations

import shlex
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any, get_args

import datasets
import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from transformers import PrinterCallback

from moe_fused.devices import use_expandable_segments
from moe_fused.memory import GIB
from moe_fused.signals import first_signal_noted
from moe_fused.staging import is_partial, replace_file

from . import attention
from .batches import Documents, Sequences, is_full, lengths_of
from .command import CONFIG
from .data import Rows, is_text, load_rows
from .model import (
    adapt,
    apply_liger,
    attends_packed,
    device_of,
    is_packed,
    is_random,
    liger_serves,
    load_config,
    load_model,
    load_tokenizer,
    quantizes_on_loading,
)
from .options import Export, Options, to_yaml
from .plan import Plan, make_plan
from .progress import LOG, Log, Stop, memory_gib
from .results import ADAPTER_CONFIG, card, write_results
from .trainer import CHECKPOINTS, Finetuner, NotFinite, last_checkpoint, sft_config


class Stopped(Exception):
    """A run that ended early, with its checkpoints in place.

    Attributes:
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(options: Options, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    """Trains as ``options`` say and writes the adapter.

    Raises:
        ValueError, FileNotFoundError: an option, a file or a row is wrong; nothing has been written.
        FileExistsError: there is something at the output directory, and neither ``resume`` nor ``overwrite``.
        Stopped: ended before its time, by a signal, a loss that is not finite or a full disk; says how to go on.
    """
    use_expandable_segments()
    console = Console(stderr=True)
    _quiet(console)
    output = options.output_directory
    _check_output(output, resume, overwrite)
    device = device_of(options)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    config, tokenizer = load_config(options), load_tokenizer(options)
    rows = load_rows(
        options.dataset,
        config=options.dataset_config,
        split=options.split,
        text_field=options.text_field,
        skip_bad=options.skip_bad_rows,
    )
    _check_rows(rows, tokenizer, options)
    for bad in rows.skipped:
        console.print(f"left out: {bad}", highlight=False, markup=False, soft_wrap=True)
    plan = make_plan(options, config, device, plain_text=rows.kind == "text")
    plan.show(console)
    if dry_run:
        return
    checkpoint = last_checkpoint(output) if resume else None
    options = plan.settle(options, device)
    _prepare_output(options, overwrite)
    begin = time.perf_counter()
    model = adapt(load_model(options, config, device), options)
    trainer = make_trainer(model, tokenizer, rows.dataset(), options, device, plan)
    if device.type != "cpu":  # what loading took beyond the model is none of the run's
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
    log = Log(output / LOG, console, device, trainer.shape is not None, lambda: trainer.tokens)
    trainer.add_callback(log)
    try:
        with first_signal_noted() as received:
            trainer.add_callback(Stop(received))
            trainer.train_from(checkpoint)
        signum = received()
        if signum is not None and trainer.state.global_step < trainer.total_steps:
            raise Stopped(f"interrupted by {signal.Signals(signum).name}; {_way_on(output)}", 128 + signum)
        text = card(options, _facts(trainer, device, plan, begin), quantizes_on_loading(options, config))
        write_results(trainer.model, tokenizer, options, text, output / LOG)
    except NotFinite as error:
        # Not --resume, which would come to the same.
        advice = "start again with a lower --learning-rate, or look at the rows around it"
        raise Stopped(f"{error}: {advice}; {_where(last_checkpoint(output))}") from error
    except torch.OutOfMemoryError as error:
        advice = f"predicted were {plan.prediction.total / GIB:.2f} GiB; start again with a lower --sequence-length"
        where = _way_on(output, " --no-cuda-graphs") if trainer.shape is not None else _where(last_checkpoint(output))
        raise Stopped(f"out of memory after step {trainer.state.global_step}: {advice}; {where}") from error
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of these, depending on who writes
        raise Stopped(f"stopped after step {trainer.state.global_step}: {error}; {_way_on(output)}") from error
    finally:
        log.close()
    print_next(options, config)


def _facts(trainer: Finetuner, device: torch.device, plan: Plan, begin: float) -> dict[str, str]:
    """What the card says of a run."""
    facts = {
        "steps": str(trainer.state.global_step),
        "tokens": f"{trainer.tokens:,}",
        "time since the last start": f"{time.perf_counter() - begin:.0f} s",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    if (memory := memory_gib(device, trainer.shape is not None)) is not None:
        facts["peak memory of tensors"] = f"{memory:.2f} GiB, predicted {plan.prediction.allocated / GIB:.2f} GiB"
    return facts


def make_trainer(
    model: Any, tokenizer: Any, dataset: datasets.Dataset, options: Options, device: torch.device, plan: Plan
) -> Finetuner:
    """The trainer of a run: what ``finetune`` trains with once it has a model with adapters, and data."""
    if liger_serves(options, model.config, device):
        apply_liger(model.get_base_model())
    config = model.config
    arguments = sft_config(
        options, device, plan.packing, plan.length, plan.accumulation, random=is_random(options, config)
    )
    packed, attends = is_packed(plan.packing), attends_packed(options, config, device, plan.packing)
    if attends:
        attention.use(model.get_base_model())
    trainer = Finetuner(model, options, device, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    batches: Any = trainer.train_dataset
    collate: Any = trainer.data_collator
    if plan.graphs:
        lengths = lengths_of(batches)
        if options.cuda_graphs or is_full(lengths):
            tokens = max(lengths)
            trainer.shape = (1, options.batch_size * tokens) if packed else (options.batch_size, tokens)
    if packed and attends:
        columns = None if trainer.shape is None else trainer.shape[1]
        documents = batches["seq_lengths"]
        trainer.data_collator = Documents.of(collate, documents, options.batch_size, columns, collate.pad_token_id)
    elif trainer.shape is not None:
        trainer.data_collator = Sequences(collate, trainer.shape, collate.pad_token_id)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _quiet(console: Console) -> None:
    """Libraries' bars only for people, and none of their warnings that a user of this command can do nothing about."""
    datasets.disable_progress_bars()
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    if (output / CONFIG).is_file():
        if not resume and not overwrite:
            raise FileExistsError(f"--output {output} holds a run: --resume goes on with it, --overwrite replaces it")
    elif output.exists() and (not output.is_dir() or any(not is_partial(path) for path in output.iterdir())):
        raise FileExistsError(f"--output {output} exists and is not the directory of a run")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no directory {output.parent}")


def _prepare_output(options: Options, overwrite: bool) -> None:
    output = options.output_directory
    output.mkdir(exist_ok=True)
    for path in filter(is_partial, list(output.iterdir())):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if overwrite:
        # First: without it, nothing takes the rest for an adapter.
        (output / ADAPTER_CONFIG).unlink(missing_ok=True)
        for layout in get_args(Export):
            if layout != "none":
                shutil.rmtree(output / layout, ignore_errors=True)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    replace_file(output / CONFIG, to_yaml(options).encode())


def _check_rows(rows: Rows, tokenizer: Any, options: Options) -> None:
    is_chat = rows.kind == "chat" or not is_text(rows.rows[0])
    if is_chat and not tokenizer.chat_template:
        raise ValueError(
            f"--dataset {options.dataset} holds chats, but the tokenizer of {options.model} has no chat template: give "
            "one with --chat-template"
        )
    if options.assistant_only_loss and not is_chat:
        raise ValueError(f"--assistant-only-loss is for chats, --dataset {options.dataset} is {rows.kind}")


def _where(checkpoint: Path | None) -> str:
    return "no checkpoint was saved yet" if checkpoint is None else f"the last checkpoint is {checkpoint}"


def _way_on(output: Path, options: str = "") -> str:
    checkpoint = last_checkpoint(output)
    how = f", go on with: moe-fused finetune --resume --output {shlex.quote(str(output))}{options}"
    return _where(checkpoint) + ("" if checkpoint is None else how)


def print_next(options: Options, config: Any) -> None:
    """Prints the commands that go on from an adapter; ``config`` is the model's."""
    output, model = shlex.quote(options.output), shlex.quote(options.model)
    print(f"adapter: {options.output}")
    print("next:")
    in_4bit = " --load-in-4bit" if quantizes_on_loading(options, config) else ""
    print(f'  moe-fused generate {model} --adapter {output}{in_4bit} --prompt "..."')
    if options.expert_rank and options.export == "none":
        target = shlex.quote(f"{options.output.rstrip('/')}-per-expert")
        print(f"  moe-fused convert adapter --from peft-fused {output} {target}")
    print(f"  moe-fused merge {model} {output} {shlex.quote(options.output.rstrip('/') + '-merged')}")
