"""The adapter that a run goes on from: that of ``--adapter``, or that of a checkpoint of such a run.

It is read, checked, and described as it will be trained, before the model is loaded. An adapter in another layout than the
one that ``finetune`` writes is converted to it when it is loaded.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moe_fused.checkpoints.adapters import Layout, ScalingChoice
from moe_fused.checkpoints.adapters.config import LEAVES, AdapterConfig, module_of
from moe_fused.checkpoints.adapters.convert import convert_adapter, plan_conversion
from moe_fused.checkpoints.adapters.detect import AmbiguousLayout, NoExperts
from moe_fused.checkpoints.adapters.fits import check_contents, other_base, read_adapter
from moe_fused.checkpoints.adapters.saved import SavedAdapter
from moe_fused.checkpoints.files import find_adapter
from moe_fused.checkpoints.finite import check_finite
from moe_fused.checkpoints.places import ADAPTER_WEIGHTS

from .options import Options
from .precheck import check_trainable

_LORA_A = ".lora_A.weight"


@dataclass(frozen=True)
class StartingAdapter:
    """The adapter that a run goes on from, in the layout in which it is trained.

    Attributes:
        name: What it is called in errors.
        directory: The directory of its files.
        config: The content of its ``adapter_config.json``.
        shapes: The shape of each of its tensors, by the names in its file.
        layout: The layout of its files, if that is not the one in which it is trained.
        is_checkpoint: Whether it is that of a checkpoint, from which Trainer loads it.
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    layout: Layout | None
    is_checkpoint: bool

    @property
    def factors(self) -> tuple[int, ...]:
        """The number of elements of each factor of LoRA."""
        sizes = []
        for key, shape in self.shapes.items():
            if ".lora_" in key:
                count = 1
                for size in shape:
                    count *= size
                sizes.append(count)
        return tuple(sizes)

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """The names of the modules that are trained in full."""
        return tuple(sorted(self.config.get("modules_to_save") or ()))

    def ranks(self, experts: int) -> tuple[int, int]:
        """The largest rank on linear layers and routers, and the largest on experts, of which a layer has ``experts``."""
        found = {key: shape[0] for key, shape in self.shapes.items() if key.endswith(_LORA_A)}
        stacked = [rows // experts for key, rows in found.items() if ".experts." in key] if experts else []
        return max((rows for key, rows in found.items() if ".experts." not in key), default=0), max(stacked, default=0)

    def described(self, *, experts: bool) -> tuple[list[int], list[float], list[str]]:
        """The ranks and the alphas that its layers have, and the last parts of their names.

        Args:
            experts: Whether the layers are the experts, or all others.
        """
        config = AdapterConfig(self.config)
        found = set()
        for module in map(module_of, self.shapes):
            path = (module or "").removesuffix(".base_layer")
            if path and (path.rpartition(".")[2] == "experts") is experts:
                stacks = [f"{path}.{leaf}" for leaf in LEAVES.values() if config.adapts_parameter(f"{path}.{leaf}")]
                found |= set(stacks) if experts else {path}
        ranks = {config.rank_of(name) for name in found}
        alphas = {config.scaling_of(name).alpha for name in found}
        return sorted(ranks), sorted(alphas), sorted({name.rpartition(".")[2] for name in found})

    @property
    def is_plain(self) -> bool:
        """Whether one rank and one alpha hold for all layers, without rsLoRA."""
        return not any(self.config.get(name) for name in ("use_rslora", "rank_pattern", "alpha_pattern"))

    @property
    def names_weights(self) -> bool:
        """Whether its config names weights of linear layers, as that of an adapter on shared experts does."""
        return any(name.endswith(".weight") for name in self.config.get("target_parameters") or ())

    def adapts(self, weights: Collection[str]) -> bool:
        """Whether it adapts one of these weights, which are the last parts of names."""
        modules = filter(None, map(module_of, self.shapes))
        return any(f".{module}.weight".endswith(f".{weight}") for module in modules for weight in weights)

    def note(self) -> str | None:
        """What changes when the adapter is converted, as a line for people; None if nothing does."""
        if self.layout is None:
            return None
        return (
            f"{self.name} is in layout {self.layout.value}; the run trains and writes it as {Layout.PEFT_FUSED.value}"
        )

    def lora_config(self, options: Options) -> Any:
        """PEFT's config for the adapter, with the dropout of the run."""
        from peft import PeftConfig

        unused = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision")
        values = {key: value for key, value in self.config.items() if key not in unused}
        values |= {
            "inference_mode": False,
            "init_lora_weights": True,
            "lora_dropout": options.lora_dropout,
            "task_type": "CAUSAL_LM",
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # options of other versions of PEFT, which are ignored
            return PeftConfig.from_peft_type(**values)

    @contextlib.contextmanager
    def files(self) -> Iterator[Path]:
        """Yields a directory with the adapter's files in the layout in which it is trained."""
        if self.layout is None:
            yield self.directory
            return
        with tempfile.TemporaryDirectory(prefix="moe-fused-") as directory:
            converted = Path(directory) / "adapter"
            convert_adapter(
                self.directory,
                converted,
                to=Layout.PEFT_FUSED,
                given=self.layout,
                scaling=ScalingChoice.KEEP,
                widen=True,
            )
            yield converted


def read_start(options: Options, checkpoint: Path | None) -> StartingAdapter | None:
    """Reads the adapter that a run goes on from; None if it begins with a new one.

    Args:
        options: The options of the run.
        checkpoint: The checkpoint from which it resumes, whose adapter takes the place of ``--adapter``.

    Raises:
        FileNotFoundError, ValueError: A file is missing or damaged, or the adapter is of a kind that cannot be trained.
    """
    if options.adapter is None:
        return None
    source = options.adapter if checkpoint is None else str(checkpoint)
    name = f"--adapter {source}" if checkpoint is None else f"checkpoint {source}"
    content, tensors = read_adapter(source, name)
    check_trainable(content, name)
    directory = find_adapter(source)[1].parent
    layout = _layout(directory, name)
    if layout in (None, Layout.PEFT_FUSED):
        with safe_open(directory / ADAPTER_WEIGHTS, "pt") as file:
            check_finite(((key, file.get_tensor(key)) for key in file.keys()), name)  # noqa: SIM118 - it is no mapping
        shapes = {key: header.shape for key, header in tensors.items()}
        return StartingAdapter(name, directory, content, shapes, None, checkpoint is not None)
    try:
        plan = plan_conversion(directory, to=Layout.PEFT_FUSED, given=layout, scaling=ScalingChoice.KEEP, widen=True)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    shapes = {key: spec.shape for key, spec in plan.tensors.items()}
    return StartingAdapter(name, directory, plan.config, shapes, layout, checkpoint is not None)


def _layout(directory: Path, name: str) -> Layout | None:
    """The layout of an adapter's experts; None if it adapts none."""
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{name} has no {ADAPTER_WEIGHTS}, only safetensors are read")
    try:
        return SavedAdapter(directory, "--adapter", None).layout.layout
    except NoExperts:
        return None
    except AmbiguousLayout as error:
        # As PEFT itself reads such a file, today's adapters of this command among them.
        if Layout.PEFT_FUSED in error.layouts:
            return Layout.PEFT_FUSED
        raise ValueError(f"{name}: {error}; first moe-fused convert adapter --to peft-fused") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_start(start: StartingAdapter, options: Options, model: Any, config: Any, *, allow_other_base: bool) -> None:
    """Raises ValueError unless the adapter of ``--adapter`` has what its config asks for in the model, and was made for it.

    Args:
        start: The adapter.
        options: The options of the run.
        model: The model on meta. It gets the adapter, and must not be used afterwards.
        config: The model's config, of Transformers.
        allow_other_base: Whether any model with the same shapes is accepted.
    """
    import moe_fused
    from moe_fused.integrations.transformers.forward import IMPLEMENTATION

    moe_fused.enable()  # because loading does so, too, and PEFT alone treats adapters of experts differently
    model.set_experts_implementation(IMPLEMENTATION)
    check_contents(model, start.lora_config(options), start.shapes, start.name)
    if start.is_checkpoint or allow_other_base:
        return
    reason = other_base(start.config.get("base_model_name_or_path"), options.model, config)
    if reason is not None:
        raise ValueError(
            f"{start.name} has another base than --model {options.model}: {reason}; --allow-other-base accepts it"
        )
