"""Sharing out a data set: every sample on one shard, one seed one split, and the moments that the papers state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from trainer.data import Sharing, held_out, keys_of, labels_of, share_out
from trainer.data.partition import PARTITIONERS
from trainer.errors import ConfigError

LABELLED = ("iid", "dirichlet", "dirichlet_device", "classes", "shards", "quantity")


def labels(samples: int, classes: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, samples)


def table(shards: list[np.ndarray], of: np.ndarray) -> np.ndarray:
    """Samples by shard and class."""
    return np.array([np.bincount(of[shard], minlength=of.max() + 1) for shard in shards])


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(LABELLED),
    samples=st.integers(40, 300),
    shards=st.integers(1, 12),
    alpha=st.sampled_from([1e-3, 0.05, 0.5, 100.0]),
    seed=st.integers(0, 2**40),
)
def test_every_sample_is_on_one_shard(name: str, samples: int, shards: int, alpha: float, seed: int) -> None:
    count = 3 if name == "classes" and shards == 1 else 2
    asked = Sharing(samples, shards, seed, labels(samples, 3), alpha=alpha, classes_per_device=count)
    found = share_out(name, asked)
    assert len(found) == shards
    assert sorted(np.concatenate(found).tolist()) == list(range(samples))
    assert min(map(len, found)) >= 1


def test_one_seed_is_one_split_in_another_process_too() -> None:
    code = (
        "import numpy as np; from trainer.data.partition import Sharing, share_out;"
        "asked = Sharing(500, 7, 11, np.arange(500) % 10);"
        f"print([[part.tolist() for part in share_out(name, asked)] for name in {LABELLED!r}])"
    )
    asked, other = (Sharing(500, 7, seed, np.arange(500) % 10) for seed in (11, 12))
    mine = [[part.tolist() for part in share_out(name, asked)] for name in LABELLED]
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert theirs.strip() == str(mine)
    for name, parts in zip(LABELLED, mine, strict=True):
        assert [part.tolist() for part in share_out(name, other)] != parts


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_device"])
def test_a_large_alpha_is_near_iid(name: str) -> None:
    of = np.arange(20_000) % 10
    found = table(share_out(name, Sharing(20_000, 20, 3, of, alpha=1e6)), of)
    expected = found.sum(1, keepdims=True) * found.sum(0, keepdims=True) / found.sum()
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < 171 + 3 * np.sqrt(2 * 171)  # (20 - 1) (10 - 1) degrees of freedom


def test_shares_of_a_class_have_the_dirichlets_moments() -> None:
    """Of each class a device holds a share with mean 1/N and variance (N - 1) / (N^2 (N alpha + 1))."""
    devices, alpha, of = 20, 0.5, np.arange(40_000) % 10
    shares = np.concatenate(
        [
            table(share_out("dirichlet", Sharing(40_000, devices, seed, of, alpha=alpha)), of) / 4_000
            for seed in range(10)
        ],
        axis=1,
    )
    each = shares.var(axis=0) * devices / (devices - 1)
    expected = (devices - 1) / (devices**2 * (devices * alpha + 1)) * devices / (devices - 1)
    error = each.std() / np.sqrt(len(each))
    assert abs(each.mean() - expected) < 3 * error
    assert np.allclose(shares.sum(0), 1)


def test_classes_of_a_device_have_the_dirichlets_moments() -> None:
    """A device's share of a class has mean p and variance p (1 - p) / (alpha + 1)."""
    alpha, classes, of = 2.0, 10, np.arange(60_000) % 10
    found = [table(share_out("dirichlet_device", Sharing(60_000, 100, seed, of, alpha=alpha)), of) for seed in range(3)]
    sizes = {int(size) for each in found for size in each.sum(1)}
    assert sizes == {600}
    shares = np.concatenate(found)[:, :] / 600
    spread = ((shares - 1 / classes) ** 2).mean(1)  # of each device, over classes
    expected = (1 / classes) * (1 - 1 / classes) / (alpha + 1)
    assert abs(spread.mean() - expected) < 3 * spread.std() / np.sqrt(len(spread))


def test_classes_and_shards_hold_as_many_classes_as_asked() -> None:
    of = labels(3_000)
    for devices, count in ((10, 2), (4, 3), (25, 1)):
        found = table(share_out("classes", Sharing(3_000, devices, 5, of, classes_per_device=count)), of)
        assert ((found > 0).sum(1) == count).all()
        owners = (found > 0).sum(0)
        assert (owners >= 1).all()
        for number in range(10):
            held = found[found[:, number] > 0, number]
            assert held.max() - held.min() <= 1
    of = np.sort(np.arange(2_000) % 10)
    found = table(share_out("shards", Sharing(2_000, 100, 5, of)), of)
    assert ((found > 0).sum(1) <= 2).all()
    assert (found.sum(1) == 20).all()


