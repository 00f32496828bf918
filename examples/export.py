"""Exports an adapter, and a model with the adapter merged, for vLLM, SGLang and llama.cpp, and prints the commands to run.

    python examples/export.py
    python examples/export.py --model Qwen/Qwen3-30B-A3B --adapter my-adapter --adapter-layout peft-fused --output my-export

In the second command, `my-adapter` is the output of `moe-fused finetune --output my-adapter`. Leave --adapter-layout out
for adapters whose files tell their layout, such as my-adapter/adapter from `qlora_trl.py --output my-adapter`.

An adapter that names PEFT's target_parameters holds all experts of a layer in two matrices, which these three tools do not
read. The example exports the adapter with a matrix for each expert and with the scaling inside the matrices. Then it
loads the result with PEFT and Transformers alone, without moe_fused, and compares the logits. The commands
`moe-fused convert adapter` and `moe-fused merge` do the same.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moe_fused
from moe_fused.checkpoints.adapters import Layout
from moe_fused.checkpoints.adapters.convert import convert_adapter

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a directory or a name on the Hub; a tiny random model by default")
parser.add_argument("--adapter", type=Path, help="a directory; a random adapter by default")
parser.add_argument(
    "--adapter-layout",
    choices=[layout.value for layout in Layout],
    help="needed if the files do not tell it: peft-fused for PEFT's target_parameters, which moe-fused finetune uses",
)
parser.add_argument("--output", type=Path, default=Path("examples-output/export"))
options = parser.parse_args()
if options.model and not options.adapter:
    parser.error("--model needs an --adapter for it")
model_id = options.model or tiny_model(options.output / "model")
adapter, layout = options.adapter, options.adapter_layout
exported, merged = options.output / "adapter-per-expert", options.output / "merged"
options.output.mkdir(parents=True, exist_ok=True)

device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
config, tokenizer = AutoConfig.from_pretrained(model_id), AutoTokenizer.from_pretrained(model_id)
moe_fused.enable()


def load(path: str | Path, experts: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=config.dtype, experts_implementation=experts, device_map={"": device}
    )


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    prompt = tokenizer("1+1=2, and 2+2=", return_tensors="pt").to(device)
    return model.eval()(**prompt).logits.float().cpu()


def tensors_of(directory: Path) -> Iterator[tuple[str, list[int]]]:
    """The names and shapes of the tensors in a directory, from the headers of its files."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            yield from ((name, file.get_slice(name).get_shape()) for name in file.offset_keys())


def check(what: str, got: dict[str, list[int]], expected: dict[str, list[int]]) -> None:
    wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise RuntimeError(f"{what}: {name} has shape {got.get(name)}, needed is {expected.get(name)}")
    print(f"{what}: {len(got)} tensors with the names and shapes that are needed")


def difference(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    print(f"{what}: relative logit difference {(got - expected).norm() / expected.norm():.1e}")


if adapter is None:
    adapter, layout = options.output / "adapter", "peft-fused"
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], target_parameters=targets)
    lora.init_lora_weights = False  # random factors; those of a new adapter would add zero
    get_peft_model(load(model_id, "moe_fused"), lora).save_pretrained(adapter)

# 1. Export the adapter. Every tool has its own rule for alpha and ranks. With alpha = r, one rank and the scaling inside
# lora_B, all rules give the same result.
try:
    convert_adapter(adapter, exported, to=Layout.PER_EXPERT, given=layout and Layout(layout), overwrite=True)
except (ValueError, OSError) as error:  # there is no adapter, or its layout must be given
    parser.error(str(error).replace("--from", "--adapter-layout"))  # the command's name for it
rank = json.loads((exported / "adapter_config.json").read_text(encoding="utf-8"))["r"]
sizes = {"gate_proj": (config.moe_intermediate_size, config.hidden_size)}
sizes |= {"up_proj": sizes["gate_proj"], "down_proj": sizes["gate_proj"][::-1]}
needed = {}
for layer in range(config.num_hidden_layers):
    for expert in range(config.num_experts):
        for name, (out_features, in_features) in sizes.items():
            path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
            needed[f"{path}.lora_A.weight"] = [rank, in_features]
            needed[f"{path}.lora_B.weight"] = [out_features, rank]
check("exported adapter", {name: shape for name, shape in tensors_of(exported) if ".experts." in name}, needed)

# 2. Merge the adapter. The merged model is dense, has a matrix for each expert as on the Hub, and needs neither PEFT nor
# moe_fused.
model = PeftModel.from_pretrained(load(model_id, "moe_fused"), adapter)
expected = logits(model)
model.merge_and_unload(safe_merge=True).save_pretrained(merged)
tokenizer.save_pretrained(merged)
del model
needed = {f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": [*size]
          for layer in range(config.num_hidden_layers) for expert in range(config.num_experts)
          for name, size in sizes.items()}  # fmt: skip
check("experts of the merged model", {name: size for name, size in tensors_of(merged) if ".experts." in name}, needed)

# 3. Load both as other programs do: with PEFT and Transformers alone, on Transformers' own experts.
moe_fused.disable()
difference("exported adapter", logits(PeftModel.from_pretrained(load(model_id, "eager"), exported)), expected)
difference("merged model", logits(load(merged, "eager")), expected)

# vLLM reserves room for one of these ranks.
room = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
base = f"--base {Path(model_id).resolve()}" if Path(model_id).is_dir() else f"--base-model-id {model_id}"
print(f"""
vLLM, the adapter over the model (which may be quantized in any way that vLLM knows), or the merged model:
  vllm serve {model_id} --enable-lora --max-lora-rank {room} --lora-modules tuned={exported}
  vllm serve {merged}
SGLang:
  python -m sglang.launch_server --model-path {model_id} --enable-lora --lora-paths tuned={exported}
  python -m sglang.launch_server --model-path {merged}
llama.cpp, in its directory:
  python convert_hf_to_gguf.py {merged.resolve()} --outtype bf16 --outfile merged.gguf
  llama-quantize merged.gguf merged-q4_k_m.gguf q4_k_m
  llama-server --model merged-q4_k_m.gguf
llama.cpp, the adapter apart, for a GGUF of the model itself:
  python convert_lora_to_gguf.py {exported.resolve()} {base} --outfile adapter.gguf
  llama-server --model model.gguf --lora adapter.gguf""")
