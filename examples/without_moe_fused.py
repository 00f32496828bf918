"""Puts the kernel into a Transformers model with torch, transformers and kernels alone, in two ways.

    LOCAL_KERNELS=org/qwen3-moe-fused=$PWD python examples/without_moe_fused.py
    python examples/without_moe_fused.py

The first command takes the kernel from this checkout, after `make build`; the second takes it from the Hub. Both ways serve
dense experts of every model whose experts Transformers can exchange, forward and backward, and with torch.compile. 4-bit
experts and adapters need the package moe-fused. `kernels` warns of each layer that the mapping of the first way lacks.
"""

import copy

import torch
from kernels import LayerRepository, Mode, get_kernel, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

REPOSITORY = "org/qwen3-moe-fused"
device = "cuda" if torch.cuda.is_available() else "cpu"


def by_layer(model: PreTrainedModel) -> None:
    """The way for a model that is loaded already: a layer takes the place of the experts' forward."""
    layer = LayerRepository(REPOSITORY, layer_name="MoeExperts", revision="v0", trust_remote_code=True)
    replace_kernel_forward_from_hub(Qwen3MoeExperts, "MoeExperts")
    with use_kernel_mapping({"MoeExperts": {device: layer}}):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device=device)


def by_function(model: PreTrainedModel) -> None:
    """The way through Transformers' own choice of experts, which from_pretrained(experts_implementation=…) takes as well."""
    kernel = get_kernel(REPOSITORY, version=0, trust_remote_code=True)
    ALL_EXPERTS_FUNCTIONS.register("qwen3-moe-fused", kernel.experts_forward)
    model.set_experts_implementation("qwen3-moe-fused")


def run(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """The loss, and the gradients of the first layer's experts."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    experts = model.get_submodule("model.layers.0.mlp.experts")
    return [loss.detach(), *[parameter.grad.detach().clone() for parameter in experts.parameters()]]


torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    use_cache=False,
)
stock = Qwen3MoeForCausalLM(config).to(device)
ids = torch.randint(0, 256, (2, 32), device=device)
expected = run(stock, ids)

for way in (by_layer, by_function):
    model = copy.deepcopy(stock)
    way(model)
    for name, candidate in (("eager", model), ("compiled", torch.compile(model, backend="aot_eager", fullgraph=True))):
        differences = [(a - b).norm() / b.norm() for a, b in zip(run(candidate, ids), expected, strict=True)]
        print(f"{way.__name__:12} {name:9} largest relative difference from Transformers {max(differences):.1e}")