def test_natural_keeps_a_persons_samples_together_and_a_file_says_it(tmp_path: Path) -> None:
    keys = [f"person {number % 13}" for number in range(200)]
    found = share_out("natural", Sharing(200, 5, 1, keys=keys))
    owners = [{keys[place] for place in shard} for shard in found]
    assert sorted(key for each in owners for key in each) == sorted(set(keys))
    file = tmp_path / "devices.txt"
    owner = np.random.default_rng(0).permutation(np.arange(200) % 4)
    file.write_text("\n".join(map(str, owner)))
    for device, shard in enumerate(share_out("file", Sharing(200, 4, path=str(file)))):
        assert shard.tolist() == np.flatnonzero(owner == device).tolist()


def test_fewest_samples_are_made_up_and_the_sizes_that_are_reachable_are_said() -> None:
    of = labels(1_000)
    for name in ("dirichlet", "quantity", "dirichlet_device"):
        found = share_out(name, Sharing(1_000, 50, 2, of, alpha=0.01, min_samples=20))
        assert [len(each) for each in found] == [20] * 50
        found = share_out(name, Sharing(1_000, 50, 2, of, alpha=0.01, min_samples=7))
        assert min(map(len, found)) >= 7
        assert sorted(np.concatenate(found).tolist()) == list(range(1_000))
    with pytest.raises(ConfigError, match=r"min_samples = 21: 50 shards of 1000 can have 20 each"):
        Sharing(1_000, 50, 2, of, min_samples=21)


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("dirichlet", {}, "needs a class for every sample"),
        ("natural", {}, "needs whom every sample is of"),
        ("natural", {"keys": ["a"] * 100}, "has 1 keys, too few for 4"),
        ("file", {}, "needs partition_file"),
        ("file", {"path": "/nowhere"}, "holds no device numbers"),
        ("classes", {"labels": np.arange(100) % 10, "classes_per_device": 11}, "has 10 classes"),
        ("classes", {"labels": np.arange(100) % 10, "classes_per_device": 2}, "cannot hold 10 classes"),
        ("shards", {"labels": np.arange(100) % 10, "classes_per_device": 26}, "at most 25 pieces"),
        ("dirichlet", {"labels": np.arange(100) % 10, "alpha": 0.0}, "alpha = 0.0: must be above 0"),
        ("dirichlet", {"labels": np.arange(100) % 10, "alpha": np.inf}, "alpha = inf: must be above 0"),
        ("iid", {"labels": np.arange(99)}, r"labels of shape \(99,\): give one class for each of the 100 samples"),
        ("iid", {"labels": np.eye(100)}, r"labels of shape \(100, 100\)"),
        ("iid", {"labels": np.linspace(0, 1, 100)}, "labels of float64: a class is a whole number or a name"),
        ("iid", {"keys": ["a"] * 7}, "keys: there are 7 for 100 samples"),
        ("iid", {"seed": -1}, "seed = -1: must be a whole number, 0 or more"),
        ("dirichle", {}, r"did you mean dirichlet\?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(name: str, asked: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        share_out(name, Sharing(100, 4, **asked))
    assert "\n" not in str(refused.value)


def test_labels_and_keys_are_found_where_data_sets_have_them() -> None:
    class WithTargets(list):
        targets = (3, 1, 2)
        device_keys = torch.tensor([7, 7, 9])

    items = WithTargets("abc")
    assert labels_of(items).tolist() == [3, 1, 2]  # type: ignore[union-attr]
    assert labels_of(Subset(items, [2, 0])).tolist() == [2, 3]  # type: ignore[arg-type, union-attr]
    assert list(keys_of(Subset(items, [2, 0])) or ()) == [9, 7]  # type: ignore[arg-type]
    assert labels_of(TensorDataset(torch.zeros(4, 2), torch.arange(4))).tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert labels_of(TensorDataset(torch.zeros(4, 2), torch.rand(4))) is None
    assert labels_of([1, 2, 3]) is None


def test_a_held_out_share_is_apart_and_repeatable() -> None:
    shard = np.arange(50, 150)
    train, test = held_out(shard, 0.2, 4, 9)
    assert len(test) == 20
    assert sorted([*train, *test]) == shard.tolist()
    assert held_out(shard, 0.2, 4, 9)[1].tolist() == test.tolist()
    assert held_out(shard, 0.2, 4, 10)[1].tolist() != test.tolist()
    assert [len(part) for part in held_out(shard[:2], 0.01, 0, 0)] == [1, 1]
    assert [len(part) for part in held_out(shard, 0.0, 0, 0)] == [100, 0]


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_device", "shards"])
def test_classes_may_be_a_list_or_names(name: str) -> None:
    classes = (np.arange(100) * 7 % 10).tolist()
    found = [
        share_out(name, Sharing(100, 4, 0, labels)) for labels in (np.array(classes), classes, [*map(str, classes)])
    ]
    for other in found[1:]:
        assert all(map(np.array_equal, found[0], other))


def test_a_partitioner_of_ones_own_is_held_to_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for shards, said in (
        ([[0, 1], [1, 2]], "gave out sample 1 2 times"),
        ([[0], [2]], "gave out sample 1 0 times"),
        ([[0, 1], [2, 3]], "gave out sample 3 of 3"),
        ([[0, 1, 2]], "made 1 shards where 2 were asked for"),
    ):
        monkeypatch.setitem(PARTITIONERS, "mine", lambda asked, made=shards: made)
        with pytest.raises(ConfigError, match=said):
            share_out("mine", Sharing(3, 2))
