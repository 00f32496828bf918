"""Real English text that every Python brings along: the language reference behind ``help("topics")``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_BLOCK_CHARACTERS = 4000
_HOLD_OUT_EVERY = 20


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, no merges: the model can be reloaded with a tokenizer, and a token is a byte of loss."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def reference_text() -> tuple[str, str]:
    """The text to train on and the text held out, 330 and 20 kB or so, depending on the Python version.

    The topics quote each other at length, so a paragraph counts once: what is held out is nowhere in the training text.

    Raises:
        RuntimeError: this Python comes without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError("this Python lacks pydoc_data, the text to train on: use a full installation") from error
    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    blocks = [""]
    for paragraph in paragraphs.values():
        if len(blocks[-1]) > _BLOCK_CHARACTERS:
            blocks.append("")
        blocks[-1] += paragraph + "\n\n"
    held_out = "".join(blocks[_HOLD_OUT_EVERY // 2 :: _HOLD_OUT_EVERY])
    del blocks[_HOLD_OUT_EVERY // 2 :: _HOLD_OUT_EVERY]
    return "".join(blocks), held_out


@dataclass(frozen=True)
class Corpus:
    """Token ids (int64) on the device that trains."""

    train: Tensor  # (N,)
    held_out: Tensor  # (windows, sequence_length)

    @classmethod
    def load(cls, tokenizer: PreTrainedTokenizerFast, sequence_length: int, device: torch.device) -> Corpus:
        train, held_out = (torch.tensor(tokenizer(text).input_ids, device=device) for text in reference_text())
        windows = len(held_out) // sequence_length
        return cls(train, held_out[: windows * sequence_length].view(windows, sequence_length))

    def batch(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """``batch_size`` windows of the training text from random places: (batch_size, sequence_length)."""
        length = self.held_out.shape[1]
        start = torch.randint(len(self.train) - length, (batch_size, 1), generator=generator)
        return self.train[(start + torch.arange(length)).to(self.train.device)]
