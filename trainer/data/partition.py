"""How a data set is shared out: partitioners by name, each from labels to one index array a shard.

A shard belongs to a rank, or to a device where a run has federated devices.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import ConfigError, require
from trainer.fields import nearest

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sharing:
    """What a partitioner is asked for: the data set and how it is to be cut.

    Raises:
        ConfigError: names the field, its value and what would hold.
    """

    samples: int
    """Samples of the data set."""
    shards: int
    """Ranks, or devices."""
    seed: int = 0
    """Two sharings of one seed are one, on every rank and in every process."""
    labels: Any = None
    """Class of every sample, (samples,): whole numbers or names; None where a data set has none."""
    keys: Sequence[Hashable] | None = None
    """Whom every sample is of (a speaker, a person, a site), (samples,), for `natural`."""
    alpha: float = 0.5
    """Concentration of the Dirichlet kinds: small is skewed, large is near IID."""
    classes_per_device: int = 2
    """Classes (of `shards`: pieces of one class) that a device holds."""
    min_samples: int = 1
    """Fewest samples of a shard; what falls short is made up from the largest shards."""
    path: str | None = None
    """For `file`: a text file with one device number a line, a line a sample, or such an array as .npy."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("shards", 1), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= least
            require(name, value, whole, f"must be a whole number, {least} or more")
        require("alpha", self.alpha, 0 < self.alpha < np.inf, "must be above 0, and no infinity; choose iid for that")
        require("min_samples", self.min_samples, self.min_samples >= 1, "must be at least 1")
        require("classes_per_device", self.classes_per_device, self.classes_per_device >= 1, "must be at least 1")
        if self.shards > self.samples:
            raise ConfigError(
                f"data set of {self.samples} samples: too few for {self.shards} ranks or devices; have fewer"
            )
        most = self.samples // self.shards
        fits = self.min_samples <= most
        require("min_samples", self.min_samples, fits, f"{self.shards} shards of {self.samples} can have {most} each")
        if self.labels is not None:
            object.__setattr__(self, "labels", _classes(self.labels, self.samples))
        if self.keys is not None and len(self.keys) != self.samples:
            raise ConfigError(f"keys: there are {len(self.keys)} for {self.samples} samples; give one for each")

    def draw(self) -> np.random.Generator:
        """Random numbers of this sharing."""
        return np.random.default_rng([self.seed, 1])

    def known_labels(self, partition: str) -> Indices:
        """The labels, which this partition needs.

        Raises:
            ConfigError: there are none.
        """
        if self.labels is None:
            raise ConfigError(
                f"partition = {partition!r}: needs a class for every sample; give the data set an attribute `targets`, "
                "or choose iid, quantity, natural or file"
            )
        found: Indices = self.labels
        return found


def _classes(labels: Any, samples: int) -> Indices:
    """The class of every sample as a number, (samples,).

    Raises:
        ConfigError: there is not one class for each sample.
    """
    try:
        found = np.asarray(labels)
    except ValueError:  # of unequal lengths
        found = np.asarray(labels, dtype=object)
    if found.shape != (samples,):
        raise ConfigError(f"labels of shape {found.shape}: give one class for each of the {samples} samples")
    whole = np.issubdtype(found.dtype, np.integer)
    if not whole and found.dtype.kind not in "bUS" and not all(isinstance(each, str) for each in found):
        raise ConfigError(f"labels of {found.dtype}: a class is a whole number or a name")
    return found.astype(np.int64) if whole else np.unique(found, return_inverse=True)[1].astype(np.int64)


LEAST = 1e-300
"""Concentrations below it are taken for it: one share is then all."""
FITS = 200
"""Rounds of fitting: sums are then right to a sample."""
Partitioner = Callable[[Sharing], list[Indices]]
PARTITIONERS: dict[str, Partitioner] = {}
AS_THEY_ARE = ("natural", "file", "classes", "shards")
"""Kinds whose shards may not be topped up, since they would no longer be what they say."""


def register_partition(name: str) -> Callable[[Partitioner], Partitioner]:
    """Decorator: make a partitioner `(Sharing) -> index arrays` known to `data.partition`.

    The arrays are disjoint and together hold every index; every rank computes all of them.
    """

    def add(partitioner: Partitioner) -> Partitioner:
        PARTITIONERS[name] = partitioner
        return partitioner

    return add


@register_partition("iid")
def iid(asked: Sharing) -> list[Indices]:
    """A seeded shuffle cut into shards whose sizes differ by at most one."""
    return np.array_split(asked.draw().permutation(asked.samples).astype(np.int64), asked.shards)


