"""Trainer restores every family that this package is tested with, from one file and from several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from tests.integration.models import MODELS, ModelCase


def other_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Changes every weight of ``model``."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


@pytest.mark.parametrize("shard", ["1GB", "40KB"], ids=["one file", "several files"])
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_restores(case: ModelCase, shard: str, tmp_path: Path) -> None:
    saved = case.build()
    saved.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    model = other_weights(case.build())
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True))
    trainer._load_from_checkpoint(str(tmp_path))
    restored, expected = model.state_dict(), saved.state_dict()
    assert [name for name in expected if not torch.equal(restored[name], expected[name])] == []
