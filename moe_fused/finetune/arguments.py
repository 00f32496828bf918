"""The arguments of TRL's trainers for a run: SFTConfig, DPOConfig or KTOConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import get_scheduler
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from .checkpoints import CHECKPOINTS

if TYPE_CHECKING:
    from .resolve import ResolvedRun

# Trainer's name for the loss of an evaluation.
LOSS = "eval_loss"


def trl_config(run: ResolvedRun) -> Any:
    """Makes the arguments of TRL's trainer for a run: SFTConfig, DPOConfig or KTOConfig."""
    options, batching = run.options, run.batching
    evaluation: dict[str, Any] = {}
    if options.evaluates:
        evaluation = {
            "eval_strategy": "steps",
            "eval_steps": options.eval_steps or options.save_steps,
            "per_device_eval_batch_size": batching.batch_size,
            "prediction_loss_only": True,
            "metric_for_best_model": LOSS,  # Trainer notes which evaluation was the best
            "greater_is_better": False,
        }
    given: dict[str, Any] = {"run_name": run.output.name, "project": "moe-fused", "trackio_space_id": None}
    given |= {"log_level_replica": "error"}  # the first process says the same
    given |= options.trainer or {}
    # If weights and adapters have one dtype, autocast is not needed. It would cost host time at every operator.
    mixed = run.dtype is not torch.float32 and run.adapter_dtype is not run.dtype
    checkpointing = {"use_reentrant": False, "preserve_rng_state": run.is_random}
    config, of_method = _of_method(run)
    arguments = config(
        output_dir=str(run.output / CHECKPOINTS),
        use_cpu=run.device.type == "cpu",
        bf16=mixed and run.dtype is torch.bfloat16,
        fp16=mixed and run.dtype is torch.float16,
        max_length=batching.length,
        per_device_train_batch_size=batching.batch_size,
        gradient_accumulation_steps=batching.accumulation,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=run.learning_rate,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=run.optimizer,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs=checkpointing if options.gradient_checkpointing else None,
        router_aux_loss_coef=options.router_aux_loss,
        seed=options.seed,
        save_strategy="steps",
        save_steps=options.save_steps,
        logging_steps=options.log_steps,
        logging_nan_inf_filter=False,  # the filter would log an average instead of a loss that is not finite
        report_to=options.report_to if run.process.is_main else "none",
        disable_tqdm=True,
        **evaluation,
        **(of_method | given),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Trainer would replicate the model to all GPUs that are visible
    return arguments


def _of_method(run: ResolvedRun) -> tuple[type[Any], dict[str, Any]]:
    """Returns the class of TRL's arguments for the method of a run, and those arguments that it alone has."""
    method, packing = run.options.method, run.batching.packing
    if method == "sft":
        is_packed = packing != "none"
        return SFTConfig, {
            "packing": is_packed,
            "packing_strategy": packing if is_packed else "bfd",
            # The data set has labels already, see data.py.
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
    if method == "kto":
        return KTOConfig, {"loss_type": "kto", "beta": run.beta}
    return DPOConfig, {"loss_type": ["ipo" if method == "ipo" else "sigmoid"], "beta": run.beta}


def try_config(run: ResolvedRun) -> None:
    """Makes the optimizer and the schedule of a run for a parameter of one element, to see whether their options are valid.

    Raises:
        TypeError, ValueError: TRL's config, the optimizer or the schedule refuses a value.
    """
    arguments = trl_config(run)
    optimizer_class, options = SFTTrainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = optimizer_class([nn.Parameter(torch.zeros(1))], **options)
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=1,
        num_training_steps=2,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
