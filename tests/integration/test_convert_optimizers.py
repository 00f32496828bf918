"""Optimizers' states between layouts of experts: there and back, and a run that goes on in the other layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft.utils.transformers_weight_conversion as peft_conversion
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from moe_fused.checkpoints.adapters import Layout, ScalingChoice
from moe_fused.checkpoints.adapters.convert import convert_adapter
from moe_fused.checkpoints.models import convert_model
from moe_fused.checkpoints.optimizers.convert import convert_optimizer

from .adapters import edit, per_expert_adapter, read
from .models import QWEN3_MOE, tokens
from .optimizers import adamw, groups, load_state, same, save_state, separate, train, write_names

bnb = pytest.importorskip("bitsandbytes")

STEPS = 4
# Matrices of experts are 16 blocks of bitsandbytes each.
ALIGNED = {"hidden_size": 64, "moe_intermediate_size": 64}
OPTIMIZERS = {
    "torch": (torch.optim.AdamW, {}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "8 bits": (bnb.optim.AdamW8bit, {}),
    "paged": (bnb.optim.PagedAdamW8bit, {}),
}


def build(apart: bool, seed: int = 0, **options: Any) -> PreTrainedModel:
    model = QWEN3_MOE.build(seed, **options).train()
    return separate(model) if apart else model


def transfer(state: dict[str, Tensor], model: nn.Module) -> None:
    """Loads weights that were trained in the other layout."""
    for name, value in model.state_dict().items():
        block, _, stack = name.rpartition(".experts.")
        if name in state:
            value.copy_(state[name])
        elif stack == "gate_up_proj":
            for expert, matrix in enumerate(value):
                gate, up = (state[f"{block}.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up"))
                matrix.copy_(torch.cat([gate, up]))
        elif stack == "down_proj":
            for expert, matrix in enumerate(value):
                matrix.copy_(state[f"{block}.experts.{expert}.down_proj.weight"])
        else:
            number, leaf, _ = stack.split(".")
            whole = state[f"{block}.experts.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][int(number)]
            value.copy_(whole if leaf == "down_proj" else whole.chunk(2)[leaf == "up_proj"])


def flat(names: list[list[str]]) -> list[str]:
    return [name for group in names for name in group]


def checkpoint(directory: Path, model: nn.Module, optimizer: Any, **options: Any) -> Path:
    save_state(directory, optimizer)
    QWEN3_MOE.build(**options).config.save_pretrained(directory)
    return directory


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("apart", [False, True], ids=["fused to per-expert", "per-expert to fused"])
def test_a_run_goes_on_in_the_other_layout(apart: bool, kind: str, tmp_path: Path) -> None:
    cls, settings = OPTIMIZERS[kind]
    options = {} if cls is torch.optim.AdamW else ALIGNED
    model = build(apart, **options)
    optimizer = adamw(model, cls, **settings)
    train(model, optimizer, 0, STEPS)
    source = checkpoint(tmp_path / "checkpoint", model, optimizer, **options)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = train(model, optimizer, STEPS, STEPS)

    other = build(not apart, seed=1, **options)
    transfer(weights, other)
    (tmp_path / "resumed").mkdir()
    names = None if apart else write_names(tmp_path / "names.json", groups(other))
    to = "fused" if apart else "per-expert"
    plan = convert_optimizer(source, tmp_path / "resumed", to=to, target_parameters=names)
    assert (plan.layouts[1], plan.notes) == (to, ())
    resumed = adamw(other, cls, **settings)
    resumed.load_state_dict(load_state(tmp_path / "resumed"))
    losses = train(other, resumed, STEPS, STEPS)
    assert losses == pytest.approx(expected, abs=1e-6)
    again = build(apart, seed=2, **options)
    transfer(other.state_dict(), again)
    for name, parameter in model.named_parameters():
        difference = (again.get_parameter(name) - parameter).abs()
        # With 8-bit moments, the last bit of a sum may decide between two codes, and so change a step.
        assert (difference > 2e-6).sum() <= (0 if cls is torch.optim.AdamW else 1e-3 * parameter.numel()), name
        assert difference.max() < 1e-3, name
    # Without the state the losses would be different.
    transfer(weights, other)
    assert train(other, adamw(other, cls, **settings), STEPS, STEPS) != pytest.approx(expected, abs=1e-4)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("layout", ["per-expert", "original"])
def test_there_and_back(layout: str, kind: str, tmp_path: Path) -> None:
    cls, settings = OPTIMIZERS[kind]
    model = build(False, **ALIGNED)
    optimizer = adamw(model, cls, **settings)
    train(model, optimizer, 0, 2)
    source = checkpoint(tmp_path / "source", model, optimizer, **ALIGNED)
    there = checkpoint(tmp_path / "there", model, optimizer, **ALIGNED)
    (tmp_path / "back").mkdir()
    names = write_names(tmp_path / "names.json", [_other_names(name, layout) for name in flat(groups(model))])
    plan = convert_optimizer(source, there, to=layout, target_parameters=names, overwrite=True)
    assert plan.layouts == ("fused", layout)
    assert len(load_state(there)["state"]) == plan.parameters[1] > plan.parameters[0]
    assert convert_optimizer(there, tmp_path / "back", to="fused", parameters=names).layouts == (layout, "fused")
    assert same(load_state(tmp_path / "back"), load_state(source))


def _other_names(name: str, layout: str) -> list[str]:
    block, _, stack = name.rpartition(".experts.")
    leaves = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}.get(stack, [])
    if layout == "original":
        return [f"{block}.{leaf}.weight" for leaf in leaves] or [name]
    return [f"{block}.experts.{expert}.{leaf}.weight" for expert in range(6) for leaf in leaves] or [name]


def test_every_element_is_where_its_weight_is(tmp_path: Path) -> None:
    """Every element of a moment goes where its weight goes.

    Moments are set to the weights, so they must equal them again.
    """
    model = build(False)
    optimizer = adamw(model)
    for parameter in model.parameters():
        moments = {"exp_avg": parameter.detach().clone(), "exp_avg_sq": parameter.detach().square()}
        optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    source = checkpoint(tmp_path / "source", model, optimizer)
    other = build(True)
    names = groups(other)
    (tmp_path / "out").mkdir()
    convert_optimizer(
        source, tmp_path / "out", to="per-expert", target_parameters=write_names(tmp_path / "n.json", names)
    )
    state = load_state(tmp_path / "out")
    assert [len(group["params"]) for group in state["param_groups"]] == [len(group) for group in names]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.0]
    for number, name in enumerate(flat(names)):
        weight = other.get_parameter(name)
        assert torch.equal(state["state"][number]["exp_avg"], weight), name
        assert torch.equal(state["state"][number]["exp_avg_sq"], weight.square()), name
    # torch counts in place: a counter for two parameters would count twice.
    steps = [entry["step"].data_ptr() for entry in state["state"].values()]
    assert len(set(steps)) == len(steps)


# --- 8 bits


def eight_bits(tmp_path: Path, **options: Any) -> tuple[Path, PreTrainedModel, dict[str, Any]]:
    model = build(False, **options)
    optimizer = adamw(model, bnb.optim.AdamW8bit)
    train(model, optimizer, 0, 2)
    source = checkpoint(tmp_path / "source", model, optimizer, **options)
    (tmp_path / "out").mkdir()
    return source, model, load_state(source)["state"]


def values(entry: dict[str, Any], number: int) -> Tensor:
    parts = entry["__bnb_optimizer_quant_state__"]
    state = parts[f"state{number}"]
    if state.dtype == torch.float32:
        return state
    return bnb.functional.dequantize_blockwise(
        state, absmax=parts[f"absmax{number}"], code=parts[f"qmap{number}"], blocksize=256
    )


def by_name(model: nn.Module, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(zip(flat(groups(model)), state.values(), strict=True))


@pytest.mark.parametrize(
    "options, requantized",
    [(ALIGNED, 0), ({"hidden_size": 72, "moe_intermediate_size": 60}, 30), ({}, 0)],
    ids=["aligned", "not aligned", "small"],
)
def test_blocks(options: dict[str, int], requantized: int, tmp_path: Path) -> None:
    source, model, before = eight_bits(tmp_path, **options)
    other = build(True, **options)
    names = write_names(tmp_path / "names.json", groups(other))

    def convert() -> Any:
        return convert_optimizer(source, tmp_path / "out", to="per-expert", target_parameters=names)

    if requantized:
        with pytest.warns(UserWarning, match=rf"8-bit moments of {requantized} parameters are quantized again"):
            plan = convert()
    elif options:
        plan = convert()
    else:
        with pytest.warns(UserWarning, match="24 small parameters go from 8 to 32 bits, exactly"):
            plan = convert()
    assert len(plan.requantized) == requantized
    fused, apart = by_name(model, before), by_name(other, load_state(tmp_path / "out")["state"])
    assert values(fused["model.layers.1.mlp.experts.gate_up_proj"], 1).any()
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        for expert in range(6):
            for number in (1, 2):
                stack = values(fused[f"{block}.gate_up_proj"], number)[expert]
                wanted = dict(zip(("gate", "up"), stack.chunk(2), strict=True))
                wanted["down"] = values(fused[f"{block}.down_proj"], number)[expert]
                for leaf, value in wanted.items():
                    entry = apart[f"{block}.{expert}.{leaf}_proj.weight"]
                    bits = entry["__bnb_optimizer_quant_state__"]["state1"].dtype
                    assert bits == (torch.uint8 if options else torch.float32)
                    found = values(entry, number)
                    if f"{block}.{expert}.{leaf}_proj.weight" in plan.requantized:
                        # The value is quantized a second time, so it may be off by half a step of the coarsest part of
                        # the code, twice.
                        assert (found - value).abs().max() <= 0.02 * value.abs().max()
                    else:
                        assert torch.equal(found, value)


def test_small_moments_stay_in_32_bits(tmp_path: Path) -> None:
    """Small matrices keep moments in 32 bits, also as part of a stack that is large enough for 8 bits."""
    model = build(True)
    optimizer = adamw(model, bnb.optim.AdamW8bit)
    train(model, optimizer, 0, 2)
    source = checkpoint(tmp_path / "source", model, optimizer)
    (tmp_path / "out").mkdir()
    assert convert_optimizer(source, tmp_path / "out", to="fused").notes == ()
    other = build(False)
    resumed = adamw(other, bnb.optim.AdamW8bit)
    resumed.load_state_dict(load_state(tmp_path / "out"))
    stack = resumed.state[other.model.layers[0].mlp.experts.gate_up_proj]
    assert stack["state1"].numel() > 4096
    assert stack["state1"].dtype == torch.float32
    train(other, resumed, 2, 1)


# --- adapters


def lora(apart: bool, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> nn.Module:
    """LoRA on down_proj and more, of stacked experts or of separate ones."""
    options: dict[str, Any] = {"r": 3, "lora_alpha": 5, "modules_to_save": ["lm_head"]}
    if apart:
        # PEFT would make target_parameters of it, as the model's type says.
        monkeypatch.setattr(peft_conversion, "convert_peft_config_for_transformers", lambda *_, **__: None)
        config = LoraConfig(target_modules=["q_proj", "k_proj", "down_proj"], **options)
    else:
        config = LoraConfig(target_modules=["q_proj", "k_proj"], target_parameters=["experts.down_proj"], **options)
    model = get_peft_model(build(apart), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def save_adapter(directory: Path, model: nn.Module, optimizer: Any, base: Path) -> Path:
    QWEN3_MOE.build().config.save_pretrained(base)
    model.save_pretrained(directory)
    edit(directory, base_model_name_or_path=str(base))
    return save_state(directory, optimizer)


def load_adapter(model: nn.Module, directory: Path) -> None:
    tensors = read(directory)[0]
    loaded = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.replace(".modules_to_save.default", "").replace(".default", "")
            parameter.data.copy_(tensors[key])
            loaded.add(key)
    assert loaded == tensors.keys()


@pytest.mark.parametrize("apart", [False, True], ids=["fused to per-expert", "per-expert to fused"])
def test_a_run_of_lora_goes_on_in_the_other_layout(
    apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora(apart, monkeypatch)
    optimizer = adamw(model)
    train(model, optimizer, 0, STEPS)
    source = save_adapter(tmp_path / "source", model, optimizer, tmp_path / "base")
    expected = train(model, optimizer, STEPS, STEPS)

    target = tmp_path / "target"
    given = None if apart else Layout.PEFT_FUSED
    to = Layout.PEFT_FUSED if apart else Layout.PER_EXPERT
    convert_adapter(source, target, to=to, given=given, scaling=ScalingChoice.KEEP)
    plan = convert_optimizer(source, target, given=given and given.value)
    assert plan.layouts[1] == to.value
    other = lora(not apart, monkeypatch, seed=5)
    load_adapter(other, target)
    resumed = adamw(other)
    resumed.load_state_dict(load_state(target))
    assert train(other, resumed, STEPS, STEPS) == pytest.approx(expected, abs=1e-6)


def test_factors_of_gate_and_up_there_and_back(tmp_path: Path) -> None:
    """An adapter's state goes there and back between layouts with separate factors of gate and up.

    Moments are set to the factors.
    """
    source = per_expert_adapter(
        tmp_path / "source", ranks={"gate": 4, "up": 4, "down": 2}, rank_pattern={"down_proj": 2}
    )
    QWEN3_MOE.build().config.save_pretrained(tmp_path / "base")
    edit(source, base_model_name_or_path=str(tmp_path / "base"))
    convert_adapter(source, tmp_path / "there", to=Layout.ORIGINAL, scaling=ScalingChoice.KEEP)
    names = {}
    for directory in (source, tmp_path / "there"):
        tensors = read(directory)[0]
        names[directory] = write_names(tmp_path / f"{directory.name}.json", [list(tensors)])
    weights = read(source)[0]
    optimizer = torch.optim.AdamW([nn.Parameter(value) for value in weights.values()])
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.tensor(7.0),
            "exp_avg": parameter.data,
            "exp_avg_sq": parameter.data,
        }
    save_state(source, optimizer)
    parameters = {"parameters": names[source], "target_parameters": names[tmp_path / "there"]}
    plan = convert_optimizer(source, tmp_path / "there", **parameters)
    assert plan.layouts == ("per-expert", "original")
    state = load_state(tmp_path / "there")["state"]
    for number, (name, tensor) in enumerate(read(tmp_path / "there")[0].items()):
        assert torch.equal(state[number]["exp_avg"], tensor), name
    (tmp_path / "back").mkdir()
    for file in source.iterdir():
        if file.name != "optimizer.pt":
            (tmp_path / "back" / file.name).write_bytes(file.read_bytes())
    parameters = {"parameters": names[tmp_path / "there"], "target_parameters": names[source]}
    convert_optimizer(tmp_path / "there", tmp_path / "back", **parameters)
    assert same(load_state(tmp_path / "back"), load_state(source))


@pytest.mark.parametrize("layout", [Layout.UNSLOTH_GROUPED, Layout.PEFT_SWAPPED, Layout.UNSLOTH_SWAPPED])
def test_common_factors_between_fused_layouts(layout: Layout, tmp_path: Path) -> None:
    """Between layouts with a common factor, moments that are set to the factors convert as the adapter does."""
    separated = per_expert_adapter(tmp_path / "separated", shared=True)
    convert_adapter(separated, tmp_path / "source", to=Layout.PEFT_FUSED, scaling=ScalingChoice.KEEP)
    convert_adapter(tmp_path / "source", tmp_path / "out", to=layout)
    before, after = (read(tmp_path / name)[0] for name in ("source", "out"))
    optimizer = torch.optim.AdamW([nn.Parameter(value) for value in before.values()])
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.tensor(7.0),
            "exp_avg": parameter.data,
            "exp_avg_sq": parameter.data,
        }
    save_state(tmp_path / "source", optimizer)
    plan = convert_optimizer(
        tmp_path / "source",
        tmp_path / "out",
        parameters=write_names(tmp_path / "before.json", [list(before)]),
        target_parameters=write_names(tmp_path / "after.json", [list(after)]),
    )
    assert plan.layouts == ("peft-fused", layout.value)
    state = load_state(tmp_path / "out")["state"]
    assert not same(before, after)
    for number, (name, tensor) in enumerate(after.items()):
        assert torch.equal(state[number]["exp_avg"], tensor), name


# --- names


def test_names_in_the_state(tmp_path: Path) -> None:
    """Names in the state, which torch writes for an optimizer that was given them, are read, and are written again."""
    model = build(False)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    train(model, optimizer, 0, 1)
    source = checkpoint(tmp_path / "source", model, optimizer)
    content = load_state(source)
    # The order is not that of the model, so only the names can tell it.
    (group,) = content["param_groups"]
    group["param_names"].reverse()
    group["params"].reverse()
    torch.save(content, source / "optimizer.pt")
    names = [name for part in groups(build(True)) for name in part]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "out").mkdir()
    convert_optimizer(source, tmp_path / "out", to="per-expert", target_parameters=tmp_path / "names.txt")
    (after,) = load_state(tmp_path / "out")["param_groups"]
    assert after["param_names"] == names
    stacks = {
        name: entry["exp_avg"]
        for name, entry in zip(group["param_names"][::-1], content["state"].values(), strict=True)
    }
    place = names.index("model.layers.1.mlp.experts.4.up_proj.weight")
    found = load_state(tmp_path / "out")["state"][place]["exp_avg"]
    assert torch.equal(found, stacks["model.layers.1.mlp.experts.gate_up_proj"][4].chunk(2)[1])


def test_frozen_parameters(tmp_path: Path) -> None:
    """If only one layer's stacks are trained, the names must be given, and the other experts are left out."""
    model = build(False)
    names = [name for name, _ in model.named_parameters() if "layers.1.mlp.experts" in name]
    optimizer = torch.optim.AdamW([model.get_parameter(name) for name in names])
    train(model, optimizer, 0, 1)
    source = checkpoint(tmp_path / "source", model, optimizer)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"fits no order of the parameters: .* the state has 2"):
        convert_optimizer(source, tmp_path / "out", to="per-expert")
    given = write_names(tmp_path / "names.json", [names])
    plan = convert_optimizer(source, tmp_path / "out", to="per-expert", parameters=given)
    assert plan.parameters == (2, 18)


