"""What recurrent layers keep for their backward: the plan's formulas against what autograd keeps, for each kind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import JambaConfig

from benchmarks.models import BY_NAME as PUBLISHED
from moe_fused import diagnosis, memory, recurrent
from moe_fused.diagnosis import Status
from moe_fused.finetune.options import Options
from moe_fused.finetune.plan import MemoryPlan, plan_run
from moe_fused.finetune.resolve import set_up
from moe_fused.memory import GIB, Workload, predict, sizes_of, skeleton
from moe_fused.recurrent import KINDS, GatedDeltaNet, Mamba2, ShortConvolution, recurrent_layers
from tests.support import REPOSITORY

from .four_bit import BY_ID
from .test_memory import kept_for_backward

# Sizes of heads and chunks in the proportions of published models; Gated DeltaNet's chunks have 64 tokens in any model.
DELTA = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
NEMOTRON = {"layers_block_type": ["mamba", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 32}
CASES: dict[str, tuple[str, dict[str, Any], type]] = {
    "qwen3_next": ("qwen3_next", DELTA | {"linear_num_value_heads": 4}, GatedDeltaNet),
    "qwen3_next, as many keys as values": ("qwen3_next", DELTA, GatedDeltaNet),
    "qwen3_5_moe": ("qwen3_5_moe_linear", DELTA, GatedDeltaNet),
    "granitemoehybrid": (
        "granitemoehybrid",
        MAMBA | {"mamba_d_state": 32, "mamba_chunk_size": 64, "mamba_expand": 4, "hidden_size": 32},
        Mamba2,
    ),
    "nemotron_h": ("nemotron_h", NEMOTRON | {"chunk_size": 32}, Mamba2),
    "lfm2_moe": ("lfm2_moe", {}, ShortConvolution),
}


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, as long as they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, Any] = {}
        self.bytes = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]:
            if storage._cdata not in self.known and storage._cdata not in self.alive:
                self.bytes += storage.nbytes()
                self.most = max(self.most, self.bytes)
                self.alive[storage._cdata] = weakref.ref(storage, self.forget(storage._cdata, storage.nbytes()))
        return made

    def forget(self, key: int, size: int) -> Any:
        def freed(_: Any) -> None:
            self.bytes -= size
            del self.alive[key]

        return freed


def mixer_of(name: str, dtype: torch.dtype) -> nn.Module:
    id_, options, _ = CASES[name]
    with torch.device("meta"):
        model = BY_ID[id_].build(**options)
    ends = tuple(KINDS)
    mixer = next(module for module in model.modules() if type(module).__name__.endswith(ends))
    mixer = mixer.to_empty(device="cpu").to(dtype).train().requires_grad_(False)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return mixer


def kept_by(mixer: nn.Module, hidden: Tensor) -> int:
    """Bytes of the distinct tensors that autograd keeps of a forward, beside parameters and input."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*mixer.parameters(), hidden]}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # alive, or another tensor would get the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = mixer(hidden)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def peak_of(mixer: nn.Module, hidden: Tensor) -> int:
    gc.collect()
    with Peak([*mixer.parameters(), *mixer.buffers(), hidden]) as peak:
        output = mixer(hidden)
        output.backward(torch.ones_like(output))
    return peak.most


def workloads(dtype: torch.dtype) -> Iterator[Workload]:
    # Whole chunks and others, so that padding counts.
    for batch, length in ((1, 256), (1, 200), (2, 128)):
        yield Workload(batch=batch, length=length, itemsize=dtype.itemsize, gpu=False)


in_plain_torch = pytest.mark.skipif(
    bool(recurrent.packages()), reason="packages for GPUs take the place of plain torch"
)


