"""Runs a fine-tuning from the options to the adapter: checks, loads, trains and writes everything in its order."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import transformers
from rich.console import Console

from moe_fused.checkpoints.places import ADAPTER_WEIGHTS
from moe_fused.commands.options import has_weights
from moe_fused.devices import use_expandable_segments
from moe_fused.launched import WORD
from moe_fused.signals import Interrupted, first_signal_noted
from moe_fused.staging import replace_file

from .adapters import adapt
from .bad_rows import RefusedRows
from .card import card
from .checkpoint_uploads import CheckpointUploads
from .checkpoints import check_finite_adapter
from .data import Data, Prepared, find, find_evaluation, prepare
from .duration import duration_line
from .endings import Stopped, explained, stopped_by
from .facts import facts
from .fingerprint import (
    adapter_fingerprint,
    as_comment,
    base_fingerprints,
    check_same_adapter,
    check_same_base,
    check_same_data,
    fingerprints,
    of_processes,
    recorded_processes,
)
from .formats import Kind
from .handed_through import Config, names_given
from .model import check_model, load_config, load_model, load_tokenizer
from .next_commands import print_next, push_command
from .options import Options, flag, to_yaml
from .output import CONFIG, LOG, has_begun, remove_leftovers, remove_run, take_back
from .parallel import Peers
from .plan import MemoryPlan, plan_run
from .precheck import Process
from .progress import Follower, Log, Stop, largest_memory
from .resolve import ResolvedRun, set_up, training_device
from .results import write_results
from .rows import bars
from .sharding import Sharding
from .show import show_rows, show_sequences
from .space import check_space
from .start import StartingAdapter, read_start
from .stream import Streamed, prepare_stream
from .trackers import keep_local
from .upload import UploadFailed, upload_adapter
from .usage import export_note
from .words import said_by

if TYPE_CHECKING:
    from .trainer import Finetuning


def run(
    options: Options,
    process: Process,
    *,
    resume: bool = False,
    checkpoint: Path | None = None,
    overwrite: bool = False,
    allow_changed_data: bool = False,
    allow_other_base: bool = False,
    dry_run: bool = False,
    planned: Process | None = None,
) -> None:
    """Trains with ``options`` and writes the adapter to the output directory, which the caller has checked and locked.

    Args:
        options: The options, which ``precheck`` has checked.
        process: This process among those of the run.
        resume: Whether the run goes on with an earlier one.
        checkpoint: The checkpoint from which it goes on; None for the beginning.
        overwrite: Whether to replace a run in the output directory.
        allow_changed_data: Whether a run may go on with other data than it began with.
        allow_other_base: Whether a run may go on with another model than it began with, or from an adapter of another.
        dry_run: Whether to end after the checks, before anything is written.
        planned: The process that a dry run plans for, if it is one of several that are not here.

    Raises:
        ValueError, FileNotFoundError: An option, a file or a row is wrong. Nothing has been written.
        Stopped: The run ended early. The message says how to go on.
    """
    peers = Peers(process)
    switches = {
        "resume": resume,
        "overwrite": overwrite,
        "allow_changed_data": allow_changed_data,
        "allow_other_base": allow_other_base,
        "dry_run": dry_run,
    }
    device = _connected(options, peers, switches)
    checkpoint = peers.of_main(checkpoint)
    start = read_start(options, checkpoint)
    console, tokenizer, found, plan = _resolve(
        options,
        peers,
        device,
        trains=True,
        start=start,
        allow_other_base=allow_other_base,
        dry_run=dry_run,
        planned=planned,
    )
    with bars(console.is_terminal), peers.first():
        evaluation = find_evaluation(options, tokenizer)
    resolved = plan.run
    if options.trainer:
        _check_trainer(resolved)

    def compared_base(download: bool) -> dict[str, str]:
        """Returns the fingerprints of the model. A resumed run compares them with those that it began with."""
        now = base_fingerprints(options.model, options.revision, download=download)
        if resume:
            _print(console, check_same_base(resolved.output / CONFIG, options.model, now, allow_other_base))
        return now

    base = compared_base(download=False) if has_weights(options.model) else {}
    note = export_note(resolved)
    _print(console, [note] if note else [])
    begun_with, remarks = _adapter_record(resolved, resume)
    _print(console, remarks)
    plan.show(console)
    with bars(console.is_terminal), peers.first(), _advising(resume):
        if peers.is_main:
            check_space(resolved, plan.prediction.trainable)
        prepared: Prepared | Streamed
        sizes: dict[str, Any] = {"vocabulary": resolved.vocabulary, "evaluation": evaluation}
        if options.streaming:
            prepared = prepare_stream(found, options, resolved.batching, lambda line: _print(console, [line]), **sizes)
        else:
            prepared = prepare(found, options, resolved.batching, **sizes)
    _print(console, prepared.lines())
    has_gpu = resolved.device.type == "cuda" and torch.cuda.is_available()
    gpu = torch.cuda.get_device_name(resolved.device) if has_gpu else None
    _print(console, [duration_line(resolved, prepared, gpu)])
    data, kinds = fingerprints(prepared, found), sorted({each.kind for each in found})
    if resume:
        _print(console, check_same_data(resolved.output / CONFIG, data, allow_changed_data))
        _print(console, _change_of_processes(resolved))
    if not peers.is_alone:
        settled = resolved.settled()
        options_now = {flag(name): repr(getattr(settled, name)) for name in vars(settled)}
        peers.check_same({**options_now, "CUDA graphs": str(resolved.graphs), **data, **base})
    if dry_run:
        if resolved.device.type == "cpu" and not torch.cuda.is_available():
            _print(
                console, ["note: this is the plan for the CPU; --device cuda plans for an NVIDIA GPU that is not here"]
            )
        peers.leave()
        return
    record = data | (base or compared_base(download=True)) | begun_with | of_processes(process.world_size)
    if checkpoint is not None:
        check_finite_adapter(checkpoint)
    with _nothing_left(resolved.output) if peers.is_main else contextlib.nullcontext():
        if peers.is_main:
            _prepare_output(resolved, overwrite, record)
        peers.wait()
        _train_and_write(plan, tokenizer, prepared, kinds, console, checkpoint, overwrite, record, peers)
    peers.leave()


def _connected(options: Options, peers: Peers, switches: Mapping[str, object]) -> torch.device:
    """Chooses the device of this process, connects the process to the others, and compares its options with theirs."""
    use_expandable_segments()
    device = training_device(options, peers.process, only_plans=bool(switches.get("dry_run")))
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.set_device_index(device.index)
    if not peers.is_alone:
        peers.connect(device, options)
        peers.check_options(options, switches)
    return device


def _change_of_processes(resolved: ResolvedRun) -> list[str]:
    """Says that the run goes on with another number of processes than it had, if it does."""
    before, now = recorded_processes(resolved.output / CONFIG), resolved.batching.processes
    if before == now:
        return []
    had = f"{before} process{'' if before == 1 else 'es'}"
    dropped = ", but what is dropped at random differs" if resolved.is_random else ""
    return [f"the run had {had} and goes on with {now}; each step takes the same rows{dropped}"]


def _upload(output: Path, repository: str, *, private: bool) -> None:
    """Uploads the adapter. If that fails or is interrupted, the user is told the command that repeats the upload."""
    begin, end = f"the adapter is in {output} and was not uploaded", push_command(output, repository, private=private)
    try:
        print(f"uploaded: {upload_adapter(output, repository, private=private)}")
    except UploadFailed as error:
        raise Stopped(f"{begin}: {error}; upload it with: {end}") from error
    except Interrupted:
        print(f"{begin}; upload it with: {end}", file=sys.stderr)
        raise


def _adapter_record(resolved: ResolvedRun, resume: bool) -> tuple[dict[str, str], list[str]]:
    """Returns the fingerprint of the adapter that the run began with, if it did, and what is to be said about it."""
    start, options = resolved.start, resolved.options
    if start is None:
        return {}, []
    directory = start.directory
    if start.is_checkpoint:
        directory = Path(str(options.adapter))
    now = adapter_fingerprint(directory) if (directory / ADAPTER_WEIGHTS).is_file() else {}
    begun_with = now
    remarks: list[str] = []
    if resume:
        begun_with, remarks = check_same_adapter(resolved.output / CONFIG, now, needed=not start.is_checkpoint)
    note = start.note()
    return begun_with, remarks if note is None else [*remarks, note]


def show(options: Options, process: Process, count: int, *, allow_other_base: bool = False) -> None:
    """Prints the first ``count`` rows of each data set as they would be trained on, and as many sequences of rows.

    It raises the same errors as ``run``.
    """
    start = read_start(options, None)
    peers = Peers(process)
    device = _connected(options, peers, {})
    console, _, found, plan = _resolve(
        options, peers, device, trains=False, start=start, allow_other_base=allow_other_base
    )
    batching = plan.run.batching
    for line in show_rows(found, count, batching, skip_bad=options.skip_bad_rows):
        print(line)
    if options.has_preferences or options.streaming:  # nothing is packed, or not yet
        return
    sys.stdout.flush()
    with bars(console.is_terminal):
        for line in show_sequences(found, options, count, batching):
            print(line)


def _resolve(
    options: Options,
    peers: Peers,
    device: torch.device,
    *,
    trains: bool,
    start: StartingAdapter | None,
    allow_other_base: bool,
    dry_run: bool = False,
    planned: Process | None = None,
) -> tuple[Console, Any, tuple[Data, ...], MemoryPlan]:
    """Resolves a run from its options, the config of its model and its first rows.

    Args:
        options: The options of the run.
        peers: The processes of the run.
        device: The device of this process.
        trains: Whether the model will be loaded afterwards. Its files must then be whole.
        start: The adapter that the run goes on from.
        allow_other_base: Whether that adapter may have been made for another model of the same shapes.
        dry_run: Whether the model will not be loaded after all. Its directory may then have no weights, and the plan may be
            for a GPU that is not here.
        planned: The process that the run is planned for, if not this one.

    Returns:
        The console to print on, the tokenizer, the rows of each data set, and the plan with the record of the run.
    """
    console = Console(stderr=True, quiet=not peers.is_main, force_terminal=None if peers.is_main else False)
    _quiet(console, peers)
    config, tokenizer = load_config(options), load_tokenizer(options)
    setup = set_up(options, config, device, planned or peers.process, start=start, allow_other_base=allow_other_base)
    if dry_run and not has_weights(options.model):
        _print(console, [f"note: --model {options.model} has no weights, which a run needs: they are not checked"])
    elif trains:
        check_model(setup)
    with bars(console.is_terminal), peers.first():
        found = find(options, tokenizer)
    has_text = any(each.kind == "text" for each in found)
    rows = 0 if options.streaming else sum(len(each.rows) for each in found)
    plan = plan_run(setup, plain_text=has_text, rows=rows, agreed=peers.least)
    return console, tokenizer, found, plan


def _check_trainer(resolved: ResolvedRun) -> None:
    """Raises ValueError if TRL's config refuses the options ``trainer``. It takes the seconds of importing TRL."""
    from .arguments import try_config

    with _naming(resolved.options, "trainer"):
        try_config(resolved)


