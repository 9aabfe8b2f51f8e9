"""Flat storage: every kind of model trains as before, and its tensors are views."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.wire.flat import FlatTensors


class Odd(nn.Module):
    """Tied weights, a frozen layer, two types, channels-last convolutions and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # in torch
        self.encode = nn.Linear(16, 8, bias=False)
        self.decode = nn.Linear(16, 8, bias=False)
        self.decode.weight = self.encode.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 2).double()
        self.empty = nn.Parameter(torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv(x).mean(dim=(2, 3)).repeat(1, 4)
        out = self.frozen(self.encode(out) * self.decode(out))
        return torch.as_tensor(self.last(out.double()))


def test_an_odd_model_trains_as_before() -> None:
    torch.manual_seed(0)
    plain = Odd()
    ours = copy.deepcopy(plain)
    flat = FlatTensors(lambda: [p for p in ours.parameters() if p.requires_grad])
    assert [buffer.dtype for buffer in flat.buffers] == [torch.float32, torch.float64]
    assert ours.decode.weight is ours.encode.weight
    assert ours.conv.weight.stride() == plain.conv.weight.stride()
    models = [(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)) for model in (plain, ours)]
    for step in range(3):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        for model, optimizer in models:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for expected, got in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(expected, got)
    starts = {buffer.untyped_storage().data_ptr() for buffer in flat.buffers}
    trained = [p for p in ours.parameters() if p.requires_grad and p.numel()]
    assert {p.untyped_storage().data_ptr() for p in trained} == starts
    flat.buffers[0].zero_()
    assert ours.conv.weight.abs().sum() == 0
    assert ours.frozen.weight.abs().sum() > 0


def test_a_tensor_that_was_moved_or_replaced_is_taken_back() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("seen", torch.zeros(4))
    flat = FlatTensors(model.buffers)
    model.seen = torch.ones(4)
    assert flat.adopt()[0][:4].sum() == 4
    flat.buffers[0].fill_(7)
    assert model.seen.sum() == 28
    model.seen = torch.ones(5)
    with pytest.raises(ConfigError, match=r"trained parameter 0 is .* where it was"):
        flat.adopt()


def test_two_parameters_in_one_memory_are_refused() -> None:
    whole = torch.zeros(6)
    first, second = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])
    with pytest.raises(ConfigError, match="share memory: tie them as one Parameter"):
        FlatTensors(lambda: [first, second])
