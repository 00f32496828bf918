"""What ``finetune`` puts in the place of Transformers', TRL's and bitsandbytes' own in a step, each against the original.

CUDA graphs themselves need a GPU (``test_finetune_gpu.py``); here is when they are used, and what becomes of gradients.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moe_fused.finetune import attention, graphs
from moe_fused.finetune.batches import Answers, Documents, Sequences, is_full, lengths_of
from moe_fused.finetune.graphs import GraphedDecoder
from moe_fused.finetune.host import queued, without_walks
from moe_fused.finetune.options import Options
from moe_fused.finetune.resolve import Batching, ResolvedRun, candidates, set_up
from moe_fused.finetune.trainer import _set_collators, _shape, narrow_tiles
from moe_fused.memory import LOSS_TILE, LOSS_TILE_BESIDE_GRAPHS

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture
def model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, attn_implementation="sdpa", use_cache=False)).train()


def packed(*lengths: list[int]) -> list[dict[str, Any]]:
    """Sequences of documents of these lengths, as TRL packs them."""
    rows = []
    for i, row_lengths in enumerate(lengths):
        tokens = [(7 * k + i) % 60 + 1 for k in range(sum(row_lengths))]
        rows.append({"input_ids": tokens, "seq_lengths": row_lengths})
    return rows


def collator(rows: list[dict[str, Any]], batch_size: int, tokens: int | None) -> Documents:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return Documents.of(collate, [row["seq_lengths"] for row in rows], batch_size, tokens, 0)


def trl_batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(copy.deepcopy(rows)))


# Batches and attention.


@pytest.mark.parametrize("tokens", [None, 24], ids=["as they are", "filled up"])
@pytest.mark.parametrize(
    "rows",
    [packed([5, 3, 9]), packed([5, 3, 9], [4]), packed([1, 1, 1]), packed([17]), packed([12], [12])],
    ids=["one row", "two rows", "of one token", "one document", "two of one document"],
)
def test_same_hidden_states_as_with_a_mask(model: Any, rows: list[dict[str, Any]], tokens: int | None) -> None:
    """Hidden states equal those of the model's own sdpa, which makes a mask of the positions."""
    theirs = trl_batch(rows)
    want = model.model(input_ids=theirs["input_ids"], position_ids=theirs["position_ids"]).last_hidden_state
    batch = collator(rows, len(rows), tokens)(copy.deepcopy(rows))
    real = theirs["input_ids"].shape[1]
    assert batch["input_ids"].shape[1] == (tokens or real)
    if tokens is not None:
        assert batch["attention_mask"].sum() == real  # by which TRL counts
    assert torch.equal(batch["labels"][:, :real], theirs["labels"])
    assert (batch["labels"][:, real:] == -100).all()
    attention.use(model)
    labels = batch.pop("labels")
    got = model.model(**batch).last_hidden_state
    assert torch.isfinite(got).all()
    assert labels.shape == got.shape[:2]
    torch.testing.assert_close(got[:, :real], want, rtol=1e-4, atol=1e-5)


def test_documents_do_not_see_each_other(model: Any) -> None:
    attention.use(model)
    rows = packed([6, 6])
    batch = collator(rows, 1, 16)(rows)
    del batch["labels"]
    before = model.model(**batch).last_hidden_state
    batch["input_ids"][0, 0] += 1
    after = model.model(**batch).last_hidden_state
    assert not torch.equal(before[0, 5], after[0, 5])
    # With other tokens, an expert multiplies another shape, and the last bits may differ.
    torch.testing.assert_close(before[0, 6:], after[0, 6:], rtol=1e-5, atol=1e-6)


def test_batches_are_of_one_shape() -> None:
    """All batches have the same shapes, whatever their documents, because a CUDA graph must fit all of them."""
    rows = packed([9, 9], [1, 2, 3, 4], [18], [5, 1])
    collate = collator(rows, 2, 48)
    batches = [collate(copy.deepcopy(subset)) for subset in (rows[:2], rows[2:], rows[1:3], rows[3:])]
    for batch in batches:
        assert batch.keys() == batches[0].keys()
        boundaries = batch["cu_seq_lens_q"]
        assert (boundaries[0], boundaries[-1]) == (0, 48)
        assert (boundaries.diff() >= 0).all()
        # The shortest sequence has 6 tokens and is filled up with 42.
        assert boundaries.diff().max() <= batch["max_length_q"] == 42
        for name, value in batch.items():
            if isinstance(value, Tensor):
                assert (value.shape, value.dtype) == (batches[0][name].shape, batches[0][name].dtype)