@register_partition("dirichlet")
def dirichlet(asked: Sharing) -> list[Indices]:
    """Skew by label: of each class, devices hold shares ~ Dir(alpha), so that sizes are unequal too (Yurochkin et al.
    2019; the split of NIID-Bench, Li et al. 2022, without its redraws)."""
    draw = asked.draw()
    cut: list[list[Indices]] = [[] for _ in range(asked.shards)]
    for members in _by_class(asked.known_labels("dirichlet"), draw):
        shares = _dirichlet(draw, np.full(asked.shards, asked.alpha))
        ends = np.rint(np.cumsum(shares) * len(members)).astype(np.int64)
        for shard, part in zip(cut, np.split(members, ends[:-1]), strict=True):
            shard.append(part)
    return [np.concatenate(parts) for parts in cut]


@register_partition("dirichlet_device")
def dirichlet_device(asked: Sharing) -> list[Indices]:
    """Skew by device: sizes are equal, and a device's classes ~ Dir(alpha p) with the data set's own shares p (Hsu et
    al. 2019). Devices' wishes are fitted to what there is of each class in proportion, so that none has to take what
    the others left."""
    draw = asked.draw()
    pools = _by_class(asked.known_labels("dirichlet_device"), draw)
    counts = np.array([len(pool) for pool in pools])
    sizes = np.array([len(part) for part in np.array_split(np.arange(asked.samples), asked.shards)])
    prior = counts / counts.sum()
    wanted = np.stack([size * _dirichlet(draw, asked.alpha * prior) for size in sizes])
    taken = _fitted(wanted, sizes, counts)
    cut = [np.split(pool, np.cumsum(column)[:-1]) for pool, column in zip(pools, taken.T, strict=True)]
    return [np.concatenate([parts[device] for parts in cut]) for device in range(asked.shards)]


def _fitted(wanted: npt.NDArray[np.float64], rows: Indices, columns: Indices) -> Indices:
    """Whole numbers near `wanted` with these sums of rows and of columns (iterative proportional fitting)."""
    fitted = wanted + 1e-9
    for _ in range(FITS):
        fitted *= (columns / fitted.sum(0))[None, :]
        fitted *= (rows / fitted.sum(1))[:, None]
    found = np.floor(fitted * np.minimum(1, columns / fitted.sum(0))[None, :]).astype(np.int64)
    short, left = rows - found.sum(1), columns - found.sum(0)
    for place in np.argsort(-(fitted - found), axis=None, kind="stable"):  # the largest remainders first
        row, column = divmod(int(place), len(columns))
        if short[row] > 0 and left[column] > 0:
            found[row, column] += 1
            short[row] -= 1
            left[column] -= 1
    for row in np.flatnonzero(short).tolist():  # wishes that no fitting meets take what is there
        for column in np.flatnonzero(left).tolist():
            more = min(int(short[row]), int(left[column]))
            found[row, column] += more
            short[row] -= more
            left[column] -= more
    fits: Indices = found
    return fits


@register_partition("classes")
def classes(asked: Sharing) -> list[Indices]:
    """Every device holds `classes_per_device` classes, and those that hold a class have equal parts of it (#C = k of
    NIID-Bench): device k has class k modulo their number, and others at random."""
    draw, count = asked.draw(), asked.classes_per_device
    pools = _by_class(asked.known_labels("classes"), draw)
    known = len(pools)
    require("classes_per_device", count, count <= known, f"the data set has {known} classes")
    enough = asked.shards * count >= known
    require("classes_per_device", count, enough, f"{asked.shards} devices cannot hold {known} classes so; raise it")
    held = _held_by_turns(asked.shards, known, count, draw)
    cut: list[list[Indices]] = [[] for _ in range(asked.shards)]
    for number, pool in enumerate(pools):
        owners = [device for device, mine in enumerate(held) if number in mine]
        for owner, part in zip(owners, np.array_split(pool, len(owners)), strict=True):
            cut[owner].append(part)
    return [np.concatenate(parts) for parts in cut]


def _held_by_turns(devices: int, known: int, count: int, draw: np.random.Generator) -> list[set[int]]:
    """Which classes each device holds, so that every class is held."""
    if devices >= known:
        first = [device % known for device in range(devices)]
        others = [[each for each in range(known) if each != mine] for mine in first]
        return [
            {mine, *draw.choice(rest, count - 1, replace=False).tolist()}
            for mine, rest in zip(first, others, strict=True)
        ]
    deck, held = draw.permutation(known).tolist(), []
    for _ in range(devices):
        mine = set(deck[:count])
        deck = deck[count:]
        if len(mine) < count:  # the deck is through: begin it again
            again = [each for each in draw.permutation(known).tolist() if each not in mine]
            mine |= set(again[: count - len(mine)])
        held.append(mine)
    return held