def test_trainer_resumes(tmp_path: Path) -> None:
    """Transformers' Trainer: a checkpoint of its own goes on after a detour over the layout of Transformers 4."""

    def trainer(name: str, model: PreTrainedModel) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            weight_decay=0.1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=7,
        )
        ids = [(tokens(1)[0] + shift) % 60 + 3 for shift in range(8)]
        return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])

    whole = trainer("whole", build(False))
    whole.train()
    source = tmp_path / "whole" / "checkpoint-2"
    names = write_names(tmp_path / "names.json", groups(build(True)))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_bytes((source / "config.json").read_bytes())
    plan = convert_optimizer(source, tmp_path / "there", to="per-expert", target_parameters=names)
    assert {"scheduler.pt", "trainer_state.json", "rng_state.pth"} <= set(plan.files)
    # Trainer writes experts one by one, and does not put them together again.
    convert_model(source, tmp_path / "back", "fused")
    convert_optimizer(tmp_path / "there", tmp_path / "back", to="fused")
    resumed = trainer("resumed", build(False, seed=3))
    resumed.train(resume_from_checkpoint=str(tmp_path / "back"))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


# --- experts that were updated less often


@pytest.mark.parametrize("cls", [torch.optim.AdamW, bnb.optim.AdamW8bit])
def test_steps_are_aligned_on_request(cls: Any, tmp_path: Path) -> None:
    model = build(True, **ALIGNED)
    optimizer = adamw(model, cls)
    experts = model.model.layers[0].mlp.experts
    rarely, never = experts[1].down_proj.weight, experts[2].down_proj.weight
    never.requires_grad_(False)
    train(model, optimizer, 0, 1)
    rarely.requires_grad_(False)
    train(model, optimizer, 1, 2)
    source = checkpoint(tmp_path / "source", model, optimizer, **ALIGNED)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ValueError, match=r"experts\.1\.down_proj\.weight was updated 1 times, .*experts\.0\.\S+ 3 times"
    ):
        convert_optimizer(source, tmp_path / "out", to="fused")
    with pytest.warns(UserWarning, match="the moments of 2 parameters, for example of .*, are scaled"):
        convert_optimizer(source, tmp_path / "out", to="fused", align_steps=True)
    other = build(False, **ALIGNED)
    resumed = adamw(other, cls)
    resumed.load_state_dict(load_state(tmp_path / "out"))
    fused_state = resumed.state[other.model.layers[0].mlp.experts.down_proj]
    assert int(fused_state["step"]) == 3
    for expert, parameter in enumerate((experts[0].down_proj.weight, rarely)):
        before = optimizer.state[parameter]
        for beta, name, number in ((0.9, "exp_avg", 1), (0.999, "exp_avg_sq", 2)):
            if cls is torch.optim.AdamW:
                one, two = before[name], fused_state[name][expert]
            else:
                one, two = (values({"__bnb_optimizer_quant_state__": part}, number) for part in (before, fused_state))
                two = two[expert]
            corrected = one / (1 - beta ** float(before["step"]))
            torch.testing.assert_close(two / (1 - beta**3), corrected)
    if cls is torch.optim.AdamW:
        assert not fused_state["exp_avg"][2].any()
        assert not fused_state["exp_avg_sq"][2].any()
    else:
        assert not values({"__bnb_optimizer_quant_state__": fused_state}, 1)[2].any()
