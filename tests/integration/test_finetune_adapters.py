"""What ``moe-fused finetune`` adapts beside attention and experts, and what it trains in full."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_fused.finetune.adapters import lora_config
from moe_fused.finetune.options import Options
from moe_fused.finetune.plan import plan_run
from moe_fused.finetune.resolve import ResolvedRun, candidates, set_up
from moe_fused.memory import Whole, Workload, predict, sizes_of

from .conftest import DEVICE
from .families import save_family
from .finetuning import assert_error, chats, finetune, losses, nothing_loads, write_jsonl
from .four_bit import BY_ID
from .lora import disabled
from .models import MODELS, ModelCase, tokens

CPU = torch.device("cpu")
ALL_LINEAR = {"attention_modules": ["all-linear"]}
# The options of short runs.
SHORT = ("--max-steps", "2", "--sequence-length", "32", "--gradient-accumulation", "1", "--learning-rate", "0.01")


def resolved(case: ModelCase, **options: Any) -> ResolvedRun:
    setup = set_up(Options(model="m", **options), case.build().config, CPU)
    return next(candidates(setup, plain_text=False))


def adapted_modules(tensors: Any) -> set[str]:
    """The modules that have LoRA, by their names within a layer."""
    found = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    return {re.split(r"\.\d+\.", name)[-1] for name in found}


def arguments(directory: Path, name: str, *, dense: bool = False) -> tuple[str | Path, ...]:
    """The options of a run on a tiny model of a family."""
    save_family(BY_ID[name], directory / "model")
    write_jsonl(directory / "chat.jsonl", chats(8))
    quantization = ("--quantization", "none") if dense else ()
    return ("--model", "model", "--dataset", "chat.jsonl", "--output", "out", *SHORT, *quantization)


def trained(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


# All linear layers, and shared experts.


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_all_linear_layers_but_the_head_routers_and_experts(case: ModelCase) -> None:
    run = resolved(case, attention_rank=2, expert_rank=0, quantization="none", **ALL_LINEAR)
    model = case.build()
    model.set_experts_implementation("moe_fused")
    adapted = get_peft_model(model, lora_config(run, model))
    linears = {
        re.split(r"\.\d+\.", name)[-1]
        for name, module in case.build().named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    routers = {"mlp.shared_expert_gate", "mlp.gate.wg", "mlp.router"}
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert adapted_modules(name.removeprefix("base_model.model.") for name in names) == linears - routers
    assert not [name for name in names if ".experts." in name]
    # The memory plan counts the same.
    assert plan_run(run, plain_text=False).prediction.trainable == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize(
    "name", ["qwen2_moe", "deepseek_v2", "glm4_moe", "qwen3_next", "granitemoeshared", "nemotron_h"]
)
@pytest.mark.parametrize("more", [{}, ALL_LINEAR], ids=["", "all linear"])
def test_shared_experts_have_their_own_rank(name: str, more: dict[str, Any]) -> None:
    case = next(case for case in MODELS if case.id == name)
    options = {"attention_rank": 2, "expert_rank": 3, "shared_expert_rank": 5, "quantization": "none", **more}
    run = resolved(case, **options)
    model = case.build()
    model.set_experts_implementation("moe_fused")
    adapted = get_peft_model(model, lora_config(run, model))
    layers = {path: module for path, module in adapted.named_modules() if hasattr(module, "lora_A")}
    for path, layer in layers.items():
        kind = 5 if ".shared" in path else 3 if ".experts" in path else 2
        assert (layer.r["default"], layer.scaling["default"]) == (kind, 2.0), path
    assert any(".shared" in path for path in layers)
    assert not [path for path in layers if path.endswith("_gate")]
    assert plan_run(run, plain_text=False).prediction.trainable == adapted.get_nb_trainable_parameters()[0]
    larger = resolved(case, **options | {"shared_expert_alpha": 3.0})
    assert larger.shared_expert_alpha == 3.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v2", "qwen3_next", "glm4_moe"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "4 bits"])
def test_trains_shared_experts_and_dense_layers(name: str, dense: bool, tmp_path: Path) -> None:
    """The adapter is that of stock PEFT: it has the logits there that it has here."""
    given = arguments(tmp_path, name, dense=dense)
    more = ("--attention-modules", "all-linear", "--shared-expert-rank", "3")
    ended = finetune(*given, *more, cwd=tmp_path)
    assert ended.status == 0, ended
    tensors = trained(tmp_path / "out")
    assert not [key for key, value in tensors.items() if ".lora_B." in key and not value.any()]
    shared = [key for key in tensors if ".shared_expert" in key and ".lora_A." in key]
    assert {tensors[key].shape[0] for key in shared} == {3}
    if name == "deepseek_v2":
        assert tensors["base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"].shape[0] == 16
    again = finetune("--resume", "--output", "out", "--max-steps", "3", cwd=tmp_path)
    assert again.status == 0, again
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3]
    assert finetune(*given, *more, "--expert-rank", "0", "--overwrite", cwd=tmp_path).status == 0
    assert not [key for key in trained(tmp_path / "out") if ".experts." in key]


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("name", ["deepseek_v2", "qwen3_next", "glm4_moe", "qwen3_5_moe"])
def test_stock_peft_reads_it_and_trains_the_same(name: str, tmp_path: Path) -> None:
    case = next(case for case in MODELS if case.id == name)
    run = resolved(case, attention_rank=2, expert_rank=2, quantization="none", shared_expert_rank=3, **ALL_LINEAR)
    model = case.build().to(DEVICE)
    model.set_experts_implementation("moe_fused")
    ours = get_peft_model(model, lora_config(run, model))
    torch.manual_seed(1)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    ours.save_pretrained(tmp_path)
    with disabled():
        stock = PeftModel.from_pretrained(case.build().to(DEVICE), tmp_path, is_trainable=True)
    losses = []
    for each in (ours, stock):
        each.train()
        ids = tokens(device=str(each.device))
        optimizer = torch.optim.SGD([value for value in each.parameters() if value.requires_grad], lr=0.5)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][2] < losses[0][0]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "qwen3_moe",
            ("--shared-expert-rank", "4"),
            ["--shared-expert-rank: Qwen3MoeForCausalLM has no shared experts"],
        ),
        ("gpt_oss", ("--shared-expert-rank", "4"), ["--shared-expert-rank: GptOssForCausalLM has no shared experts"]),
        ("qwen3_moe", ("--shared-expert-rank", "-1"), ["--shared-expert-rank must be at least 0, got -1"]),
        (
            "qwen3_moe",
            ("--attention-modules", "all-linear", "--attention-modules", "q_proj"),
            ["--attention-modules all-linear", "give it alone"],
        ),
        (
            "qwen3_moe",
            ("--attention-modules", "lm_head"),
            ["--attention-modules lm_head: the head of the model gets no adapter"],
        ),
    ],
)
def test_refuses_layers_that_cannot_be_adapted(
    name: str, options: tuple[str, ...], words: list[str], tmp_path: Path
) -> None:
    ended = finetune(*arguments(tmp_path, name), *options, cwd=tmp_path, before=nothing_loads)
    assert_error(ended, *words)
    assert not (tmp_path / "out").exists()


# Modules that are trained in full.

FULL = ("--max-steps", "4", "--save-steps", "2", "--sequence-length", "32", "--gradient-accumulation", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "modules", "more"),
    [
        ("qwen3_moe", ("lm_head", "embed_tokens"), ()),
        ("qwen3_moe", ("lm_head", "norm"), ("--dtype", "bfloat16", "--adapter-dtype", "float32")),
        ("ernie4_5_moe", ("lm_head",), ()),
        ("gpt_oss", ("embed_tokens",), ("--quantization", "none")),
    ],
    ids=["4 bits", "two dtypes", "tied", "dense"],
)
def test_trains_modules_in_full(name: str, modules: tuple[str, ...], more: tuple[str, ...], tmp_path: Path) -> None:
    """The run keeps its best, stops and goes on as if it had not stopped, and stock PEFT has the trained modules."""
    given = (
        *arguments(tmp_path, name),
        *FULL,
        *more,
        *(word for each in modules for word in ("--modules-to-save", each)),
    )
    evaluation = ("--eval-share", "0.25", "--eval-steps", "1", "--keep-best")
    ended = finetune(*given, *evaluation, "--learning-rate", "0.01", cwd=tmp_path)
    assert ended.status == 0, ended
    out, other = tmp_path / "out", tmp_path / "other"
    tensors, base = trained(out), load_file(tmp_path / "model" / "model.safetensors")
    for module in modules:
        (key,) = (key for key in tensors if key.endswith(f"{module}.weight"))
        before = base.get(key.removeprefix("base_model.model."), base["model.embed_tokens.weight"])
        change = (tensors[key].float() - before.float()).abs().max()
        assert 0 < change < 0.1, key
        assert tensors[key].dtype == (torch.bfloat16 if "bfloat16" in more else torch.float32)
    # Again from its checkpoint.
    shutil.copytree(out, other)
    shutil.rmtree(other / "checkpoints" / "checkpoint-4")
    (other / "adapter_config.json").unlink()
    again = finetune("--resume", "--output", "other", cwd=tmp_path)
    assert again.status == 0, again
    assert losses(other) == losses(out)
    resumed = trained(other)
    assert resumed.keys() == tensors.keys()
    assert all(torch.equal(resumed[key], value) for key, value in tensors.items())
    changed = finetune("--resume", "--output", "other", "--modules-to-save", "norm", cwd=tmp_path)
    assert_error(changed, "--modules-to-save is", "cannot become")
    with disabled():
        stock = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=tensors[key].dtype), out
        )
    head, embedding = stock.get_output_embeddings(), stock.get_input_embeddings()
    for module, layer in (("lm_head", head), ("embed_tokens", embedding)):
        if module in modules:
            assert torch.equal(layer.weight.float(), tensors[_key_of(tensors, module)].float())
    assert (head.weight is embedding.weight) == (name == "ernie4_5_moe")


def _key_of(tensors: dict[str, torch.Tensor], module: str) -> str:
    return next(key for key in tensors if key.endswith(f"{module}.weight"))


def test_modules_in_full_are_counted() -> None:
    case = BY_ID["qwen3_moe"]
    plain = resolved(case, quantization="none")
    full = resolved(case, quantization="none", modules_to_save=["lm_head", "embed_tokens"], adapter_dtype="bfloat16")
    before, after = (plan_run(run, plain_text=False).prediction for run in (plain, full))
    model = case.build()
    elements = 2 * model.lm_head.weight.numel()
    assert after.trainable - before.trainable == elements
    assert after.parts["modules trained in full"] == 4 * elements  # in the dtype of the model, as PEFT has them
    assert after.parts["adapters"] == before.parts["adapters"] // 2
    # bitsandbytes keeps the state of embeddings in 32 bits.
    sizes = sizes_of(model)
    states = {}
    for embeds in (False, True):
        work = Workload(optimizer="adamw_8bit", whole=(Whole(1 << 20, embeds=embeds),))
        states[embeds] = predict(sizes, work).parts["optimizer state"]
    assert states[True] - states[False] == 2 * (3 << 20) - 8 * (1 << 20) // 256
    # A module that is trained in full has no adapter beside.
    linear = resolved(case, quantization="none", modules_to_save=["q_proj"])
    adapted = get_peft_model(model, lora_config(linear, model))
    assert plan_run(linear, plain_text=False).prediction.trainable == adapted.get_nb_trainable_parameters()[0]


def test_tied_embeddings_count_once() -> None:
    runs = [
        resolved(BY_ID["ernie4_5_moe"], modules_to_save=names) for names in (["lm_head"], ["lm_head", "embed_tokens"])
    ]
    assert runs[0].whole.tensors == runs[1].whole.tensors == (Whole(64 * 40, embeds=True, scores=True),)


@pytest.mark.parametrize(
    ("modules", "more", "words"),
    [
        ("experts", (), ["--modules-to-save: experts", "--expert-rank gives them adapters"]),
        ("mlp", (), ["--modules-to-save: mlp cannot be trained in full", "--expert-rank gives them adapters"]),
        ("gate", (), ["--modules-to-save: gate is a router", "--router-rank gives it an adapter"]),
        ("head", (), ["--modules-to-save: Qwen3MoeForCausalLM has no module head, it can be embed_tokens", "lm_head"]),
        ("self_attn", (), ["--modules-to-save: self_attn has parts", "q_proj"]),
        ("q_proj", (), ["--modules-to-save: q_proj is in 4 bits", "--attention-modules", "--quantization none"]),
        ("lm_head", ("--dtype", "float16"), ["--modules-to-save", "--dtype float16", "bfloat16"]),
        ("", (), ["--modules-to-save must name a module"]),
    ],
)
def test_refuses_modules_that_cannot_be_trained_in_full(
    modules: str, more: tuple[str, ...], words: list[str], tmp_path: Path
) -> None:
    given = (*arguments(tmp_path, "qwen3_moe"), "--modules-to-save", modules, *more)
    assert_error(finetune(*given, cwd=tmp_path, before=nothing_loads), *words)
    assert not (tmp_path / "out").exists()
