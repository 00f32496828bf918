"""vLLM, SGLang and llama.cpp read what ``moe-fused convert adapter`` exports, and get the weights that were trained.

``make test-readers`` runs these tests. They need a package index.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from moe_fused.checkpoints.adapters import Layout, ScalingChoice
from moe_fused.checkpoints.adapters.convert import convert_adapter
from tests.integration.adapters import deltas, peft_adapter
from tests.integration.models import QWEN3_MOE

from . import environments
from .environments import HERE, Environment

pytestmark = [pytest.mark.readers, pytest.mark.slow]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DOWN = ["mlp.experts.down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA, ranks and alphas that differ": {
        "use_rslora": True,
        "rank_pattern": {"mlp.experts.gate_up_proj": 5, "q_proj": 2},
        "alpha_pattern": {"mlp.experts.down_proj": 7},
    },
    "down_proj only": {"target_parameters": DOWN},
}
RANK = "8"  # of the buffers; the adapters have smaller ones


class Exported:
    """An adapter of stock PEFT, its export, its model, and what it adds to the experts' weights."""

    def __init__(self, directory: Path, options: dict[str, Any]) -> None:
        self.source, self.export, self.model = directory / "source", directory / "export", directory / "model"
        self.result = directory / "result.safetensors"
        peft_adapter(self.source, **{"target_modules": ATTENTION, "modules_to_save": None, **options})
        convert_adapter(self.source, self.export, to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED)
        QWEN3_MOE.build().save_pretrained(self.model)
        self.truth = deltas(self.source, Layout.PEFT_FUSED)

    def compare(self) -> None:
        got = load_file(self.result)
        for layer in range(2):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                name = f"{layer}.{projection}"
                truth = self.truth.get(name, torch.zeros_like(got[name]))
                # Folding the scaling rounds lora_B once, to float32.
                torch.testing.assert_close(got[name], truth, rtol=0, atol=1e-6)


@pytest.fixture(params=OPTIONS)
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Exported:
    return Exported(tmp_path, OPTIONS[request.param])


@pytest.fixture(scope="module")
def vllm() -> Environment:
    return environments.vllm()


@pytest.fixture(scope="module")
def sglang() -> Environment:
    return environments.sglang()


def test_vllm(exported: Exported, vllm: Environment) -> None:
    vllm.run(HERE / "read_vllm.py", exported.export, exported.model, RANK, "2d", exported.result)
    exported.compare()


def test_vllm_reads_stacks(tmp_path: Path, vllm: Environment) -> None:
    """With enable_mixed_moe_lora_format, vLLM reads PEFT's own file, patterns and rsLoRA included."""
    exported = Exported(tmp_path, OPTIONS["rsLoRA, ranks and alphas that differ"])
    vllm.run(HERE / "read_vllm.py", exported.source, exported.model, RANK, "3d", exported.result)
    exported.compare()


def test_sglang(exported: Exported, sglang: Environment) -> None:
    sglang.run(HERE / "read_sglang.py", exported.export, exported.model, RANK, exported.result)
    exported.compare()


@pytest.mark.parametrize("reader", ["vllm", "sglang"])
def test_what_an_export_is_for(reader: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Without what an export adds, a reader fails: vLLM wants all three projections, SGLang one rank and one scaling."""
    environment: Environment = request.getfixturevalue(reader)
    name = "down_proj only" if reader == "vllm" else "rsLoRA, ranks and alphas that differ"
    exported = Exported(tmp_path, OPTIONS[name])
    kept = tmp_path / "kept"
    convert_adapter(exported.source, kept, to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED, scaling=ScalingChoice.KEEP)
    layout = ["2d"] if reader == "vllm" else []
    with pytest.raises(AssertionError, match=r"assert w1_lora is not None|Sizes of tensors must match"):
        environment.run(HERE / f"read_{reader}.py", kept, exported.model, RANK, *layout, exported.result)


def test_llama_cpp(exported: Exported, tmp_path: Path) -> None:
    """llama.cpp's own converter takes the export. At run time llama.cpp multiplies with alpha / rank of each tensor."""
    environment = environments.llama_cpp()
    converter, file = environment.directory / "converters" / "convert_lora_to_gguf.py", tmp_path / "adapter.gguf"
    environment.run(converter, "--base", exported.model, "--outfile", file, exported.export)
    reader = GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()).double() for tensor in reader.tensors}
    got = {}
    for layer in range(2):
        for leaf in ("gate", "up", "down"):
            name = f"blk.{layer}.ffn_{leaf}_exps.weight"
            a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            got[f"{layer}.{leaf}_proj"] = alpha / a.shape[1] * b @ a
    save_file(got, exported.result)
    exported.compare()
