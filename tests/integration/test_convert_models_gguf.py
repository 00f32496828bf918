"""A converted model is what llama.cpp's converter takes, by the names that its ``gguf`` package has for it.

That converter stacks the experts of a dense checkpoint with a matrix for each, maps the names and writes what comes out;
these tests do the same with the package it rests on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_fused.checkpoints.models import convert_model

from .four_bit import build, load, v4_checkpoint
from .saved import tensors_of

gguf: Any = pytest.importorskip("gguf")

pytestmark = pytest.mark.usefixtures("enabled")


def write_gguf(path: Path, tensors: dict[str, Tensor], layers: int, experts: int) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, layers)
    merged: dict[str, dict[int, Tensor]] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.weight", key)
        name, place = (f"{match[1]}.{match[3]}.weight", int(match[2])) if match else (key, -1)
        merged.setdefault(name, {})[place] = value
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(layers)
    writer.add_expert_count(experts)
    for name, parts in merged.items():
        value = parts[-1] if -1 in parts else torch.stack([parts[expert] for expert in range(experts)])
        mapped = names.get_name(name, try_suffixes=(".weight",))
        assert mapped is not None, f"llama.cpp does not know {name}"
        writer.add_tensor(
            mapped,
            value.contiguous().view(torch.uint8).numpy(),
            raw_shape=(*value.shape[:-1], value.shape[-1] * 2),
            raw_dtype=gguf.GGMLQuantizationType.BF16,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("source", ["fused", "4-bit fused"])
def test_gguf(source: str, tmp_path: Path) -> None:
    original = build()
    original.save_pretrained(tmp_path / "dense")
    state: dict[str, Tensor] = original.state_dict()
    if source == "fused":
        convert_model(tmp_path / "dense", tmp_path / source, "fused")
        convert_model(tmp_path / source, tmp_path / "hf", "per-expert", dtype=torch.bfloat16)
    else:
        v4_checkpoint(tmp_path / "dense", tmp_path / "v4")
        convert_model(tmp_path / "v4", tmp_path / source, "fused")
        convert_model(tmp_path / source, tmp_path / "hf", "per-expert", dtype=torch.bfloat16, dequantize=True)
        state = load(tmp_path / "v4", dtype=torch.bfloat16).dequantize().cpu().state_dict()
    write_gguf(tmp_path / "model.gguf", tensors_of(tmp_path / "hf"), layers=2, experts=6)

    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}

    def values(name: str) -> np.ndarray:
        assert read[name].tensor_type == gguf.GGMLQuantizationType.BF16
        return np.asarray(read[name].data)

    def same(name: str, want: Tensor) -> bool:
        # GGUF lists dimensions from the fastest.
        return read[name].shape.tolist() == list(want.shape)[::-1] and np.array_equal(
            values(name), want.contiguous().view(torch.uint8).numpy()
        )

    assert same("token_embd.weight", state["model.embed_tokens.weight"])
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up = state[f"{experts}.gate_up_proj"].chunk(2, dim=1)
        assert same(f"blk.{layer}.ffn_gate_exps.weight", gate)
        assert same(f"blk.{layer}.ffn_up_exps.weight", up)
        assert same(f"blk.{layer}.ffn_down_exps.weight", state[f"{experts}.down_proj"])
        assert same(f"blk.{layer}.ffn_gate_inp.weight", state[f"model.layers.{layer}.mlp.gate.weight"])
    assert len(read) == len(state) + 2  # gate and up are separate
