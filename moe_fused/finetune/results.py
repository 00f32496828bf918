"""What a run leaves behind: the adapter, its card and the plot of the loss."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_fused.signals import signals_ignored

from .options import Options
from .progress import read_log

CARD, PLOT = "README.md", "loss.png"
ADAPTER_CONFIG = "adapter_config.json"


def draw_loss(records: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")  # without pyplot, which would look for a display
    axes = figure.subplots()
    steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
    axes.plot(steps, losses, linewidth=0.8, alpha=0.5, label="each record")
    smooth, mean = [], None
    for loss in losses:
        mean = loss if mean is None else 0.9 * mean + 0.1 * loss
        smooth.append(mean)
    axes.plot(steps, smooth, label="moving average")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _loading(options: Options, quantizes: bool) -> str:
    """Python that loads the model as the run did, and the adapter."""
    arguments = [f'"{options.model}"', f"dtype=torch.{options.dtype}", 'experts_implementation="moe_fused"']
    if options.revision is not None:
        arguments.insert(1, f'revision="{options.revision}"')
    imports, quantization = "AutoModelForCausalLM", ""
    if quantizes:
        imports += ", BitsAndBytesConfig"
        arguments.append("quantization_config=quantization")
        quantization = f"""quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{options.quantization}",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.{options.dtype},
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


def card(options: Options, facts: dict[str, str], quantizes: bool) -> str:
    """The model card: what was trained on what, in which way, and how to load it.

    Args:
        options: of the run, with nothing left open.
        facts: what else the card says of it.
        quantizes: whether the model is quantized while it is loaded.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    is_hub_id = not Path(options.dataset).exists()
    metadata = ["library_name: peft", f"base_model: {options.model}"]
    metadata += [f"datasets:\n- {options.dataset}"] if is_hub_id else []
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
{_loading(options, quantizes)}
```
"""


def export(source: Path, target: Path, options: Options) -> None:
    """Writes an adapter in the layout that was asked for, as ``moe-fused convert adapter`` does."""
    from moe_fused.checkpoints.adapters import Layout
    from moe_fused.checkpoints.adapters.convert import convert_adapter

    convert_adapter(source, target, to=Layout(options.export), given=Layout.PEFT_FUSED)


def write_results(model: Any, tokenizer: Any, options: Options, text: str, log: Path) -> None:
    """Writes the adapter and what goes with it to the output directory; ``text`` is its card.

    Everything is made elsewhere first and then moved, what PEFT looks for first as the last: whenever the process ends, an
    adapter that can be loaded is whole.
    """
    output = options.output_directory
    staging = output / f".adapter-{secrets.token_hex(4)}.partial"
    try:
        model.save_pretrained(str(staging))
        if options.export != "none":
            export(staging, staging / options.export, options)
        tokenizer.save_pretrained(str(staging))
        draw_loss(read_log(log), staging / PLOT)
        (staging / CARD).write_text(text, encoding="utf-8")
        with signals_ignored():
            (output / ADAPTER_CONFIG).unlink(missing_ok=True)
            for path in sorted(staging.iterdir(), key=lambda path: path.name == ADAPTER_CONFIG):
                if path.is_dir():
                    shutil.rmtree(output / path.name, ignore_errors=True)
                path.replace(output / path.name)
    finally:
        with signals_ignored():
            shutil.rmtree(staging, ignore_errors=True)
