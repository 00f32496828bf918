"""What is wrong with a model that cannot be converted, said in one line before anything is written."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_fused.checkpoints.models import convert_model

from .four_bit import BY_ID, build, load, rewrite, same_state, stacks, v4_checkpoint
from .models import GPT_OSS
from .saved import config_of, same_tensors, tensors_of

pytestmark = pytest.mark.usefixtures("enabled")

EXPERTS = "model.layers.0.mlp.experts"
UP = f"{EXPERTS}.3.up_proj.weight"

Change = Callable[[dict[str, Tensor]], object]


def refuse(
    message: str, source: Path, layout: Any = "fused", error: type[Exception] = ValueError, **options: Any
) -> None:
    """Converting ``source`` must raise ``error`` with one line that matches, and leave nothing behind."""
    target = source.parent / "target"
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        convert_model(source, target, layout, **options)
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.rglob("*")) == before


def changed(source: Path, target: Path, change: Change) -> Path:
    def apply(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(tensors)
        return tensors

    rewrite(source, target, apply)
    return target


def fuse_layer(tensors: dict[str, Tensor]) -> None:
    """The first layer in the original project's layout, the second as it was."""
    stacked = {key: value for key, value in stacks(tensors).items() if ".layers.0." in key}
    for key in [key for key in tensors if key.startswith(f"{EXPERTS}.")]:
        del tensors[key]
    tensors.update(stacked)


DENSE: dict[str, tuple[Change, str]] = {
    "missing expert": (lambda tensors: tensors.pop(UP), rf"{UP} is missing from the checkpoint"),
    "missing stack": (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.0" in key and "down_proj" in key],
        rf"{EXPERTS}\.down_proj is missing from the checkpoint, in every layout that is known",
    ),
    "transposed": (
        lambda tensors: tensors.update({UP: tensors[UP].mT.contiguous()}),
        rf"{UP} must have shape \(32, 64\), got \(64, 32\)",
    ),
    "another dtype": (
        lambda tensors: tensors.update({UP: tensors[UP].half()}),
        rf"{UP} must be of the dtype of .*, BF16, got F16",
    ),
    "integers": (
        lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}),
        rf"{UP} must be bfloat16, float16 or float32, or have an absmax, got I8 without",
    ),
    "one expert too many": (
        lambda tensors: tensors.update({UP.replace(".3.", ".6."): tensors[UP].clone()}),
        r"experts\.6\.up_proj\.weight belongs to expert 6, but .*gate_up_proj has 6 experts",
    ),
    "unknown tensor of experts": (
        lambda tensors: tensors.update({UP.replace("weight", "weight_scale_inv"): torch.ones(1)}),
        rf"{EXPERTS}\.3\.up_proj\.weight_scale_inv belongs to experts that Qwen3MoeForCausalLM does not have",
    ),
    "a layer that the model has not": (
        lambda tensors: tensors.update({UP.replace("layers.0", "layers.7"): tensors[UP].clone()}),
        r"layers\.7\.mlp\.experts\.3\.up_proj\.weight belongs to experts that",
    ),
    "two layouts in two layers": (
        fuse_layer,
        r"experts must be in one layout, got \S+layers\.\d\S+ and \S+layers\.\d\S+$",
    ),
    "two layouts in one layer": (
        lambda tensors: tensors.update({f"{EXPERTS}.down_proj": torch.zeros(6, 64, 32)}),
        rf"{EXPERTS}\.down_proj must be in one layout, got .* and ",
    ),
    "4-bit unannounced": (
        lambda tensors: tensors.update({f"{UP}.absmax": torch.zeros(1)}),
        rf"{UP}\.absmax belongs to 4-bit weights, but config.json has no quantization_config",
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, dense: Path, tmp_path: Path) -> None:
    change, message = DENSE[name]
    refuse(message, changed(dense, tmp_path / "bad", change))


