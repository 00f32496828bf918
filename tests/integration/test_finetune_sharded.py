"""``moe-fused finetune --shard`` in several processes, which divide the experts of a model among them."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe_fused.checkpoints.share import local

from .finetuning import (
    build,
    chats,
    checkpoints,
    evaluations,
    finetune,
    leftovers,
    save_tokenizer,
    write_jsonl,
)
from .together import Case, assert_alike, assert_ended, assert_refused, signal_after, together

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on a CPU; GPUs have tests of their own")

EXPERTS, LAYERS = 6, 2
# A rank with which a half of each factor of the experts still has whole blocks of an optimizer in 8 bits.
TRAINED = (
    "--epochs", "2", "--packing", "none", "--eval-share", "0.2", "--eval-steps", "2", "--save-steps", "2",
    "--expert-rank", "32",
)  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("sharded")
    build(
        vocab_size=272,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    ).save_pretrained(directory / "model")
    save_tokenizer(directory / "model")
    write_jsonl(directory / "chat.jsonl", chats(23))
    return Case(directory)


@pytest.fixture(scope="module", params=["adamw_torch", pytest.param("adamw_8bit", marks=pytest.mark.slow)])
def alone(case: Case, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A run of one process, and its optimizer."""
    output = f"alone-{request.param}"
    options = (*TRAINED, "--optimizer", request.param, "--output", output)
    ended = finetune(*case.arguments, "6", *options, cwd=case.directory)
    assert ended.status == 0, ended
    return case.directory / output, request.param


def _tolerance(optimizer: str) -> float:
    """Gradients that differ by rounding may give another value of an optimizer's state in 8 bits."""
    return 2e-3 if "8bit" in optimizer else 2e-4


def _in_two_processes(case: Case, one: Path, optimizer: str, name: str, before: Callable[[], object]) -> Path:
    """Trains in two processes that divide the model, as one process did, and returns the output."""
    output = case.directory / f"{name}-{optimizer}"
    options = (*TRAINED, "--optimizer", optimizer, "--shard", "--output", output.name)
    ended = together(2, *case.arguments, "3", *options, cwd=case.directory, before=dict.fromkeys(range(2), before))
    assert_ended(ended)
    assert_alike(one, output, _tolerance(optimizer))
    assert evaluations(output) == pytest.approx(evaluations(one), rel=1e-4)
    return output


def test_shards_train_as_one_process_does(case: Case, alone: tuple[Path, str]) -> None:
    one, optimizer = alone
    output = _in_two_processes(case, one, optimizer, "two", _note_what_is_held)
    assert checkpoints(output) == checkpoints(one)
    assert not leftovers(output)
    for held in map(json.loads, (case.directory / "held.jsonl").read_text().splitlines()):
        divided = [name for name, share in held.items() if share == 0.5]
        assert len([name for name in divided if ".experts." in name and "lora_" not in name]) == 8 * LAYERS
        # A factor of 4096 elements would have halves that an optimizer in 8 bits takes for small ones.
        assert len([name for name in divided if "lora_" in name]) == (11 if "8bit" in optimizer else 12) * LAYERS
        assert [name for name in divided if "embed_tokens" in name]
        assert set(held.values()) == {0.5, 1.0}
    (case.directory / "held.jsonl").unlink()


def _note_what_is_held() -> None:
    """Writes, in the last step, which part of each parameter this process holds. This runs in the process of a command."""
    from moe_fused.finetune.trainer import Finetuning

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 5 and self.accelerator.sync_gradients:
            held = {name: local(value).numel() / value.numel() for name, value in self.model.named_parameters()}
            with Path("held.jsonl").open("a") as file:
                file.write(json.dumps(held) + "\n")
        return loss

    original = Finetuning.training_step
    Finetuning.training_step = training_step  # type: ignore[method-assign]


def test_graphs_of_a_divided_decoder(case: Case, alone: tuple[Path, str]) -> None:
    _in_two_processes(case, *alone, "graphs", _run_graphs_again)
    replays = (case.directory / "replays.txt").read_text().split()
    assert {"forward", "backward", "evaluation"} == set(replays)
    assert replays.count("forward") == replays.count("backward") > 20
    (case.directory / "replays.txt").unlink()