def test_documents_without_tokens_change_nothing(model: Any) -> None:
    """However many there are, hidden states are the same bit for bit."""
    rows = packed([5, 3, 9])
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    attention.use(model)
    hidden = []
    for most in (None, 3, 50):
        batch = Documents(collate, most, 9, None, 0)(copy.deepcopy(rows))
        del batch["labels"]
        assert len(batch["cu_seq_lens_q"]) == {None: 5, 3: 5, 50: 52}[most]
        hidden.append(model.model(**batch).last_hidden_state)
    assert torch.equal(hidden[0], hidden[1])
    assert torch.equal(hidden[0], hidden[2])


def test_answers_are_filled_up() -> None:
    """Pairs, and rated answers with those to other prompts, are filled up with padding that nothing is learned from."""
    pairs = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}]
    rated = [{"prompt_ids": [1, 2], "completion_ids": [3], "KL_completion_ids": [4, 5], "label": True}]
    for collate, rows, prefixes in (
        (DataCollatorForPreference(pad_token_id=9), pairs, ("",)),
        (DataCollatorForUnpairedPreference(pad_token_id=9), rated, ("", "KL_")),
    ):
        theirs, batch = collate(copy.deepcopy(rows)), Answers(collate, 6, 9)(copy.deepcopy(rows))
        assert batch.keys() == theirs.keys()
        for prefix in prefixes:
            for name, padding in (("input_ids", 9), ("attention_mask", 0), ("completion_mask", 0)):
                filled, before = batch[prefix + name], theirs[prefix + name]
                assert filled.shape == (len(before), 6)
                assert torch.equal(filled[:, : before.shape[1]], before)
                assert (filled[:, before.shape[1] :] == padding).all()


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_batches_of_an_evaluation_have_the_shape_of_the_training(packing: str) -> None:
    """With CUDA graphs one recording must fit both, whichever has more documents, longer ones or longer sequences."""
    lengths = ([[9, 9], [1, 2, 3, 4], [18]], [[20], [1] * 7, [5, 1]])
    for first, second in (lengths, lengths[::-1]):
        sets = [datasets.Dataset.from_list(packed(*rows)) for rows in (first, second)]
        run = SimpleNamespace(
            batching=Batching(packing, 20, batch_size=2), maskless=True, graphs_asked_for=True, options=Options()
        )
        shape = _shape(run, [length for dataset in sets for length in lengths_of(dataset)])  # type: ignore[arg-type]
        assert shape == ((1, 40) if packing == "bfd" else (2, 20))
        stock = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packing == "bfd")
        trainer: Any = SimpleNamespace(data_collator=stock, eval_collator=None, shape=shape)
        _set_collators(trainer, run, *sets)  # type: ignore[arg-type]
        assert trainer.eval_collator is None  # the training's collator makes them
        made = []
        for dataset in sets:
            rows = [{name: row[name] for name in trainer_columns(packing)} for row in dataset]
            made += [trainer.data_collator(copy.deepcopy(rows[:2])), trainer.data_collator(copy.deepcopy(rows[2:]))]
        shapes = [{name: getattr(value, "shape", value) for name, value in batch.items()} for batch in made]
        assert shapes == [shapes[0]] * 4


def trainer_columns(packing: str) -> tuple[str, ...]:
    return ("input_ids", "seq_lengths") if packing == "bfd" else ("input_ids",)


@pytest.mark.parametrize("shape", [(2, 5), (3, 8)])
def test_sequences_are_filled_up(model: Any, shape: tuple[int, int]) -> None:
    """Padding tokens and padding rows fill the shape up.

    They are not learned from, and the other tokens' results stay the same.
    """
    rows = [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6, 7, 8]}]
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    theirs, batch = collate(copy.deepcopy(rows)), Sequences(collate, shape, 0)(copy.deepcopy(rows))
    assert {value.shape for value in batch.values()} == {shape}
    assert batch["attention_mask"].sum() == 8
    assert (batch["labels"] != -100).sum() == 8
    want = model.model(input_ids=theirs["input_ids"], attention_mask=theirs["attention_mask"]).last_hidden_state
    attention.use(model)
    got = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    counts = theirs["attention_mask"].bool()
    torch.testing.assert_close(got[:2, :5][counts], want[counts], rtol=1e-4, atol=1e-5)


