"""Masked next-token loss: sums and counts, never a mean (the division happens once, by the global count)."""

from typing import Any

import torch
from torch import Tensor


def masked_loss(losses_1t: Tensor, loss_mask_t: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Sum of the losses that count, in the form megatron-core's schedules expect with `calculate_per_token_loss`.

    Args:
        losses_1t: [1, t] FP32 loss of every position.
        loss_mask_t: [t] FP32, 1 where the position predicts an assistant token.

    Returns:
        (sum, number of loss tokens as int32, {"loss_sum": the sum as FP64}).
    """
    total = (losses_1t.float().squeeze(0) * loss_mask_t).sum()
    return total, loss_mask_t.sum().to(torch.int), {"loss_sum": total.detach().double()}
