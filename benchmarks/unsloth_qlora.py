"""Steps of a QLoRA with and without Unsloth: times, losses and the kernels that ran, as one line of JSON for each way.

    python -m benchmarks.unsloth_qlora                     # all ways, each in a process of its own, and their ratio
    python -m benchmarks.unsloth_qlora --way unsloth --model DIR

All ways train the same adapters on the same 4-bit model with the same batch, in bf16 under autocast with adapters in fp32,
which is what Unsloth's trainer does. The optimizer is part of a step.

- ``plain``: Transformers and PEFT with ``moe_fused.enable()``.
- ``unsloth``: Unsloth's ``FastLanguageModel`` with ``moe_fused.enable()``, its gradient checkpointing and its compilation.
- ``unsloth-eager``: the same with ``UNSLOTH_COMPILE_DISABLE=1``.
- ``native``: Unsloth without ``moe_fused``.
- ``stock``: no training. Transformers and PEFT alone load the adapter ``--adapter`` onto the dense model.

The model has random weights in the layer shapes of Qwen3-30B-A3B, with fewer layers, experts and words. A way prints its
traceback where it fails, and the others still run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

WAYS = ("plain", "unsloth", "unsloth-eager", "native", "stock")
RANK, ALPHA = 16, 32
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--way", choices=WAYS, help="run this way in this process")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=["plain", "unsloth", "unsloth-eager"])
    made.add_argument("--model", type=Path, help="a saved model; made if it is left out")
    made.add_argument("--adapter", type=Path, help="where the trained adapter goes, or comes from with --way stock")
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--experts", type=int, default=64)
    made.add_argument("--hidden", type=int, default=2048)
    made.add_argument("--intermediate", type=int, default=768)
    made.add_argument("--vocabulary", type=int, default=32768)
    made.add_argument("--tokens", type=int, default=2048)
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    made.add_argument("--timeout", type=int, default=150, help="seconds that one way may take")
    return made


def save_model(options: argparse.Namespace, directory: Path) -> Path:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_fused.demo.data import byte_tokenizer

    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    sizes: dict[str, Any] = {
        "vocab_size": max(options.vocabulary, len(tokenizer)),
        "hidden_size": options.hidden,
        "moe_intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(options.hidden // 64, 1),
        "num_key_value_heads": max(options.hidden // 512, 1),
        "head_dim": 128,
        "num_experts": options.experts,
        "num_experts_per_tok": 8,
        "max_position_embeddings": max(options.tokens, 512),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = Qwen3MoeConfig(**sizes)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen3MoeForCausalLM(config)
    model = model.to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def plain_model(options: argparse.Namespace, device: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import moe_fused

    moe_fused.enable()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": device}
    )
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # what Unsloth makes of the names of linear layers
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=ATTENTION, target_parameters=stacks, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def unsloth_model(options: argparse.Namespace, device: Any, ours: bool) -> Any:
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # isort: skip  # before Transformers
    import torch

    if ours:
        import moe_fused

        moe_fused.enable()
    model, _ = FastLanguageModel.from_pretrained(
        str(options.model),
        max_seq_length=options.tokens,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        device_map={"": device},
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=ATTENTION + EXPERTS,
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )


def start_alike(model: Any) -> list[Any]:
    """Gives all adapters of ``model`` the same start in every way, in fp32, and returns them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    trained = sorted((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    for name, parameter in trained:
        assert "lora_" in name, name
        start = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.data = start.to(parameter.device)
    return [parameter for _, parameter in trained]


def our_kernels() -> set[str]:
    """The names of the kernel package's kernels, as they stand in its sources."""
    import moe_fused

    folder = Path(str(moe_fused.get_kernel().__file__)).parent / "kernels"
    return {
        name
        for path in folder.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def kernels_of(step: Any) -> dict[str, int]:
    """How often each of our kernels runs on the GPU in one step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    names = our_kernels()
    return {event.key: event.count for event in profiler.key_averages() if event.key in names}


def versions() -> dict[str, str | None]:
    from moe_fused.hub import installed

    names = ("torch", "triton", "transformers", "kernels", "peft", "trl", "bitsandbytes", "unsloth", "unsloth_zoo")
    return {name: installed(name) for name in names}


def classes_of(model: Any) -> dict[str, str]:
    """The classes and forwards of the first layer that has experts."""
    shown = {}
    for name, module in model.named_modules():
        if re.search(r"layers\.0(\.(self_attn|input_layernorm|mlp|mlp\.gate|mlp\.experts(\.base_layer)*))?$", name):
            forward: Any = type(module).forward
            code = getattr(forward, "__code__", None)
            where = code.co_filename.rpartition("/")[2] if code else ""
            shown[name] = f"{type(module).__module__}.{type(module).__qualname__}, forward in {where}"
    return shown


def train(options: argparse.Namespace) -> dict[str, Any]:
    way = options.way
    if way == "unsloth-eager":
        os.environ["UNSLOTH_COMPILE_DISABLE"] = "1"
    began = time.perf_counter()
    if way != "plain":
        import unsloth  # noqa: F401  # it wants to be imported before Transformers
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = plain_model(options, device) if way == "plain" else unsloth_model(options, device, way != "native")
    loaded = time.perf_counter() - began
    model.train()
    trained = start_alike(model)
    optimizer = torch.optim.AdamW(trained, lr=options.rate)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 250, (1, options.tokens), generator=generator).to(device)

    def step() -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    losses, times = [], []
    for _ in range(options.steps):
        start = time.perf_counter()
        loss = step()
        wait()
        times.append(time.perf_counter() - start)
        losses.append(float(loss))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    if options.adapter is not None:
        model.save_pretrained(options.adapter)
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    half = times[len(times) // 2 :]  # the first steps compile
    return {
        "median_ms": round(statistics.median(half) * 1e3, 2),
        "fastest_ms": round(min(half) * 1e3, 2),
        "first_s": round(times[0], 1),
        "loaded_s": round(loaded, 1),
        "peak_gib": round(peak, 2),
        "losses": losses,
        "kernels": kernels_of(step) if way != "native" else {},
        "classes": classes_of(model),
    }


def read_by_stock(options: argparse.Namespace) -> dict[str, Any]:
    """The loss of the dense model without and with the adapter, in Transformers and PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, device_map={"": device})
    ids = torch.randint(0, 250, (1, options.tokens), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    with torch.no_grad():
        losses.append(float(model(input_ids=ids, labels=ids).loss))
        model = PeftModel.from_pretrained(model, options.adapter)
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert not any(name.startswith(("moe_fused.integrations", "unsloth")) for name in sys.modules)
    return {"losses": losses}


def run_way(options: argparse.Namespace) -> None:
    result: dict[str, Any] = {"way": options.way, "versions": versions()}
    try:
        result |= read_by_stock(options) if options.way == "stock" else train(options)
    except Exception:  # noqa: BLE001  # the other ways still run, and the reader sees what failed
        result["error"] = traceback.format_exc()
    print(json.dumps(result))


def in_process(way: str, arguments: list[str], timeout: float) -> dict[str, Any]:
    """Runs one way in a process of its own, in a new directory, where Unsloth writes what it compiles."""
    repository = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.unsloth_qlora", "--way", way, *arguments]
        environment = {**os.environ, "PYTHONPATH": path, "UNSLOTH_DISABLE_STATISTICS": "1"}
        try:
            process = subprocess.run(
                command,
                cwd=directory,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return {"way": way, "error": f"took more than {timeout} s\n{str(error.stderr)[-3000:]}"}
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"way"')]
    if not lines:
        return {
            "way": way,
            "error": f"exit status {process.returncode}\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}",
        }
    result: dict[str, Any] = json.loads(lines[-1])
    if "error" in result:
        result["output"] = process.stdout[-1500:] + process.stderr[-1500:]
    return result


def main() -> int:
    options = parser().parse_args()
    if options.way is not None:
        run_way(options)
        return 0
    arguments = sys.argv[1:]
    if "--ways" in arguments:
        start = arguments.index("--ways")
        del arguments[start : start + 1 + len(options.ways)]
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        if options.model is None:
            arguments += ["--model", str(save_model(options, Path(directory)))]
        for way in options.ways:
            results[way] = in_process(way, arguments, options.timeout)
            print(json.dumps(results[way]), flush=True)
    base = results.get("plain", {}).get("median_ms")
    ratios = {way: round(one["median_ms"] / base, 3) for way, one in results.items() if base and "median_ms" in one}
    print(json.dumps({"step_time_over_plain": ratios}))
    return 1 if any("error" in one for one in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
