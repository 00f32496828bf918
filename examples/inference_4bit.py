"""Loads a dense Qwen3-MoE with linear layers and experts in 4 bits, runs it, saves it and loads it again.

    python examples/inference_4bit.py
    python examples/inference_4bit.py --model Qwen/Qwen3-30B-A3B --output qwen3-4bit --prompt "Why is the sky blue?"

Qwen3-30B-A3B takes 61 GB in bf16 and 17 GB in 4 bits. It is quantized tensor by tensor while it loads, so a GPU with
24 GB is enough. The commands `moe-fused quantize` and `moe-fused generate` do the same.
"""

import argparse
from pathlib import Path

import torch
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import moe_fused

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a directory or a name on the Hub; a tiny random model by default")
parser.add_argument("--output", type=Path, default=Path("examples-output/inference_4bit"))
parser.add_argument("--prompt", default="1+1=")
parser.add_argument("--max-new-tokens", type=int, default=16)
options = parser.parse_args()
model_id = options.model or tiny_model(options.output / "model")
checkpoint = options.output / "model-4bit"

# Without this call, Transformers quantizes the linear layers alone. The experts, nearly all of the model, stay dense.
moe_fused.enable()
device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
model = AutoModelForCausalLM.from_pretrained(
    model_id, dtype=dtype, quantization_config=quantization, device_map={"": device}
).eval()
tokenizer = AutoTokenizer.from_pretrained(model_id)

with torch.device("meta"):  # the same model dense, without memory for its weights
    dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_id), dtype=dtype)
bytes_dense, bytes_4bit = dense.get_memory_footprint(), model.get_memory_footprint()
print(f"memory: {bytes_4bit / 1e6:,.2f} MB in 4 bits, {bytes_dense / 1e6:,.2f} MB in {dtype}")

prompt = tokenizer(options.prompt, return_tensors="pt").to(device)


def generate(model: torch.nn.Module) -> list[int]:
    tokens = model.generate(**prompt, max_new_tokens=options.max_new_tokens, do_sample=False)
    return tokens[0, prompt.input_ids.shape[1] :].tolist()


tokens = generate(model)
print(f"generated: {tokenizer.decode(tokens)!r}")

# By default, the checkpoint has a 4-bit matrix for each expert, as Transformers 4 with bitsandbytes wrote it and other tools
# read it. After moe_fused.save_format(model, "fused") it has a few large tensors for each layer. These load faster, but
# only with moe_fused.
model.save_pretrained(checkpoint)
tokenizer.save_pretrained(checkpoint)
on_disk = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
print(f"saved: {on_disk / 1e6:,.2f} MB in {checkpoint}")

with torch.no_grad():
    logits = model(**prompt).logits
del model
# The checkpoint's config says that it is in 4 bits, so this call needs no quantization_config.
reloaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map={"": device}).eval()
with torch.no_grad():
    difference = (reloaded(**prompt).logits - logits).abs().max()
print(f"reloaded: largest logit difference {difference:.1e}, same tokens: {generate(reloaded) == tokens}")