def test_lengths_tell_whether_filling_up_pays() -> None:
    rows = [[1] * 10, [2] * 9, [3] * 8]
    lengths = lengths_of(datasets.Dataset.from_dict({"input_ids": rows}))
    assert lengths == [10, 9, 8]
    assert is_full(lengths)
    assert not is_full([10, 5, 8])


def test_padding_behind_the_tokens_changes_nothing(model: Any) -> None:
    """Without packing, padding behind shorter sequences does not change the results."""
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    want = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    attention.use(model)
    got = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-5)


def test_flash_attention_of_torch_without_a_scale_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10's ``varlen_attn``, which takes no scale, is not used."""
    from torch.nn.attention import varlen

    from moe_fused.finetune import varlen as ours

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError

    ours.torch_kernel.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(varlen, "varlen_attn", varlen_attn)
            assert ours.torch_kernel() is None
    finally:
        ours.torch_kernel.cache_clear()


# Which runs have graphs.


def resolved(config: Qwen3MoeConfig, device: torch.device = CUDA, **options: Any) -> ResolvedRun:
    """The run that these options prefer, whether it fits or not."""
    return next(candidates(set_up(Options(**options), config, device), plain_text=True))


@pytest.mark.parametrize(
    ("options", "packing", "serve"),
    [
        ({}, "wrapped", True),
        ({}, "bfd", True),
        ({}, "none", False),  # batches of many shapes
        ({"cuda_graphs": True}, "none", True),
        ({"cuda_graphs": False}, "wrapped", False),
        ({"lora_dropout": 0.1}, "wrapped", False),
        ({"router_aux_loss": 0.1}, "wrapped", False),
        ({"adapter_dtype": "float32"}, "wrapped", False),
        ({"attn": "eager"}, "wrapped", False),
    ],
)
def test_graphs_where_they_are_safe(options: dict[str, Any], packing: str, serve: bool) -> None:
    assert resolved(Qwen3MoeConfig(**SIZES), packing=packing, **options).graphs == serve


def test_graphs_need_a_rotary_embedding_that_does_not_look_at_positions() -> None:
    config = Qwen3MoeConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert not resolved(config, packing="wrapped").graphs


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        ({}, CPU, "--cuda-graphs: it needs a GPU"),
        ({"lora_dropout": 0.1}, CUDA, "--cuda-graphs: what dropout drops"),
        ({"router_aux_loss": 0.1}, CUDA, "--cuda-graphs: --router-aux-loss"),
        ({"adapter_dtype": "float32"}, CUDA, "--cuda-graphs: adapters of another dtype"),
        ({"attn": "eager"}, CUDA, "--cuda-graphs: --attn eager"),
    ],
)
def test_graphs_that_cannot_be(options: dict[str, Any], device: torch.device, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(Qwen3MoeConfig(**SIZES), device, cuda_graphs=True, packing="wrapped", **options)


def test_random_models_are_known() -> None:
    assert not resolved(Qwen3MoeConfig(**SIZES)).is_random
    assert resolved(Qwen3MoeConfig(**SIZES, attention_dropout=0.1)).is_random
    assert resolved(Qwen3MoeConfig(**SIZES, hidden_dropout_prob=0.1)).is_random


# Graphs: when, and where gradients are.


class _Recorded:
    """Stands for a recording: counts what it is asked for and runs the decoder."""

    made: list[_Recorded]
    is_stale = is_waiting = False

    def __init__(self, decoder: nn.Module, forward: Any, inputs: Any, kept: Any) -> None:
        self.forward, self.shapes, self.runs, self.evaluations = forward, _shapes(inputs), 0, 0
        self.made.append(self)

    def takes(self, inputs: Any) -> bool:
        return _shapes(inputs) == self.shapes

    def run(self, inputs: Any) -> Any:
        self.runs += 1
        return self.forward(**inputs)

    def evaluate(self, inputs: Any) -> Any:
        self.evaluations += 1
        return self.forward(**inputs)

    def move_gradients(self) -> None:
        pass

    drop_gradients = move_gradients


def _shapes(inputs: Any) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in inputs.items()}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[_Recorded]:
    _Recorded.made = []
    for name in ("_Recording", "_Forward"):
        monkeypatch.setattr(graphs, name, _Recorded)
    return _Recorded.made