@in_plain_torch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_a_mixer_keeps_and_makes(name: str, dtype: torch.dtype) -> None:
    mixer = mixer_of(name, dtype)
    sizes = CASES[name][2].of(mixer)
    for work in workloads(dtype):
        hidden = torch.randn(work.batch, work.length, mixer.out_proj.out_features, dtype=dtype, requires_grad=True)
        assert sizes.kept(work) == pytest.approx(kept_by(mixer, hidden), rel=0.05), work
        predicted = sizes.kept(work) + sizes.made(work) + hidden.nbytes
        assert predicted == pytest.approx(peak_of(mixer, hidden), rel=0.12), work


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["qwen3-next-80b-a3b", "qwen3.5-122b-a10b", "granite-4.0-h-tiny"])
def test_at_full_size_on_a_gpu(name: str) -> None:
    """Counts what torch's allocator holds, with the packages that are installed or in plain torch."""
    model = skeleton(PUBLISHED[name].config())
    (kind,) = recurrent_layers(model)
    mixer = model.get_submodule(kind.paths[0]).to_empty(device="cuda").bfloat16().train().requires_grad_(False)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.02)
    work = Workload(length=4096, packages=recurrent.packages())
    features = mixer.out_proj.out_features
    hidden = torch.randn(1, work.length, features, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    for _ in range(2):  # the first pass compiles kernels and makes workspaces
        hidden.grad = None
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = mixer(hidden)
        kept = torch.cuda.memory_allocated() - before - output.nbytes
        output.backward(torch.ones_like(output))
        del output
        peak = torch.cuda.max_memory_allocated() - before
    assert kind.mixer.kept(work) == pytest.approx(kept, rel=0.05)
    assert kind.mixer.kept(work) + kind.mixer.made(work) + hidden.nbytes == pytest.approx(peak, rel=0.12)


# --- which package computes a layer


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that seem to be installed; a test fills it."""
    names: set[str] = set()
    monkeypatch.setattr(recurrent, "_has", lambda module, _: module.partition(".")[0] in names)
    return names


def plan_of(id_: str, device: str = "cuda", **options: Any) -> MemoryPlan:
    _, sizes, _ = CASES.get(id_, ("", {}, None))
    config = BY_ID[id_].build(**sizes, max_position_embeddings=512).config
    options = {"sequence_length": 512, "memory_limit": 1000, "liger": False, **options}
    return plan_run(set_up(Options(model="m", **options), config, torch.device(device)), plain_text=False)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_package_keeps_less(checkpointing: bool) -> None:
    """With checkpointing one layer counts, and without it all 36 recurrent ones."""
    sizes = sizes_of(skeleton(PUBLISHED["qwen3-next-80b-a3b"].config()))
    (delta,) = sizes.recurrent
    work = Workload(checkpointing=checkpointing)
    fused = replace(work, packages=frozenset({"fla"}))
    convolved = replace(work, packages=frozenset({"fla", "causal_conv1d"}))
    totals = [predict(sizes, each).total for each in (work, fused, convolved)]
    assert totals == sorted(totals, reverse=True)
    less = delta.mixer.kept(work) - delta.mixer.kept(fused)
    assert less > 0.7 * GIB
    if checkpointing:
        assert totals[0] - totals[1] == pytest.approx(less, abs=0.3 * GIB)  # what is made beside differs, too
    else:
        assert totals[0] - totals[1] == pytest.approx(36 * less, rel=0.01)


def test_a_cpu_has_no_kernels(there: set[str]) -> None:
    there.add("fla")
    assert plan_of("qwen3_next").run.packages == {"fla"}
    assert plan_of("qwen3_next", "cpu").run.packages == frozenset()


def test_the_plan_says_what_computes_recurrent_layers(there: set[str]) -> None:
    (note,) = plan_of("qwen3_next").notes
    assert note.startswith("note: Transformers computes 1 layer of Gated DeltaNet in plain torch, and each keeps ")
    assert "`pip install flash-linear-attention`" in note
    (said,) = plan_of("qwen3_next", "cpu").notes  # where the package has no kernels
    assert said.startswith("Transformers computes 1 layer of Gated DeltaNet in plain torch")
    assert "pip" not in said
    there.add("fla")
    assert plan_of("qwen3_next").notes == ("flash-linear-attention computes 1 layer of Gated DeltaNet",)
    assert plan_of("qwen3_moe").notes == ()


def test_the_package_for_mamba_reads_dense_weights_only(there: set[str]) -> None:
    (in_4bit,) = plan_of("granitemoehybrid").notes
    (dense,) = plan_of("granitemoehybrid", quantization="none").notes
    assert "pip" not in in_4bit
    assert "`pip install mamba-ssm`" in dense
    there.add("mamba_ssm")
    assert plan_of("granitemoehybrid", quantization="none").notes == ("mamba-ssm computes 1 layer of Mamba-2",)
    words = "mamba-ssm computes 1 layer of Mamba-2 and cannot read their weights in 4 bits: uninstall it"
    with pytest.raises(ValueError, match=words):
        plan_of("granitemoehybrid")


def test_transformers_takes_the_functions_that_the_plan_asks_for(tmp_path: Path) -> None:
    """A package that has the function by its name and place replaces Transformers' own."""
    for package, (module, name) in recurrent.FUNCTIONS.items():
        parts = module.split(".")
        for number in range(1, len(parts)):
            (tmp_path / Path(*parts[:number])).mkdir(exist_ok=True)
            (tmp_path / Path(*parts[:number]) / "__init__.py").touch()
        path = tmp_path / Path(*parts)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        path.write_text(f"def {name}(*args, **kwargs):\n    raise SystemExit({package!r} + ' was called')\n")
    program = """
        import torch
        from tests.integration.test_recurrent import mixer_of
        from moe_fused.recurrent import packages
        assert packages() == {"fla", "mamba_ssm", "causal_conv1d"}
        for name in ("qwen3_next", "granitemoehybrid"):
            mixer = mixer_of(name, torch.float32)
            try:
                mixer(torch.zeros(1, 4, mixer.out_proj.out_features))
            except SystemExit as called:
                print(called)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.split("\n")[:2] == ["causal_conv1d was called", "mamba_ssm was called"], run.stderr


# --- the sizes of models


def test_recurrent_layers_of_a_model() -> None:
    config = BY_ID["qwen3_next"].build(num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"])
    (delta,) = sizes_of(config).recurrent
    assert delta.paths == tuple(f"model.layers.{index}.linear_attn" for index in range(3))
    assert delta.mixer == GatedDeltaNet(2, 2, 8, 8, 4, is_joined=True)
    assert not delta.is_alone
    (mamba,) = recurrent_layers(BY_ID["nemotron_h"].build(**NEMOTRON))
    assert mamba.is_alone
    assert sizes_of(BY_ID["qwen3_moe"].build()).recurrent == ()


def test_linear_layers_of_a_mixer_count_once() -> None:
    """What a mixer keeps of its projections is in its own formula, not with the linear layers beside attention."""
    attention, mamba = (
        sizes_of(BY_ID["granitemoehybrid"].build(layer_types=types))
        for types in (["attention", "attention"], ["mamba", "mamba"])
    )
    assert attention.mlp == mamba.mlp > 0


def test_without_checkpointing_every_recurrent_layer_keeps_its_own() -> None:
    _, options, _ = CASES["qwen3_next"]
    work = Workload(length=256, checkpointing=False)
    kept = {}
    for layers in (1, 2, 3):
        types = ["linear_attention"] * layers + ["full_attention"]
        sizes = sizes_of(
            BY_ID["qwen3_next"].build(**{**options, "num_hidden_layers": layers + 1, "layer_types": types})
        )
        kept[layers] = predict(sizes, work).parts["activations"]
    (delta,) = sizes.recurrent
    assert kept[3] - kept[2] == kept[2] - kept[1] > delta.mixer.kept(work)
    once = list(memory._layers(sizes, replace(work, checkpointing=True)))
    assert [each.number for each in once] == [1, 3]
    assert once[1].backward["layer"] > delta.mixer.kept(work)
    assert once[1].kept == 256 * sizes.hidden * work.itemsize


def test_recurrent_layers_of_unknown_kinds_are_named() -> None:
    """The plan says of which layers it does not know what they keep."""
    config = JambaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1,
        expert_layer_offset=0, mamba_d_state=8, mamba_dt_rank=4,
    )  # fmt: skip
    sizes = sizes_of(skeleton(config))
    assert sizes.recurrent == ()
    assert len(sizes.uncounted) == 1
    options = Options(model="m", sequence_length=64, quantization="none")
    (note,) = plan_run(set_up(options, config, torch.device("cpu")), plain_text=False).notes
    assert note.startswith(f"note: the plan does not count what layers of type {sizes.uncounted[0]} keep")
    for case in BY_ID.values():
        assert sizes_of(case.build()).uncounted == (), case.id


@in_plain_torch
@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("qwen3_next", ("in_proj_qkvz", "out_proj")),
        ("qwen3_5_moe", ("in_proj_qkv", "out_proj")),
        ("granitemoehybrid", ("o_proj",)),
    ],
)
def test_what_a_recurrent_layer_keeps(name: str, modules: tuple[str, ...]) -> None:
    """A layer with experts and adapters keeps as much as predicted. The difference between two layers and one shows it."""
    id_, options, _ = CASES[name]
    recurrent_type, other = options["layer_types"]
    kept, predicted = {}, {}
    for layers in (1, 2):
        types = [recurrent_type] * layers + [other]
        sizes_given = {**options, "num_hidden_layers": layers + 1, "layer_types": types, "max_position_embeddings": 256}
        model = BY_ID[id_].build(**sizes_given).float()
        model.set_experts_implementation("moe_fused")
        sizes = sizes_of(model)
        lora = LoraConfig(r=4, target_modules=list(modules))
        model = get_peft_model(model, lora).train()
        model.enable_input_require_grads()
        tokens = torch.randint(3, 60, (1, 192), generator=torch.Generator().manual_seed(0))
        kept[layers] = kept_for_backward(model.base_model.model.model, tokens)
        work = Workload(
            length=192, itemsize=4, adapter_itemsize=4, attention_rank=4, attention_modules=modules, expert_rank=0,
            checkpointing=False, quantized=False, fused_norms=False, gpu=False,
        )  # fmt: skip
        predicted[layers] = predict(sizes, work).parts["activations"]
    assert predicted[2] - predicted[1] == pytest.approx(kept[2] - kept[1], rel=0.07)


def test_doctor_names_the_packages(there: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there.add("mamba_ssm")
    checks = {check.name: check for check in diagnosis._recurrent()}
    assert checks["Mamba-2"].found == "in mamba-ssm"
    delta = checks["Gated DeltaNet"]
    assert (delta.status, delta.found) == (Status.ABSENT, "in plain torch, which takes more memory and time")
    assert str(delta.advice).endswith("pip install flash-linear-attention")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [check.found for check in diagnosis._recurrent()] == ["in plain torch, as there is no GPU"]
