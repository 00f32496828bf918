"""The model of a run: its config, its tokenizer, and the model itself with 4-bit weights and its experts in the kernel."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moe_fused
from moe_fused.checkpoints.architecture import CONFIG
from moe_fused.checkpoints.files import check_json
from moe_fused.commands.options import check_vocabulary
from moe_fused.quantized import check_quantization

from .hub import reached_once
from .options import Options

if TYPE_CHECKING:
    from .resolve import ModelSetup


def load_config(options: Options) -> Any:
    """The config of the model that ``options`` name, without its weights.

    Raises:
        FileNotFoundError: There is no such model.
        NotImplementedError: Its checkpoint is quantized in a way that is not read.
    """
    from transformers import AutoConfig

    config = _load(AutoConfig, options)
    with _hub(options):
        check_quantization("--model", options.model, config, options.revision)
    return config


def _hub(options: Options) -> Any:
    """The context in which files of a model are looked for: a model on the Hub may have some in the cache alone."""
    return contextlib.nullcontext() if Path(options.model).is_dir() else reached_once()


def load_tokenizer(options: Options) -> Any:
    """The tokenizer of the model that ``options`` name, with the chat template that they name.

    Raises:
        FileNotFoundError: No tokenizer comes with the model, or the file of the template is missing.
        ValueError: A file of the tokenizer is damaged, it has no end-of-sequence token, or the template is none.
    """
    from transformers import AutoTokenizer

    from .render import check_template

    try:
        tokenizer = _load(AutoTokenizer, options)
    except ValueError as error:  # a damaged file
        reason = " ".join(str(error).split())
        raise ValueError(f"--model {options.model} has a tokenizer that cannot be loaded: {reason}") from error
    check_vocabulary(tokenizer, "--model", options.model)
    where = f"the chat template of {options.model}"
    if options.chat_template is not None:
        where = f"--chat-template {options.chat_template}"
        try:
            # A byte order mark would be rendered into every row.
            tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} must be UTF-8: {error.reason} at byte {error.start}") from None
        if not tokenizer.chat_template.strip():
            raise ValueError(f"{where} is empty")
    check_template(tokenizer, where)
    if tokenizer.eos_token is None:
        raise ValueError(f"--model {options.model}: its tokenizer has no end-of-sequence token")
    return tokenizer


def _load(auto: Any, options: Options) -> Any:
    """What one of Transformers' Auto classes makes of the model's files.

    Raises:
        ValueError: A file in the model's directory is damaged.
        FileNotFoundError: The class cannot load what is there, or there is nothing.
    """
    path = Path(options.model)
    what = "config" if auto.__name__ == "AutoConfig" else "tokenizer"
    if path.is_dir():
        # Transformers takes some of these files for absent if they are damaged.
        names = (file.name for file in sorted(path.glob("*.json")) if (file.name == CONFIG) == (what == "config"))
        check_json(path, (name for name in names if not name.endswith(".index.json")))
    try:
        with _hub(options) as unreachable:
            return auto.from_pretrained(options.model, revision=options.revision)
    except Exception as error:  # tokenizers raises nothing narrower for a damaged file
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        where = "" if path.is_dir() else " is no directory, and"
        if unreachable is not None:
            where, reason = f"{where} the cache", f"the Hub cannot be reached: {unreachable}"
        raise FileNotFoundError(f"--model {options.model}{where} has no {what} that can be loaded: {reason}") from error


def check_model(setup: ModelSetup) -> None:
    """Compares the model's files with what its config needs, before it is loaded, as far as they are on this machine.

    Raises:
        FileNotFoundError, ValueError: A file or a tensor is missing or damaged, or there is one too many. The error
            names it.
    """
    from moe_fused.checkpoints.loading import check_checkpoint

    options, packs = setup.options, setup.quantize_to is not None
    check_checkpoint(options.model, f"--model {options.model}", setup.config, revision=options.revision, packs=packs)


def load_model(setup: ModelSetup) -> Any:
    """Loads the model onto the device of the run, with its experts in the kernel and without adapters.

    With ``--shard``, it has the experts of this process alone.

    Raises:
        FileNotFoundError, ValueError: Weights are missing, or some are NaN or infinite.
    """
    from moe_fused.checkpoints.loading import load_pretrained, share_of
    from moe_fused.checkpoints.share import taking
    from moe_fused.integrations.quantizer.configs import config_for

    moe_fused.enable()
    options, process, share = setup.options, setup.process, None
    name = f"--model {options.model}"
    if options.shard:
        rank, processes = process.rank, process.world_size
        share = share_of(
            options.model, name, rank, processes, device=setup.device, dtype=setup.dtype, revision=options.revision
        )
    quantization = None
    if setup.quantize_to is not None:
        quantization = config_for(setup.quantize_to, setup.skeleton, setup.dtype)
    with taking(share):
        return load_pretrained(
            options.model,
            name,
            setup.config,
            revision=options.revision,
            quantization=quantization,
            dtype=setup.dtype,
            attn_implementation=setup.attention,
            experts_implementation="moe_fused",
            # Also for a CPU: Transformers would put a quantized model on the GPU of a machine that has one.
            device_map={"": setup.device},
        )


def apply_liger(model: Any) -> None:
    """Puts Liger's rotary embeddings and norms into ``model``.

    The rotary embeddings are replaced where Liger does so by default: other models turn only a part of the features, or
    turn them in another order. Liger's loss stays out, for TRL has a fused head of its own and refuses Liger's. Liger's
    experts stay out, too, because they would replace ours.
    """
    from transformers.integrations.liger import apply_liger_kernel

    others = {"swiglu": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    apply_liger_kernel(model, {"rms_norm": True, **others})