def test_fused_and_stacked_of_a_wrong_shape(dense: Path, tmp_path: Path) -> None:
    for layout, key, shape in (
        ("fused", f"{EXPERTS}.gate_up_proj", (6, 64, 64)),
        ("original", "model.layers.0.mlp.up_proj.weight", (6, 32, 64)),
    ):
        convert_model(dense, tmp_path / layout, layout)
        bad = changed(
            tmp_path / layout, tmp_path / f"bad {layout}", lambda t, key=key: t.update({key: t[key][:5].clone()})
        )
        refuse(rf"{key} must have shape {re.escape(str(shape))}, got \(5, ", bad, "per-expert")


STATE = f"{UP}.quant_state.bitsandbytes__nf4"
PACKED: dict[str, tuple[Change, str]] = {
    "no weight": (lambda tensors: tensors.pop(UP), rf"{UP} is missing"),
    "no absmax": (lambda tensors: tensors.pop(f"{UP}.absmax"), rf"{UP}\.absmax is missing"),
    "no quant_state": (lambda tensors: tensors.pop(STATE), rf"{STATE} \(or fp4\) is missing"),
    "truncated": (
        lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}),
        rf"{UP} must have 1024 values of uint8, got 1023",
    ),
    "not JSON": (lambda tensors: tensors.update({STATE: tensors[STATE][:-1].clone()}), rf"{STATE} must hold JSON"),
    "foreign quant_map": (
        lambda tensors: tensors.update({f"{UP}.quant_map": tensors[f"{UP}.quant_map"] * 2}),
        rf"{UP}\.quant_map must hold bitsandbytes' own values",
    ),
    "unknown part": (
        lambda tensors: tensors.update({f"{UP}.absmin": torch.zeros(1)}),
        rf"{UP}\.absmin is not a tensor of nf4 weights",
    ),
    "a wide integer": (
        lambda tensors: tensors.update({f"{UP}.absmax": tensors[f"{UP}.absmax"].long()}),
        rf"{UP}\.absmax must be bfloat16, float16, float32 or uint8, got safetensors' I64",
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed(name: str, v4: Path, tmp_path: Path) -> None:
    change, message = PACKED[name]
    quantization = config_of(v4)["quantization_config"]
    bad = changed(v4, tmp_path / "bad", change)
    assert config_of(bad)["quantization_config"] == quantization
    refuse(message, bad)


def test_a_module_half_in_4_bits(dense: Path, tmp_path: Path) -> None:
    v4_checkpoint(dense, tmp_path / "half", only="(down|q|k|v|o)_proj")
    refuse(r"experts\.\w+_proj and .*experts\.\w+_proj must both be of 4-bit weights, or neither", tmp_path / "half")


def test_original_layout_of_double_quantization(v4: Path, tmp_path: Path) -> None:
    rewrite(v4, tmp_path / "v4", dict)
    refuse(
        r"^model\.layers\.\d\.mlp\.experts\.\w+ cannot be written in the original project's layout: "
        r".* give --dequantize or --to fused$",
        tmp_path / "v4",
        "original",
    )


def test_models_with_one_layout(tmp_path: Path) -> None:
    build(GPT_OSS).save_pretrained(tmp_path / "gpt_oss")
    refuse(r"of GptOssExperts is transposed, or gate and up alternate", tmp_path / "gpt_oss")
    build(BY_ID["granitemoe"]).save_pretrained(tmp_path / "granitemoe")
    refuse(r"cannot be written per expert: Transformers knows no such", tmp_path / "granitemoe", "per-expert")
    refuse(r"the original project's layout is for Qwen3-MoE, not for a GraniteMoe", tmp_path / "granitemoe", "original")
    values = config_of(tmp_path / "granitemoe") | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "granitemoe" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    refuse(r"holds a Qwen3ForCausalLM, which has no experts that could be converted", tmp_path / "granitemoe")


# Files.


def test_files_of_the_source(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    plan = convert_model(dense, source, "per-expert", max_shard_size=20_000)
    first, second, *_ = sorted(plan.shards)
    key = plan.shards[first][0]
    index = source / "model.safetensors.index.json"
    text, data = index.read_text(encoding="utf-8"), (source / first).read_bytes()

    (source / first).write_bytes(data[:-1])
    refuse(rf"{first} is not a whole safetensors file", source)
    (source / first).unlink()
    refuse(rf"{first}, which holds \S+, is missing", source, error=FileNotFoundError)
    (source / first).write_bytes(data)
    weight_map = json.loads(text)["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {key: second}}), encoding="utf-8")
    refuse(rf"{re.escape(key)} is not in {second}, where", source)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != key}}), encoding="utf-8")
    refuse(rf"{re.escape(key)} is in {first}, but not in model\.safetensors\.index\.json", source)
    index.write_text("{}", encoding="utf-8")
    refuse(r"model\.safetensors\.index\.json must be JSON with a weight_map", source)
    index.unlink()
    refuse(r"has neither model\.safetensors nor model\.safetensors\.index\.json", source, error=FileNotFoundError)
    (source / "config.json").write_text('{"model_type": "unheard_of"}', encoding="utf-8")
    (source / "model.safetensors").write_bytes(data)
    refuse(
        r"config\.json describes a model that Transformers does not know: architectures \[\], model_type unheard_of",
        source,
    )
    text = json.dumps({"model_type": "qwen3_moe", "dtype": "float4"})
    (source / "config.json").write_text(text, encoding="utf-8")
    refuse(r"config\.json is not that of a model: AttributeError", source)
    (source / "config.json").write_text("{", encoding="utf-8")
    refuse(r"config\.json must be JSON", source)
    (source / "config.json").unlink()
    refuse(r"config\.json is missing: not the directory of a model", source, error=FileNotFoundError)


