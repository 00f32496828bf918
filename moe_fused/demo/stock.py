"""The fine-tuned model in stock Transformers and PEFT, as a script that needs nothing else: ``python stock.py``.

Stands among what the demo wrote. Both layouts of the adapter go onto the dequantized weights of the 4-bit model, and their
logits are compared with those that moe_fused gave over the 4 bits.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).parent
# Relative to this file. PEFT reads both: its own layout of fused experts, and a matrix for each expert.
ADAPTERS = {"peft-fused": "adapter", "per-expert": "adapter/per-expert"}


@torch.no_grad()
def logits(adapter: str, tokens: Tensor) -> Tensor:
    """Of the model with an adapter, for token ids (B, L): (B, L, V)."""
    model = AutoModelForCausalLM.from_pretrained(HERE / "model-dequantized", experts_implementation="eager")
    return PeftModel.from_pretrained(model, HERE / adapter).to(tokens.device).eval()(tokens, use_cache=False).logits


def main(device: str = "cpu", save: str | None = None) -> None:
    """Prints the largest difference for each layout.

    Args:
        device: to run on.
        save: file to write the logits to, by layout.
    """
    logging.disable_progress_bar()
    # PEFT looks for patterns among modules only, not among the parameters that an adapter of experts names.
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
    probe = {name: tensor.to(device) for name, tensor in load_file(HERE / "probe.safetensors").items()}
    stock = {layout: logits(adapter, probe["tokens"]) for layout, adapter in ADAPTERS.items()}
    if save is not None:
        save_file(stock, save)
    for layout, own in stock.items():
        difference = (own - probe["logits"]).abs().max().item()
        print(f"{layout}: largest logit difference from moe_fused over 4-bit weights {difference:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
