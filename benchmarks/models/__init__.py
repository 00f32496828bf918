"""Published mixture-of-experts models: their configs, and how many parameters their publishers count.

The JSON files are config.json as on the Hub, reduced to what decides the sizes of a model and the work of a step. What they
leave out has the default of Transformers' config class. ``docs/models.md`` and the fine-tuning benchmark read them, and a
test compares the parameters of each with the published number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Published:
    """A model as it is published.

    Attributes:
        name: The name of its config here, of its rows, and what ``--model`` of the benchmark takes.
        repository: Its repository on the Hub.
        parameters, active: Billions of parameters, and of those that a token uses, with the digits that were published.
        is_mxfp4: Whether the checkpoint has its experts in MXFP4.
    """

    name: str
    repository: str
    parameters: str
    active: str
    is_mxfp4: bool = False

    @property
    def title(self) -> str:
        """The name of the model without that of its publisher."""
        return self.repository.rpartition("/")[2]

    def config(self) -> Any:
        """The config, of Transformers."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(DIRECTORY / f"{self.name}.json")


MODELS = (
    Published("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "30.5", "3.3"),
    Published("qwen3-coder-30b-a3b", "Qwen/Qwen3-Coder-30B-A3B-Instruct", "30.5", "3.3"),
    Published("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", "235", "22"),
    Published("qwen3-next-80b-a3b", "Qwen/Qwen3-Next-80B-A3B-Instruct", "80", "3"),
    Published("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B", "35", "3"),
    Published("qwen3.5-122b-a10b", "Qwen/Qwen3.5-122B-A10B", "122", "10"),
    Published("qwen3.5-397b-a17b", "Qwen/Qwen3.5-397B-A17B", "397", "17"),
    Published("gpt-oss-20b", "openai/gpt-oss-20b", "20.9", "3.6", is_mxfp4=True),
    Published("gpt-oss-120b", "openai/gpt-oss-120b", "116.8", "5.1", is_mxfp4=True),
    Published("glm-4.5-air", "zai-org/GLM-4.5-Air", "106", "12"),
    Published("mixtral-8x7b", "mistralai/Mixtral-8x7B-Instruct-v0.1", "46.7", "12.9"),
    Published("olmoe-1b-7b", "allenai/OLMoE-1B-7B-0924", "6.9", "1.3"),
    Published("deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite", "15.7", "2.4"),
    Published("granite-4.0-h-tiny", "ibm-granite/granite-4.0-h-tiny", "7", "1"),
    Published("granite-4.0-h-small", "ibm-granite/granite-4.0-h-small", "32", "9"),
    Published("ernie-4.5-21b-a3b", "baidu/ERNIE-4.5-21B-A3B-PT", "21", "3"),
)
BY_NAME = {model.name: model for model in MODELS}
