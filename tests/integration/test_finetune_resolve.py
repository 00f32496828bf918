"""A run is resolved once: what the record holds, what is refused where, and that later steps ask nothing again."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from moe_fused import finetune
from moe_fused.finetune import launch, resolve
from moe_fused.finetune.options import DEFAULTS, Options
from moe_fused.finetune.plan import plan_run
from moe_fused.finetune.precheck import Process, check_automatic_device, check_shared, notes
from moe_fused.finetune.resolve import ANSWERED, ResolvedRun, candidates, set_up, training_device, with_options

from .models import GPT_OSS, QWEN3_MOE

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# The modules that answer the questions: the table of options, the checks before torch is imported, and the resolution.
ANSWERING = {"options.py", "precheck.py", "launch.py", "resolve.py"}


def run_of(device: torch.device = CPU, *, plain_text: bool = False, **options: Any) -> ResolvedRun:
    setup = set_up(Options(model="m", **options), QWEN3_MOE.build().config, device)
    return next(candidates(setup, plain_text=plain_text))


@pytest.mark.parametrize(
    ("device", "dtype", "optimizer"), [(CPU, torch.float32, "adamw_torch"), (CUDA, torch.bfloat16, "paged_adamw_8bit")]
)
def test_nothing_is_left_open(device: torch.device, dtype: torch.dtype, optimizer: str) -> None:
    run = run_of(device)
    assert (run.dtype, run.adapter_dtype, run.optimizer, run.attention) == (dtype, dtype, optimizer, "sdpa")
    assert run.attention_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (run.attention_alpha, run.expert_alpha) == (32, 16)
    assert (run.quantize_to, run.is_4bit) == ("nf4", True)
    assert run.batching.packing == "bfd"
    assert run.batching.length * run.batching.accumulation == 16384
    assert run.process == Process(rank=0, local_rank=0, world_size=1)


def test_records_are_frozen() -> None:
    run = run_of()
    for record in (run, run.batching, run.process, run.options):
        field = dataclasses.fields(record)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field, None)


def test_what_is_settled_resolves_to_the_same() -> None:
    """So a run that goes on decides nothing anew, on another device either."""
    run = run_of(CUDA, plain_text=True)
    settled = run.settled()
    open_still = {name for name in ANSWERED if getattr(settled, name) in (None, "auto")}
    alphas = {"attention_alpha", "expert_alpha", "shared_expert_alpha"}
    assert open_still == alphas | {"liger", "cuda_graphs", "device", "modules_to_save", "beta"}
    elsewhere = next(candidates(set_up(settled, run.config, CPU), plain_text=False))
    for name in ("dtype", "adapter_dtype", "optimizer", "attention", "attention_modules", "batching"):
        assert getattr(elsewhere, name) == getattr(run, name), name


def test_settled_sinks_keep_flash_attention_and_packing() -> None:
    """ "eager" by name would be Transformers' own attention, which refuses the packing that the run has."""
    config = GPT_OSS.build().config
    run = next(candidates(set_up(Options(model="m"), config, CUDA), plain_text=False))
    assert (run.attention, run.maskless, run.batching.packing) == ("eager", True, "bfd")
    again = next(candidates(set_up(run.settled(), config, CUDA), plain_text=False))
    assert (again.attention, again.maskless, again.batching) == (run.attention, run.maskless, run.batching)
    asked = Options(model="m", attn="eager")
    assert next(candidates(set_up(asked, config, CUDA), plain_text=False)).settled().attn == "eager"


def test_candidates_need_less_and_less() -> None:
    config = QWEN3_MOE.build(max_position_embeddings=2048).config
    found = list(candidates(set_up(Options(model="m"), config, CUDA), plain_text=False))
    assert [(run.batching.length, run.graphs) for run in found[:3]] == [
        (2048, found[0].graphs),
        (2048, False),
        (1024, True),
    ]
    lengths = [run.batching.length for run in found]
    assert lengths == sorted(lengths, reverse=True)
    asked = list(candidates(set_up(Options(model="m", cuda_graphs=True), config, CUDA), plain_text=False))
    assert all(run.graphs and run.graphs_asked_for for run in asked)


def test_other_options_for_the_same_run() -> None:
    run = run_of(sequence_length=64)
    other = with_options(run, batch_size=2, gradient_accumulation=3)
    assert (other.batching.batch_size, other.batching.accumulation, other.batching.length) == (2, 3, 64)
    assert with_options(run, sequence_length=32).batching.length == 32
    assert with_options(run, quantization="none").quantize_to is None


def test_a_plan_is_of_one_record() -> None:
    setup = set_up(Options(model="m", sequence_length=64), QWEN3_MOE.build().config, CPU)
    plan = plan_run(setup, plain_text=True)
    assert plan.run.batching.packing == "bfd_split"
    assert plan.fits
    assert plan.limit is None


# Several processes.

OF_TORCHRUN = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "1",
}  # fmt: skip


def test_the_process_is_read_from_the_environment() -> None:
    assert Process.of_environment({}) == Process()
    assert Process.of_environment({"RANK": "0", "WORLD_SIZE": "1", "PMI_SIZE": "1"}) == Process()
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    assert Process.of_environment(one) == Process()


