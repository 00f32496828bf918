"""The command ``moe-fused`` as a user types it, and a model such as one has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moe_fused.__main__ as entry
from moe_fused import console

from .models import VOCABULARY

CHAT_TEMPLATE = "{% for message in messages %}w3 {{ message['content'] }} {% endfor %}w4"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that a failed command ends with."""
        last = self.stderr.splitlines()[-1]
        assert last.startswith("error: "), self
        return last


Command = Callable[..., Ended]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process: a process of its own would spend seconds on imports."""

    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["moe-fused", *map(str, arguments)])
        monkeypatch.setattr(console, "raise_on_signals", lambda: None)
        capsys.readouterr()
        status = entry.main()
        captured = capsys.readouterr()
        return Ended(status, captured.out, captured.err)

    return run


def save_tokenizer(directory: Path, template: bool = True) -> PreTrainedTokenizerFast:
    """A word for each entry of the tiny models' vocabulary."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w5"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="w5"
    )
    if template:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer
