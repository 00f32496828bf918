"""One model over two devices computes, generates and learns what it does on one GPU.

    pytest tests/integration/test_device_map_gpu.py

The second device is another GPU or, in the tests called ``cpu``, the CPU. Those need one GPU: the layers on the CPU run
there, in plain torch, and are not offloaded. Two tests at the end are about what is offloaded from one GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from .conftest import Calls
from .four_bit import build, config, packed, same_state
from .lora import fix_routes, randomize
from .models import experts_modules, tokens

COUNT = torch.cuda.device_count()
FIRST = torch.device("cuda", 0)
SECOND_GPU = torch.device("cuda", 1)
# A device for those who compare objects. Accelerate offloads what has the string "cpu".
CPU = torch.device("cpu")
STEPS = 4
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
}

needs_two = pytest.mark.skipif(COUNT < 2, reason="needs two GPUs")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(COUNT < 1, reason="needs a GPU of CUDA or ROCm"),
    pytest.mark.usefixtures("enabled"),
]
both = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])
seconds = pytest.mark.parametrize(
    "second", [pytest.param(SECOND_GPU, id="gpu", marks=needs_two), pytest.param(CPU, id="cpu")]
)


def over(first: Any, second: Any) -> dict[str, Any]:
    """A device_map with the embedding and two layers on the first device, and two layers and the head on the second."""
    parts = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1")
    rest = ("model.layers.2", "model.layers.3", "model.norm", "lm_head")
    return {**dict.fromkeys(parts, first), **dict.fromkeys(rest, second)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in two directories: ``dense``, and ``4bit`` as the first GPU quantizes it."""
    import moe_fused

    path = tmp_path_factory.mktemp("models")
    build(num_hidden_layers=4).save_pretrained(path / "dense")
    moe_fused.enable()
    load(path / "dense", FIRST, quantization_config=config()).save_pretrained(path / "4bit")
    moe_fused.disable()
    return path


def load(path: Path, device_map: Any, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation="moe_fused", device_map=device_map, **options
    )
    return model