def test_which_passes_are_replayed(model: Any, recorded: list[_Recorded]) -> None:
    decoder = model.model
    graphed = GraphedDecoder(decoder, (1, 4))
    full, short = torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)
    decoder(input_ids=short)
    decoder(input_ids=full)
    assert not recorded  # the first one of the shape is to compile what must be compiled
    decoder(input_ids=full)
    decoder(input_ids=short)
    decoder(input_ids=full, position_ids=full)  # other inputs than were recorded
    decoder(full)
    with torch.no_grad():
        decoder(input_ids=full)
    with torch.autocast("cpu", torch.bfloat16):
        decoder(input_ids=full)
    decoder.eval()
    decoder(input_ids=full)  # with gradients
    decoder.train()
    assert [(recording.runs, recording.evaluations) for recording in recorded] == [(1, 1)]
    recorded[0].is_stale = True  # a parameter moved: from the beginning
    evaluate(decoder, full)
    assert [recording.evaluations for recording in recorded] == [1]
    decoder(input_ids=full)
    decoder(input_ids=full)
    assert [recording.runs for recording in recorded] == [1, 1]
    graphed.enabled = False
    decoder(input_ids=full)
    assert [recording.runs for recording in recorded] == [1, 1]
    graphed.close()
    assert "forward" not in vars(decoder)
    decoder.forward = forward = decoder.forward
    GraphedDecoder(decoder, (1, 4)).close()
    assert vars(decoder)["forward"] == forward
    del decoder.forward
    assert decoder(input_ids=full).last_hidden_state.shape == (1, 4, 64)


def evaluate(decoder: Any, tokens: Tensor, **inputs: Any) -> None:
    decoder.eval()
    with torch.no_grad():
        decoder(input_ids=tokens, **inputs)
    decoder.train()


def test_which_evaluations_are_replayed(model: Any, recorded: list[_Recorded]) -> None:
    """Those of the recorded shape, once there is a recording; an evaluation itself records nothing."""
    decoder = model.model
    graphed = GraphedDecoder(decoder, (1, 4))
    full, short = torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)
    evaluate(decoder, full)
    evaluate(decoder, full)
    decoder(input_ids=full)
    assert not recorded
    decoder(input_ids=full)
    evaluate(decoder, full)
    evaluate(decoder, short)
    evaluate(decoder, full, position_ids=full)  # other inputs than were recorded
    evaluate(decoder, full)
    assert [(recording.runs, recording.evaluations) for recording in recorded] == [(1, 2)]
    graphed.enabled = False
    evaluate(decoder, full)
    assert recorded[0].evaluations == 2


def test_batches_with_more_documents_are_recorded_anew(model: Any, recorded: list[_Recorded]) -> None:
    """Each recording has room for more documents than the one before; batches with fewer are filled up."""
    decoder = model.model
    attention.use(model)
    graphed = GraphedDecoder(decoder, (1, 12))
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    collator = Documents(collate, most=None, longest=12, tokens=12, padding=0)

    def batch(*lengths: int) -> dict[str, Any]:
        made = collator(packed(list(lengths)))
        del made["labels"]
        return made

    few, some, many = batch(12), batch(6, 6), batch(*[1] * 12)
    assert [len(made["cu_seq_lens_q"]) - 1 for made in (few, some, many)] == [2, 4, 16]
    want = {}
    for name, inputs in (("few", few), ("some", some), ("many", many)):
        graphed.enabled = False
        want[name] = decoder(**inputs).last_hidden_state
        graphed.enabled = True
    for inputs in (few, few, few):
        decoder(**inputs)
    assert [made.runs for made in recorded] == [2]
    evaluate(decoder, many["input_ids"], **{name: many[name] for name in many if name != "input_ids"})
    assert [(made.runs, made.evaluations) for made in recorded] == [(2, 0)]  # an evaluation records nothing
    for name, inputs in (("some", some), ("few", few), ("many", many), ("some", some), ("many", many), ("few", few)):
        assert torch.equal(decoder(**inputs).last_hidden_state, want[name]), name
    # The first batch with more documents runs eagerly.
    assert [made.runs for made in recorded] == [2, 1, 3]
    evaluate(decoder, few["input_ids"], **{name: few[name] for name in few if name != "input_ids"})
    assert recorded[-1].evaluations == 1