@contextlib.contextmanager
def _advising(resume: bool) -> Iterator[None]:
    """Makes the advice about bad rows within the block one that a run which goes on can take: its options are settled."""
    try:
        yield
    except RefusedRows as error:
        if not resume:
            raise
        advice = (
            "mend what is wrong there, or begin again with --overwrite and --skip-bad-rows, which leaves such rows out"
        )
        raise ValueError(f"{error.rows}; {advice}") from error


@contextlib.contextmanager
def _naming(options: Options, *configs: Config) -> Iterator[None]:
    """Names the fields that ``trainer`` and ``lora`` have in errors that libraries raise within the block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, NotImplementedError) as error:
        if not (given := names_given(options, *configs)):
            raise
        raise ValueError(f"{given}: {said_by(error)}") from error


def _train_and_write(
    plan: MemoryPlan,
    tokenizer: Any,
    prepared: Prepared | Streamed,
    kinds: Collection[Kind],
    console: Console,
    checkpoint: Path | None,
    overwrite: bool,
    record: dict[str, str],
    peers: Peers,
) -> None:
    """Loads the model, trains it, and writes and uploads the results."""
    resolved, begin = plan.run, time.perf_counter()
    model = load_model(resolved)
    sharding = Sharding(model, resolved, peers) if resolved.options.shard else None
    if not resolved.options.has_preferences:  # TRL adapts the model itself
        model = adapt(model, resolved)
    keep_local(resolved.options.report_to, resolved.output)
    from .trainer import make_trainer  # this imports TRL, which takes seconds, so errors in options come before it

    held = prepared.evaluation
    first = prepared.first if isinstance(prepared, Streamed) else None
    evaluated = None if held is None else held.dataset
    with _naming(resolved.options, "trainer", "lora"):
        trainer = make_trainer(model, tokenizer, prepared.dataset, resolved, evaluated, first, peers, sharding)
    if resolved.device.type != "cpu":  # the peak of the run does not include loading
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(resolved.device)
    if peers.is_main and overwrite and has_begun(resolved.output):
        remove_run(resolved.output)
        _write_options(resolved, record)
    has_graphs = trainer.shape is not None
    log = Log(
        resolved.output / LOG,
        console,
        resolved.device,
        has_graphs,
        lambda: trainer.tokens,
        evaluated=0 if held is None else held.report.tokens - held.report.lost,
        per_token=not resolved.options.has_preferences,
        peers=peers,
    )
    WORD.trains = True
    if not peers.is_main:
        trainer.add_callback(Follower(peers, resolved.device, has_graphs))
        with explained(trainer, plan, peers):
            _train(trainer, checkpoint, resolved, peers)
            largest_memory(peers, resolved.device, has_graphs)
        return
    with _uploading(trainer, resolved, console):
        with contextlib.closing(log), explained(trainer, plan, peers):
            # First, because it adds to the numbers that the others get.
            trainer.callback_handler.callbacks.insert(0, log)
            _train(trainer, checkpoint, resolved, peers)
            memory = largest_memory(peers, resolved.device, has_graphs)
            log.end_after(trainer.state.global_step)  # a run that has nothing left to do has not begun its log anew
        _print(console, trainer.ending())
        if isinstance(prepared, Streamed):
            _print(console, prepared.ending())
        with explained(trainer, plan, peers):
            text = card(resolved, facts(trainer, plan, prepared, kinds, begin, memory))
            write_results(trainer.model, tokenizer, resolved, text)
        print_next(resolved)
        if resolved.options.repository is not None:  # before the last checkpoints, which may still be on their way
            _upload(resolved.output, resolved.options.repository, private=resolved.options.private)


def _uploading(
    trainer: Finetuning, resolved: ResolvedRun, console: Console
) -> contextlib.AbstractContextManager[object]:
    """Uploads the checkpoints that are saved within the block, with ``--push-checkpoints``."""
    options = resolved.options
    if options.repository is None or not options.push_checkpoints:
        return contextlib.nullcontext()
    uploads = CheckpointUploads(resolved.output, options.repository, options.private, console)
    trainer.add_callback(uploads)
    return uploads


# The seconds in which torchrun may hand on a signal that a process has got already.
_APART = 5.0


def _train(trainer: Finetuning, checkpoint: Path | None, resolved: ResolvedRun, peers: Peers) -> None:
    """Trains to the end; raises Stopped if a signal ends the training before."""
    with first_signal_noted(0.0 if peers.is_alone else _APART) as received:
        stop = Stop(received, peers)
        trainer.add_callback(stop)
        trainer.train_from(checkpoint)
    signum = received() if peers.is_alone else stop.signum
    if signum is not None and not trainer.has_ended:
        raise stopped_by(signum, resolved)


@contextlib.contextmanager
def _nothing_left(output: Path) -> Iterator[None]:
    """Removes the files of this run from ``output`` if an error ends it, within the block, before its first step.

    After a signal finetune.yaml stays, so that --resume can begin with its options.
    """
    fresh = not (output / CONFIG).is_file()
    try:
        yield
    except Exception:
        if fresh and not has_begun(output):
            take_back(output)
        raise


def _prepare_output(resolved: ResolvedRun, overwrite: bool, record: dict[str, str]) -> None:
    """Makes the output directory and writes the options. A run that will be replaced stays until the new one begins."""
    resolved.output.mkdir(exist_ok=True)
    remove_leftovers(resolved.output)
    if not (overwrite and has_begun(resolved.output)):
        _write_options(resolved, record)


def _write_options(resolved: ResolvedRun, record: dict[str, str]) -> None:
    replace_file(resolved.output / CONFIG, (as_comment(record) + to_yaml(resolved.settled())).encode())


def _print(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _quiet(console: Console, peers: Peers) -> None:
    """Hides libraries' progress bars if there is no terminal, and warnings about which users can do nothing."""
    if not peers.is_main:  # the first process says the same
        transformers.utils.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