def test_arguments(dense: Path, v4: Path, tmp_path: Path) -> None:
    for path in (dense, v4):
        rewrite(path, tmp_path / path.name, dict)
    one, four = tmp_path / dense.name, tmp_path / v4.name
    refuse(r"layout must be one of per-expert, fused, original, got 'stacked'", one, "stacked")
    refuse(r"dtype must be bfloat16, float16 or float32, got torch\.int8", one, dtype=torch.int8)
    refuse(r"has no 4-bit tensors that could be dequantized", one, dequantize=True)
    refuse(r"dtype=torch\.float16 is for dense models: .* must be dequantized", four, dtype=torch.float16)
    refuse(r"Unit 'IB' not supported", one, max_shard_size="5GiB")
    for target in (one, one / "inside", tmp_path):
        with pytest.raises(ValueError, match="source and target must be apart"):
            convert_model(one, target, "fused", overwrite=True)


def test_targets(dense: Path, tmp_path: Path) -> None:
    rewrite(dense, tmp_path / "source", dict)
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work", encoding="utf-8")
    refuse(r"target exists: choose another path, or replace it with --overwrite", source, error=FileExistsError)
    refuse(r"target exists and has no config\.json, so that it is no", source, error=FileExistsError, overwrite=True)
    (target / "thesis.txt").unlink()
    convert_model(source, target, "fused")  # an empty directory is as good as none
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(FileExistsError, match="file exists and is not a directory"):
        convert_model(source, tmp_path / "file", "fused", overwrite=True)
    with pytest.raises(FileNotFoundError, match="cannot create the target"):
        convert_model(source, tmp_path / "nowhere" / "target", "fused")


# What happens on the way.


