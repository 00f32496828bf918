"""The model card of a run's adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .resolve import ModelSetup


def card(setup: ModelSetup, facts: Mapping[str, str]) -> str:
    """The text of the model card: what was trained on what and how, and how to load it.

    Args:
        setup: The record of the run.
        facts: What else the card tells, such as the number of steps.
    """
    options = setup.options
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    hub_ids = [part.dataset for part in options.datasets if not Path(part.dataset).exists()]
    metadata = ["library_name: peft", f"base_model: {options.model}"]
    metadata += ["\n".join(["datasets:", *(f"- {name}" for name in hub_ids)])] if hub_ids else []
    metadata += ["pipeline_tag: text-generation", "tags:\n- lora\n- moe-fused"]
    head = "\n".join(metadata)
    return f"""---
{head}
---

# Adapter for {options.model}

Trained by `moe-fused finetune`; every option is in `finetune.yaml`, every step in `log.jsonl`.

| | |
|---|---|
{rows}

![loss](loss.png)

```python
{_loading(setup)}
```
"""


def _loading(setup: ModelSetup) -> str:
    """Python that loads the model as the run did, and the adapter."""
    options, dtype = setup.options, str(setup.dtype)
    arguments = [f'"{options.model}"', f"dtype={dtype}", 'experts_implementation="moe_fused"']
    arguments.insert(1, f'revision="{options.revision}"')
    imports, quantization = "AutoModelForCausalLM", ""
    if setup.quantize_to is not None:
        imports += ", BitsAndBytesConfig"
        arguments.append("quantization_config=quantization")
        quantization = f"""quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{setup.quantize_to}",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype={dtype},
)
"""
    given = "".join(f"    {argument},\n" for argument in arguments)
    return f"""import moe_fused
import torch
from peft import PeftModel
from transformers import {imports}

moe_fused.enable()
{quantization}model = AutoModelForCausalLM.from_pretrained(
{given})
model = PeftModel.from_pretrained(model, "DIRECTORY OF THIS ADAPTER")"""
