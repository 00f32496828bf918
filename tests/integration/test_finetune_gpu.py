"""On a GPU: the default run in 4 bits, its memory against the prediction, and its CUDA graphs against eager layers."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_fused
from moe_fused.devices import use_expandable_segments
from moe_fused.finetune.options import KeepAttention, Options

from .finetuning import CHAT_TEMPLATE, write_jsonl

pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU"),
    pytest.mark.usefixtures("enabled"),
]


@pytest.fixture(autouse=True)
def stock_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger replaces layers for the whole process, which other tests build on a CPU."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    for name in ("apply_rotary_pos_emb", "Qwen3MoeRMSNorm"):
        monkeypatch.setattr(modeling_qwen3_moe, name, getattr(modeling_qwen3_moe, name))


def save_model(directory: Path, **sizes: int) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(num_experts_per_tok=8, max_position_embeddings=8192, head_dim=128, **sizes)
    torch.manual_seed(0)
    with torch.device("cuda"):
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    torch.cuda.empty_cache()
    return directory


TINY = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
}
# A model whose experts, activations and loss each take hundreds of MiB.
MEDIUM = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 64,
}
TEXT = "the quick brown fox jumps over the lazy dog, and the dog looks at it. " * 8


def texts(count: int) -> list[str]:
    """Rows of many lengths."""
    return [TEXT[i : i + 40 + 37 * i % 300] for i in range(count)]


def make(model: Path, output: Path, rows: list[str], **options: Any) -> tuple[Any, Any]:
    """A trainer over ``rows`` of plain text, and its plan."""
    from transformers import AutoConfig

    from moe_fused.demo.data import byte_tokenizer
    from moe_fused.finetune.adapters import adapt
    from moe_fused.finetune.data import find, prepare
    from moe_fused.finetune.model import load_model
    from moe_fused.finetune.plan import plan_run
    from moe_fused.finetune.resolve import set_up, training_device
    from moe_fused.finetune.trainer import make_trainer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|pad|>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    path = write_jsonl(output.with_suffix(".jsonl"), [{"text": row} for row in rows])
    chosen = Options(model=str(model), dataset=str(path), output=str(output), **options)
    setup = set_up(chosen, AutoConfig.from_pretrained(model), training_device(chosen))
    plan = plan_run(setup, plain_text=True)
    adapted = adapt(load_model(plan.run), plan.run)
    prepared = prepare(find(chosen, tokenizer), chosen, plan.run.batching, vocabulary=plan.run.vocabulary)
    held = None if prepared.evaluation is None else prepared.evaluation.dataset
    return make_trainer(adapted, tokenizer, prepared.dataset, plan.run, held), plan


def peak_of(
    directory: Path, length: int, packing: str, graphs: bool, evaluates: bool, keep_attention: KeepAttention
) -> tuple[int, int]:
    """The predicted and the measured peak of a run's memory, in bytes. It needs a process that has done nothing yet.

    What graphs keep is not allocated between their replays, so a run with graphs is measured by what is reserved.
    """
    use_expandable_segments()
    moe_fused.enable()
    model = save_model(directory / "model", **MEDIUM)
    gc.collect()  # models refer to themselves
    torch.cuda.empty_cache()
    trainer, plan = make(
        model,
        directory / "out",
        # Four with their ends fill a sequence, however they are packed. The evaluation is one sequence.
        ["x" * (length // 4 - 1)] * (28 if evaluates else 24),
        **({"eval_share": 1 / 7, "eval_steps": 1} if evaluates else {}),
        sequence_length=length,
        packing=packing,
        max_steps=2,
        gradient_accumulation=2,
        cuda_graphs=graphs,
        keep_attention=keep_attention,
    )
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {length}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # loading and quantizing may take more
    trainer.train_from(None)
    measured = torch.cuda.max_memory_reserved() if graphs else torch.cuda.max_memory_allocated()
    return plan.prediction.allocated, measured


@pytest.mark.parametrize("length, packing", [(2048, "wrapped"), (8192, "wrapped"), (4096, "bfd")])
@pytest.mark.parametrize(
    ("graphs", "evaluates"), [(False, False), (True, False), (True, True)], ids=["eager", "graphs", "evaluation"]
)
def test_peak_is_as_predicted(length: int, packing: str, graphs: bool, evaluates: bool, tmp_path: Path) -> None:
    """The peak of memory is within 10 % of the prediction, which is the same with an evaluation.

    It runs in a process of its own, because other tests leave memory in use.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        predicted, measured = executor.submit(peak_of, tmp_path, length, packing, graphs, evaluates, "none").result()
    assert measured == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("where", ["device", "host"])
