"""Wire formats and the exchange that uses them: bounds, bytes, and error feedback."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.wire.encoded import pipeline
from trainer.wire.formats import BLOCK, FORMATS, Blocks


def rows(seed: int, count: int, exponent: float) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, count * BLOCK, generator=draw) * 10.0**exponent


def round_trip(name: str, values: torch.Tensor) -> torch.Tensor:
    format = FORMATS[name]
    coded = torch.empty(len(values), format.row_bytes(values.shape[1]), dtype=torch.uint8)
    format.encode(values.clone(), coded, torch.empty_like(values))
    out = torch.empty_like(values)
    format.decode(coded, out)
    return out


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), exponent=st.floats(-20, 20))
@pytest.mark.parametrize("name", FORMATS)
def test_a_round_trip_is_within_its_bound(name: str, seed: int, count: int, exponent: float) -> None:
    values = rows(seed, count, exponent)
    out = round_trip(name, values)
    format = FORMATS[name]
    if isinstance(format, Blocks):
        bound = values.view(2, -1, BLOCK).abs().amax(2, keepdim=True) / format.levels / 2
        off = (values - out).view(2, -1, BLOCK).abs()
    else:
        bound, off = values.abs() * 2.0**-8, (values - out).abs()
    assert (off <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_and_what_is_not_finite_shows(name: str) -> None:
    values = torch.zeros(1, 2 * BLOCK)
    assert torch.equal(round_trip(name, values), values)
    values[0, 3] = float("nan")
    out = round_trip(name, values)
    assert out[0, 3].isnan()
    assert torch.equal(out[0, BLOCK:], values[0, BLOCK:])


@pytest.mark.parametrize("count", range(5))
def test_a_pipeline_keeps_its_order_whatever_its_length(count: int) -> None:
    calls: list[str] = []

    def first(item: int) -> int:
        calls.append(f"a{item}")
        return item

    def second(item: int) -> int:
        calls.append(f"b{item}")
        return item

    assert list(pipeline(range(count), first, second, lambda item: item)) == list(range(count))
    assert sorted(calls) == [f"a{item}" for item in range(count)] + [f"b{item}" for item in range(count)]
    if count > 1:
        assert calls.index("a1") < calls.index("b0"), "the next item is begun while the first is under way"
