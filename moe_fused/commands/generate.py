"""``moe-fused generate``: a model answers, token by token."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from .options import Dtype, Model, Traceback, check_source, require_4bit, require_peft


def generate(
    model: Model,
    adapter: Annotated[str | None, typer.Option(help="Directory of an adapter, or its name on the Hub.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.  [default: standard input]")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="End after that many.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0: the likeliest token always  [default: as the model says]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Likeliest tokens to choose from.  [default: as the model says]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes samples repeatable.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="The prompt is a user's turn.  [default: if there is a chat template]"),
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantize a dense model to NF4 while loading it.")
    ] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="To compute in.  [default: as the model says]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu ...")] = "auto",
    traceback: Traceback = False,
) -> None:
    """Generate text with fused experts, and with an adapter; what is not the text goes to standard error."""
    del traceback  # read by console.run, which prints errors
    if load_in_4bit:
        require_4bit("--load-in-4bit")
    if adapter is not None:
        require_peft("--adapter")
        check_source("--adapter", adapter, "adapter_config.json")
    check_source("MODEL", model, "config.json")
    if prompt is None:
        if sys.stdin.isatty():
            raise ValueError("--prompt is missing: give it, or text on standard input")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise ValueError("--prompt must not be empty")

    import torch
    from transformers import AutoTokenizer, TextStreamer

    from moe_fused.devices import choose_device
    from moe_fused.quantizer import four_bit_config

    from .loading import is_quantized, load_adapter, load_model, read_config

    chosen = choose_device(device)
    config = read_config(model)
    if load_in_4bit and is_quantized(config):
        raise ValueError(f"MODEL {model} is quantized already: leave --load-in-4bit out")
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = _encode(tokenizer, model, prompt, chat)
    inputs = {name: encoded[name].to(chosen) for name in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    _check_length(config, length, max_new_tokens)
    compute: Any = getattr(torch, dtype.value) if dtype else "auto"
    quantization = None
    if load_in_4bit:
        quantization = four_bit_config(config.dtype or torch.float32 if compute == "auto" else compute)
    loaded: Any = load_model(model, compute, chosen, quantization)
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    if seed is not None:
        torch.manual_seed(seed)
    options = _sampling(temperature, top_p)
    if tokenizer.pad_token_id is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    with torch.inference_mode():
        tokens = loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, use_cache=True, **options)
    seconds, new = time.perf_counter() - start, tokens.shape[1] - length
    print(f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} a second", file=sys.stderr)


def _encode(tokenizer: Any, model: str, prompt: str, chat: bool | None) -> Any:
    """The prompt as the model's inputs, in the tokenizer's chat template if asked for or, by default, if it has one."""
    has_template = bool(tokenizer.chat_template)
    if chat and not has_template:
        raise ValueError(f"--chat needs a chat template, which the tokenizer of {model} has not: leave it out")
    if not (has_template if chat is None else chat):
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _check_length(config: Any, length: int, max_new_tokens: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"--max-new-tokens must be at most {max(limit - length, 0)} after a prompt of {length} tokens, as the model "
            f"has {limit} positions, got {max_new_tokens}"
        )


def _sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Arguments of ``generate``; what is not given is left to the model's own defaults."""
    if temperature == 0:
        # The model's own would only be warned of.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    options: dict[str, Any] = {}
    if temperature is not None:
        options |= {"do_sample": True, "temperature": temperature}
    if top_p is not None:
        options |= {"do_sample": True, "top_p": top_p}
    return options