def test_several_processes_are_read_from_the_environment() -> None:
    process = Process.of_environment(OF_TORCHRUN)
    assert process == Process(rank=1, local_rank=1, world_size=2, local_world_size=2)
    assert not process.is_main
    assert not process.is_alone
    without = {name: value for name, value in OF_TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert Process.of_environment(without).local_world_size == 2  # as accelerate may leave it out
    assert set_up(Options(model="m"), QWEN3_MOE.build().config, CPU, process).process is process


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**OF_TORCHRUN, "MASTER_ADDR": ""}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        (
            {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "RANK": "0"},
            "LOCAL_RANK is 0, but MASTER_ADDR, MASTER_PORT are not set",
        ),
        ({"RANK": "x"}, "RANK must be a whole number, as torchrun sets it, got 'x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, got 0"),
        ({"RANK": "1"}, "RANK is 1 and must be below WORLD_SIZE, which is not set"),
        ({**OF_TORCHRUN, "RANK": "2"}, "RANK is 2 and must be below WORLD_SIZE, which is 2"),
        ({**OF_TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2 and must be below LOCAL_WORLD_SIZE, which is 2"),
        ({**OF_TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT must be a whole number, as torchrun sets it, got 'http'"),
        ({**OF_TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT must be from 1 to 65535, got 70000"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but processes that an MPI started cannot"),
    ],
    ids=str,
)
def test_variables_of_no_launcher_are_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Process.of_environment(variables)


def test_a_step_is_shared() -> None:
    setup = set_up(Options(model="m"), QWEN3_MOE.build().config, CPU, Process(1, 1, 2, 2))
    run = next(candidates(setup, plain_text=False))
    alone = next(candidates(set_up(Options(model="m"), QWEN3_MOE.build().config, CPU), plain_text=False))
    assert run.batching.accumulation * 2 == alone.batching.accumulation == run.batching.step_batches
    assert run.batching.step_tokens == alone.batching.step_tokens
    parts = plan_run(setup, plain_text=False).prediction.parts
    assert 0 < parts["gradient buckets"] <= 32 << 20


def test_all_processes_plan_for_the_gpu_with_the_least_memory() -> None:
    options = Options(model="m", memory_limit=80)
    setup = set_up(options, QWEN3_MOE.build().config, CUDA, Process(1, 1, 2, 2))
    plan = plan_run(setup, plain_text=False, agreed=lambda limit: limit and limit // 4)
    assert plan.limit == 20 << 30
    assert plan.prediction.parts["NCCL"] == 512 << 20
    assert "NCCL" in plan.prediction.outside


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"streaming": True, "max_steps": 2}, "--streaming cannot be shared by several processes yet"),
        ({"method": "dpo"}, "--method dpo cannot be shared by several processes yet"),
        ({"trainer": {"train_sampling_strategy": "group_by_length"}}, "group_by_length cannot be shared"),
        ({"trainer": {"average_tokens_across_devices": False}}, "must be true with several processes"),
        ({"device": "cuda:1"}, "--device cuda:1 is one device, and there are several processes: give --device cuda"),
    ],
)
def test_what_several_processes_cannot_share(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_shared(Options(model="m", dataset="d", output="o", **options))


def test_gpus_are_counted_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(model="m")
    monkeypatch.setattr(launch, "count_gpus", lambda: 2)
    launch.check_gpus(2, options, Process())
    with pytest.raises(ValueError, match="--gpus 8: this machine has 2 GPUs"):
        launch.check_gpus(8, options, Process())
    with pytest.raises(ValueError, match="--gpus must be at least 1"):
        launch.check_gpus(0, options, Process())
    with pytest.raises(ValueError, match="--gpus 2: there are 3 processes already"):
        launch.check_gpus(2, options, Process(1, 1, 3, 3))
    with pytest.raises(ValueError, match="--device cpu has no GPUs"):
        launch.check_gpus(2, dataclasses.replace(options, device="cpu"), Process())
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(resolve, "choose_device", lambda _: torch.device("cuda"))
    assert training_device(options, Process(1, 1, 2, 2)) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="8 processes, but this machine has 2 GPUs"):
        training_device(options, Process(1, 1, 8, 8))


def test_gpus_become_processes_of_torchrun() -> None:
    command = launch.command(2, ["finetune", "--resume", "--output", "out"])
    assert command[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "moe_fused", "finetune", "--resume", "--output", "out",
    ]  # fmt: skip
    assert launch.environment(2, {"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"


# Options without effect.


def test_options_without_effect_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    given = {"model": str(tmp_path), "dataset": str(tmp_path / "rows.jsonl")}
    assert list(notes(Options(**given))) == []
    options = Options(**given, split="test", dataset_config="en", revision="v2", attention_rank=0, attention_alpha=4.0)
    named = [note.split()[0] for note in notes(options)]
    assert named == ["--split", "--dataset-config", "--revision", "--attention-alpha"]
    assert list(notes(Options(model="org/m", dataset="org/d", split="test", revision="v2"))) == []


# Questions that are asked once.


def _reads(path: Path) -> set[str]:
    """The answered options that a module reads from options."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ANSWERED
        and (
            (isinstance(node.value, ast.Name) and node.value.id in ("options", "said"))
            or (isinstance(node.value, ast.Attribute) and node.value.attr in ("options", "_options"))
        )
    }


def test_nobody_asks_again() -> None:
    modules = {path for path in Path(finetune.__file__).parent.glob("*.py") if path.name not in ANSWERING}
    assert len(modules) > 20
    assert {path.name: _reads(path) for path in modules if _reads(path)} == {}
    assert _reads(Path(finetune.__file__).parent / "resolve.py") >= ANSWERED - {"attention_alpha"}


@pytest.mark.parametrize("option", ["cuda_graphs", "liger"])
def test_what_needs_a_gpu_is_refused_early_where_there_is_none(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(model="m", **{option: True})
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')}: .* a GPU"):
        check_automatic_device(options)
    check_automatic_device(Options(model="m"))
    # Asking a GPU for more than its presence would initialize CUDA before the allocator's settings are made.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: pytest.fail("initializes CUDA"))
    check_automatic_device(options)


def test_the_questions_are_options() -> None:
    assert DEFAULTS.keys() >= ANSWERED
