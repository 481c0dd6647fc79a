"""AdamW that counts its steps in the param group, as apex's and TransformerEngine's FusedAdam do.

torch.optim.AdamW keeps `step` for every parameter. megatron-core's distributed optimizer stores only exp_avg and
exp_avg_sq of a parameter, and one `step` of the group; with torch's Adam it cannot load what it saved (KeyError
'step'), and ignoring the key resets the bias correction. Keeping the count where the checkpoint keeps it makes save and
load exact.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) with `step` in the param group; the constructor is FusedAdam's.

    The update itself is torch.optim.adamw's functional form.

    Args:
        params: parameters or param groups.
        lr: learning rate.
        betas: decay of the running means of gradient and squared gradient.
        eps: added to the denominator.
        weight_decay: decoupled decay, times lr.
        adam_w_mode: must be True; L2-regularised Adam is not offered.

    Raises:
        ValueError: adam_w_mode is False.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ):
        if not adam_w_mode:
            raise ValueError("GroupStepAdamW has decoupled weight decay only: adam_w_mode must be True")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("GroupStepAdamW takes no closure")
        for group in self.param_groups:
            # A group that is empty on this rank counts too: all ranks store the same step.
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                max_exp_avg_sqs=[],
                # The functional form raises each count by one before it uses it.
                state_steps=[torch.tensor(float(group["step"] - 1)) for _ in params],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
