"""On a GPU: the default run in 4 bits, and its memory against the prediction."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from moe_fused.finetune.options import Options

from .finetuning import CHAT_TEMPLATE

datasets = pytest.importorskip("datasets")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")]


def release() -> None:
    """Frees what earlier tests left, or what is measured here would shrink by it when it is freed midway.

    Models and trainers refer to themselves, so they stay until the collector comes by; cuBLAS's workspaces stay for good.
    """
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("length, packing", [(2048, "wrapped"), (8192, "wrapped"), (4096, "bfd")])
def test_peak_is_as_predicted(length: int, packing: str, tmp_path: Path) -> None:
    """A model of which experts, activations and the loss each take hundreds of MiB."""
    from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_fused.demo.data import byte_tokenizer
    from moe_fused.finetune.model import adapt, device_of, load_model
    from moe_fused.finetune.plan import make_plan
    from moe_fused.finetune.run import make_trainer

    config = Qwen3MoeConfig(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=8192,
    )
    with torch.device("cuda"):
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    release()
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|pad|>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    options = Options(
        model=str(tmp_path / "model"),
        output=str(tmp_path / "out"),
        sequence_length=length,
        packing=packing,  # type: ignore[arg-type]
        max_steps=2,
        gradient_accumulation=2,
    )
    device, config = device_of(options), AutoConfig.from_pretrained(tmp_path / "model")
    before = torch.cuda.memory_allocated()
    plan = make_plan(options, config, device, plain_text=True)
    model = adapt(load_model(options, config, device), options)
    # Four documents with their ends fill a sequence, however they are packed.
    rows = [{"text": "x" * (length // 4 - 1)} for _ in range(24)]
    trainer = make_trainer(model, tokenizer, datasets.Dataset.from_list(rows), options, device, plan)
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {length}
    torch.cuda.reset_peak_memory_stats()  # loading and quantizing may take more
    trainer.train_from(None)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(plan.prediction.allocated, rel=0.1)
