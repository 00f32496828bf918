"""How to use an adapter with PEFT, vLLM, SGLang and llama.cpp, as its card says it.

``docs/formats.md`` says which tool reads which layout.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from moe_fused.quantized import PUBLISHED

from .adapters import routers_of
from .markdown import code, fenced

if TYPE_CHECKING:
    from .resolve import ModelSetup

# The ranks for which vLLM reserves room.
_ROOMS = (8, 16, 32, 64, 128, 256, 320, 512)


def loading(setup: ModelSetup, directory: str) -> str:
    """Python that loads the model as the run did, and the adapter.

    Args:
        setup: The record of the run.
        directory: The directory of the adapter.
    """
    options, dtype, adapter = setup.options, str(setup.dtype), _literal(directory)
    arguments = [_literal(options.model), f"dtype={dtype}", 'experts_implementation="moe_fused"']
    arguments.insert(1, f"revision={_literal(options.revision)}")
    imports, quantization = "AutoModelForCausalLM, AutoTokenizer", ""
    if setup.quantize_to in PUBLISHED:
        from moe_fused.integrations.quantizer.configs import has_stacks_alone

        arguments.append("quantization_config=quantization")
        if setup.quantize_to == "mxfp4" and has_stacks_alone(setup.skeleton):
            imports += ", Mxfp4Config"
            quantization = "quantization = Mxfp4Config()\n"
        else:
            quantization = f'quantization = moe_fused.quantization_config("{setup.quantize_to}")\n'
    elif setup.quantize_to is not None:
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
model = PeftModel.from_pretrained(model, {adapter})
tokenizer = AutoTokenizer.from_pretrained({adapter})"""


def served(setup: ModelSetup, directory: str) -> str:
    """The sections on vLLM, SGLang and llama.cpp, in the layout that these tools read.

    Args:
        setup: The record of the run.
        directory: The directory of the adapter.
    """
    options = setup.options
    base, note = _dense(setup)
    reason = refusal(setup)
    if reason is not None:
        merged = f"{directory}-merged"
        commands = {
            "": f"moe-fused merge {_word(options.model)} {_word(directory)} {_word(merged)}",
            "vLLM": f"vllm serve {_word(merged)}",
            "SGLang": f"python -m sglang.launch_server --model-path {_word(merged)}",
            "llama.cpp": f"python convert_hf_to_gguf.py {_word(merged)} --outfile merged.gguf\n"
            "llama-server --model merged.gguf",
        }
        intro = (
            f"These tools cannot load this adapter beside a model, because {reason}. They load a model into which it is "
            "merged."
        )
        return _sections(intro, commands)
    adapter, convert = f"{directory}-per-expert", ""
    if options.export == "per-expert":
        adapter = f"{directory}/per-expert"
        intro = f"These tools read the layout `per-expert`, which is in {code(adapter)}."
    elif is_read_as_it_is(setup):
        adapter = directory
        intro = "These tools read the adapter as it is."
    else:
        convert = conversion(setup, directory, adapter)
        intro = (
            "These tools read the layout `per-expert`, and this adapter is in `peft-fused`. This command converts it:"
        )
    rank = max(setup.ranks.attention, setup.ranks.expert)
    room = next((size for size in _ROOMS if size >= rank), rank)
    is_directory = Path(options.model).is_dir()
    revision = "" if is_directory or options.revision == "main" else f" --revision {_word(options.revision)}"
    of_base = f"--base {_word(base)}" if is_directory or base != options.model else f"--base-model-id {_word(base)}"
    commands = {
        "": convert,
        "vLLM": f"vllm serve {_word(base)}{revision} --enable-lora --max-lora-rank {room} "
        f"--lora-modules tuned={_word(adapter)}",
        "SGLang": f"python -m sglang.launch_server --model-path {_word(base)}{revision} --enable-lora "
        f"--lora-paths tuned={_word(adapter)}",
        "llama.cpp": f"python convert_lora_to_gguf.py {_word(adapter)} {of_base} --outfile adapter.gguf\n"
        "llama-server --model model.gguf --lora adapter.gguf",
    }
    return _sections(note + intro, commands)


def is_read_as_it_is(setup: ModelSetup) -> bool:
    """Whether vLLM, SGLang and llama.cpp read the adapter that a run writes, without a conversion."""
    return not setup.ranks.expert and refusal(setup) is None


def conversion(setup: ModelSetup, source: str, target: str) -> str:
    """The command that converts the adapter of a run to the layout that vLLM, SGLang and llama.cpp read."""
    # What --adapter brought may have ranks for which the layout needs a larger one.
    widen = " --widen" if setup.start is not None else ""
    return f"moe-fused convert adapter --from peft-fused --to per-expert{widen} {_word(source)} {_word(target)}"


def export_note(setup: ModelSetup) -> str | None:
    """A line about an export that no tool can load; None if there is nothing to say."""
    if setup.options.export != "per-expert" or (reason := refusal(setup)) is None:
        return None
    return (
        f"note: --export per-expert: vLLM, SGLang and llama.cpp cannot load this adapter, because {reason}; for them, merge "
        "it into the model with moe-fused merge"
    )


def refusal(setup: ModelSetup) -> str | None:
    """Why vLLM, SGLang and llama.cpp cannot load the adapter in any layout, or None if they can."""
    options = setup.options
    if setup.ranks.router or (setup.start is not None and setup.start.adapts(routers_of(setup.skeleton))):
        return "it adapts routers, too"
    if setup.whole.names:
        return f"{', '.join(setup.whole.names)} is trained in full"
    if setup.ranks.shared_expert or (setup.start is not None and setup.start.names_weights):
        return "it adapts shared experts by the names of their weights"
    if (options.lora or {}).get("use_dora"):
        return "it has use_dora, which is more than LoRA"
    if setup.ranks.expert:
        return setup.layout_refusals["per-expert"]
    # The conversion, which would bring all layers to one rank and alpha, is for adapters on experts.
    plain = setup.start.is_plain if setup.start is not None else not (options.lora or {}).get("use_rslora")
    return None if plain else "it has rsLoRA, or ranks and alphas that differ between layers"


def _dense(setup: ModelSetup) -> tuple[str, str]:
    """The model that the tools load beside an adapter, and sentences about it if it is not the one that the run had."""
    if setup.is_4bit and setup.quantize_to is None:
        name = setup.options.model.rstrip("/").rpartition("/")[2]
        layout = "per-expert" if setup.layout_refusals["per-expert"] is None else "fused"
        made = f"moe-fused convert model {_word(name)} DENSE-MODEL --to {layout} --dequantize"
        return "DENSE-MODEL", (
            f"`DENSE-MODEL` stands for the dense model from which {code(name)} was quantized. {code(made)} makes one with "
            f"the weights that this adapter was trained on, of a directory {code(name)}. "
        )
    return setup.options.model, ""


def _sections(intro: str, commands: dict[str, str]) -> str:
    """A block of code for each command, below the heading of its tool. The first command belongs to the introduction."""
    first = commands.pop("")
    begin = f"### vLLM, SGLang, llama.cpp\n\n{intro}" + (f"\n\n{fenced('', first)}" if first else "")
    return "\n\n".join((begin, *(f"{tool}:\n\n{fenced('', command)}" for tool, command in commands.items())))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _word(argument: str) -> str:
    return shlex.quote(f"./{argument}" if argument.startswith("-") else argument)