def test_peak_of_kept_attention_is_as_predicted(where: KeepAttention, graphs: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        predicted, measured = executor.submit(peak_of, tmp_path, 8192, "wrapped", graphs, False, where).result()
    assert measured == pytest.approx(predicted, rel=0.1)


def count_replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each batch that runs as CUDA graphs."""
    from moe_fused.finetune import graphs

    replays: list[int] = []
    run: Callable[..., Any] = graphs._Recording.run
    monkeypatch.setattr(graphs._Recording, "run", lambda self, inputs: replays.append(1) or run(self, inputs))
    return replays


@pytest.mark.parametrize("packing", ["wrapped", "bfd", "bfd_split"])
def test_graphs_compute_what_layers_do(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs train as eager layers do.

    A step has several batches, documents have many lengths, and sequences are not full.
    """
    replays = count_replays(monkeypatch)
    model = save_model(tmp_path / "model", **TINY)
    rows = texts(60)
    losses, adapters = {}, {}
    for use_graphs in (False, True):
        trainer, plan = make(
            model,
            tmp_path / f"out{use_graphs}",
            rows,
            sequence_length=256,
            packing=packing,
            max_steps=6,
            gradient_accumulation=3,
            learning_rate=1e-3,
            cuda_graphs=use_graphs,
        )
        assert plan.run.graphs == use_graphs
        trainer.train_from(None)
        losses[use_graphs] = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        adapters[use_graphs] = {
            name: value.detach().float() for name, value in trainer.model.named_parameters() if value.requires_grad
        }
        assert len(replays) == 17 * use_graphs  # of 18 batches the first runs eagerly
        assert "forward" not in vars(trainer.model.get_base_model().model)
    assert losses[True] == pytest.approx(losses[False], rel=5e-3)
    assert losses[True][-1] < losses[True][0] - 0.05
    moved = {name: value for name, value in adapters[False].items() if "lora_B" in name}
    for name, value in moved.items():
        assert (adapters[True][name] - value).norm() < 0.1 * value.norm(), name


@pytest.mark.parametrize("packing", ["wrapped", "bfd"])
def test_kept_attention_trains_the_same(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without graphs, on the device and on the host, also after an evaluation and with several batches a step."""
    replays = count_replays(monkeypatch)
    model = save_model(tmp_path / "model", **TINY)
    rows = texts(60)
    found = {}
    for where in ("none", "device", "host"):
        for graphs in (False, True):
            trainer, _ = make(
                model,
                tmp_path / f"{where}-{graphs}",
                rows,
                sequence_length=256,
                packing=packing,
                max_steps=6,
                gradient_accumulation=2,
                learning_rate=1e-3,
                eval_share=0.2,
                eval_steps=2,
                cuda_graphs=graphs,
                keep_attention=where,
            )
            before = len(replays)
            trainer.train_from(None)
            assert len(replays) - before == 11 * graphs
            history = trainer.state.log_history
            found[where, graphs] = [
                record[name] for record in history for name in ("loss", "eval_loss") if name in record
            ]
    for values in found.values():
        assert values == pytest.approx(found["none", False], rel=5e-3)


@pytest.mark.parametrize(("packing", "batch_size"), [("bfd", 1), ("bfd", 2), ("none", 2)])
def test_an_evaluation_replays_the_forward(
    packing: str, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the loss of eager layers, over batches that are not full as well, and the training goes on as before."""
    from moe_fused.finetune import graphs

    evaluations: list[int] = []
    evaluate: Callable[..., Any] = graphs._Recording.evaluate
    monkeypatch.setattr(
        graphs._Recording, "evaluate", lambda self, inputs: evaluations.append(1) or evaluate(self, inputs)
    )
    model = save_model(tmp_path / "model", **TINY)
    rows = texts(75)
    found, trained = {}, {}
    for name, options in {
        "eager": {"cuda_graphs": False, "eval_share": 0.2, "eval_steps": 2},
        "graphs": {"cuda_graphs": True, "eval_share": 0.2, "eval_steps": 2},
        "not evaluated": {"cuda_graphs": True, "eval_share": 0.2, "eval_steps": 6},
    }.items():
        trainer, _ = make(
            model,
            tmp_path / name,
            rows,
            sequence_length=256,
            packing=packing,
            max_steps=6,
            batch_size=batch_size,
            gradient_accumulation=2,
            learning_rate=1e-3,
            **options,
        )
        before = len(evaluations)
        trainer.train_from(None)
        history = trainer.state.log_history
        found[name] = [record["eval_loss"] for record in history if "eval_loss" in record]
        trained[name] = [record["loss"] for record in history if "loss" in record]
        batches = len(trainer.get_eval_dataloader())
        assert batches > 1
        replayed = len(evaluations) - before
        assert replayed == {"eager": 0, "graphs": 3 * batches, "not evaluated": batches}[name]
    assert len(found["graphs"]) == 3
    assert found["graphs"] == pytest.approx(found["eager"], rel=5e-3)
    assert found["graphs"][-1] < found["graphs"][0]
    assert trained["graphs"] == pytest.approx(trained["not evaluated"], rel=2e-3)


def test_batches_with_more_documents_are_recorded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a stream, whose documents nobody has counted. The losses are those without graphs."""
    from moe_fused.finetune import graphs
    from moe_fused.finetune.batches import Documents

    recordings: list[int] = []
    record = graphs._Recording._record
    monkeypatch.setattr(
        graphs._Recording, "_record", lambda self, *arguments: recordings.append(1) or record(self, *arguments)
    )
    model = save_model(tmp_path / "model", **TINY)
    rows = ["x" * 255] * 6 + ["y" * 15] * 96  # sequences of one document, and of sixteen
    found = {}
    for is_graphed in (False, True):
        trainer, _ = make(
            model,
            tmp_path / f"out-{is_graphed}",
            rows,
            sequence_length=256,
            packing="bfd",
            max_steps=6,
            gradient_accumulation=2,
            learning_rate=1e-3,
            cuda_graphs=is_graphed,
        )
        collator = trainer.data_collator
        if not isinstance(collator, Documents):
            pytest.skip("this torch has no attention over documents")
        trainer.data_collator = dataclasses.replace(collator, most=None)
        trainer.train_from(None)
        found[is_graphed] = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert 1 <= len(recordings) <= 2
    assert found[True] == pytest.approx(found[False], rel=5e-3)


def test_records_while_an_earlier_pass_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs record while views of the parameters are alive.

    These keep autograd's nodes of the stream that earlier passes ran on.
    """
    replays = count_replays(monkeypatch)
    model = save_model(tmp_path / "model", **TINY)
    options = {"sequence_length": 256, "packing": "wrapped", "gradient_accumulation": 1, "max_steps": 3}
    trainer, _ = make(model, tmp_path / "out", [TEXT] * 8, **options, cuda_graphs=True)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    kept = [parameter.view_as(parameter) for parameter in trained]
    trainer.train_from(None)
    assert len(replays) == 2
    assert all(view.grad_fn is not None for view in kept)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2)])
def test_flash_attention_keeps_documents_apart(heads: int, groups: int) -> None:
    """Flash attention keeps documents apart as the mask does, with documents of no tokens at the end."""
    from moe_fused.finetune import attention

    module = torch.nn.Module()
    module.num_key_value_groups = heads // groups  # type: ignore[assignment]
    boundaries = torch.tensor([0, 3, 130, 131, 300, 300, 300], dtype=torch.int32, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, heads, 300, 64), (1, groups, 300, 64), (1, groups, 300, 64)]
    inputs = [torch.randn(shape, device="cuda", generator=generator).requires_grad_() for shape in shapes]
    grad = torch.randn(1, 300, heads, 64, device="cuda", generator=generator)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):  # in fp32 there is only the mask
        out, _ = attention.attention(
            module,
            *(tensor.to(dtype) for tensor in inputs),
            None,
            0.0,
            0.125,
            cu_seq_lens_q=boundaries,
            max_length_q=169,
        )
        results[dtype] = (out, *torch.autograd.grad(out, inputs, grad.to(dtype)))
    for got, want in zip(results[torch.bfloat16], results[torch.float32], strict=True):
        assert (got.float() - want).abs().max() < 0.03 * want.abs().max()
