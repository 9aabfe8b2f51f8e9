"""Models by name: the FedAvg CNN, torchvision's classifiers, a user's own."""

from __future__ import annotations

import torch
import torchvision.models
from torch import nn

from trainer.config.config import TaskConfig
from trainer.errors import ConfigError, import_object


class FedAvgCNN(nn.Sequential):
    """The CNN of McMahan et al. 2017 (arXiv 1602.05629): 1,663,370 parameters at 28x28, one channel, ten classes.

    Input [B, channels, 28, 28] (or [B, channels, 32, 32]), output logits [B, classes]. `hidden` is the paper's 512
    units; more make it a model of any size.
    """

    def __init__(self, classes: int = 10, channels: int = 1, size: int = 28, hidden: int = 512) -> None:
        super().__init__(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (size // 4) ** 2, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )


def check_model(config: TaskConfig) -> None:
    """Refuse a model that does not exist, before anything is built.

    Raises:
        ConfigError: names the setting.
    """
    if ":" in config.model:
        import_object("task.model", config.model)
    elif config.model != "fedavg_cnn" and config.model not in classifiers():
        raise ConfigError(
            f"task.model = {config.model!r}: choose fedavg_cnn, a torchvision classification model "
            "(resnet18, vgg11, ...), or module:callable"
        )


def classifiers() -> list[str]:
    """The names of torchvision's classification models."""
    return list(torchvision.models.list_models(module=torchvision.models))


def build_model(config: TaskConfig, classes: int, channels: int, size: int) -> nn.Module:
    """The model that `config.model` means, for pictures [B, channels, size, size].

    Raises:
        ConfigError: a model that does not exist, or that cannot be fitted to these pictures.
    """
    check_model(config)
    if ":" in config.model:
        return _own(config.model, classes, channels)
    if config.model == "fedavg_cnn":
        return FedAvgCNN(classes, channels, size)
    options: dict[str, int] = {"aux_logits": False} if config.model in ("googlenet", "inception_v3") else {}
    if config.model.startswith("vit_"):
        options["image_size"] = size
    model: nn.Module = torchvision.models.get_model(config.model, weights=None, num_classes=classes, **options)
    _fit_channels(model, channels)
    if config.small_image_stem:
        _fit_small_images(model, classes)
    return model


def _own(spec: str, classes: int, channels: int) -> nn.Module:
    model = import_object("task.model", spec)(num_classes=classes, channels=channels)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"task.model = {spec!r}: returned {type(model).__name__}, not a torch module")
    return model


def _fit_channels(model: nn.Module, channels: int) -> None:
    """Give the first convolution `channels` input channels, freshly initialised as torchvision does it."""
    place, first = _first(model, nn.Conv2d)
    if first.in_channels != channels:
        _replace(model, place, _convolution(first, in_channels=channels))


def _fit_small_images(model: nn.Module, classes: int) -> None:
    """Keep the resolution that 28 to 32 pixels need: a stride-1 3x3 stem without pooling (ResNet and its kin);
    for VGG, pooling that rounds up, and one linear layer on the pooled features."""
    if isinstance(model, torchvision.models.VGG):
        for module in model.features:
            if isinstance(module, nn.MaxPool2d):
                module.ceil_mode = True  # 28 pixels survive five halvings
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, classes)
        return
    place, first = _first(model, nn.Conv2d)
    if first.stride != (1, 1):
        _replace(model, place, _convolution(first, kernel_size=3, stride=1, padding=1))
    pools = [name for name, module in model.named_modules() if isinstance(module, nn.MaxPool2d)]
    if pools:
        _replace(model, pools[0], nn.Identity())


def _first(model: nn.Module, kind: type[nn.Conv2d]) -> tuple[str, nn.Conv2d]:
    for name, module in model.named_modules():
        if isinstance(module, kind):
            return name, module
    raise ConfigError(f"task.model: {type(model).__name__} has no convolution to fit to these pictures")


def _convolution(like: nn.Conv2d, **changes: int) -> nn.Conv2d:
    options = {
        name: getattr(like, name) for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    }
    new = nn.Conv2d(**(options | changes), bias=like.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new


def _replace(model: nn.Module, place: str, module: nn.Module) -> None:
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def loss_function(config: TaskConfig) -> nn.Module:
    """The loss that `config.loss` means: (outputs, targets) -> mean over the batch."""
    if config.loss == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    return _Callable(import_object("task.loss", config.loss))


class _Callable(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        assert callable(function)
        self.function = function

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self.function(outputs, targets)
        assert isinstance(loss, torch.Tensor)
        return loss
