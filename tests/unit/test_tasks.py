"""Models by name, fitted to small pictures; the local step that trains them; learning rates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from trainer import Constant, LocalSGD, Plan
from trainer.config.config import OptimConfig, StepConfig, TaskConfig
from trainer.errors import ConfigError
from trainer.loop.optimizer import build_optimizer, learning_rate, may_fuse
from trainer.loop.step import LocalStep
from trainer.tasks import build_model, loss_function, parameter_count


def test_the_fedavg_cnn_has_the_papers_parameters() -> None:
    model = build_model(TaskConfig(), classes=10, channels=1, size=28)
    assert parameter_count(model) == 1_663_370
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11", "mobilenet_v2"])
def test_small_image_stems(name: str) -> None:
    with torch.device("meta"):  # for shapes alone
        model = build_model(TaskConfig(model=name, small_image_stem=True), classes=7, channels=1, size=28)
    maps: list[Any] = []
    if name.startswith("resnet"):
        model.layer1.register_forward_hook(lambda *called: maps.append(called[2].shape[2:]))
    for size in (28, 32):
        assert model(torch.zeros(2, 1, size, size, device="meta")).shape == (2, 7)
    if name.startswith("resnet"):
        assert maps == [(28, 28), (32, 32)], "the stem keeps the resolution"


def test_torchvision_models_as_they_are() -> None:
    model = build_model(TaskConfig(model="resnet18"), classes=1000, channels=3, size=224)
    assert parameter_count(model) == 11_689_512
    inception = build_model(TaskConfig(model="inception_v3"), classes=5, channels=3, size=96)
    assert inception(torch.zeros(2, 3, 96, 96)).shape == (2, 5)
    with pytest.raises(ConfigError, match="resnet19"):
        build_model(TaskConfig(model="resnet19"), 10, 3, 32)


def own_model(num_classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 9, num_classes))


def own_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.sum(dim=1) - targets).square().mean()


def test_a_users_own_model_and_loss() -> None:
    config = TaskConfig(model="test_tasks:own_model", loss="test_tasks:own_loss")
    model = build_model(config, classes=4, channels=2, size=3)
    assert loss_function(config)(model(torch.zeros(5, 2, 3, 3)), torch.zeros(5)).dim() == 0
    with pytest.raises(ConfigError, match="not a torch module"):
        build_model(TaskConfig(model="test_tasks:own_loss_wrapped"), 4, 2, 3)


def own_loss_wrapped(num_classes: int, channels: int) -> int:
    return num_classes


# ---- the local step

PLAIN = OptimConfig()


def trained(
    config: StepConfig, optim: OptimConfig = PLAIN, batch: int = 12, steps: int = 3, *, fused: bool = False
) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    step = LocalStep(config, optim, nn.CrossEntropyLoss(), torch.device("cpu"))
    optimizer = build_optimizer(optim, model.parameters(), fused=fused)
    with LocalSGD(model, optimizer, Constant(Plan(batch, 1)), scaler=step.scaler) as sync:
        for _ in range(steps):
            loss, skipped, _ = step(sync, torch.randn(batch, 3, 8, 8), torch.randint(0, 5, (batch,)))
            sync.step(loss, samples=batch)
            assert not skipped
        assert sync.local_step == steps
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("micro", [1, 5, 12, 100])
@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(name="adamw", lr=0.01), OptimConfig(clip_norm=0.1)])
def test_accumulation_is_the_undivided_batch(micro: int, optim: OptimConfig) -> None:
    torch.testing.assert_close(
        trained(StepConfig(max_micro_batch=micro), optim), trained(StepConfig(), optim), rtol=1e-4, atol=2e-5
    )


def test_number_formats_and_layouts_train_alike() -> None:
    plain = trained(StepConfig())
    torch.testing.assert_close(trained(StepConfig(channels_last=True)), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained(StepConfig(precision="bf16")), plain, rtol=0.05, atol=0.02)
    torch.testing.assert_close(trained(StepConfig(precision="fp16")), plain, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("optim", [OptimConfig(weight_decay=0.1), OptimConfig(name="adamw", lr=0.01)])
def test_the_fused_optimizer_is_the_plain_one(optim: OptimConfig, channels_last: bool) -> None:
    step = StepConfig(channels_last=channels_last)
    torch.testing.assert_close(trained(step, optim, fused=True), trained(step, optim), rtol=1e-5, atol=1e-6)


def test_what_the_fused_kernels_cannot_do_is_left_to_the_plain_optimizer() -> None:
    without, scaler = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    dense, sparse = (nn.Sequential(nn.Embedding(4, 2, sparse=each), nn.Linear(2, 2)) for each in (False, True))
    assert may_fuse(dense, without)
    assert not may_fuse(dense, scaler)
    assert not may_fuse(sparse, without)
    optim = OptimConfig(momentum=0.0, nesterov=False)
    optimizer = build_optimizer(optim, sparse.parameters(), fused=may_fuse(sparse, without))
    before = sparse[0].weight.detach().clone()
    sparse(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert (sparse[0].weight != before).any(dim=1).tolist() == [False, True, False, False]


def test_clipping_bounds_the_step() -> None:
    optim = OptimConfig(lr=1.0, momentum=0.0, nesterov=False, clip_norm=0.01)
    moved = trained(StepConfig(), optim, steps=1) - trained(StepConfig(), optim, steps=0)
    assert moved.norm() == pytest.approx(0.01, rel=1e-3)


def test_label_smoothing_reaches_the_loss() -> None:
    outputs, targets = torch.tensor([[4.0, 0.0]]), torch.tensor([0])
    losses = [loss_function(TaskConfig(label_smoothing=s))(outputs, targets).item() for s in (0.0, 0.5)]
    assert losses[1] == pytest.approx(losses[0] + 0.25 * 4.0, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (OptimConfig(lr=2.0, schedule="constant"), {0: 2.0, 50: 2.0, 100: 2.0}),
        (OptimConfig(lr=2.0, schedule="cosine"), {0: 2.0, 50: 1.0, 100: 0.0, 130: 0.0}),
        (OptimConfig(lr=2.0, schedule="cosine", warmup_samples=20), {0: 0.1, 9: 1.0, 20: 2.0, 60: 1.0, 100: 0.0}),
        (OptimConfig(lr=2.0, schedule="step", milestones=(30, 60)), {29: 2.0, 30: 0.2, 60: 0.02}),
    ],
)
def test_learning_rates_by_samples(config: OptimConfig, rates: dict[int, float]) -> None:
    assert {samples: learning_rate(config, samples, 100) for samples in rates} == pytest.approx(rates)


def test_frozen_parameters_are_left_out_of_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    before = copy.deepcopy(model[1].weight)
    optimizer = build_optimizer(OptimConfig(weight_decay=0.5), model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, before)
