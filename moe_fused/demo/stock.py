"""Loads the fine-tuned model with Transformers and PEFT alone: ``python stock.py``, which needs nothing else.

The demo puts this script beside its other files. Both layouts of the adapter are loaded onto the dequantized weights of the
4-bit model, and their logits are compared with those of moe_fused over 4-bit weights.
"""

from __future__ import annotations

import logging as python_logging
import sys
import warnings
from pathlib import Path

import torch

# PEFT imports bitsandbytes, which on some processors warns that it has no kernel for 4-bit weights. There are none here.
for library in ("bitsandbytes", "kernels"):
    python_logging.getLogger(library).setLevel(python_logging.ERROR)

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).parent
# Paths relative to this file. PEFT reads both: its own layout of fused experts, and a matrix for each expert.
ADAPTERS = {"peft-fused": "adapter", "per-expert": "adapter/per-expert"}


@torch.no_grad()
def logits(adapter: str, tokens: Tensor) -> Tensor:
    """Computes the logits (B, L, V) of the model with an adapter for token ids (B, L)."""
    model = AutoModelForCausalLM.from_pretrained(HERE / "model-dequantized", experts_implementation="eager")
    return PeftModel.from_pretrained(model, HERE / adapter).to(tokens.device).eval()(tokens, use_cache=False).logits


def main(device: str = "cpu", save: str | None = None) -> None:
    """Prints the largest difference for each layout.

    Args:
        device: the device to run on.
        save: a file to write the logits to, by layout.
    """
    logging.disable_progress_bar()
    # PEFT compares patterns with modules only, and not with the parameters that an adapter of experts names.
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
    probe = {name: tensor.to(device) for name, tensor in load_file(HERE / "probe.safetensors").items()}
    stock = {layout: logits(adapter, probe["tokens"]) for layout, adapter in ADAPTERS.items()}
    if save is not None:
        save_file(stock, save)
    for layout, adapted in stock.items():
        difference = (adapted - probe["logits"]).abs().max().item()
        print(f"{layout}: largest logit difference from moe_fused over 4-bit weights {difference:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
