"""The configuration: a frozen dataclass tree, one section a table of a recipe. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Any, Literal

from trainer.errors import ConfigError, require, require_at_least, require_choices
from trainer.plan import Plan, WireFormat
from trainer.policies import Alternating, Policy, policy_name

GradientFormat = Literal["float32", "bf16", "powersgd"]
OuterRule = Literal["none", "slowmo", "diloco", "fedavgm", "fedadam"]
StatePolicy = Literal["keep", "average", "reset"]
BatchNormPolicy = Literal["average", "keep", "recalibrate"]


@dataclass(frozen=True)
class RunConfig:
    """What the run is called, how long it lasts and where its records go."""

    name: str = ""
    """Name of the run's directory under `root`; empty: data set, model and policy."""
    root: str = "runs"
    """Folder that holds the run directories."""
    seed: int = 0
    """Seed of initialisation, sharding, sampling and augmentation."""
    samples: int = 120_000
    """Samples to train in all, over all ranks; at most world size - 1 more are trained, so that ranks stay equal."""
    reference: str | None = None
    """Run directory whose samples_per_s is one device's; without it, rank 0 times itself alone at the start."""
    resume: str | None = None
    """`auto` (the newest checkpoint of this run, where there is one) or the path of a checkpoint."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "samples")
        require("seed", self.seed, 0 <= self.seed < 2**63, "must be in 0 .. 2**63 - 1")
        require("name", self.name, "/" not in self.name and self.name not in (".", ".."), "must be a plain folder name")


@dataclass(frozen=True)
class WorldConfig:
    """The process group."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """nccl where CUDA is, else gloo."""
    timeout_s: float = 300.0
    """Seconds after which a collective that has not finished is an error."""
    ranks: int | None = None
    """Ranks that the job must have; a launcher that started another number is refused."""

    def __post_init__(self) -> None:
        require_choices(self)
        require("timeout_s", self.timeout_s, self.timeout_s > 0, "must be above 0 seconds")
        require_at_least(self, 1, "ranks")


@dataclass(frozen=True)
class DataConfig:
    """The data set and how it is shared out."""

    name: str = "fashion_mnist"
    """fashion_mnist, mnist, cifar10, cifar100, imagefolder, fake, or module:callable (root, train) -> dataset."""
    root: str = "data"
    """Folder of the data set's files (imagefolder: holds train/ and val/)."""
    partition: str = "iid"
    """How samples are shared out to the ranks."""
    on_device: bool = True
    """Hold the shard as uint8 tensors on the device, where the data set has tensors; else read it through workers."""
    workers: int = 2
    """Reading processes of a rank where the shard is not held on the device; 0 reads in the training process."""
    image_size: int = 224
    """Side in pixels that imagefolder's pictures are cropped to."""
    crop_padding: int = 0
    """Pixels of zero padding before a random crop back to size; 0: no crop."""
    flip: bool = False
    """Mirror half of the training pictures left to right."""
    train_limit: int | None = None
    """Use only this many training samples (drawn by the seed)."""
    test_limit: int | None = None
    """Use only this many test samples (drawn by the seed)."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "workers", "crop_padding")
        require_at_least(self, 1, "image_size", "train_limit", "test_limit")


@dataclass(frozen=True)
class TaskConfig:
    """The model and its loss."""

    model: str = "fedavg_cnn"
    """fedavg_cnn, a torchvision classification model, or module:callable (num_classes, channels) -> Module."""
    loss: str = "cross_entropy"
    """cross_entropy, or module:callable (outputs, targets) -> mean loss."""
    small_image_stem: bool = False
    """Fit a torchvision model to pictures of 28 to 32 pixels."""
    label_smoothing: float = 0.0
    """Share of a label's weight spread over all classes (cross_entropy only)."""

    def __post_init__(self) -> None:
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "must be in 0 .. 1")
        plain = self.loss == "cross_entropy" or ":" in self.loss
        require("loss", self.loss, plain, "choose cross_entropy, or module:callable")
        smooth_with = self.label_smoothing == 0 or self.loss == "cross_entropy"
        require("label_smoothing", self.label_smoothing, smooth_with, "needs task.loss = cross_entropy")


