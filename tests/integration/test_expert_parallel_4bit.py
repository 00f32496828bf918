"""4-bit experts under expert parallelism as Transformers does it: two ranks, each with half of the experts.

Two processes run everything once and leave what they found in files. The tests compare this with the undivided model.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch import multiprocessing as mp
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moe_fused
from moe_fused.checkpoints.converter import ExpertsConverter, Quantization
from moe_fused.checkpoints.names import Names, Target
from moe_fused.checkpoints.share import Share
from tests.support import REPOSITORY

from .conftest import Calls
from .finetuning import save_tokenizer
from .four_bit import build, config, fitting, packed, rewrite, same_bits, stacked_checkpoint, v4_checkpoint
from .models import EXPERTS, GPT_OSS, QWEN3_MOE, experts_modules, tokens

RANKS = 2
HELD = EXPERTS // RANKS
STEPS = 3
# transformers >= 5.21 sends tokens to their experts' rank by default. It can mask the experts of the other ranks instead, as
# older releases always do, until 5.24.
CAN_DISPATCH = hasattr(DistributedConfig, "ep_size")
MASK = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# By the stacks, whose file has a tensor for each, and by linear layers, whose file has matrices for each expert.
LORA: dict[str, dict[str, Any]] = {
    "stacks": {"target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH},
    "linears": {"target_modules": "all-linear"},
}


class Checkpoint(NamedTuple):
    """A checkpoint, and how it is loaded.

    Attributes:
        name: of its directory.
        options: of the quantization while it is loaded; None if it is in 4 bits.
    """

    name: str
    options: dict[str, Any] | None = None


CHECKPOINTS = (
    Checkpoint("dense", {}),
    Checkpoint("dense", {"bnb_4bit_quant_storage": torch.bfloat16}),
    Checkpoint("gpt_oss", {}),
    Checkpoint("v4"),
    Checkpoint("stacked"),
    Checkpoint("fused"),
    Checkpoint("gpt_oss-fused"),
    Checkpoint("only attention"),
)
REFUSED = {
    "tp_size of DistributedConfig alone": {"tp_size": RANKS},
    "fsdp_size of DistributedConfig": {"fsdp_size": RANKS},
    "pp_size of DistributedConfig": {"pp_size": RANKS},
}
if CAN_DISPATCH:
    REFUSED["self_attn.q_proj is in 4 bits, and tp_plan"] = {"tp_size": RANKS, "ep_size": RANKS}


def _plans(checkpoint: str = "") -> dict[str, DistributedConfig]:
    """The ways of expert parallelism by name."""
    if not CAN_DISPATCH:
        return {"mask": DistributedConfig(tp_size=RANKS, enable_expert_parallel=True)}
    size: dict[str, Any] = {"tp_size": RANKS, "ep_size": RANKS, "tp_plan": {}}
    if checkpoint.startswith("gpt_oss"):  # whose router is no module that a plan could mask
        return {"dispatch": DistributedConfig(**size)}
    if hasattr(DistributedConfig, "ep_implementation"):
        return {name: DistributedConfig(**size, ep_implementation=name) for name in ("auto", "all_reduce")}
    return {"dispatch": DistributedConfig(**size), "mask": DistributedConfig(**size, ep_plan=MASK)}


def _load(directory: Path, checkpoint: Checkpoint, plan: DistributedConfig | None = None) -> Any:
    options: dict[str, Any] = {} if plan is None else {"distributed_config": plan}
    if checkpoint.options is not None:
        options["quantization_config"] = config(bnb_4bit_compute_dtype=torch.float32, **checkpoint.options)
    return AutoModelForCausalLM.from_pretrained(
        directory / checkpoint.name, dtype=torch.float32, experts_implementation="moe_fused", **options
    )


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens()).logits
    return logits


def _stacks(model: Any) -> dict[str, Tensor]:
    """The bytes of packed experts by parameter and part."""
    return {
        f"{name} {part}": value.detach().clone()
        for name, weights in packed(model).items()
        for part, value in weights.tensors().items()
    }


def _of_rank(name: str, value: Tensor, rank: int, held: int = HELD) -> Tensor:
    """What a rank has of an adapter's factor, or of its gradient, of all experts."""
    first, of_experts = rank * held, ".experts." in name and ".lora_" in name
    if not of_experts:
        return value
    if ".lora_A." in name:
        return value.unflatten(0, (EXPERTS, -1))[first : first + held].flatten(0, 1)
    return value.unflatten(1, (-1, EXPERTS))[..., first : first + held].flatten(1)


