"""The adapters of a run: PEFT's config for them, and a model with them."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_fused.integrations.transformers.experts_module import layout_refusal

from .architecture import names_of_experts

if TYPE_CHECKING:
    from .resolve import ModelSetup
    from .start import StartingAdapter


def lora_config(setup: ModelSetup, model: nn.Module) -> Any:
    """PEFT's config for the adapters of a run.

    Args:
        setup: The record of the run.
        model: A model of its architecture, on any device, meta included.

    Raises:
        ValueError: The model has no experts or no routers that could be adapted, and the options say to adapt them. Or
            a value of ``lora`` is none that PEFT takes, or that adapters on experts can have.
        NotImplementedError: Adapters on experts cannot have a value of ``lora``.
    """
    from peft import LoraConfig

    if setup.start is not None:
        config = setup.start.lora_config(setup.options)
        if setup.ranks.expert:
            _check_experts(config, setup.start.name)
        return _in_order(config)
    options, given = setup.options, setup.ranks
    experts = _experts_of(model)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    # By weight, because PEFT would take such a module for the experts'.
    taken = names_of_experts(model)
    names = {name: f"{name}.weight" if name.rpartition(".")[2] in taken else name for name in setup.linear_modules}
    for target in (names[name] for name in setup.shared_expert_modules):
        ranks[target], alphas[target] = given.shared_expert, setup.shared_expert_alpha
    parameters = [target for target in names.values() if target.endswith(".weight")]
    if given.expert:
        if not experts:
            raise ValueError(f"--expert-rank: {type(model).__name__} has no experts that could be adapted, set it to 0")
        _check_adaptable(model)
        for target in (f"{path}.{name}" for path, names in experts.items() for name in names):
            ranks[target], alphas[target] = given.expert, setup.expert_alpha
            parameters.append(target)
    if given.router:
        routers = routers_of(model)
        if not routers:
            raise ValueError(f"--router-rank: {type(model).__name__} has no routers that could be adapted, set it to 0")
        for target in routers:
            ranks[target], alphas[target] = given.router, 2.0 * given.router
            parameters.append(target)
    config = LoraConfig(
        r=given.attention or given.expert or given.shared_expert or given.router,
        lora_alpha=setup.attention_alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=options.lora_dropout,
        target_modules=[target for name, target in names.items() if target == name],
        target_parameters=parameters or None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=list(setup.whole.names) or None,
        ensure_weight_tying=setup.whole.is_tied,
        task_type="CAUSAL_LM",
        **(options.lora or {}),
    )
    if experts and given.expert:
        _check_experts(config, "lora", "; --expert-rank 0 leaves them out")
    return _in_order(config)


def _in_order(config: Any) -> Any:
    """Sorts the names of a config's target modules. PEFT makes a set of them, which each process writes in another order."""
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    return config


def _check_experts(config: Any, option: str, hint: str = "") -> None:
    """Raises ValueError or NotImplementedError if adapters on experts cannot have what ``config`` asks for."""
    from moe_fused.integrations.peft.wrapper import refuse_unsupported

    try:
        refuse_unsupported(config)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{option}: {error}{hint}") from error


def adapt(model: Any, setup: ModelSetup) -> Any:
    """Puts the adapters of a run on a model. They and the modules that are trained in full become all that is trained.

    The initial values of new adapters are the same for the same seed. Those of ``--adapter`` are loaded, unless Trainer
    will load those of a checkpoint.

    Returns:
        PEFT's model around ``model``.
    """
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(setup.options.seed)
    with adapting():
        adapted = get_peft_model(model, lora_config(setup, model))
    check_adapted(adapted, setup)
    if setup.start is not None and not setup.start.is_checkpoint:
        _load(adapted, setup.start)
    return adapted


@contextlib.contextmanager
def adapting() -> Iterator[None]:
    """Hides a warning of PEFT within the block: it looks for patterns among modules, and ours name parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        yield


def check_adapted(model: Any, setup: ModelSetup) -> None:
    """Raises RuntimeError if a model has no adapters on its experts although it should."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if setup.ranks.expert and not any(".experts." in name for name in trained):
        name = type(model.get_base_model()).__name__
        raise RuntimeError(f"no experts of {name} were adapted, only {', '.join(trained[:3])}, …")


def _load(adapted: Any, start: StartingAdapter) -> None:
    """Loads the adapter that a run goes on from."""
    from moe_fused.checkpoints.adapters.fits import check_keys

    with start.files() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the adapter was compared with the model before
        result = adapted.load_adapter(directory, adapted.active_adapter, is_trainable=True, torch_device="cpu")
    check_keys(adapted, result, f"{start.name} does not fit {type(adapted.get_base_model()).__name__}")


def _suffix(path: str) -> str:
    """The name of a module within its layer, which is what follows the last number in its path."""
    return re.split(r"(?:^|\.)\d+\.", path)[-1]


def _experts_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of the experts modules within their layers, each with the names of its projections."""
    from moe_fused.integrations.transformers.experts_module import projections_of

    return {
        _suffix(path): projections_of(module)
        for path, module in model.named_modules()
        if hasattr(type(module), "_apply_gate")
    }


def _check_adaptable(model: nn.Module) -> None:
    """Raises ValueError if the kernel cannot adapt the experts of a model."""
    for module in model.modules():
        reason = layout_refusal(module) if hasattr(type(module), "_apply_gate") else None
        if reason is not None:
            raise ValueError(
                f"--expert-rank: the experts of {type(model).__name__} cannot be adapted, set it to 0: {reason}"
            )


def routers_of(model: nn.Module) -> list[str]:
    """The names within their layers of the routers' matrices, which lie beside the experts."""
    experts, found = _experts_of(model), dict[str, None]()
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        beside = any(_suffix(path).rpartition(".")[0] == name.rpartition(".")[0] for name in experts)
        if beside and not isinstance(module, nn.Linear) and weight is not None and weight.dim() == 2:
            found[f"{_suffix(path)}.weight"] = None
    return list(found)
