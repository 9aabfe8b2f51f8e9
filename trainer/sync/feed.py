"""Passes over a user's data: batches as planned, ranks that stop together, and cursors that a checkpoint holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from trainer.control.rounds import Rounds
from trainer.data import ShardStream
from trainer.data.device_data import DeviceData, DeviceItems, DevicePictures
from trainer.data.planned import PlannedBatches, count_steps, length_of, shard_sizes
from trainer.data.supply import UNKNOWN, Place, PlannedLoader, Supply, open_supply, refuse_what_is_no_data_set
from trainer.distributed.clock import Clock
from trainer.distributed.collectives import Collectives
from trainer.errors import ConfigError, DataError, MismatchError, PeerError
from trainer.plan import Plan
from trainer.sync.gradient_average import GradientAverage
from trainer.sync.host import Host
from trainer.sync.passes import KINDS, AsPlanned, ByBatches, BySamples, Cursor, Key, Options, Pass, Sizes
from trainer.sync.progress import Progress

MOST_LONE_ROUNDS = 100
"""Rounds in a row without a report after which a run of devices gives up."""
MOST_AHEAD = 64
"""Steps that one vote covers at most."""


class Feed:
    """Gives batches to a loop, and knows how many samples every rank trains in the present step.

    Args:
        told: what ranks have told one another; it knows the Plan.
        progress: this rank's place in the run.
        collectives: of all ranks.
        clock: where waits for input are counted.
        parallel: the average of gradients, told each rank's weight where ranks train unequal batches.
        observe_steps: steps that a vote covers where the Plan has no rounds of several steps.
        host: trains devices in turn, where there are any.
    """

    def __init__(
        self,
        told: Rounds,
        progress: Progress,
        collectives: Collectives,
        clock: Clock,
        parallel: GradientAverage,
        observe_steps: int,
        host: Host | None = None,
    ) -> None:
        self.told, self.progress, self.via, self.clock, self.parallel = told, progress, collectives, clock, parallel
        self._observe_steps, self._host = observe_steps, host
        self._begun: dict[Key, int] = {}
        self._open: list[Cursor] = []
        self._pending: list[Cursor] = []
        self._taken: dict[tuple[Key, int], Sizes] = {}
        self._weighed = self._warned = self._of_loader = False
        self._running: dict[tuple[Key, int], Pass] = {}
        self.owes_step = False
        """The others have a batch in hand of a step that this rank has yet to begin: it takes one that counts for
        nothing."""
        self._stream: ShardStream | None = None
        self._past: list[Any] | None = None
        """Of the trainer's stream, the worlds that it went through before this rank was new."""
        self._worlds = 0
        """How many worlds this feed has gone on to; a pass of an earlier one is begun anew."""
        self.on_failure: Callable[[PeerError], None] | None = None
        """Mends what fails because a peer has gone; None: it is raised."""
        self.between_steps: Callable[[], None] = lambda: None
        """Lets newcomers in where they wait, before a step's first batch."""
        self._reader: tuple[Any, Options, DeviceItems] | None = None
        """Of devices' samples: the data and options that it was made for, and the reader."""

    # ---- what a step asks

    @property
    def step_sizes(self) -> Sizes | None:
        """Samples that each rank trains in the present step, by rank; None where its batch is not of `batches`.

        The same on every rank, so a learning rate may follow it.
        """
        if not self._taken:
            return None
        return [_most(sizes) for sizes in zip(*self._taken.values(), strict=True)]

    @property
    def own_batch(self) -> float | None:
        """Samples of the present step's batch a rank, mean over the ranks, where a DataLoader of the user's own gives
        another than the Plan's; None where batches are the Plan's, or not known."""
        sizes = self.step_sizes
        if not self._of_loader or not sizes or UNKNOWN in sizes:
            return None
        known = [size for size in sizes if size]
        return sum(known) / len(known) if known else None

    @property
    def batch_samples(self) -> int | None:
        """Samples of this rank in the present step; None where they are not known."""
        sizes = self.step_sizes
        if sizes is None:
            return None
        mine = sizes[self.via.rank] or 0
        return None if mine == UNKNOWN else mine

    def everyones(self, mine: int) -> int:
        """Samples that all ranks train in the present step; where they are not known, as many as this rank's each."""
        sizes = self.step_sizes
        known = sizes is not None and UNKNOWN not in sizes and (sizes[self.via.rank] or 0) == mine
        return sum(size or 0 for size in sizes) if known and sizes is not None else mine * self.via.size

    @property
    def idle(self) -> bool:
        """This rank has no data of its own for the present step, which must change nothing."""
        return bool(self._taken) and self.batch_samples == 0

    def end_step(self) -> None:
        """A local step was counted."""
        self._taken = {}
        self.parallel.set_weight(None)

    def passes(self, data: Any, options: Options) -> int:
        """Passes over this data set that are over."""
        supply = open_supply(data, self._place(options), collate=None, workers=0, shard=options.shard)
        key = self._new(supply, options).key
        return self._begun.get(key, 0) - sum(cursor.key == key for cursor in (*self._open, *self._pending))

    def take_weighed(self) -> bool:
        """Whether ranks' gradients were weighted by unequal batches since this was last asked."""
        weighed, self._weighed = self._weighed, False
        return weighed

    # ---- what a loop asks

    def batches(self, data: Any, options: Options) -> Batches:
        """One more pass at each iteration."""
        if options.samples is not None:
            self.told.total_samples = options.samples
        if self._host is not None:
            host = self._host
            if options.seed:
                raise ConfigError(
                    f"seed = {options.seed}: devices have orders of their own; Devices(..., seed=) has it"
                )
            return Batches(lambda: self._device_rounds(host, data, options), lambda: None)
        if isinstance(data, ShardStream):
            total = options.samples
            if total is None:
                raise ConfigError("samples = None: a ShardStream never ends; say how many samples the run has")
            return Batches(lambda: self._endless(data, total), lambda: None)
        return Batches(lambda: self._passes(data, options), lambda: self._count(data, options))

    def batch_sampler(self, data: Any, seed: int) -> PlannedBatches:
        """Lists of indices for a DataLoader of a user's own."""
        if self._host is not None:
            raise ConfigError(
                "sync.batch_sampler: devices read their shards one after another; take sync.batches(dataset)"
            )
        return PlannedBatches(
            length_of(data),
            self.via.rank,
            self.via.size,
            seed=seed,
            planned=lambda: self.plan.batch_per_rank,
            next_pass=lambda: self._number((KINDS[-1], length_of(data), seed, True)),
        )

    @property
    def plan(self) -> Plan:
        """What the present round does."""
        return self.told.plan

    def window(self) -> int:
        """Steps to the next exchange of the ranks, which a vote covers."""
        period = self.plan.sync_period_steps
        rest = period - self.progress.round_steps if period > 1 else self._observe_steps - self.progress.ledger.steps
        return min(max(1, rest), MOST_AHEAD)

    def _endless(self, stream: ShardStream, total: int) -> Iterator[Any]:
        """The trainer's own stream, which fills a batch up from the next epoch."""
        self._stream = stream
        if self._past is not None:
            stream.regroup(self.via.world, self._past)
            self._past = None
        while self.progress.samples < total and not self.told.stopping:
            self.between_steps()
            self.owes_step = False  # the next step of the stream is the one that the others are in
            share = -(-(total - self.progress.samples) // self.via.size)
            with self.clock.waiting("input_wait"):
                batch = stream.take(min(self.plan.batch_per_rank, share))
            self._taken = {((), 0): [len(batch[1])] * self.via.size}
            yield batch

    def _device_rounds(self, host: Host, data: Any, options: Options) -> Iterator[Any]:
        """The rest of the open round or one more, or as many as `samples` asks for: this rank's devices in turn. A rank
        without a device in a round is given one batch, which counts for nothing."""
        reader: DeviceData = data if isinstance(data, DevicePictures) else self._device_items(data, options)
        lone = 0
        while not self.told.stopping and (options.samples is None or self.progress.samples < options.samples):
            before = self.progress.samples
            host.begin_round(self.plan, self.progress.local_step)
            requests = list(host.requests())
            batches = reader.read(request for request, _ in requests)
            for _, count in requests:
                with self.clock.waiting("input_wait"):
                    batch = next(batches)
                self._taken = {((), 0): [count] * self.via.size}
                steps = self.progress.local_step, self.progress.rounds
                yield batch
                if steps == (self.progress.local_step, self.progress.rounds):
                    raise RuntimeError("a batch of sync.batches was not followed by sync.step: call it after each one")
            if options.samples is None:
                return
            lone = lone + 1 if self.progress.samples == before else 0
            if lone == MOST_LONE_ROUNDS:
                raise ConfigError(
                    f"min_reports: too few devices reported in {lone} rounds in a row, up to round "
                    f"{self.progress.rounds}; raise deadline_s or availability, or lower min_reports"
                )

    def _device_items(self, data: Any, options: Options) -> DeviceData:
        refuse_what_is_no_data_set(data)
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise ConfigError(
                f"data = {type(data).__name__}: devices need a data set with a length and items by index; "
                "their shards are indices of it"
            )
        assert self._host is not None
        self._host.devices.require_within(len(data))
        if self._reader is not None:
            of, by, reader = self._reader
            if of is data and (by.collate_fn, by.workers) == (options.collate_fn, options.workers):
                return reader
            self.close()
        reader = DeviceItems(data, self.via.world.device, options.collate_fn, options.workers)
        self._reader = data, options, reader
        return reader

    def close(self) -> None:
        """End processes that read devices' samples."""
        if self._reader is not None:
            self._reader[-1].close()
            self._reader = None

    def _passes(self, data: Any, options: Options) -> Iterator[Any]:
        """One pass, or as many as `samples` asks for."""
        while True:
            this = self._begun_by_all(data, options)
            this = yield from self._run(this, data, options)
            done = options.samples is None or this.done >= options.samples or self.told.stopping
            if not done and this.cursor.kind == "generator":
                warnings.warn(
                    f"samples = {options.samples}: the generator ended after {this.done}; pass a function that makes "
                    "one, to go on with a further pass",
                    stacklevel=2,
                )
                done = True
            if done:
                return

    def _run(self, this: Pass, data: Any, options: Options) -> Generator[Any, None, Pass]:
        """The batches of a pass, also where the ranks change on the way; what it is in the end."""
        try:
            while not self.told.stopping and not this.limit_reached:
                if not self._taken and not self.owes_step:
                    self.between_steps()
                if self.owes_step:
                    yield self._alone(this)
                    continue
                if this.worlds != self._worlds:
                    this = self._begun_by_all(data, options, this)
                try:
                    found = this.next()
                except PeerError as error:
                    self._mend(error)
                    continue
                cursor = this.cursor
                if found is None:
                    if cursor in self._open:
                        self._open.remove(cursor)
                    return this
                batch, sizes = found
                self._hand_out(cursor, sizes)
                yield batch
            return this
        finally:
            this.cursor.live = False
            self._running.pop((this.cursor.key, this.cursor.number), None)
            this.supply.close()

    def _begun_by_all(self, data: Any, options: Options, going: Pass | None = None) -> Pass:
        opened: list[tuple[Supply, Cursor]] = []
        while True:
            try:
                return self._begin(data, options, opened, going)
            except PeerError as error:
                self._mend(error)
                if self.owes_step:
                    raise  # there is no batch to take the others' step with

    def _mend(self, error: PeerError) -> None:
        """Have what failed mended.

        Raises:
            PeerError: nobody does.
        """
        if self.on_failure is None:
            raise error
        self.on_failure(error)

    def _alone(self, this: Pass) -> Any:
        """A batch for a step that the others are in already; it counts for nothing."""
        self.owes_step = False
        batch = this.spare()
        self._taken = {((), 0): [None] * self.via.rank + [0] + [None] * (self.via.size - self.via.rank - 1)}
        return batch

    # ---- other ranks

    @property
    def in_hand(self) -> bool:
        """A batch was given out, and its step is not yet counted."""
        return bool(self._taken)

    def lefts(self) -> list[list[Any]]:
        """Of every running pass whose samples can be dealt anew: its key, its number, and what is left on each rank."""
        return [
            [[*key], number, self._left(this)] for (key, number), this in self._running.items() if this.cursor.is_dealt
        ]

    def _left(self, this: Pass) -> list[int]:
        if this.worlds == self._worlds:
            return this.lefts()
        return shard_sizes(sum(this.cursor.past[-1][1]), self.via.size)  # dealt anew, and not yet begun

    def read(self) -> list[Any] | None:
        """How far the trainer's stream is: the worlds before, and samples in this one."""
        return None if self._stream is None else [list(self._stream.past), self._stream.consumed]

    def regroup(
        self, places: Sequence[tuple[int, Mapping[str, Any]]], ranks: int, state: Mapping[str, Any] | None
    ) -> None:
        """The ranks are others now: what is left of running passes is dealt anew.

        Args:
            places: of those that go on, each one's rank of before, its `lefts` and `read`; the furthest first.
            ranks: of before.
            state: another rank's, of a rank that is new.
        """
        self._worlds += 1
        lefts = [(rank, place["lefts"]) for rank, place in places]
        self._regroup_stream([(rank, place["read"]) for rank, place in places if place["read"]], ranks)
        if state is not None:
            self.load_state_dict(state)
            self._running = {}
        going = [this.cursor for this in self._running.values()]
        going += [each for each in self._pending if each not in going]
        for cursor in going:
            told = {
                rank: [left for key, n, left in theirs if ((*key,), n) == (cursor.key, cursor.number)]
                for rank, theirs in lefts
            }
            known = [(rank, found[0]) for rank, found in told.items() if found]
            if cursor.is_dealt and known:
                left = list(known[0][1])
                for rank, own in known:
                    left[rank] = own[rank]
                cursor.past.append([ranks, left])
                cursor.consumed, cursor.last, cursor.left = 0, 0, None
        self._open = [each for each in self._open if each not in going]
        self._pending = going

    def _regroup_stream(self, places: Sequence[tuple[int, Sequence[Any]]], ranks: int) -> None:
        if not places:
            return
        past, read = places[0][1]
        reads = [read] * ranks
        for rank, (_, own) in places:
            reads[rank] = own
        past = [*past, [ranks, reads]]
        if self._stream is None:
            self._past = past
        else:
            self._stream.regroup(self.via.world, past)

    def _hand_out(self, cursor: Cursor, sizes: Sizes) -> None:
        """Note a batch of the present step: several of one pass are added up, and what another pass left is dropped."""
        self._of_loader = cursor.kind == "DataLoader"
        live = [(each.key, each.number) for each in self._open if each.live]
        self._taken = {each: taken for each, taken in self._taken.items() if each in live}
        before = self._taken.get((cursor.key, cursor.number), [None] * len(sizes))
        self._taken[cursor.key, cursor.number] = [_plus(*pair) for pair in zip(before, sizes, strict=True)]
        if self.parallel.on:
            weight = self._weight()
            self._weighed |= weight is not None
            self.parallel.set_weight(weight)

    def _weight(self) -> float | None:
        """This rank's share in the mean of gradients; None where all weigh alike."""
        sizes = self.step_sizes
        assert sizes is not None
        inside = self.parallel.collectives  # of all ranks, or of a node's
        world = self.via.world
        told = [sizes[rank] for rank in world.nodes[world.node]] if inside.size < self.via.size else sizes
        counts = [size or 0 for size in told]
        if UNKNOWN in counts:
            counts = [int(size is not None) for size in told]
        if len(set(counts)) == 1 and counts[0]:
            return None
        return counts[inside.rank] / sum(counts) if any(counts) else 0.0

    # ---- beginning a pass

    def _begin(
        self, data: Any, options: Options, opened: list[tuple[Supply, Cursor]], going: Pass | None = None
    ) -> Pass:
        """Open the data on every rank, compare, and begin the next pass or go on with one of a checkpoint.

        Args:
            data: of the user.
            options: of the call.
            opened: the data, where a try before this one has opened it; data of a rank's own is read on from there.
            going: the pass that is going on in another world; data of a rank's own is read on where it is.
        """
        problem: Exception | None = None
        supply, cursor = None, None
        facts = dict.fromkeys(("length", "kind", "number", "left"), -1) | {"ended": True}
        own = going if going is not None and not going.cursor.is_dealt else None
        worlds = self._worlds
        try:
            if own is not None:
                supply, cursor = own.supply, own.cursor
                supply.look_ahead(self.ahead(), self.plan.batch_per_rank)
            else:
                if going is not None:
                    going.supply.close()
                supply, cursor = self._opened(data, options, opened)
            facts = {"length": supply.length, "kind": KINDS.index(supply.kind), "number": cursor.number}
            if own is not None:
                facts["left"] = sum(supply.left)
            else:
                facts["left"] = self._sought(supply, cursor, options) if opened else self._seek(supply, cursor, options)
            opened[:] = [(supply, cursor)]
            facts["ended"] = supply.ended
        except (ConfigError, DataError) as error:
            problem = error
            facts |= {"left": 0, "ended": True}
        facts |= {"seed": options.seed % 2**53}
        facts |= {"shard": options.shard, "uneven": options.uneven == "stop", "samples": options.samples or 0}
        step = self.progress.local_step
        with self.via.world.board.saying(f"begins another pass over its data after local step {step}", step):
            told = self.via.gather({**facts, "failed": problem is not None, "trained": self.progress.samples})
        self.together(told, problem)
        assert supply is not None
        assert cursor is not None
        self._compare(told, options)
        this = self._enter(supply, cursor, options, told, going)
        this.worlds = worlds
        self._running[cursor.key, cursor.number] = this
        return this

    def _opened(self, data: Any, options: Options, opened: list[tuple[Supply, Cursor]]) -> tuple[Supply, Cursor]:
        """The data, and the pass over it: what a try before has opened, as far as it is the same pass."""
        for supply, cursor in opened:
            if not cursor.is_dealt and cursor == self._cursor(supply, options):
                return supply, cursor
            supply.close()
        opened.clear()
        supply = open_supply(
            data, self._place(options), collate=options.collate_fn, workers=options.workers, shard=options.shard
        )
        return supply, self._cursor(supply, options)

    def _place(self, options: Options) -> Place:
        return Place(self.via.rank, self.via.size, self.via.world.device, options.seed)

    def _seek(self, supply: Supply, cursor: Cursor, options: Options) -> int:
        """Go to the cursor's place, with `go_on` before the last batch, which may be repeated; the samples known to be
        left from the cursor on."""
        with self.clock.waiting("input_wait"):
            if isinstance(supply, PlannedLoader):
                cursor.left = supply.begin_with(cursor.number, cursor.left, self._place(options), cursor.past)
                return 0
            back = cursor.last if options.uneven == "go_on" else 0
            supply.begin(cursor.number, cursor.consumed - back, cursor.past)
            return self._sought(supply, cursor, options)

    def _sought(self, supply: Supply, cursor: Cursor, options: Options) -> int:
        """The samples known to be left from the cursor on."""
        if not supply.by_samples:
            return 0
        back = cursor.last if options.uneven == "go_on" else 0
        supply.look_ahead(self.ahead(), self.plan.batch_per_rank + back)
        return sum(supply.left) - back

    def ahead(self) -> int:
        """Steps to look ahead for a vote: a world of one needs none."""
        return self.window() if self.via.size > 1 else 1

    def _enter(
        self,
        supply: Supply,
        cursor: Cursor,
        options: Options,
        told: Sequence[Mapping[str, float]],
        going: Pass | None,
    ) -> Pass:
        """Begin this pass, or go on with it in another world; those whose loops were left are over."""
        self._begun[cursor.key] = max(self._begun.get(cursor.key, 0), cursor.number + 1)
        self._pending = [each for each in self._pending if each is not cursor]
        self._open = [each for each in self._open if each.live] + [cursor]
        cursor.live = True
        done = int(max(rank["trained"] for rank in told))
        if isinstance(supply, PlannedLoader):
            return AsPlanned(self, supply, cursor, options, done, going)
        if supply.by_samples:
            return BySamples(self, supply, cursor, options, done, going, told)
        return ByBatches(self, supply, cursor, options, done, going)

    def _cursor(self, supply: Supply, options: Options) -> Cursor:
        """The first interrupted pass of the checkpoint over such a data set, else a new one."""
        new = self._new(supply, options)
        for cursor in self._pending:
            if cursor.key == new.key:
                return cursor
        return new

    def _new(self, supply: Supply, options: Options) -> Cursor:
        new = Cursor(0, supply.kind, supply.length, _seed_of(supply, options), options.shard)
        return replace(new, number=self._begun.get(new.key, 0))

    def _number(self, key: Key) -> int:
        """The number of a pass that begins outside `batches`."""
        number = self._begun.get(key, 0)
        self._begun[key] = number + 1
        return number

    def together(self, told: Sequence[Mapping[str, float]], problem: Exception | None) -> None:
        """Raise on every rank where any rank has a problem.

        Raises:
            ConfigError, DataError: one line, the same on every rank.
        """
        if not any(rank["failed"] for rank in told):
            return
        mine = (str(problem), isinstance(problem, ConfigError)) if problem is not None else None
        problems = self.via.gather_objects(mine)
        first = next(rank for rank, each in enumerate(problems) if each)
        text, setting = problems[first]
        said = text if all(each == problems[first] for each in problems) else f"rank {first}: {text}"
        raise (ConfigError if setting else DataError)(said) from problem

    def _compare(self, told: Sequence[Mapping[str, float]], options: Options) -> None:
        """Ranks must begin the same pass.

        Raises:
            MismatchError: they do not.
            ConfigError: their data does not go together.
        """
        for name in ("kind", "shard", "uneven", "samples", "number", *(("seed",) if options.shard else ())):
            values = [int(rank[name]) for rank in told]
            if len(set(values)) > 1:
                said = [KINDS[value] if name == "kind" else str(value) for value in values]
                sides = ", ".join(f"{each} on rank {rank}" for rank, each in enumerate(said))
                raise MismatchError(f"ranks disagree about the {name} of sync.batches: {sides}")
        lengths = [int(rank["length"]) for rank in told]
        if options.shard and len(set(lengths)) > 1:
            sides = ", ".join(f"{length} on rank {rank}" for rank, length in enumerate(lengths))
            raise ConfigError(f"dataset has different lengths ({sides}): pass shard=False if each rank has its own")

    def refuse_nothing(self, left: Sequence[int], kind: str) -> None:
        """A pass needs data on every rank.

        Raises:
            DataError: names the ranks without any.
        """
        empty = [str(rank) for rank, each in enumerate(left) if not each]
        if empty:
            mend = "; a generator is used up after one pass: pass a function that makes one"
            raise DataError(
                f"the {kind} gave nothing on rank{'s' * (len(empty) > 1)} {', '.join(empty)}"
                + (mend if kind == "generator" else "")
            )

    def warn_of_size(self, size: int) -> None:
        """Say once that a DataLoader's batch is not the Plan's."""
        planned = self.plan.batch_per_rank
        if not self._warned and size not in (planned, UNKNOWN):
            self._warned = True
            warnings.warn(
                f"the DataLoader gives batches of {size} samples where the Plan has {planned}, and the learning rate "
                "follows what is trained: for batches that follow the Plan, DataLoader(dataset, "
                "batch_sampler=sync.batch_sampler(dataset))",
                stacklevel=2,
            )

    def _count(self, data: Any, options: Options) -> int | None:
        """Steps of a pass by the present Plan, where that is known."""
        if options.samples is not None:
            return None
        if not hasattr(data, "__getitem__"):
            return len(data)  # a DataLoader's, or none
        shared = options.shard and self.via.size > 1
        sizes = shard_sizes(len(data), self.via.size) if shared else [len(data)]
        return count_steps(sizes, self.plan.batch_per_rank, options.uneven)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: passes begun over each data set, and those that are not over."""
        unfinished = [asdict(cursor) for cursor in (*self._pending, *self._open)]
        return {"begun": [[list(key), count] for key, count in self._begun.items()], "open": unfinished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: the next pass over such a data set is the interrupted one's rest."""
        self._begun = {tuple(key): count for key, count in state["begun"]}
        self._open = []
        self._pending = [Cursor(**cursor | {"live": False}) for cursor in state["open"]]
        self._taken = {}


class Batches:
    """What `LocalSGD.batches` returns: each iteration over it is one more pass."""

    def __init__(self, begin: Callable[[], Iterator[Any]], count: Callable[[], int | None]) -> None:
        self._begin, self._count = begin, count
        self._running: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self._begin()

    def __next__(self) -> Any:
        """The next batch of a pass of its own, for a loop that calls `next` itself."""
        self._running = self._running or self._begin()
        return next(self._running)

    def __len__(self) -> int:
        """Steps of a pass by the present Plan, for a progress bar.

        Raises:
            TypeError: not known before it ends.
        """
        count = self._count()
        if count is None:
            raise TypeError("the number of batches is not known before they end")
        return count


def _plus(before: int | None, more: int | None) -> int | None:
    """Samples of two batches of one step."""
    if before is None or more is None:
        return more if before is None else before
    return UNKNOWN if UNKNOWN in (before, more) else before + more


def _most(sizes: Sequence[int | None]) -> int | None:
    """Samples of a step that takes a batch of several passes."""
    known = [size for size in sizes if size is not None]
    return max(known) if known else None


def _seed_of(supply: Supply, options: Options) -> int:
    """The seed that a pass's order is drawn by: of a batch sampler its own."""
    return supply.seed if isinstance(supply, PlannedLoader) else options.seed
