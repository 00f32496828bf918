"""The model card of a run's adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .markdown import code, fenced, table
from .usage import loading, served

if TYPE_CHECKING:
    from .facts import Facts
    from .resolve import ModelSetup


def card(setup: ModelSetup, facts: Facts) -> str:
    """The text of the model card: what was trained on what and how, with which result, and how to use the adapter.

    Args:
        setup: The record of the run.
        facts: What the card tells of the data, the training, the evaluation and the machine.
    """
    options, directory = setup.options, Path(setup.options.output).resolve().name
    get = f"hf download {options.repository} --local-dir {directory}" if options.repository else ""
    tables = {
        "Data": facts.data,
        "Training": facts.training,
        "Evaluation": facts.evaluation,
        "Versions and machine": facts.machine,
    }
    sections = [f"## {title}\n\n{table(content)}" for title, content in tables.items() if content]
    sections.insert(2, "![loss](loss.png)")
    fetch = f"\n\n{fenced('', get)}" if get else ""
    begun = f" The training went on from the adapter {code(_name(options.adapter))}." if options.adapter else ""
    return f"""---
{metadata(setup)}
---

# Adapter for {code(_name(options.model))}

LoRA over {code(_name(options.model))}, trained by `moe-fused finetune`. All options are in `finetune.yaml`, all steps in
`log.jsonl`.{begun}

{(chr(10) * 2).join(sections)}

## Use

The commands and the code below take the files of this adapter from the directory {code(directory)}.{fetch}

### PEFT

{fenced("python", loading(setup, directory))}

PEFT 0.19.1 or newer also loads the adapter without moe-fused, over the dense model. Leave out the lines that name
`moe_fused` or a quantization then.

{served(setup, directory)}
"""


def metadata(setup: ModelSetup) -> str:
    """The YAML at the beginning of a card. The Hub refuses names of models and data sets that cannot be there."""
    from huggingface_hub import ModelCardData

    options = setup.options
    base = options.model if _is_hub_id(options.model) else None
    content = ModelCardData(
        library_name="peft",
        base_model=base,
        datasets=[part.dataset for part in options.datasets if _is_hub_id(part.dataset)] or None,
        pipeline_tag="text-generation",
        tags=["lora", "moe", "moe-fused"],
    )
    if base is not None:
        content["base_model_relation"] = "adapter"
    return str(content.to_yaml())


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _name(path: str) -> str:
    """A model as the card calls it: of a path on this machine only the last part."""
    return path if _is_hub_id(path) else Path(path).resolve().name
