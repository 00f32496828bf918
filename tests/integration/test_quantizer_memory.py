"""How much memory quantizing on loading takes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .four_bit import build

_LOAD = """
import json, sys, threading, time
import torch
import moe_fused
from transformers import BitsAndBytesConfig, Qwen3MoeForCausalLM

def resident():
    # Without the pages of the checkpoint that are mapped, which the system takes back when it needs them.
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

moe_fused.enable()
options = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
load = lambda path: Qwen3MoeForCausalLM.from_pretrained(
    path, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
)
load(sys.argv[2])  # imports everything
before, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1])
done = True
thread.join()
print(json.dumps({"growth": peak - before, "model": model.get_memory_footprint()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_near_the_4_bit_size(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 16, "num_hidden_layers": 12}
    dense = build(**sizes)
    dense.save_pretrained(tmp_path / "large")
    build().save_pretrained(tmp_path / "small")
    dense_bytes = dense.get_memory_footprint()
    layer = sum(p.nbytes for p in dense.model.layers[0].mlp.experts.parameters())
    del dense
    arguments = [sys.executable, "-c", _LOAD, tmp_path / "large", tmp_path / "small"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["model"] < 0.3 * dense_bytes
    # A layer for what is worked on, a layer for what the allocator keeps.
    assert measured["growth"] < measured["model"] + 2 * layer < 0.5 * dense_bytes, (
        f"{measured}, dense {dense_bytes}, a layer {layer}"
    )
