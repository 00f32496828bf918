"""The command ``moe-fused generate``, which lets a model continue a text."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fused.checkpoints.places import ADAPTER_CONFIG, read_object

from .options import (
    AllowOtherBase,
    Dtype,
    Model,
    Traceback,
    check_device,
    check_finite_options,
    check_weights,
    read_source,
    require_4bit,
    require_peft,
)

# By default, at most this many tokens are generated, and no more than the model has room for.
_NEW_TOKENS = 512


def generate(
    model: Model,
    adapter: Annotated[str | None, typer.Option(help="Directory of an adapter, or its name on the Hub.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.  [default: standard input]")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many tokens.  [default: 512, or as many as the model has room for]"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, help="Sampling temperature; 0 always takes the likeliest token.  [default: the model's setting]"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the probability to sample from.  [default: the model's setting]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Seed that makes samples repeatable.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Treat the prompt as a user's turn.  [default: if there is a chat template]"
        ),
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantize a dense model to NF4 while loading it.")
    ] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype to compute in.  [default: the dtype in the model's config]")
    ] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, xpu ...")] = "auto",
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Launch each step as one CUDA graph.  [default: on a GPU of CUDA or ROCm]",
        ),
    ] = None,
    allow_other_base: AllowOtherBase = False,
    traceback: Traceback = False,
) -> None:
    """Generate text with fused experts, with or without an adapter. Everything but the text goes to standard error."""
    del traceback  # read by console.run, which prints errors
    check_finite_options(temperature=temperature, top_p=top_p)
    if temperature == 0 and top_p is not None:
        raise ValueError(
            "--top-p has no effect with --temperature 0, which always takes the likeliest token: leave one out"
        )
    if load_in_4bit:
        require_4bit("--load-in-4bit")
    if adapter is not None:
        require_peft("--adapter")
        read_source("--adapter", adapter, ADAPTER_CONFIG)
        check_weights("--adapter", adapter, ("adapter_model.safetensors", "adapter_model.bin"))
    about = read_source("MODEL", model, "config.json")
    if load_in_4bit and about is not None and about.get("quantization_config"):
        raise ValueError(f"MODEL {model} is quantized already: leave --load-in-4bit out")
    check_weights("MODEL", model)
    if chat and about is not None and not _may_have_template(Path(model)):
        raise ValueError(_no_template(model))
    check_device(device)
    if cuda_graphs and device.partition(":")[0] not in ("auto", "cuda"):
        raise ValueError(f"--cuda-graphs needs a GPU of CUDA or ROCm, got --device {device}")
    _generate(
        model,
        adapter,
        _prompt(prompt),
        max_new_tokens,
        _sampling(temperature, top_p),
        seed,
        chat,
        load_in_4bit,
        dtype,
        device,
        cuda_graphs,
        allow_other_base,
    )


def _generate(
    model: str,
    adapter: str | None,
    prompt: str,
    max_new_tokens: int | None,
    options: dict[str, Any],
    seed: int | None,
    chat: bool | None,
    load_in_4bit: bool,
    dtype: Dtype | None,
    device: str,
    cuda_graphs: bool | None,
    allow_other_base: bool,
) -> None:
    """Loads the model and prints what it generates; ``options`` are sampling arguments of ``generate``."""
    import torch
    from transformers import TextStreamer

    from moe_fused import fast_generation
    from moe_fused.devices import choose_device
    from moe_fused.integrations.quantizer.packed_experts import four_bit_config

    from .loading import (
        check_fits,
        check_model,
        generation_note,
        is_quantized,
        load_adapter,
        load_model,
        read_config,
        read_tokenizer,
    )

    chosen = choose_device(device)
    if cuda_graphs and chosen.type != "cuda":
        raise ValueError(f"--cuda-graphs needs a GPU of CUDA or ROCm, and --device {device} is {chosen.type} here")
    config = read_config(model)
    if load_in_4bit and is_quantized(config):
        raise ValueError(f"MODEL {model} is quantized already: leave --load-in-4bit out")
    tokenizer = read_tokenizer(model)
    encoded = _encode(tokenizer, model, prompt, chat)
    inputs = {name: encoded[name].to(chosen) for name in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    max_new_tokens = _new_tokens(config, length, max_new_tokens)
    generation_note(model)  # raises if the file cannot be read
    check_model(model, config, packs=load_in_4bit)
    if adapter is not None:
        check_fits(model, config, adapter, allow_other_base, "--adapter")
    compute: Any = getattr(torch, dtype.value) if dtype else "auto"
    quantization = None
    if load_in_4bit:
        quantization = four_bit_config(config.dtype or torch.float32 if compute == "auto" else compute)
    loaded: Any = load_model(model, compute, chosen, quantization)
    if adapter is not None:
        loaded = load_adapter(loaded, adapter, "--adapter")
    if seed is not None:
        torch.manual_seed(seed)
    if tokenizer.pad_token_id is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    if chosen.type == "cuda" and cuda_graphs is not False:
        fast_generation(loaded)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes characters that a terminal need not have
    # The model's settings may ask for beam search, which has no text before its end, or for more than one text.
    in_beams = (options.get("num_beams") or loaded.generation_config.num_beams or 1) > 1
    streamer = None if in_beams else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options |= {"use_cache": True, "num_return_sequences": 1, "return_dict_in_generate": False}
    start = time.perf_counter()
    with torch.inference_mode():
        tokens = loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **options)
    seconds, new = time.perf_counter() - start, tokens.shape[1] - length
    if in_beams:
        print(tokenizer.decode(tokens[0, length:], skip_special_tokens=True))
    print(f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} a second", file=sys.stderr)


def _prompt(given: str | None) -> str:
    """Returns the text to continue: that of ``--prompt``, or else standard input.

    Raises:
        ValueError: There is none, or it is not UTF-8.
    """
    what = "--prompt" if given is not None else "standard input, which is read without --prompt,"
    if given is None:
        if sys.stdin is None or sys.stdin.isatty():  # None if it is closed
            raise ValueError("--prompt is missing: give it, or text on standard input")
        try:
            given = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} must be text in UTF-8: {error}") from error
    # Python keeps bytes that are no text as halves of surrogate pairs, which no tokenizer reads.
    if any("\ud800" <= character <= "\udfff" for character in given):
        raise ValueError(f"{what} must be text in UTF-8")
    if not given.strip():
        raise ValueError(f"{what} must not be empty")
    return given


def _may_have_template(directory: Path) -> bool:
    """Whether a model's directory has any of the files that can hold a chat template."""
    if any(
        (directory / name).exists()
        for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    ):
        return True
    path = directory / "tokenizer_config.json"
    return path.is_file() and bool(read_object(path).get("chat_template"))