@dataclass(frozen=True)
class OptimConfig:
    """The local optimizer and its learning rate, scheduled in samples over all ranks."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The local optimizer."""
    lr: float = 0.05
    """Learning rate at the policy's base plan."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = True
    """SGD with Nesterov's momentum."""
    weight_decay: float = 0.0
    """L2 penalty (sgd) or decoupled decay (adamw)."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.999
    """AdamW's decay of the second moment."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """What follows the warm-up: cosine to zero, steps down, or none."""
    warmup_samples: int = 0
    """Samples over which the rate rises linearly from zero."""
    milestones: tuple[int, ...] = ()
    """Samples at which `step` multiplies the rate by `decay`."""
    decay: float = 0.1
    """Factor of `step` at each milestone."""
    clip_norm: float | None = None
    """Largest norm of a step's gradient."""

    def __post_init__(self) -> None:
        require_choices(self)
        require("lr", self.lr, self.lr > 0, "must be above 0")
        require("momentum", self.momentum, 0 <= self.momentum < 1, "must be in 0 .. 1")
        steady = not self.nesterov or self.momentum > 0 or self.name != "sgd"
        require("nesterov", self.nesterov, steady, "needs optim.momentum above 0")
        require("weight_decay", self.weight_decay, self.weight_decay >= 0, "must be 0 or more")
        for name in ("beta1", "beta2"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "must be in 0 .. 1")
        require_at_least(self, 0, "warmup_samples")
        stepped = bool(self.milestones) == (self.schedule == "step")
        require("milestones", self.milestones, stepped, "go with optim.schedule = step, and only with it")
        require("milestones", self.milestones, list(self.milestones) == sorted(self.milestones), "must rise")
        require("clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0, "must be above 0")


@dataclass(frozen=True)
class StepConfig:
    """How one local step is computed."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass; fp16 scales the loss."""
    max_micro_batch: int | None = None
    """Most samples in one forward pass; a larger batch is accumulated and still counts as one local step."""
    channels_last: bool = False
    """Keep pictures and convolutions in channels-last layout."""
    compile: bool = False
    """Compile the model with torch.compile."""
    max_skipped_steps: int = 10
    """Local steps in a row that a rank may skip for a non-finite loss before the run ends with an error."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(self, 1, "max_micro_batch", "max_skipped_steps")


@dataclass(frozen=True)
class SyncConfig:
    """How replicas are averaged."""

    state: StatePolicy = "keep"
    """Optimizer state at an averaging: keep each rank's own, average it (a delayed average is a correction, of which
    as much is left as of the state that was sent), or reset it. `keep` averages it where period 1 begins, since there
    it must be the same on every rank."""
    batch_norm: BatchNormPolicy = "average"
    """Floating-point buffers: average them (behind a delay at evaluations only), keep each rank's own, or recalibrate
    them before an evaluation."""
    recalibrate_samples: int = 1_024
    """Samples of its shard that each rank recalibrates BatchNorm statistics with."""
    wire_format: WireFormat = "float32"
    """Number format of averaged parameters on the network: float32 (their own type), bf16, int8 or int4. What is lost
    is kept and sent the next time (error feedback)."""
    gradient_format: GradientFormat = "float32"
    """Number format of averaged gradients at period 1: float32 (their own type), bf16, or powersgd (rank 2)."""
    delay_steps: int | Literal["auto"] = 0
    """Local steps between sending a replica and taking its average; 0 waits for it. auto measures the transfer, and
    all ranks take the fewest steps that hide it."""
    max_delay_steps: int = 8
    """Most steps that auto chooses."""
    fragments: int = 1
    """Parts of the model, averaged in turn within a round."""
    mixing: float = 1.0
    """Share of the average that a replica takes; below 1 replicas stay apart between evaluations."""
    outer: OuterRule = "none"
    """What is done with the averaged displacement: nothing, or an outer optimizer."""
    outer_lr: float | None = None
    """Learning rate of the outer optimizer; without it, the published one."""
    outer_momentum: float | None = None
    """Momentum of the outer optimizer (of fedadam: its first decay); without it, the published one."""
    bucket_bytes: int = 4 * 2**20
    """Bytes of a flat bucket in float32: one collective each. What is sent at once should fit a slow link's queue."""
    node_period_steps: int | None = None
    """Local steps between averagings inside a node; 1 averages its gradients at every step. Without it a node's ranks
    are averaged with all others. With it a round's average goes between nodes, a share of it a rank."""
    node_wire_format: WireFormat = "float32"
    """Number format of averages inside a node."""
    ranks_per_node: int | None = None
    """Consecutive ranks that make up a node; without it, those that the launcher started on a host."""
    observe_steps: int = 8
    """At period 1 and 0, local steps between two observations, so that small messages do not slow every step; in
    shorter rounds than that, local steps between two looks at the gradient."""
    find_unused_parameters: bool = False
    """At period 1, look each step for parameters that the forward pass left out."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(
            self, 1, "recalibrate_samples", "bucket_bytes", "observe_steps", "fragments", "max_delay_steps"
        )
        require_at_least(self, 1, "node_period_steps", "ranks_per_node")
        lossy = self.node_wire_format != "float32"
        levels, at_once = self.node_period_steps is not None, self.delay_steps == 0
        require("node_wire_format", self.node_wire_format, not lossy or levels, "needs sync.node_period_steps")
        mend = "needs sync.delay_steps = 0, and a policy that plans no delays"
        require("node_wire_format", self.node_wire_format, not lossy or at_once, mend)
        sends = self.node_period_steps != 1
        require("node_wire_format", self.node_wire_format, not lossy or sends, "averages no parameters at period 1")
        shaped = self.ranks_per_node is not None
        require("ranks_per_node", self.ranks_per_node, not shaped or levels, "needs sync.node_period_steps")
        steps = self.delay_steps
        whole = steps == "auto" or (isinstance(steps, int) and steps >= 0)
        require("delay_steps", steps, whole, "must be 0 or more local steps, or auto")
        require("mixing", self.mixing, 0 < self.mixing <= 1, "must be above 0 and at most 1")
        for name, low in (("outer_lr", 0), ("outer_momentum", -1)):
            value = getattr(self, name)
            require(name, value, value is None or self.outer != "none", "needs sync.outer")
            require(name, value, value is None or value > low, f"must be {'above 0' if low == 0 else '0 or more'}")
        momentum = self.outer_momentum
        require("outer_momentum", momentum, momentum is None or 0 <= momentum < 1, "must be in 0 .. 1")
        require("outer", self.outer, self.outer == "none" or self.mixing == 1, "needs sync.mixing = 1")

    def under(self, plan: Plan) -> SyncConfig:
        """These settings with what the Plan says itself."""
        delay = self.delay_steps if plan.delay_steps is None else plan.delay_steps
        return replace(self, delay_steps=delay, wire_format=plan.wire_format or self.wire_format)

    def check_scaler(self, *, used: bool) -> None:
        """Refuse what a loss scaler makes impossible.

        Raises:
            ConfigError: names the field.
        """
        fits = not used or self.gradient_format != "powersgd"
        mend = "keeps what it loses, which a loss scaler's infinite gradients spoil: choose bf16, or no fp16"
        require("gradient_format", self.gradient_format, fits, mend)

    def check_plans(self, plans: Sequence[Plan]) -> None:
        """Refuse what the rounds of these plans cannot hold.

        Raises:
            ConfigError: names the field and the shortest period above 1.
        """
        for plan in plans:
            self.under(plan)  # refuses what the plan's own settings make impossible
        periods = [plan.sync_period_steps for plan in plans if plan.sync_period_steps > 1]
        if not periods:
            said = "averages no parameters at period 1: leave it out, or choose a policy with a longer period"
            idles = {"wire_format": "float32", "outer": "none", "delay_steps": 0, "fragments": 1, "mixing": 1.0}
            idles["node_period_steps"] = None
            for name, idle in idles.items():
                value = getattr(self, name)
                mend = f"{said}; gradients have sync.gradient_format" if name == "wire_format" else said
                require(name, value, value == idle, mend)
            return
        long = [plan for plan in plans if plan.sync_period_steps > 1]
        for name, idle in (("delay_steps", 0), ("wire_format", "float32")):
            value = getattr(self, name)
            used = any(getattr(plan, name) is None for plan in long)
            require(name, value, used or value == idle, "has no effect: the policy's plans say it; leave it out")
        by_policy = all(plan.delay_steps is not None for plan in long)
        whole_model = self.fragments == 1 or not by_policy
        require("fragments", self.fragments, whole_model, "must be 1 where the policy plans delays of the whole model")
        for plan in long:
            usable = plan.early_end == "never" or self.under(plan).delay_steps == 0
            require("delay_steps", self.delay_steps, usable, "must be 0 where rounds end early")
            usable = plan.early_end == "never" or self.fragments == 1
            require("fragments", self.fragments, usable, "must be 1 where rounds end early")
            usable = plan.early_end != "gradient_change" or self.node_period_steps != 1
            require("node_period_steps", self.node_period_steps, usable, "must not be 1 where gradients end rounds")
            usable = plan.early_end != "divergence" or self.mixing == 1
            require("mixing", self.mixing, usable, "must be 1 where divergence ends rounds")
        inner = self.node_period_steps
        whole = inner is None or all(period % inner == 0 for period in periods)
        longer = ", ".join(str(period) for period in sorted(set(periods)))
        require("node_period_steps", inner, whole, f"must divide the policy's periods above 1 ({longer} steps)")
        short = min(periods)
        for name in ("delay_steps", "fragments"):
            value = getattr(self, name)
            fits = value == "auto" or value <= short
            require(name, value, fits, f"must be at most the policy's shortest period above 1 ({short} steps)")


@dataclass(frozen=True)
class EvalConfig:
    """When the consensus model is evaluated."""

    every_samples: int | None = 12_000
    """Samples (over all ranks) between two evaluations, at a round's end; the end is always evaluated."""
    batch: int = 500
    """Samples of a rank in one forward pass."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every_samples", "batch")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written."""

    every_samples: int | None = None
    """Samples (over all ranks) between two checkpoints; without it, one at the end and one when told to stop."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every_samples", "keep")


@dataclass(frozen=True)
class RecordConfig:
    """What is shown and recorded while training."""

    progress: bool = True
    """Show progress: a bar on a terminal, plain lines elsewhere."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    reference_s: float = 3.0
    """Seconds that rank 0 times itself alone for scaling_speedup; 0: not at all."""

    def __post_init__(self) -> None:
        require("reference_s", self.reference_s, self.reference_s >= 0, "must be 0 or more seconds")