def test_an_error_while_writing_leaves_the_old_model(dense: Path, v4: Path, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        if 2 * done > total:
            raise OSError("no space left on device")

    convert_model(v4, tmp_path / "model", "fused")
    before = load(tmp_path / "model")
    with pytest.raises(OSError, match="no space left on device"):
        convert_model(dense, tmp_path / "model", "fused", overwrite=True, progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert same_state(load(tmp_path / "model"), before)


_KILLED = """
import os, signal, sys
from pathlib import Path
from moe_fused.checkpoints.models import convert_model

def kill(done, total):
    if 2 * done > total:
        os.kill(os.getpid(), signal.SIGKILL)

convert_model(Path(sys.argv[1]), Path(sys.argv[2]), "fused", overwrite=True, progress=kill)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_kill_while_writing_leaves_the_old_model(dense: Path, v4: Path, tmp_path: Path) -> None:
    convert_model(v4, tmp_path / "model", "fused")
    convert_model(v4, tmp_path / "copy", "fused")
    command = [sys.executable, "-c", _KILLED, dense, tmp_path / "model"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert same_tensors(tmp_path / "model", tmp_path / "copy")
    assert config_of(tmp_path / "model") == config_of(tmp_path / "copy")
    # What was begun is beside it, hidden, and in nobody's way.
    assert len([path for path in tmp_path.iterdir() if path.name.endswith(".partial")]) == 1
    convert_model(dense, tmp_path / "model", "fused", overwrite=True)
    assert tensors_of(tmp_path / "model")[f"{EXPERTS}.down_proj"].dtype == torch.bfloat16


_MEASURED = """
import json, sys, threading, time
from pathlib import Path
from moe_fused.checkpoints.models import convert_model

def resident():
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def convert(source, target, layout, **options):
    peak, done = 0, False

    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.001)

    before = resident()
    thread = threading.Thread(target=watch)
    thread.start()
    convert_model(Path(source), Path(target), layout, **options)
    done = True
    thread.join()
    return peak - before

large, small, root = sys.argv[1:]
growth = {}
for source in (small, large):  # the first imports everything
    name = f"{root}/{Path(source).name}"
    growth["4-bit to dense"] = convert(source, f"{name} fused", "fused", dequantize=True)
    growth["fused to per-expert"] = convert(f"{name} fused", f"{name} matrices", "per-expert")
    growth["per-expert to original"] = convert(f"{name} matrices", f"{name} original", "original")
    growth["4-bit to per-expert"] = convert(source, f"{name} 4-bit matrices", "per-expert")
    growth["4-bit to fused"] = convert(f"{name} 4-bit matrices", f"{name} 4-bit fused", "fused")
    growth["mxfp4 to dense"] = convert(f"{name} mxfp4", f"{name} mxfp4 dense", "fused", dequantize=True)
    growth["mxfp4 to stacks"] = convert(f"{name} mxfp4", f"{name} mxfp4 stacks", "fused")
    growth["mxfp4 to matrices"] = convert(f"{name} mxfp4 stacks", f"{name} mxfp4 matrices", "per-expert")
print(json.dumps(growth))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_less_than_a_layer(tmp_path: Path) -> None:
    import moe_fused
    from moe_fused.integrations.quantizer.published import compressed_config

    from .four_bit import config

    # A layer of 50 MB, beside which the few megabytes that the allocator keeps from one tensor to the next do not count.
    for name, sizes in {
        "large": {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 4},
        "small": {},
    }.items():
        build(**sizes).save_pretrained(tmp_path / f"{name} dense")
        model = load(tmp_path / f"{name} dense", quantization_config=config(), dtype=torch.bfloat16)
        moe_fused.save_format(model, "fused")
        model.save_pretrained(tmp_path / name)
        model = load(tmp_path / f"{name} dense", quantization_config=compressed_config("mxfp4"), dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / f"{name} mxfp4")
    layer = 16 * 3 * 1024 * 512 * 2
    command = [sys.executable, "-c", _MEASURED, tmp_path / "large", tmp_path / "small", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    growth = json.loads(result.stdout)
    # A dense model has a few megabytes in memory at a time, one in 4 bits a stack before and after.
    assert max(value for name, value in growth.items() if "4-bit" not in name) < layer / 2, f"{growth}, a layer {layer}"
    assert max(growth.values()) < layer, f"{growth}, a layer {layer}"
