"""Makes the rows of a data set into tokens and labels, in several processes if there are many, and keeps them in a cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_fused.signals import workers_forked

from .formats import BadRow
from .rows import program

if TYPE_CHECKING:
    from datasets import Dataset

    from .data import Data

# A further process pays off for this number of rows, or of bytes of rows.
_ROWS_OF_A_PROCESS, _BYTES_OF_A_PROCESS = 1000, 2 << 20
# The number of rows that are read, tokenized and written together.
BATCH = 250


def tokenize(data: Data) -> Dataset:
    """Makes a data set with the tokens and labels of each row, and its problem if it has one."""
    count = len(data.rows)
    shares = max(count / _ROWS_OF_A_PROCESS, data.rows.table.data.nbytes / _BYTES_OF_A_PROCESS)
    processes = min(_cores(), math.ceil(shares), count)
    table = data.rows.table
    with workers_forked():
        tokens: Dataset = table.map(
            _Worker(data),
            batched=True,
            batch_size=BATCH,
            writer_batch_size=BATCH,
            remove_columns=table.column_names,
            features=_features(data),
            num_proc=processes if processes > 1 else None,
            new_fingerprint=_cache_key(data),
            desc="Tokenizing",
        )
    return tokens


def tokenize_block(data: Data) -> Dataset:
    """Does what ``tokenize`` does in this process and in memory, for a block of rows that ``--streaming`` has read."""
    from datasets import Dataset

    return Dataset.from_dict(_Worker(data)(data.rows.table[:]), features=_features(data))


def _features(data: Data) -> Any:
    from datasets import Features, List, Value

    return Features(
        {name: Value("bool") if name == "wanted" else List(Value("int32")) for name in data.columns}
        | {name: Value("int32") for name in ("length", "first")}
        | {name: Value("string") for name in ("form", "problem", "notes")}
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cache_key(data: Data) -> str:
    """Names the cache of a data set's tokens by everything that the tokens depend on, this program included."""
    renderer = data.renderer
    tokenizer = renderer.tokenizer
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        data.rows.table._fingerprint,
        *(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "tokenizers", "trl", "jinja2")),
        program("tokenizing", "formats", "render", "rows", "text_files", "words"),
        backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items())),
        repr((type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map)),
        repr((renderer.template, renderer.assistant_only, renderer.text_field, renderer.method)),
        repr((data.columns, data.rows.by_text)),
    ]
    for part in parts:
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class _Worker:
    """Makes a batch of rows into tokens. It puts the problem of a bad row into the column ``problem``."""

    data: Data

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        results = [self._row(content) for content in self.data.rows.contents(batch)]
        return {name: [result[name] for result in results] for name in results[0]}

    def _row(self, content: Any) -> dict[str, Any]:
        renderer = self.data.renderer
        form = ""
        try:
            row = renderer.parse(content())
            form = row.form
            tokens = renderer(row)
        except BadRow as error:
            empty: dict[str, Any] = {name: False if name == "wanted" else [] for name in self.data.columns}
            return {**empty, "length": 0, "first": 0, "form": form, "problem": str(error), "notes": ""}
        values = {
            "input_ids": tokens.ids,
            "labels": tokens.labels,
            "rejected_ids": tokens.rejected,
            "wanted": row.wanted,
        }
        return {
            **{name: values[name] for name in self.data.columns},
            "length": len(tokens.ids),
            "first": tokens.first,
            "form": form,
            "problem": None,
            "notes": " ".join(tokens.notes),
        }