@dataclass(frozen=True)
class Config:
    """A complete run."""

    run: RunConfig = RunConfig()
    world: WorldConfig = WorldConfig()
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    optim: OptimConfig = OptimConfig()
    policy: Policy = Alternating()
    step: StepConfig = StepConfig()
    sync: SyncConfig = SyncConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    record: RecordConfig = RecordConfig()

    def __post_init__(self) -> None:
        try:
            self.sync.check_plans(self.policy.plans())
            self.sync.check_scaler(used=self.step.precision == "fp16")
        except ConfigError as error:
            raise ConfigError(f"sync.{error}") from None

    def named(self) -> Config:
        """This configuration with the run's name filled in."""
        if self.run.name:
            return self
        parts = (self.data.name, self.task.model, policy_name(self.policy))
        return replace(self, run=replace(self.run, name="-".join(parts).replace(":", ".").replace("/", ".")))


def to_dict(section: Any) -> dict[str, Any]:
    """A dataclass as the tables of a recipe: fields that are None left out, a Constant's plan as its own fields."""
    table: dict[str, Any] = {"name": policy_name(section)} if isinstance(section, Policy) else {}
    for field in fields(section):
        value = getattr(section, field.name)
        if is_flat(field):
            table |= to_dict(value)
        elif hasattr(value, "__dataclass_fields__"):
            table[field.name] = to_dict(value)
        elif value is not None:
            table[field.name] = list(value) if isinstance(value, tuple) else value
    return table


def is_flat(field: Field[Any]) -> bool:
    """Whether a policy's Plan is written as fields of the policy itself (`Constant`), not as a table."""
    return bool(field.metadata.get("flat"))


def digest(config: Config) -> str:
    """Fingerprint of everything that ranks must agree on (where files lie may differ by host)."""
    table = to_dict(config)
    for section, name in (("run", "root"), ("run", "reference"), ("run", "resume"), ("data", "root")):
        table[section].pop(name, None)
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def check_ranks(config: Config, ranks: int) -> None:
    """Refuse a world that the configuration cannot have.

    Raises:
        ConfigError: another number of ranks than asked for, or more ranks than samples.
    """
    node = config.sync.ranks_per_node
    fits = node is None or ranks % node == 0
    require("sync.ranks_per_node", node, fits, f"must divide the number of ranks ({ranks})")
    wanted = config.world.ranks
    if wanted is not None and wanted != ranks:
        raise ConfigError(
            f"world.ranks = {wanted}: the launcher started {ranks}; mend its --nnodes or --nproc-per-node"
        )
    require("run.samples", config.run.samples, config.run.samples >= ranks, f"must be at least one a rank ({ranks})")
