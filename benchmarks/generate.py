"""Measures generating with a 4-bit model: tokens per second after the prompt, for a few numbers of sequences.

    python -m benchmarks.generate                          48 layers of Qwen3-30B-A3B
    python -m benchmarks.generate --layers 8 --adapter     a short model with adapters, writes only to --output
    python -m benchmarks.generate --device cpu --quick

Weights are random. All contenders run in one process over the same prompts, of 128 tokens each, with greedy search:

- ``generate``: Transformers' ``generate`` as it is, with its growing cache.
- ``static``: the same over a static cache, without compiling.
- ``compiled``: the same, compiled as ``generate`` compiles for a static cache.
- ``batched``: Transformers' ``generate_batch``, with its CUDA graphs. On a GPU only.
- ``moe_fused``: ``generate`` after ``moe_fused.fast_generation``.

A row's ``tokens`` are the sequences, and its ``ms`` are a step: the time of a long answer less that of a short one, by the
steps between, each the least of several. What compiles, tunes or records does so before. Further numbers of a row, under
``details``:

- ``tokens_per_second`` of all sequences.
- ``same_tokens``: the share of the tokens that are those of ``generate``. Ties in bf16 may end a sequence's likeness.
- ``cache_mib``: what keys and values of the longest answer take.
- ``first_s``: the seconds of the first call, with all that is done once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import moe_fused
from moe_fused.benchmark.harness import MIB, UnavailableError, current_environment, release_memory

from . import full_model, runner
from .experts_4bit import QUANT_TYPE
from .finetune_30b import DEFAULT_MODEL, SEED
from .model import Model
from .models import BY_NAME
from .rows import OURS, Row, merge, new_row, read_rows, slug, write_rows

NAME = "generate"
PLAIN, STATIC, COMPILED, BATCHED = "generate", "static", "compiled", "batched"
CONTENDERS = (PLAIN, STATIC, COMPILED, BATCHED, OURS)
PHASE = "decode"
PROMPT = 128
# The tokens of a short answer and of a long one.
ANSWERS, QUICK_ANSWERS = (8, 104), (4, 20)
SEQUENCES, QUICK_SEQUENCES = (1, 8, 32), (1, 2)
EXPERT_RANK, ATTENTION_RANK = 8, 16
REPEATS = 3


def adapted(model: Any) -> Any:
    """Returns PEFT's model with the adapters of a default run of ``moe-fused finetune``, whose factors are not zero."""
    from peft import LoraConfig, get_peft_model

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(
        r=ATTENTION_RANK,
        target_modules=attention,
        target_parameters=stacks,
        rank_pattern={name.rpartition(".")[2]: EXPERT_RANK for name in stacks},
        init_lora_weights=False,
    )
    found: Any = get_peft_model(model, config)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data = (0.01 * parameter.data).to(torch.bfloat16)
    return found.eval()


@contextlib.contextmanager
def contending(name: str, model: Any) -> Iterator[Callable[[Tensor, int], Tensor]]:
    """Prepares a model for a contender.

    Yields:
        Makes so many new tokens after prompts (B, T), and returns all tokens.
    """
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    if name in (STATIC, COMPILED):
        options |= {"cache_implementation": "static", "disable_compile": name == STATIC}

    def generate(prompts: Tensor, count: int) -> Tensor:
        mask = torch.ones_like(prompts)
        found: Tensor = model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=count, **options)
        return found

    def generate_batch(prompts: Tensor, count: int) -> Tensor:
        from transformers import GenerationConfig

        settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers = model.generate_batch(inputs=prompts.tolist(), generation_config=settings)
        rows = [[*answer.prompt_ids, *answer.generated_tokens] for answer in answers.values()]
        return torch.tensor(rows, device=prompts.device)

    if name == BATCHED and model.device.type == "cpu":  # where each call prepares for half a minute
        raise UnavailableError("needs a GPU")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantizer = type(base.hf_quantizer) if getattr(base, "hf_quantizer", None) is not None else None
    before = vars(quantizer).get("is_compileable") if quantizer is not None else None
    handle = moe_fused.fast_generation(model) if name == OURS else None
    if name == COMPILED and quantizer is not None:
        quantizer.is_compileable = True
    try:
        yield generate_batch if name == BATCHED else generate
    finally:
        if handle is not None:
            handle.disable()
        if name == COMPILED:
            torch._dynamo.reset()
            if quantizer is not None:
                if before is None:
                    del quantizer.is_compileable
                else:
                    quantizer.is_compileable = before


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a contender takes.

    Attributes:
        ms: Milliseconds of a step.
        peak: The peak of the allocator's memory in MiB, without what the model takes.
        first: The seconds of the first call.
        tokens: All tokens of the long answers.
    """

    ms: float
    peak: float
    first: float
    tokens: Tensor


def measure(generate: Callable[[Tensor, int], Tensor], prompts: Tensor, answers: tuple[int, int]) -> Measured:
    """Measures a contender for some prompts (B, T), with short and long answers of so many tokens.

    Raises:
        ValueError: A long answer takes no longer than a short one.
    """
    on_gpu, (short, long) = prompts.is_cuda, answers

    def timed(count: int) -> tuple[float, Tensor]:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        tokens = generate(prompts, count)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start, tokens

    held = 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / MIB
    first, _ = timed(long)
    timed(short)
    times = [(timed(long)[0], timed(short)[0]) for _ in range(REPEATS)]
    tokens = timed(long)[1]
    peak = torch.cuda.max_memory_reserved() / MIB - held if on_gpu else 0.0
    # The least of each: the difference of a pair would be too small if something else made its short answer slow.
    of_long, of_short = (min(each) for each in zip(*times, strict=True))
    if of_long <= of_short:
        raise ValueError(
            f"{long} tokens take {of_long:.3f} s and {short} take {of_short:.3f} s, which gives no time of a step"
        )
    return Measured(1e3 * (of_long - of_short) / (long - short), peak, first, tokens)


def cache_mib(config: Any, batch: int, longest: int) -> float:
    """Returns the MiB of keys and values of the longest answers in bf16, each of so many tokens."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * batch * (PROMPT + longest) * config.num_hidden_layers * config.num_key_value_heads * size / MIB


