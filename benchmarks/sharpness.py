"""Sharpness of a trained model: the largest eigenvalue of its training loss's Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from trainer.config import recipes
from trainer.data import Transform, open_part
from trainer.tasks import build_model, loss_function

POWER_ITERATIONS = 20
HESSIAN_CHUNK = 64


def sharpness(folder: Path, samples: int) -> float:
    """Largest eigenvalue of the training loss's Hessian at the run's final model, in evaluation mode, over so many
    training samples without augmentation (the same for every run)."""
    config = recipes.load(folder / "config.toml")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    part = open_part(config.data, train=True, seed=0)
    inputs, labels = part.subset(np.random.default_rng(0).permutation(len(part))[:samples]).items.tensors
    inputs, labels = inputs.to(device), labels.to(device)
    inputs = Transform.of(part, config.data, device, train=False)(inputs)
    model = build_model(config.task, part.classes, inputs.shape[1], inputs.shape[-1]).to(device)
    model.load_state_dict(torch.load(folder / "model.pt", map_location=device))
    model.eval()
    loss, parameters = loss_function(config.task), list(model.parameters())

    def product(vector: torch.Tensor) -> torch.Tensor:
        split = torch.split(vector, [each.numel() for each in parameters])
        pieces = [piece.view_as(each) for piece, each in zip(split, parameters, strict=True)]
        total = torch.zeros_like(vector)
        for some, right in zip(torch.split(inputs, HESSIAN_CHUNK), torch.split(labels, HESSIAN_CHUNK), strict=True):
            mean = loss(model(some), right) * (len(right) / len(labels))
            slopes = torch.autograd.grad(mean, parameters, create_graph=True)
            seconds = torch.autograd.grad(slopes, parameters, pieces)
            total += torch.cat([each.reshape(-1) for each in seconds])
        return total

    start = torch.randn(sum(each.numel() for each in parameters), generator=torch.Generator().manual_seed(0)).to(device)
    found = dominant_eigenvalue(product, start)
    if found >= 0:
        return found
    return found + dominant_eigenvalue(lambda vector: product(vector) - found * vector, start)


def dominant_eigenvalue(product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> float:
    """The eigenvalue of largest magnitude, by power iteration from `start` until it changes by less than 1 %."""
    vector, value = start, math.inf
    for _ in range(POWER_ITERATIONS):
        vector = vector / vector.norm()
        image = product(vector)
        before, value = value, float(vector @ image)
        if abs(value - before) < 0.01 * abs(value):
            break
        vector = image
    return value