def _adapt(model: Any, lora: str, rank: int, held: int) -> PeftModel:
    """Adds an adapter whose factors of all experts are the same, however these are divided."""
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **LORA[lora]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if ".lora_" in name:
                shape = list(parameter.shape)
                if ".experts." in name:
                    shape[".lora_B." in name] *= EXPERTS // held
                parameter.copy_(_of_rank(name, torch.randn(shape, generator=generator) * 0.1, rank, held))
    return adapted  # type: ignore[return-value]


def _train(model: Any, checkpointing: bool) -> dict[str, Tensor]:
    """Trains a model for some steps, and returns its first gradients and its last parameters and loss."""
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    found = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        if step == 0:
            found = {f"gradient {name}": parameter.grad.clone() for name, parameter in trained.items()}
        optimizer.step()
    model.eval()
    values = {name: parameter.detach().clone() for name, parameter in trained.items()}
    return found | values | {"loss": loss.detach()}


# What each rank does. It returns what the tests compare.


def _loading(directory: Path) -> dict[str, Any]:
    found = {}
    for number, checkpoint in enumerate(CHECKPOINTS):
        for name, plan in _plans(checkpoint.name).items():
            model = _load(directory, checkpoint, plan)
            found[f"{number} {name}"] = {
                "logits": _logits(model),
                "stacks": _stacks(model),
                "held": [module.num_experts for module in experts_modules(model)],
            }
    return found


def _training(directory: Path, rank: int) -> dict[str, Any]:
    found = {}
    for name, plan in _plans().items():
        for lora in LORA:
            model = _adapt(_load(directory, CHECKPOINTS[0], plan), lora, rank, HELD)
            values = _train(model, checkpointing=lora == "stacks")
            path = directory / f"{name}-{lora}"
            model.save_pretrained(path, is_main_process=rank == 0)
            distributed.barrier()
            model.load_adapter(path, "again")
            again = {key: value for key, value in model.state_dict().items() if ".again." in key}
            before = _logits(model)
            model.merge_adapter()
            found[f"{name}-{lora}"] = {"values": values, "again": again, "logits": before, "merged": _logits(model)}
    return found


