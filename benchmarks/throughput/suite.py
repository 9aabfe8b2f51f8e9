"""What the suite measures: its flags, and the cases that they come to. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from trainer.errors import ConfigError, require, require_at_least, require_choices
from trainer.plan import WireFormat

DATA = "made-up pictures"


@dataclass(frozen=True, order=True)
class Case:
    """One thing that is measured."""

    model: str
    batch_per_rank: int
    sync_period_steps: int
    wire_format: str
    world_size: int

    @property
    def name(self) -> str:
        """The case as a file's name."""
        model = re.sub(r"[^A-Za-z0-9_.]+", "_", self.model)
        way = f"period{self.sync_period_steps}-{self.wire_format}"
        return f"{model}-batch{self.batch_per_rank}-{way}-world{self.world_size}"

    @property
    def ranks(self) -> str:
        """The world size in a word."""
        return f"{self.world_size} rank{'s' * (self.world_size != 1)}"


@dataclass(frozen=True)
class Task:
    """What two measurements must have alike to be compared."""

    data: str = DATA
    image_size: int = 32
    loss: str = "cross_entropy"
    precision: str = "fp32"
    channels_last: bool = False
    delay_steps: int | str = 0

    def refuse_other(self, other: Task, mine: str, theirs: str) -> None:
        """Another task is not compared with this one.

        Raises:
            ConfigError: names the first difference, and the mend.
        """
        for field, value in asdict(self).items():
            found = asdict(other)[field]
            if found != value:
                raise ConfigError(
                    f"{theirs}: measured another task than {mine} ({field} {found} against {value}); "
                    "measure both with the same flags, or name another folder"
                )


@dataclass(frozen=True)
class Suite:
    """What is measured."""

    models: tuple[str, ...] = ("fedavg_cnn", "resnet18", "vgg11")
    """As in task.model, or module:callable of your own. Up to 64 pixels torchvision's get the small-image stem."""
    batches: tuple[int, ...] = (32, 128)
    """Samples a rank in one local step. World sizes side by side show weak scaling."""
    global_batches: tuple[int, ...] = ()
    """Samples of all ranks in one step, shared out to them: world sizes side by side show strong scaling."""
    periods: tuple[int, ...] = (1, 16)
    """Local steps between two averagings."""
    wire_formats: tuple[WireFormat, ...] = ("float32",)
    """Number formats of what is averaged. At period 1 gradients go in float32 or bf16 only."""
    world_sizes: tuple[int, ...] = ()
    """Ranks that train; by default 1, 2, 4 and so on up to all that the launcher gave. The others wait."""
    repeats: int = 3
    """Times that each case is measured, in turns."""
    seconds: float = 5.0
    """Seconds of training that each figure is taken over, at least one round."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass."""
    channels_last: bool = False
    """Convolutions in channels-last layout."""
    image_size: int = 32
    """Side of the made-up pictures in pixels."""
    data: str = DATA
    """Made-up pictures in memory, or module:callable (root, train) of a data set of your own."""
    loss: str = "cross_entropy"
    """cross_entropy, or module:callable (outputs, targets) of your own."""
    delay_steps: int | Literal["auto"] = 0
    """Local steps behind which averages of parameters are hidden; 0 waits for them."""
    links: bool = True
    """Also measure transfers between ranks, which the cost model needs."""
    out: str = "runs/throughput"
    """Folder of the records and the report. What is there already is not measured again."""
    report: bool = True
    """Draw the report and fit the cost model at the end."""
    quick: bool = False
    """One model, short figures, two repeats: less than three minutes on two ranks."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(self, 1, "image_size", "repeats")
        require("seconds", self.seconds, self.seconds > 0, "must be above 0")
        for name, low in (("batches", 1), ("global_batches", 1), ("periods", 1), ("world_sizes", 1)):
            numbers = getattr(self, name)
            require(name, numbers, all(number >= low for number in numbers), f"must be at least {low}")
        require("batches", self.batches, bool(self.batches or self.global_batches), "name one, or a global batch")
        for name in ("models", "periods", "wire_formats"):
            require(name, getattr(self, name), bool(getattr(self, name)), "name one at least")

    def settled(self) -> Suite:
        """With what `quick` means."""
        if not self.quick:
            return self
        return replace(
            self,
            models=self.models[:1],
            wire_formats=("float32", "int4"),
            repeats=2,
            seconds=min(self.seconds, 1.5),
            image_size=28,
        )

    @property
    def task(self) -> Task:
        """What these measurements have alike."""
        return Task(self.data, self.image_size, self.loss, self.precision, self.channels_last, self.delay_steps)

    def worlds(self, launched: int) -> tuple[int, ...]:
        """The world sizes to measure, where the launcher gave so many ranks.

        Raises:
            ConfigError: more ranks than there are.
        """
        if not self.world_sizes:
            return tuple(sorted({launched, *(2**power for power in range(launched.bit_length()))} - {0}))
        most = max(self.world_sizes)
        if most > launched:
            raise ConfigError(
                f"world_sizes = {most}: the launcher gave {launched} rank{'s' * (launched != 1)}; start {most} "
                f"(torchrun --nproc-per-node, --nnodes), or name {launched} or fewer"
            )
        return tuple(sorted(set(self.world_sizes)))

    def cases(self, launched: int) -> list[Case]:
        """All cases, each once. One rank alone sends nothing, so it is measured at the longest period only."""
        found: dict[Case, None] = {}
        for model in self.models:
            for world in self.worlds(launched):
                for batch in self._batches(world):
                    for period, wire in self._ways(world):
                        found[Case(model, batch, period, wire, world)] = None
        return list(found)

    def _batches(self, world: int) -> list[int]:
        for batch in self.global_batches:
            mend = f"must be a multiple of every world size ({world} is one)"
            require("global_batches", batch, batch % world == 0, mend)
        return list(dict.fromkeys([*self.batches, *(batch // world for batch in self.global_batches)]))

    def _ways(self, world: int) -> Iterator[tuple[int, str]]:
        if world == 1:
            yield max(self.periods), "float32"
            return
        for period in self.periods:
            for wire in self.wire_formats:
                if period > 1 or wire in ("float32", "bf16"):
                    yield period, wire


def case_of(table: dict[str, Any]) -> Case:
    """The Case whose `asdict` this is."""
    case = Case(**table)
    assert case.wire_format in get_args(WireFormat)
    return case


def short_name(name: str) -> str:
    """A model's name, without the module of one's own."""
    return name.rpartition(":")[2]


def label(case: Case) -> str:
    """A case in a few words."""
    return (
        f"{short_name(case.model)}, b {case.batch_per_rank}, H {case.sync_period_steps}, {case.wire_format}, "
        f"{case.ranks}"
    )