def main(
    model_name: Annotated[str, typer.Option("--model", help="One of benchmarks.models, by its name.")] = DEFAULT_MODEL,
    layers: Annotated[int | None, typer.Option(help="Decoder layers. Writes only to --output.", min=1)] = None,
    sequences: Annotated[list[int] | None, typer.Option(help="Sequences at a time; may be given again.", min=1)] = None,
    contender: Annotated[list[str] | None, typer.Option(help=f"{', '.join(CONTENDERS)}; may be given again.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="With adapters, which are not merged.")] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
) -> None:
    """Measures generating, and writes rows under benchmarks/results."""
    runner.choices("model", [model_name], tuple(BY_NAME), ())
    contenders = runner.choices("contender", contender, CONTENDERS, CONTENDERS)
    runner.check_device(device, quick)
    runner.check_output(output)
    chosen = runner.pick_device(device, "--device cpu --quick")
    console, environment = runner.make_console(), current_environment(chosen)
    console.print(f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}")
    sizes = Model(model_name, BY_NAME[model_name].config())
    sizes = sizes.tiny() if quick else sizes
    sizes = sizes if layers is None else sizes.shortened(layers)
    shared = runner.ROOT / "results" / f"{NAME}-{slug(model_name)}_{slug(environment.gpu)}.json"
    path = output or (None if quick or layers is not None or contender else shared)
    with runner.one_line_errors():
        kept = read_rows(path) if path is not None and path.exists() else []
        model = full_model.build(sizes, chosen, seed=SEED).eval()
        full_model.run_fused()
        model.config.use_cache = True
        model = adapted(model) if adapter else model
        answers = QUICK_ANSWERS if quick else ANSWERS
        rows: list[Row] = []
        for batch in sequences or (QUICK_SEQUENCES if quick else SEQUENCES):
            generator = torch.Generator().manual_seed(SEED)
            ids = torch.randint(sizes.config().vocab_size, (batch, PROMPT), generator=generator).to(chosen)
            plain: Tensor | None = None
            for name in contenders:
                try:
                    with contending(name, model) as generate, torch.no_grad():
                        found = measure(generate, ids, answers)
                except Exception as error:
                    if name in (PLAIN, OURS):
                        raise
                    console.print(f"{name}, {batch} sequences: cannot run: {str(error).strip()[:300]}")
                    continue
                finally:
                    release_memory(chosen)
                plain = found.tokens if name == PLAIN else plain
                row = new_row(
                    environment, benchmark=NAME, layer=sizes.name, tokens=batch, implementation=name,
                    phase=f"{PHASE}_adapter" if adapter else PHASE, weights=QUANT_TYPE, ms=found.ms, flops=0.0,
                    peak_mib=found.peak or None, lora_rank=EXPERT_RANK if adapter else 0,
                )  # fmt: skip
                details = {
                    "tokens_per_second": 1e3 * batch / found.ms,
                    "cache_mib": cache_mib(sizes.config().get_text_config(), batch, answers[1]),
                    "first_s": found.first,
                }
                if plain is not None and plain.shape == found.tokens.shape:
                    details["same_tokens"] = float((plain == found.tokens)[:, PROMPT:].float().mean())
                details = {key: float(f"{value:.5g}") for key, value in details.items()}
                rows.append(dataclasses.replace(row, tflops=None, details=details))
                numbers = ", ".join(f"{key} {value:g}" for key, value in details.items())
                console.print(f"{name}, {batch} sequences: {found.ms:.2f} ms, {found.peak:.0f} MiB; {numbers}")
                if path is not None:
                    write_rows(path, merge(kept, rows))
    moe_fused.disable()
    if path is not None:
        console.print(f"Wrote {path}")


if __name__ == "__main__":
    typer.run(main)