def _saving(directory: Path) -> dict[str, Any]:
    model = _load(directory, CHECKPOINTS[0], next(iter(_plans().values())))
    generated = model.generate(tokens()[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    for layout in ("per_expert", "fused"):
        moe_fused.save_format(model, layout)  # type: ignore[arg-type]
        model.save_pretrained(directory / f"saved {layout}")
    model.dequantize()
    return {"generated": generated, "dequantized": _logits(model)}


def _refusing(directory: Path) -> dict[str, str]:
    found = {}
    for name, options in REFUSED.items():
        with pytest.raises(NotImplementedError) as error:
            _load(directory, CHECKPOINTS[0], DistributedConfig(**options))
        found[name] = str(error.value)
    model = _load(directory, CHECKPOINTS[0], next(iter(_plans().values())))
    with pytest.raises(NotImplementedError) as error:
        model.load_adapter(directory / "adapter")
    found["load_adapter"] = str(error.value)
    model.add_adapter(LoraConfig(target_parameters=BOTH, target_modules=[]))
    with pytest.raises(NotImplementedError) as error:
        model.save_pretrained(directory / "refused")
    found["save_pretrained"] = str(error.value)
    return found


def _foreign_damage(directory: Path, rank: int) -> dict[str, str]:
    """Loads checkpoints in which an expert of rank 1 is damaged, and returns the errors."""
    plan = next(iter(_plans().values()))

    def error_of(checkpoint: Checkpoint) -> str:
        try:
            _load(directory, checkpoint, plan)
        except ValueError as error:
            return str(error)
        return ""

    return {each.name: error_of(each) for each in (Checkpoint("damaged dense", {}), Checkpoint("damaged v4"))}


def _example(directory: Path) -> dict[str, Any]:
    """Runs the example of the documentation in this process, with a small model in the place of the one on the Hub."""
    from tests.docs.markdown import blocks

    page = blocks(REPOSITORY / "docs" / "several-gpus.md")
    (block,) = (block for block in page if block.language == "python" and "distributed_config=" in block.text)
    text, names = block.text, {"__name__": "block"}
    for ours, theirs in ((directory / "words", "Qwen/Qwen3-235B-A22B"), (directory / "words adapter", "adapter-apart")):
        assert text.count(f'"{theirs}"') == 1
        text = text.replace(f'"{theirs}"', repr(str(ours)))
    exec(compile(text, str(block), "exec"), names)
    model: Any = names["model"]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return {"tokens": names["tokens"], "gradients": [gradient is not None for gradient in gradients]}


def _rank(rank: int, directory: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=RANKS)
    moe_fused.enable()
    spy = Calls(moe_fused.hub.submodule(moe_fused.get_kernel(), "experts_module").moe_experts)
    moe_fused.hub.submodule(moe_fused.get_kernel(), "experts_module").moe_experts = spy
    found: dict[str, Any] = {"loading": _loading(directory)}
    found["calls"] = spy.count
    found |= {"training": _training(directory, rank), "saving": _saving(directory), "refusing": _refusing(directory)}
    found["damage"] = _foreign_damage(directory, rank)
    if CAN_DISPATCH:  # the example is for these versions, and ends the group of processes itself
        found["example"] = _example(directory)
    else:
        distributed.destroy_process_group()
    torch.save(found, directory / f"rank{rank}.pt")


class Ran(NamedTuple):
    directory: Path
    ranks: list[dict[str, Any]]


def _damage(key: str, change: Callable[[Tensor], None]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(tensors[key])
        return tensors

    return damage


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    directory = tmp_path_factory.mktemp("apart")
    moe_fused.enable()
    build(QWEN3_MOE, torch.float32).save_pretrained(directory / "dense")
    build(fitting(GPT_OSS), torch.float32).save_pretrained(directory / "gpt_oss")
    v4_checkpoint(directory / "dense", directory / "v4")
    v4_checkpoint(directory / "dense", directory / "only attention", "self_attn")
    stacked_checkpoint(directory / "dense", directory / "stacked")
    for source, target in (("dense", "fused"), ("gpt_oss", "gpt_oss-fused")):
        model = _load(directory, Checkpoint(source, {}))
        moe_fused.save_format(model, "fused")
        model.save_pretrained(directory / target)
    build(vocab_size=300).save_pretrained(directory / "words")
    save_tokenizer(directory / "words")
    last = f"model.layers.1.mlp.experts.{EXPERTS - 1}.up_proj.weight"
    rewrite(directory / "dense", directory / "damaged dense", _damage(last, lambda value: value.fill_(torch.nan)))
    state = f"{last}.quant_state.bitsandbytes__nf4"
    rewrite(directory / "v4", directory / "damaged v4", _damage(state, lambda value: value.fill_(0)))
    moe_fused.disable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # two ranks on one GPU is more than NCCL takes
        mp.spawn(_rank, (directory,), RANKS)
    return Ran(directory, [torch.load(directory / f"rank{rank}.pt") for rank in range(RANKS)])


@pytest.mark.parametrize("number", range(len(CHECKPOINTS)), ids=lambda number: CHECKPOINTS[number].name)
@pytest.mark.usefixtures("enabled")
def test_each_rank_has_its_experts_and_all_the_same_logits(ran: Ran, number: int) -> None:
    checkpoint = CHECKPOINTS[number]
    whole = _load(ran.directory, checkpoint)
    logits, stacks = _logits(whole), _stacks(whole)
    assert (checkpoint.name == "only attention") == (not stacks)
    for plan in _plans(checkpoint.name):
        for rank, found in enumerate(ran.ranks):
            result = found["loading"][f"{number} {plan}"]
            assert result["held"] == [HELD, HELD]
            assert result["stacks"].keys() == stacks.keys()
            for name, value in result["stacks"].items():
                assert same_bits(value, stacks[name][rank * HELD : (rank + 1) * HELD]), name
            torch.testing.assert_close(result["logits"], logits)


def test_experts_run_in_the_kernel(ran: Ran) -> None:
    """Two layers for each checkpoint and plan."""
    runs = sum(len(_plans(checkpoint.name)) for checkpoint in CHECKPOINTS)
    assert [found["calls"] for found in ran.ranks] == [2 * runs] * RANKS


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.usefixtures("enabled")
def test_training_equals_that_of_the_undivided_model(ran: Ran, lora: str, tmp_path: Path) -> None:
    """Gradients, steps, the saved adapter, the loaded one and the merged model."""
    model = _adapt(_load(ran.directory, CHECKPOINTS[0]), lora, 0, EXPERTS)
    values = _train(model, checkpointing=False)
    model.save_pretrained(tmp_path)
    wanted = load_file(tmp_path / "adapter_model.safetensors")
    logits = _logits(model)
    model.merge_adapter()
    merged = _logits(model)
    assert any(".experts." in name for name in values)
    for plan in _plans():
        for rank, found in enumerate(ran.ranks):
            result = found["training"][f"{plan}-{lora}"]
            assert result["values"].keys() == values.keys()
            for name, value in result["values"].items():
                torch.testing.assert_close(value, _of_rank(name, values[name], rank), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(result["logits"], logits, rtol=1e-4, atol=1e-4)
            # What is quantized again after the merge may differ by a value, where rounding differs.
            torch.testing.assert_close(result["merged"], merged, rtol=0.05, atol=0.05)
            again = {name.replace(".again.", ".default."): value for name, value in result["again"].items()}
            assert again.keys() == {name for name in values if ".lora_" in name and not name.startswith("gradient")}
            assert all(torch.equal(value, result["values"][name]) for name, value in again.items())
        saved = load_file(ran.directory / f"{plan}-{lora}" / "adapter_model.safetensors")
        assert saved.keys() == wanted.keys()
        for name, value in saved.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("enabled")
def test_a_saved_model_has_all_experts(ran: Ran, tmp_path: Path) -> None:
    whole = _load(ran.directory, CHECKPOINTS[0])
    generated = whole.generate(tokens()[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    for layout in ("per_expert", "fused"):
        moe_fused.save_format(whole, layout)  # type: ignore[arg-type]
        whole.save_pretrained(tmp_path / layout)
        saved = ran.directory / f"saved {layout}"
        wanted, found = (load_file(path / "model.safetensors") for path in (tmp_path / layout, saved))
        assert found.keys() == wanted.keys()
        assert all(same_bits(value, wanted[name]) for name, value in found.items())
        assert (saved / "config.json").read_text() == (tmp_path / layout / "config.json").read_text()
    whole.dequantize()
    for rank in ran.ranks:
        assert torch.equal(rank["saving"]["generated"], generated)
        torch.testing.assert_close(rank["saving"]["dequantized"], _logits(whole))


@pytest.mark.skipif(not CAN_DISPATCH, reason="the example is for versions with ep_size")
def test_the_example_in_the_documentation_runs(ran: Ran) -> None:
    first, second = (rank["example"] for rank in ran.ranks)
    assert torch.equal(first["tokens"], second["tokens"])
    assert first["tokens"].shape[1] > 20
    assert first["gradients"] == second["gradients"] == [True] * (2 * 2 * (4 + 2))
    adapter = load_file(ran.directory / "words adapter" / "adapter_model.safetensors")
    experts = {name.split(".experts.")[1].split(".")[0] for name in adapter if ".experts." in name}
    assert experts == {str(expert) for expert in range(EXPERTS)}


def test_what_cannot_be_divided_is_refused(ran: Ran) -> None:
    instead = {
        "fsdp_size of DistributedConfig": "moe-fused finetune --shard",
        "load_adapter": "PeftModel.from_pretrained",
        "save_pretrained": "peft.get_peft_model",
    }
    for rank in ran.ranks:
        errors = rank["refusing"]
        assert errors.keys() == {*REFUSED, "load_adapter", "save_pretrained"}
        for name, message in errors.items():
            assert name in (*instead, "save_pretrained") or name in message
            assert instead.get(name, "take DistributedConfig(tp_size=N, ") in message


def test_the_experts_of_other_ranks_are_not_looked_at(ran: Ran) -> None:
    first, second = (rank["damage"] for rank in ran.ranks)
    name = f"model.layers.1.mlp.experts.{EXPERTS - 1}.up_proj.weight"
    assert first == {"damaged dense": "", "damaged v4": ""}
    assert second["damaged dense"] == f"{name} holds NaN or infinite values, which cannot be quantized"
    assert second["damaged v4"].startswith(f"{name}.quant_state.bitsandbytes__nf4 must hold JSON")


@pytest.mark.usefixtures("enabled")
def test_tensors_of_other_ranks_are_let_go(ran: Ran) -> None:
    """Threads read ahead. What they have read for another rank must not stay until its layer is converted."""
    name, keys = "model.layers.0.mlp.experts.down_proj", load_file(ran.directory / "v4" / "model.safetensors").keys()
    model = _load(ran.directory, Checkpoint("v4"))
    names = Names([Target(name, (EXPERTS, 64, 32), 1)], model.hf_quantizer.names.converters, "model")
    quantization = Quantization(True, "nf4", 64, True, torch.float32)
    share = Share(1, RANKS, torch.device("cpu"), torch.float32, {})
    converter = ExpertsConverter(names, quantization, {name: share})
    alive: dict[int, list[weakref.ref[Tensor]]] = {expert: [] for expert in range(EXPERTS)}
    waiting: dict[int, list[Future[Tensor]]] = {expert: [] for expert in range(EXPERTS)}
    for key in keys:
        target, pattern = converter.rename_source_key(key)
        if pattern is None:
            continue
        expert = pattern.role.expert  # type: ignore[attr-defined]
        read: Future[Tensor] = Future()
        read.set_result(torch.zeros(1))
        alive[expert].append(weakref.ref(read.result()))
        converter.add_tensor(target, key, pattern, read)
        waiting[expert].append(Future())
        converter.add_tensor(target, key, pattern, waiting[expert][-1])
        del read
    for expert in range(EXPERTS):
        held = expert >= HELD
        assert len(alive[expert]) == 6
        assert {value() is not None for value in alive[expert]} == {held}
        assert {future.cancelled() for future in waiting[expert]} == {not held}
