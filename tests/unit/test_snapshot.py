"""What a checkpoint writes comes back exactly: any state, and its tensors in a file."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.loop.snapshot import Snapshot, restored
from trainer.loop.tensor_file import Checksum, as_stored, read_tensors, write_tensors

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool]
TYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint32]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of any type and up to two dimensions, of any bits."""
    kind, shape = draw(st.sampled_from(TYPES)), draw(st.lists(st.integers(0, 3), max_size=2))
    count = math.prod(shape) * torch.empty(0, dtype=kind).element_size()
    most = 1 if kind == torch.bool else 255
    bits = draw(st.lists(st.integers(0, most), min_size=count, max_size=count))
    flat = torch.tensor(bits, dtype=torch.uint8)
    return flat.view(kind).view(shape) if count else torch.empty(shape, dtype=kind)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
arrays = st.sampled_from([np.arange(5, dtype=np.uint32), np.float64(0.1), np.array([], dtype=np.int8), np.bool_(True)])
keys = st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.text(max_size=2)) | st.just("$tensor")
states = st.recursive(
    plain | arrays | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Equal in type and bits, NaN included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(same(a, b) and same(v, w) for (a, v), (b, w) in pairs)
    return bool(one == other)


@settings(max_examples=200, deadline=None)
@given(state=states)
def test_any_state_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "state.safetensors"
    snapshot = Snapshot.of(state)
    checksum = write_tensors(path, {name: as_stored(tensor) for name, tensor in snapshot.tensors.items()})
    assert checksum == Checksum.of(path)
    assert same(restored(json.loads(json.dumps(snapshot.tree, allow_nan=False)), read_tensors(path).__getitem__), state)


def test_random_states_come_back_and_training_may_go_on_beside_a_snapshot() -> None:
    weights = torch.zeros(3, requires_grad=True)
    lists = [1, 2]
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    snapshot = Snapshot.of(state | {"weights": weights, "lists": lists, "strided": torch.arange(6).view(2, 3).t()})
    with torch.no_grad():
        weights += 1
    lists.append(3)
    again = restored(snapshot.tree, snapshot.tensors.__getitem__)
    assert same({name: again[name] for name in state}, state)
    random.setstate(again["python"])
    np.random.set_state(again["numpy"])
    assert (again["weights"].tolist(), again["lists"]) == ([0, 0, 0], [1, 2])
    assert again["strided"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_cannot_be_held_is_named() -> None:
    with pytest.raises(TypeError, match=r"state\.policy\.0 is a object, which a checkpoint cannot hold"):
        Snapshot.of({"policy": [object()]})
    with pytest.raises(TypeError, match=r"state\.sparse is a tensor stored as torch\.sparse_coo"):
        Snapshot.of({"sparse": torch.eye(2).to_sparse()})


def test_files_are_those_of_the_safetensors_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch")
    held = {"flag": torch.tensor([True]), "a": torch.randn(3, 5).t(), "half": torch.randn(4).bfloat16(), "none": None}
    held["none"] = torch.empty(0, 2)
    write_tensors(tmp_path / "ours", held, {"format": "pt"})
    theirs = package.load_file(tmp_path / "ours")
    assert same({name: theirs[name] for name in held}, held)
    package.save_file({name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / "theirs")
    assert same({name: read_tensors(tmp_path / "theirs")[name] for name in held}, held)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="file"):
        read_tensors(path)
