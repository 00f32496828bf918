"""Lengths of documents as they are in data of chats: the one mix that benchmarks of packed sequences use.

Lengths are log-normal with a median of 400 tokens, and the logarithm has a standard deviation of 1. So a sixth of the
documents has fewer than 150 tokens, and a sixth more than 1,090. The mean is 660, and a token lies in a document of 1,790
tokens on average.
"""

from __future__ import annotations

import itertools

import numpy as np

MEDIAN, SIGMA, SEED = 400, 1.0, 0


def packed_lengths(tokens: int, sequences: int, *, seed: int = SEED) -> list[list[int]]:
    """Draws documents that fill sequences to the last token.

    Args:
        tokens: The number of tokens of a sequence.
        sequences: The number of sequences.
        seed: The seed of the lengths.

    Returns:
        The numbers of tokens of the documents in each sequence. The last document of a sequence is cut off where it ends.
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(sequences):
        lengths: list[int] = []
        while (left := tokens - sum(lengths)) > 0:
            length = max(1, round(float(generator.lognormal(np.log(MEDIAN), SIGMA))))
            lengths.append(min(length, left))
        found.append(lengths)
    return found


def boundaries_of(lengths: list[int]) -> list[int]:
    """Returns where documents begin and end, one number more than there are documents."""
    return [0, *itertools.accumulate(lengths)]


def pairs_of(lengths: list[int]) -> int:
    """Returns the number of pairs of tokens that causal attention within each document has."""
    return sum(length * (length + 1) // 2 for length in lengths)
