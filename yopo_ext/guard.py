"""What a step does about a loss that is not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .first_layer.full_pass import distributed


class NonFiniteGuard:
    """Takes back what a batch did to `.grad` and the buffers if its loss is not finite.

    mode "ignore" does and costs nothing, "skip" takes back, "raise" takes back and raises FloatingPointError. Under
    DistributedDataParallel the processes decide together: their gradients are already mixed.
    """

    def __init__(self, model: nn.Module, loss: nn.Module, mode: str) -> None:
        self.model, self.loss, self.mode = model, loss, mode
        self.remember()

    def remember(self) -> None:
        """Take the present state as the one to go back to."""
        if self.mode == "ignore":
            return
        parameters = (*self.model.parameters(), *self.loss.parameters())
        self.gradients = [(p, None if p.grad is None else p.grad.clone()) for p in parameters]
        self.buffers = [(b, b.detach().clone()) for b in (*self.model.buffers(), *self.loss.buffers())]

    def accepts(self, losses: list[Tensor]) -> bool:
        """Whether all losses are finite; if not, everything is put back."""
        if self.mode == "ignore":
            return True
        bad = (~torch.isfinite(torch.stack(losses))).any()
        parallel = distributed(self.model)
        if parallel is not None:
            flag = bad.to(torch.int32)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=parallel.process_group)
            bad = flag > 0
        if not bool(bad):
            return True
        with torch.no_grad():
            for parameter, gradient in self.gradients:
                if gradient is not None and parameter.grad is not None:
                    parameter.grad.copy_(gradient)
                else:
                    parameter.grad = gradient
            for buffer, value in self.buffers:
                buffer.copy_(value)
        if self.mode == "raise":
            values = [f"{loss.item():g}" for loss in losses]
            raise FloatingPointError(
                f"the loss is not finite (per pass: {', '.join(values)}); no gradient was accumulated"
            )
        return False
