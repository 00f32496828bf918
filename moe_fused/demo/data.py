"""Makes training data of text that every Python contains: first the language reference, then source code of modules."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_BLOCK_CHARACTERS = 4000
_HOLD_OUT_EVERY = 20
# Large modules that are a single file in every Python so far.
_MODULES = ("argparse", "configparser", "difflib", "inspect", "shutil", "subprocess", "tarfile", "typing")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token for each byte and one for the end, which every tool can load."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def hold_out(blocks: list[str]) -> tuple[str, str]:
    """Splits blocks into the text to train on and the text of every twentieth block, which is held out."""
    held_out = "".join(blocks[_HOLD_OUT_EVERY // 2 :: _HOLD_OUT_EVERY])
    del blocks[_HOLD_OUT_EVERY // 2 :: _HOLD_OUT_EVERY]
    return "".join(blocks), held_out


def _split(texts: Iterable[str]) -> tuple[str, str]:
    """Splits texts into the text to train on and the text that is held out.

    A paragraph is used once, however often it is quoted, so that held-out text does not occur in the training text.
    """
    paragraphs: dict[str, str] = {}
    for text in texts:
        for paragraph in text.split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    blocks = [""]
    for paragraph in paragraphs.values():
        if len(blocks[-1]) > _BLOCK_CHARACTERS:
            blocks.append("")
        blocks[-1] += paragraph + "\n\n"
    return hold_out(blocks)


def reference_text() -> tuple[str, str]:
    """Returns English text to train on and held-out text, about 330 and 20 kB, depending on the Python version.

    Raises:
        RuntimeError: this Python has no ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError("this Python lacks pydoc_data, the text to train on: use a full installation") from error
    return _split(topics[name] for name in sorted(topics))


def source_text() -> tuple[str, str]:
    """Returns Python code to fine-tune on and held-out code, about 690 and 35 kB, depending on the Python version.

    Raises:
        RuntimeError: this Python has no source code of its modules.
    """
    return _split(map(_source, _MODULES))


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec and isinstance(spec.loader, SourceFileLoader) else None
    if source is None:
        raise RuntimeError(f"this Python lacks the source of {module}, text to fine-tune on: use a full installation")
    return source


def windows(text: str, tokenizer: PreTrainedTokenizerFast, length: int, device: torch.device) -> Tensor:
    """Cuts ``text`` into token ids (windows, length). What is left over is dropped."""
    tokens = torch.tensor(tokenizer(text).input_ids, device=device)
    return tokens[: len(tokens) // length * length].view(-1, length)


@dataclass(frozen=True)
class Corpus:
    """Token ids (int64) on the device that trains."""

    train: Tensor  # (N,)
    held_out: Tensor  # (windows, sequence_length)

    @classmethod
    def load(cls, tokenizer: PreTrainedTokenizerFast, sequence_length: int, device: torch.device) -> Corpus:
        train, held_out = reference_text()
        tokens = torch.tensor(tokenizer(train).input_ids, device=device)
        return cls(tokens, windows(held_out, tokenizer, sequence_length, device))

    def batch(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Returns ``batch_size`` windows of the training text from random positions: (batch_size, sequence_length)."""
        length = self.held_out.shape[1]
        start = torch.randint(len(self.train) - length, (batch_size, 1), generator=generator)
        return self.train[(start + torch.arange(length)).to(self.train.device)]