def test_a_reference_has_a_graph_of_its_own(model: Any, recorded: list[_Recorded]) -> None:
    """Preferences compute each batch without its adapters as well, between the forward and the backward pass."""
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    decoder = model.model
    GraphedDecoder(decoder, (1, 4))
    full = torch.ones(1, 4, dtype=torch.int64)

    def step() -> None:
        decoder(input_ids=full)
        with torch.no_grad(), adapted.disable_adapter():
            decoder(input_ids=full)

    step()
    assert not recorded
    step()
    training, _ = recorded
    assert [(made.runs, made.evaluations) for made in recorded] == [(1, 0), (0, 1)]
    step()
    evaluate(decoder, full)
    with adapted.disable_adapter():
        evaluate(decoder, full)
    assert [(made.runs, made.evaluations) for made in recorded] == [(2, 1), (0, 3)]
    training.is_waiting = True  # the backward pass is still to come
    evaluate(decoder, full)
    assert [(made.runs, made.evaluations) for made in recorded] == [(2, 1), (0, 3)]
    training.is_stale = True
    step()
    assert len(recorded) == 2
    step()
    assert len(recorded) == 4


def test_batches_of_fewer_rows_are_filled_up(model: Any, recorded: list[_Recorded]) -> None:
    """The last batch of the data may have fewer rows than the recorded one. Its results are those of its rows alone."""
    decoder = model.model
    attention.use(model)
    graphed = GraphedDecoder(decoder, (3, 4))
    ids = torch.arange(1, 13).view(3, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for _ in range(2):
        decoder(**inputs)
    fewer = {name: value[:2] for name, value in inputs.items()}
    hidden = decoder(**fewer).last_hidden_state
    assert recorded[0].runs == 2
    decoder.eval()
    with torch.no_grad():
        evaluated = decoder(**fewer).last_hidden_state
    assert recorded[0].evaluations == 1
    graphed.close()
    want = decoder(**fewer).last_hidden_state
    torch.testing.assert_close(hidden, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(evaluated, want, rtol=1e-5, atol=1e-6)


def test_more_than_hidden_states_is_left_alone(model: Any, recorded: list[_Recorded]) -> None:
    graphed = GraphedDecoder(model.model, (1, 4))
    for _ in range(3):
        model.model(input_ids=torch.ones(1, 4, dtype=torch.int64), output_hidden_states=True)
    assert not recorded
    assert not graphed.enabled


def test_what_went_wrong_first_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is reported, although ending the recording fails as well and hides it."""
    reasons: list[Exception] = [RuntimeError("operation not permitted"), torch.OutOfMemoryError("CUDA out of memory")]

    def fail(*_: Any) -> None:
        try:
            raise reasons[0]
        finally:
            raise RuntimeError("failed due to a previous error")

    monkeypatch.setattr(graphs, "_Recording", fail)
    GraphedDecoder(model.model, (1, 4))
    tokens = torch.ones(1, 4, dtype=torch.int64)
    model.model(input_ids=tokens)
    with pytest.raises(RuntimeError, match="--no-cuda-graphs runs it without them: operation not permitted"):
        model.model(input_ids=tokens)
    del reasons[0]
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        model.model(input_ids=tokens)


class _Replays(graphs._Recording):
    """A recording whose graphs write, in turn, these gradients into the same memory."""

    def __init__(self, parameters: list[nn.Parameter], passes: list[float]) -> None:
        self._parameters, self._passes = parameters, iter(passes)
        self._inputs = {"input_ids": torch.zeros(1, 2)}
        self._hidden, self._grad = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
        self._grads = [torch.zeros_like(parameter) for parameter in parameters]
        self._places = [parameter.data_ptr() for parameter in parameters]
        self._buffers = None
        self._cause = torch.zeros((), requires_grad=True)
        self._output_type = SimpleNamespace
        self._forward_graph = SimpleNamespace(replay=self._overwrite)  # type: ignore[assignment]
        self._backward_graph = SimpleNamespace(replay=self._differentiate)  # type: ignore[assignment]

    def _overwrite(self) -> None:
        for grad in self._grads:
            grad.fill_(float("nan"))

    def _differentiate(self) -> None:
        value = next(self._passes)
        for grad in self._grads:
            grad.fill_(value)


def test_gradients_add_up_until_they_are_taken() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    recording = _Replays(parameters, [1.0, 2.0, 4.0, 8.0, 16.0])

    def step(batches: int) -> list[float]:
        for _ in range(batches):
            recording.run({"input_ids": torch.ones(1, 2)}).last_hidden_state.sum().backward()
        sums = []
        for parameter in parameters:
            assert parameter.grad is not None
            assert (parameter.grad == parameter.grad[0]).all()
            sums.append(float(parameter.grad[0]))
            parameter.grad = None
        return sums

    assert step(3) == [7.0, 7.0]
    assert step(1) == [8.0, 8.0]
    recording.run({"input_ids": torch.ones(1, 2)}).last_hidden_state.sum().backward()
    recording.drop_gradients()
    assert [parameter.grad for parameter in parameters] == [None, None]
    assert not recording.is_stale
    parameters[0].data = parameters[0].data.clone()
    assert recording.is_stale


def test_gradients_from_elsewhere_are_kept() -> None:
    """Replays add to gradients of a batch that ran eagerly, as the first one does, for some parameters or for all."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    recording = _Replays(parameters, [1.0, 2.0])
    parameters[0].grad = torch.full((2,), 0.5)
    for want in ([1.5, 1.0], [3.5, 3.0]):
        recording.run({"input_ids": torch.ones(1, 2)}).last_hidden_state.sum().backward()
        assert [parameter.grad[0].item() for parameter in parameters if parameter.grad is not None] == want


# The host's part of a step.


def test_modes_and_gradients_without_walks(model: Any) -> None:
    trained = [model.lm_head.weight]
    model.eval()
    with without_walks(model, trained):
        assert all(module.training for module in model.modules())
        assert model.train() is model
        model.eval()
        assert not model.model.training
        model.train()
        assert model.model.training
        trained[0].grad = torch.ones_like(trained[0])
        model.zero_grad(set_to_none=False)
        assert not trained[0].grad.any()
        model.zero_grad()
        assert trained[0].grad is None
    assert not {"train", "zero_grad"} & vars(model).keys()


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit"])
def test_queued_steps_are_the_same(name: str) -> None:
    """Queued steps equal those of bitsandbytes' optimizer, also for parameters without a gradient.

    Either goes on from the other's state.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    stock = getattr(bitsandbytes.optim, name)
    torch.manual_seed(0)
    start = [torch.randn(64, 128), torch.randn(7), torch.randn(5)]
    runs: list[list[nn.Parameter]] = []
    optimizers = []
    for kind in (stock, queued(stock)):
        parameters = [nn.Parameter(value.clone()) for value in start]
        optimizers.append(kind(parameters, lr=0.01, weight_decay=0.1))
        runs.append(parameters)
    optimizers[1].allocate()
    assert all(optimizers[1].state[parameter] for parameter in runs[1])
    for i in range(4):
        if i == 2:
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for parameters, optimizer in zip(runs, optimizers, strict=True):
            generator = torch.Generator().manual_seed(i)
            for parameter in parameters[:2]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for left, right in zip(*runs, strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(runs[1][0], start[0])
    assert torch.equal(runs[1][2], start[2])


def test_tiles_of_the_loss_are_narrower_meanwhile() -> None:
    """The loss uses narrower tiles meanwhile.

    If TRL renames their width, this fails, for the predicted memory is wrong then.
    """

    def tile() -> tuple[int, int]:
        return chunked_logprob.TOKEN_CHUNK_SIZE, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE

    assert tile() == LOSS_TILE
    with narrow_tiles():
        assert tile() == LOSS_TILE_BESIDE_GRAPHS
    assert tile() == LOSS_TILE