def _no_template(model: str) -> str:
    return f"--chat needs a chat template, which the tokenizer of {model} does not have: leave --chat out"


def _encode(tokenizer: Any, model: str, prompt: str, chat: bool | None) -> Any:
    """Turns the prompt into inputs of the model. By default, a chat template is used if the tokenizer has one."""
    has_template = bool(tokenizer.chat_template)
    if chat and not has_template:
        raise ValueError(_no_template(model))
    if not (has_template if chat is None else chat):
        return tokenizer(prompt, return_tensors="pt")
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}]
    options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise ValueError(
            f"the chat template of MODEL {model} does not take the prompt: {error}; --no-chat continues the prompt as it is"
        ) from error


def _new_tokens(config: Any, length: int, wanted: int | None) -> int:
    """Returns how many tokens to generate at most after ``length`` tokens.

    Raises:
        ValueError: The tokenizer makes no token of the prompt, or the model has too few positions.
    """
    if not length:
        raise ValueError("--prompt must have a token, and the tokenizer makes none of it")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return _NEW_TOKENS if wanted is None else wanted
    room = limit - length
    if room < 1:
        raise ValueError(f"--prompt is too long: it makes {length} tokens, and the model has {limit} positions")
    if wanted is not None and wanted > room:
        raise ValueError(
            f"--max-new-tokens must be at most {room} after a prompt of {length} tokens, as the model has {limit} "
            f"positions, got {wanted}"
        )
    return min(_NEW_TOKENS, room) if wanted is None else wanted


def _sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Returns sampling arguments for ``generate``. What is not given is left to the model's defaults."""
    if temperature == 0:
        # The model's settings are unset, because Transformers would warn that they are ignored.
        return {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    options: dict[str, Any] = {}
    if temperature is not None:
        options |= {"do_sample": True, "temperature": temperature}
    if top_p is not None:
        options |= {"do_sample": True, "top_p": top_p}
    return options