def _run_graphs_again() -> None:
    """Lets a recording run its passes again where CUDA graphs would be replayed. This runs in the process of a command."""
    from moe_fused.finetune import graphs, resolve

    torch.cuda.CUDAGraph = lambda: None  # type: ignore[assignment,misc]
    resolve._graphs = lambda *_: True

    class Again(graphs._Recording):
        def _record(self, decoder: Any, forward: Any) -> None:
            self._pass: Any = lambda: forward(**self._inputs)
            self._decoder, self._open = decoder, contextlib.ExitStack()
            self._forward_graph = self._backward_graph = self  # type: ignore[assignment]
            with graphs._own_leaves(decoder) as leaves:
                with graphs.gathering(decoder):
                    output = self._pass()
                with graphs.gathering(decoder):
                    self._grad = torch.zeros_like(output.last_hidden_state)
                    grads = graphs._gradients(output.last_hidden_state, self._grad, list(leaves.values()))
            self._keep(output, dict(zip(leaves, grads, strict=True)))

        def replay_forward(self) -> torch.Tensor:
            if not self.is_waiting:
                _note("evaluation")
                with graphs.gathering(self._decoder):
                    return self._hidden.copy_(self._pass().last_hidden_state)
            _note("forward")
            self._leaves = self._open.enter_context(graphs._own_leaves(self._decoder))
            with torch.enable_grad(), graphs.gathering(self._decoder):
                self._output = self._pass().last_hidden_state
            return self._hidden.copy_(self._output.detach())

        def replay(self) -> None:
            _note("backward")
            with torch.enable_grad(), graphs.gathering(self._decoder):
                grads = graphs._gradients(self._output, self._grad, list(self._leaves.values()))
            for held, grad in zip(self._grads, grads, strict=True):
                assert held is not None
                assert grad is not None
                local(held).copy_(local(grad))
            self._open.close()

    graphs._Recording = Again  # type: ignore[misc]


def _note(word: str) -> None:
    with Path("replays.txt").open("a") as file:
        file.write(f"{word} ")


def test_three_processes_and_bytes_as_another_dtype(case: Case, alone: tuple[Path, str]) -> None:
    one, optimizer = alone
    if optimizer != "adamw_torch":
        pytest.skip("one optimizer is enough")
    options = (*TRAINED, "--shard", "--output", "three")
    ended = together(
        3, *case.arguments, "2", *options, cwd=case.directory, before=dict.fromkeys(range(3), _store_as_floats)
    )
    assert_ended(ended)
    assert_alike(one, case.directory / "three")


def _store_as_floats() -> None:
    """Holds the bytes of experts as torch before 2.13 needs them. This runs in the process of a command."""
    from moe_fused.finetune import sharding

    sharding.storage_dtype = lambda _: torch.bfloat16