def one_and_spread(
    checkpoints: Path, second: torch.device, quantized: bool, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model on the first GPU, and over two devices. Both route alike, which rounding could otherwise change."""
    path = checkpoints / ("4bit" if quantized else "dense")
    models = load(path, FIRST, dtype), load(path, over(FIRST, second), dtype)
    for model in models:
        assert len(packed(model)) == (8 if quantized else 0)
        fix_routes(model)
    assert places(models[0]) == [FIRST] * 4
    assert places(models[1]) == [FIRST, FIRST, second, second]
    return models


def places(model: nn.Module) -> list[torch.device]:
    """The device of each layer's experts, which is one for all of their tensors."""
    devices = [{value.device for value in experts.parameters()} for experts in experts_modules(model)]
    return [device for (device,) in devices]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the norm of ``theirs``."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).norm() / theirs.norm())


def tolerance(second: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Two GPUs may be unlike. A CPU sums in another order, and rounds intermediate results elsewhere."""
    return 3e-2 if dtype == torch.bfloat16 else 1e-4 if second == CPU else 1e-5


def batch(length: int = 40) -> Tensor:
    return tokens(2, length, str(FIRST))


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(input_ids=ids).logits
    return values


@seconds
@both
@pytest.mark.parametrize("length", [1, 9, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits(
    dtype: torch.dtype, length: int, quantized: bool, second: torch.device, checkpoints: Path, calls: Calls
) -> None:
    """With as many rows as matrix-vector products serve, and with more."""
    one, spread = one_and_spread(checkpoints, second, quantized, dtype)
    ids = batch(length)
    logits = logits_of(spread, ids)
    assert calls.count == 4
    assert [arguments[0].device for arguments in calls.arguments] == [FIRST, FIRST, second, second]
    assert logits.device == FIRST, "Accelerate returns the output to the device of the input"
    assert distance(logits, logits_of(one, ids)) < tolerance(second, dtype)


@seconds
@both
def test_generation(quantized: bool, second: torch.device, checkpoints: Path) -> None:
    one, spread = one_and_spread(checkpoints, second, quantized)
    results = [model.generate(batch(5), max_new_tokens=8, do_sample=False) for model in (one, spread)]
    assert torch.equal(*results)


@seconds
@both
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_adapters_learn_the_same(
    checkpointing: bool, quantized: bool, second: torch.device, checkpoints: Path, tmp_path: Path
) -> None:
    """The loss and all gradients of several steps; then the adapter is saved and loaded, there and on one GPU."""
    models = [get_peft_model(model, LoraConfig(**LORA)) for model in one_and_spread(checkpoints, second, quantized)]
    for model in models:
        randomize(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    # With a usual eps, a step of an element whose gradient is near zero is noise.
    optimizers = [
        torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-3) for model in models
    ]
    losses: list[list[float]] = [[], []]
    for _ in range(STEPS):
        for model, values in zip(models, losses, strict=True):
            loss = model(input_ids=batch(), labels=batch()).loss
            loss.backward()
            values.append(loss.item())
        one, spread = ({name: p for name, p in model.named_parameters() if p.requires_grad} for model in models)
        assert one.keys() == spread.keys()
        for name, parameter in spread.items():
            layer = int(name.split(".layers.")[1].split(".")[0])
            assert parameter.device == parameter.grad.device == (FIRST if layer < 2 else second), name
            assert distance(parameter.grad, one[name].grad) < 20 * tolerance(second), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=20 * tolerance(second))
    assert losses[1][-1] < losses[1][0] - 0.1
    trained = models[1].eval()
    expected = logits_of(trained, batch())
    trained.save_pretrained(tmp_path)
    for model in one_and_spread(checkpoints, second, quantized):
        reloaded = PeftModel.from_pretrained(model, tmp_path).eval()
        assert distance(logits_of(reloaded, batch()), expected) < tolerance(second)


@seconds
@both
def test_trainer_takes_the_model_as_it_is(
    quantized: bool, second: torch.device, checkpoints: Path, tmp_path: Path
) -> None:
    one, spread = one_and_spread(checkpoints, second, quantized)
    ids = batch()[:1].repeat(2, 1)  # whatever their order, the rows of a batch are these
    first_loss = one(input_ids=ids, labels=ids).loss.item()
    model = get_peft_model(spread, LoraConfig(**LORA))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], lr_scheduler_type="constant", use_cpu=FIRST == CPU,
    )  # fmt: skip
    rows: Any = [{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()} for _ in range(8)]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(first_loss, rel=1e-3)  # the adapter begins as zero, and records are rounded
    assert losses[-1] < losses[0] - 0.1
    learned = {p.device for name, p in model.named_parameters() if "lora_B" in name and p.any()}
    assert learned == {FIRST, second}


@seconds
@both
def test_merging(quantized: bool, second: torch.device, checkpoints: Path) -> None:
    """Adapters are merged where their layer is. 4-bit weights are quantized again there."""
    models = [
        get_peft_model(model, LoraConfig(**LORA)).eval() for model in one_and_spread(checkpoints, second, quantized)
    ]
    for model in models:
        randomize(model)
    one, spread = (model.merge_and_unload() for model in models)
    assert places(spread) == [FIRST, FIRST, second, second]
    # The CPU rounds some weights to a neighbour of what a GPU rounds them to.
    allowed = 0.1 if quantized and second == CPU else 20 * tolerance(second)
    assert distance(logits_of(spread, batch()), logits_of(one, batch())) < allowed


@seconds
@both
def test_a_saved_model_is_the_one_that_was_loaded(
    quantized: bool, second: torch.device, checkpoints: Path, tmp_path: Path
) -> None:
    one, spread = one_and_spread(checkpoints, second, quantized)
    spread.save_pretrained(tmp_path)
    assert same_state(load(tmp_path, FIRST), one)


@needs_two
@both
def test_quantizing_while_loading_and_a_map_that_transformers_makes(quantized: bool, checkpoints: Path) -> None:
    """Layers are quantized on their own GPU, with the same bits."""
    options = {"quantization_config": config()} if quantized else {}
    one = load(checkpoints / "dense", FIRST, **options)
    total = one.get_memory_footprint()
    room = {0: total, 1: total, "cpu": 0}
    spread = load(checkpoints / "dense", "auto", max_memory=room, **options)
    assert set(spread.hf_device_map.values()) == {0, 1}
    assert same_state(spread, one)
    assert distance(logits_of(spread, batch()), logits_of(one, batch())) < tolerance(SECOND_GPU)


@needs_two
@both
def test_the_current_device_does_not_matter(quantized: bool, checkpoints: Path) -> None:
    one, spread = one_and_spread(checkpoints, SECOND_GPU, quantized)
    expected = logits_of(one, batch())
    for current in (FIRST, SECOND_GPU):
        with torch.cuda.device(current):
            assert distance(logits_of(spread, batch()), expected) < tolerance(SECOND_GPU)
            assert torch.cuda.current_device() == current.index


@needs_two
def test_tied_weights_are_on_both_gpus(tmp_path: Path) -> None:
    build(num_hidden_layers=4, tie_word_embeddings=True).save_pretrained(tmp_path)
    one, spread = load(tmp_path, FIRST), load(tmp_path, over(FIRST, SECOND_GPU))
    assert distance(logits_of(spread, batch()), logits_of(one, batch())) < tolerance(SECOND_GPU)


# What is offloaded from a GPU.


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_dense_layers_are_offloaded(place: str, checkpoints: Path, calls: Calls, tmp_path: Path) -> None:
    """They run on the GPU, in the kernel, for which their weights come and go."""
    one = load(checkpoints / "dense", FIRST)
    spread = load(checkpoints / "dense", over(0, place), offload_folder=tmp_path / "offloaded")
    assert places(spread) == [FIRST, FIRST, torch.device("meta"), torch.device("meta")]
    expected = logits_of(one, batch())
    calls.arguments.clear()
    for _ in range(2):
        assert distance(logits_of(spread, batch()), expected) < tolerance(FIRST)
    assert {arguments[0].device for arguments in calls.arguments} == {FIRST}
    results = [model.generate(batch(5), max_new_tokens=4, do_sample=False) for model in (one, spread)]
    assert torch.equal(*results)


def test_what_is_offloaded_stays_dense_beside_4_bit_layers(checkpoints: Path) -> None:
    options = {"quantization_config": config(llm_int8_enable_fp32_cpu_offload=True)}
    model = load(checkpoints / "dense", over(0, "cpu"), **options)
    assert {name.split(".")[2] for name in packed(model)} == {"0", "1"}
    assert logits_of(model, batch()).isfinite().all()
    adapted = get_peft_model(model, LoraConfig(**LORA, layers_to_transform=[0, 1], layers_pattern="layers"))
    adapted(input_ids=batch(), labels=batch()).loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert len(gradients) == 2 * 2 * 4, "two linear layers and two stacks in each of two layers"
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
