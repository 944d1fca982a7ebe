"""Optimizers of tiny-wan's transformer and text encoder."""

from __future__ import annotations

import math

import torch


class BatchedMuon(torch.optim.Optimizer):
    """Muon (orthogonalised momentum) over stacks of equal shapes.

    `torch.optim.Muon` takes the matrices one by one: some 2,000 small kernels a step here, more host time than the model's own.
    Same arithmetic: Nesterov momentum, five Newton-Schulz iterations in bf16, update scaled to AdamW's typical size.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes: dict = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for matrices in shapes.values():
                self._update(matrices, group)

    def _update(self, matrices, group):
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta, grads = [self.state[p]["momentum"] for p in matrices], [p.grad for p in matrices]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        update = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # [N, rows, columns]
        rows, columns = update.shape[1:]
        update = self._orthogonalise(update) * (0.2 * math.sqrt(max(rows, columns)))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(update.to(matrices[0].dtype)), alpha=-group["lr"])

    def _orthogonalise(self, x):
        a, b, c = self.COEFFICIENTS
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x.bfloat16()
        x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7).view(-1, 1, 1)
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x


def make_optimizers(transformer, prompts) -> list:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for m in (transformer, prompts) for p in m.parameters() if id(p) not in chosen]
    muon = BatchedMuon(matrices, lr=1.5e-3, weight_decay=0.02)
    adam = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for optimizer in (muon, adam):
        optimizer.param_groups[0]["base_lr"] = optimizer.param_groups[0]["lr"]
    return [muon, adam]