def test_published_formats_are_divided(case: Case) -> None:
    """Experts in nvfp4, whose scales are other tensors than those of bitsandbytes."""
    options = ("--quantization", "nvfp4", "--max-steps", "2", "--packing", "none", "--expert-rank", "32")
    ended = finetune(*case.arguments, "6", *options, "--output", "nvfp4-alone", cwd=case.directory)
    assert ended.status == 0, ended
    ended = together(2, *case.arguments, "3", *options, "--shard", "--output", "nvfp4-shared", cwd=case.directory)
    assert_ended(ended)
    assert_alike(case.directory / "nvfp4-alone", case.directory / "nvfp4-shared", 2e-4)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "--shard"), (1, "--no-shard")), ((1, "--no-shard"), (2, "--shard")), ((2, "--shard"), (3, "--shard"))],
    ids=str,
)
def test_checkpoints_are_those_of_one_process(
    case: Case, alone: tuple[Path, str], before: tuple[int, str], after: tuple[int, str]
) -> None:
    one, optimizer = alone
    if optimizer == "adamw_8bit" and after[0] == 3:
        pytest.skip("a third of a factor has no whole blocks")
    (first, shard), (second, shard_again) = before, after
    output = case.directory / f"{optimizer}-{first}-{second}"
    options = (*TRAINED, "--optimizer", optimizer, shard, "--output", output.name)
    ended = together(
        first, *case.arguments, str(6 // first), *options, cwd=case.directory, before={0: partial(signal_after, 3)}
    )
    assert all(each.status == 128 + signal.SIGTERM for each in ended), ended
    assert checkpoints(output) == [2, 3]
    ended = together(second, "--resume", shard_again, "--output", output.name, cwd=case.directory)
    assert_ended(ended)
    settled = yaml.safe_load((output / "finetune.yaml").read_text())
    assert settled.get("shard", False) == (shard_again == "--shard")
    assert_alike(one, output, _tolerance(optimizer))
    assert evaluations(output) == pytest.approx(evaluations(one), rel=1e-4)
    shutil.rmtree(output)


def _rise() -> None:
    """Makes evaluations worse the later they are. This runs in the process of a command."""
    from moe_fused.finetune.evaluation import TokenMean

    value = TokenMean.value
    seen: list[TokenMean] = []

    def later(self: TokenMean) -> float | None:
        seen.append(self)
        mean = value(self)
        return None if mean is None else mean + 10 * len(seen)

    TokenMean.value = later  # type: ignore[method-assign]


def test_the_best_adapter_is_written(case: Case) -> None:
    """If the loss rises again, the adapter that is written is not the last one."""
    options = (*TRAINED, "--keep-best", "--shard", "--output", "best")
    ended = together(2, *case.arguments, "1", *options, cwd=case.directory, before=dict.fromkeys(range(2), _rise))
    assert_ended(ended)
    found = evaluations(case.directory / "best")
    best = min(found, key=lambda step: found[step])
    assert best != max(found)
    assert f"the adapter is that of step {best}, whose evaluation had the lowest loss" in ended[0].stderr
    written = load_file(case.directory / "best" / "adapter_model.safetensors")
    saved = load_file(case.directory / "best" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert written.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in written.items())


def test_what_cannot_be_divided_is_refused(case: Case) -> None:
    arguments = (*case.arguments, "1", "--max-steps", "2", "--output", "refused", "--shard")
    ended = finetune(*arguments, cwd=case.directory)
    assert ended.status, ended
    assert ended.stderr.endswith("add --gpus with their number, or --no-shard to train on one\n"), ended
    for options, words in (
        (("--quantization", "none"), "--shard: experts must be in 4 bits, use --quantization nf4"),
        (("--router-aux-loss", "0.01"), "--shard: FSDP2 hides from --router-aux-loss what the routers give"),
        (("--dtype", "float16"), "--shard: the gradients of --dtype float16 need scaling, use bfloat16"),
    ):
        assert_refused(together(2, *arguments, *options, cwd=case.directory), words)
    ended = together(4, *arguments, cwd=case.directory)
    assert_refused(ended, "6 experts to a layer cannot be divided among 4 GPUs")
    assert not (case.directory / "refused").exists()


def test_a_divided_run_is_planned_without_gpus(case: Case) -> None:
    arguments = [each for each in case.arguments if each not in ("--device", "cpu")]
    options = ("--output", "planned", "--dry-run", "--device", "cuda", "--gpus", "2")
    ended = finetune(*arguments, "1", *options, "--shard", "--memory-limit", "24", cwd=case.directory)
    assert ended.status == 0, ended
    assert "NCCL" in ended.stderr
    assert "1 x 64 x 1 x 2 (batch x length x accumulation x processes)" in ended.stderr
    assert "note: without --shard the run needs" in ended.stderr
    ended = finetune(*arguments, "1", *options, cwd=case.directory)
    assert (ended.status, ended.stderr) == (1, "error: --gpus 2: this machine has 0 GPUs\n")
    assert not (case.directory / "planned").exists()


def test_experts_that_stay_dense_are_not_divided(tmp_path: Path) -> None:
    build(vocab_size=272, hidden_size=40, moe_intermediate_size=12, max_position_embeddings=128).save_pretrained(
        tmp_path / "model"
    )
    save_tokenizer(tmp_path / "model")
    write_jsonl(tmp_path / "chat.jsonl", chats(4))
    arguments = (*Case(tmp_path).arguments, "1", "--max-steps", "2", "--output", "out", "--shard")
    assert_refused(
        together(2, *arguments, cwd=tmp_path),
        "--shard: experts must be in 4 bits, and those of Qwen3MoeExperts stay dense: an expert's 12 x 40 weights",
    )