@register_partition("shards")
def shards(asked: Sharing) -> list[Indices]:
    """Samples in the order of their labels are cut into equal pieces, of which each device has `classes_per_device`
    at random (McMahan et al. 2017, with two)."""
    draw, count = asked.draw(), asked.classes_per_device
    labels = asked.known_labels("shards")
    pieces = asked.shards * count
    most = asked.samples // asked.shards
    require("classes_per_device", count, pieces <= asked.samples, f"at most {most} pieces a device have samples")
    shuffled = draw.permutation(asked.samples)
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")].astype(np.int64)
    cut, dealt = np.array_split(ordered, pieces), draw.permutation(pieces).reshape(asked.shards, count)
    return [np.concatenate([cut[piece] for piece in mine]) for mine in dealt]


@register_partition("quantity")
def quantity(asked: Sharing) -> list[Indices]:
    """Skew by quantity: sizes ~ Dir(alpha) of an IID order (NIID-Bench)."""
    draw = asked.draw()
    order = draw.permutation(asked.samples).astype(np.int64)
    ends = np.rint(np.cumsum(_dirichlet(draw, np.full(asked.shards, asked.alpha))) * asked.samples).astype(np.int64)
    return np.split(order, ends[:-1])


@register_partition("natural")
def natural(asked: Sharing) -> list[Indices]:
    """By whom samples are of: each key's samples stay together, and the keys are dealt to devices in a seeded order."""
    if asked.keys is None:
        raise ConfigError(
            "partition = 'natural': needs whom every sample is of; give the data set an attribute `device_keys`, "
            "one key a sample"
        )
    known = {key: number for number, key in enumerate(dict.fromkeys(asked.keys))}
    if len(known) < asked.shards:
        raise ConfigError(f"partition = 'natural': the data has {len(known)} keys, too few for {asked.shards} devices")
    places = asked.draw().permutation(len(known)) % asked.shards
    owner = places[np.array([known[key] for key in asked.keys])]
    return _by_owner(owner, asked.shards)


@register_partition("file")
def from_file(asked: Sharing) -> list[Indices]:
    """By a file that names the device of every sample, from 0."""
    if asked.path is None:
        raise ConfigError("partition = 'file': needs partition_file, with the device of every sample")
    owner = _read_owners(Path(asked.path))
    if len(owner) != asked.samples:
        raise ConfigError(f"partition_file = {asked.path!r}: has {len(owner)} lines for {asked.samples} samples")
    if len(owner) and not (owner.min() >= 0 and owner.max() < asked.shards):
        bad = int(owner.max() if owner.max() >= asked.shards else owner.min())
        raise ConfigError(f"partition_file = {asked.path!r}: names device {bad} of {asked.shards} (from 0)")
    return _by_owner(owner, asked.shards)


def _read_owners(path: Path) -> Indices:
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False), dtype=np.int64).reshape(-1)
        return np.array([int(line) for line in path.read_text().split()], dtype=np.int64)
    except (OSError, ValueError) as error:
        raise ConfigError(f"partition_file = {str(path)!r}: holds no device numbers ({error})") from error


def share_out(name: str, asked: Sharing) -> list[Indices]:
    """Every shard's samples: disjoint, and together all.

    Raises:
        ConfigError: no such partitioner, one that is wrong, or a shard that cannot have its fewest samples.
    """
    if name not in PARTITIONERS:
        known = sorted(PARTITIONERS)
        raise ConfigError(f"data.partition = {name!r}: choose one of {', '.join(known)}{nearest(name, known)}")
    found = [np.asarray(each, dtype=np.int64) for each in PARTITIONERS[name](asked)]
    _require_whole(name, found, asked)
    fewest = min(len(each) for each in found)
    if fewest >= asked.min_samples:
        return found
    if name in AS_THEY_ARE:
        raise ConfigError(
            f"min_samples = {asked.min_samples}: partition {name!r} leaves a shard with {fewest}; have fewer shards"
        )
    return _topped_up(found, asked.min_samples)


