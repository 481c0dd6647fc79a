"""Optimizer and learning-rate schedule."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from qwen3_vlm.config.schema import OptimConfig, PrecisionConfig
from qwen3_vlm.model.megatron_config import params_dtype


def build_optimizer(
    optim: OptimConfig, precision: PrecisionConfig, wrapped: DistributedDataParallel
) -> MegatronOptimizer:
    """megatron-core's distributed optimizer over the trainable parameters; FP32 master weights where they are BF16.

    Adam's moments exist from the start, as zeros: a run can be saved before its first batch that has a loss.
    """
    dtype = params_dtype(precision)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=wrapped.ddp_config.overlap_param_gather,
        ),
        [wrapped],
        use_gloo_process_groups=False,
    )
    for part in optimizer.chained_optimizers:
        if part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


class ProgressSchedule:
    """The learning rate as a function of progress: the share of the run's samples (or steps) that are done.

    Packing makes the number of steps of an epoch unknown before it is run, but not its number of samples: counted in
    samples the schedule ends exactly at the last one. A step's rate is that of its middle, so that neither the first
    step (warm-up from 0) nor the last (decay to min_lr) is wasted. megatron-core's OptimizerParamScheduler does the
    work, in half units.

    Args:
        optimizer: whose param groups are set.
        optim: rates, warm-up, decay.
        total: samples (or steps) of the whole run.
    """

    def __init__(self, optimizer: MegatronOptimizer, optim: OptimConfig, total: int):
        decay_steps = 2 * total
        self.scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=min(round(optim.warmup_fraction * decay_steps), decay_steps - 1),
            lr_decay_steps=decay_steps,
            lr_decay_style=optim.decay,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=decay_steps,
            wd_incr_style="constant",
            # The configuration decides; a checkpoint brings the position only, so that a run can be made longer.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self._optimizer = optimizer
        self._optim = optim

    def resume(self, done: int) -> None:
        """Stand where a run goes on, by this configuration's rates; call it when the optimizer is loaded.

        Loading brings back the settings that the optimizer was saved with: they give way to the configuration's.

        Args:
            done: samples (or steps) of the run that are done, whichever the run is measured in now.
        """
        optim = self._optim
        for group in self._optimizer.param_groups:
            group |= {"max_lr": optim.lr, "min_lr": optim.min_lr}
            group |= {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        self.scheduler.num_steps = 2 * done
        self.scheduler.step(increment=0)

    def before_step(self, units: int) -> float:
        """Move to the middle of a step of `units` samples (or one step); returns the learning rate."""
        self.scheduler.step(increment=units)
        return max((g["lr"] for g in self._optimizer.param_groups), default=0.0)

    def after_step(self, units: int) -> None:
        """Move to the end of the step."""
        self.scheduler.step(increment=units)