def _require_whole(name: str, found: Sequence[Indices], asked: Sharing) -> None:
    """Shards are as many as asked for, disjoint, and together all."""
    said = f"partition {name!r}"
    if len(found) != asked.shards:
        raise ConfigError(f"{said} made {len(found)} shards where {asked.shards} were asked for; mend it")
    everything = np.concatenate(found)
    beyond = everything[(everything < 0) | (everything >= asked.samples)]
    if len(beyond):
        raise ConfigError(f"{said} gave out sample {beyond[0]} of {asked.samples} (from 0); mend it")
    wrong = np.flatnonzero(np.bincount(everything, minlength=asked.samples) != 1)
    if len(wrong):
        times = int((everything == wrong[0]).sum())
        raise ConfigError(f"{said} gave out sample {wrong[0]} {times} times; each belongs to one shard: mend it")


def shard_of(name: str, samples: int, shards: int, rank: int, seed: int) -> Indices:
    """The samples of one shard of a sharing that needs no labels.

    Raises:
        ConfigError: as `share_out`.
    """
    return share_out(name, Sharing(samples, shards, seed))[rank]


def held_out(shard: Indices, share: float, seed: int, device: int) -> tuple[Indices, Indices]:
    """A device's samples to train, and those held out for its own test: a seeded choice of this share, at least one of
    each where there are two."""
    if not share or len(shard) < 2:
        return shard, shard[:0]
    count = min(len(shard) - 1, max(1, round(len(shard) * share)))
    order = np.random.default_rng([seed, 6, device]).permutation(len(shard))
    return shard[np.sort(order[count:])], shard[np.sort(order[:count])]


def labels_of(items: Any) -> Indices | None:
    """The class of every sample of a map-style data set, where its attributes say it: `targets`, `labels`, or the
    second tensor of a TensorDataset, also through Subsets; None where they do not."""
    inner, chosen = getattr(items, "dataset", None), getattr(items, "indices", None)
    if inner is not None and chosen is not None:
        found = labels_of(inner)
        return None if found is None else found[np.asarray(chosen, dtype=np.int64)]
    tensors = getattr(items, "tensors", ())
    for value in (getattr(items, "targets", None), getattr(items, "labels", None), *tensors[1:2]):
        if value is None:
            continue
        try:
            labels = np.asarray(value)
        except (TypeError, ValueError):
            continue
        if labels.ndim == 1 and len(labels) == len(items) and np.issubdtype(labels.dtype, np.integer):
            return labels.astype(np.int64)
    return None


def keys_of(items: Any) -> Sequence[Hashable] | None:
    """Whom every sample is of, where the data set has `device_keys`, also through Subsets."""
    inner, chosen = getattr(items, "dataset", None), getattr(items, "indices", None)
    if inner is not None and chosen is not None:
        found = keys_of(inner)
        return None if found is None else [found[int(place)] for place in chosen]
    keys = getattr(items, "device_keys", None)
    return None if keys is None else [key.item() if hasattr(key, "item") else key for key in keys]


def _by_class(labels: Indices, draw: np.random.Generator) -> list[Indices]:
    """The samples of each class that occurs, shuffled."""
    return [draw.permutation(np.flatnonzero(labels == each)).astype(np.int64) for each in np.unique(labels)]


def _by_owner(owner: Indices, shards: int) -> list[Indices]:
    order = np.argsort(owner, kind="stable").astype(np.int64)
    return np.split(order, np.searchsorted(owner[order], np.arange(1, shards)))


def _dirichlet(draw: np.random.Generator, concentration: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Shares ~ Dir(concentration), also where concentrations are so small that every Gamma draw is zero."""
    concentration = np.maximum(concentration, LEAST)
    # log Gamma(a) = log Gamma(a + 1) + log(U) / a, which does not run out of small numbers
    logs = np.log(draw.standard_gamma(concentration + 1)) + np.log(draw.random(len(concentration))) / concentration
    shares = np.exp(logs - logs.max())
    found: npt.NDArray[np.float64] = shares / shares.sum()
    return found


def _topped_up(found: list[Indices], fewest: int) -> list[Indices]:
    """Shards with at least so many samples: each that falls short takes the last ones of the largest shards."""
    sizes = np.array([len(each) for each in found])
    for place in np.flatnonzero(sizes < fewest):
        while len(found[place]) < fewest:
            largest = int(np.argmax(sizes))
            spare = min(fewest - len(found[place]), len(found[largest]) - fewest)
            second = int(np.partition(sizes, -2)[-2]) if len(sizes) > 1 else 0
            spare = max(1, min(spare, len(found[largest]) - second))
            found[place] = np.concatenate([found[place], found[largest][-spare:]])
            found[largest] = found[largest][:-spare]
            sizes[place], sizes[largest] = len(found[place]), len(found[largest])
    return found
