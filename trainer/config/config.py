"""The configuration: a frozen dataclass tree, one section a table of a recipe. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import Field, dataclass, fields, replace
from typing import Any, Literal

from trainer.config.federated import FederatedConfig, check_federated, check_local_optimizer
from trainer.config.sync import SyncConfig, check_plans, check_scaler
from trainer.errors import ConfigError, require, require_at_least
from trainer.fields import require_types
from trainer.policies import Alternating, Policy, policy_name, policy_of


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
        require_types(self)
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
    """Ranks that the job must have; a launcher that started another number is refused. With elastic, those that it
    begins with; min_ranks by default."""
    elastic: str | None = None
    """Let ranks come and go: host:port of the store that they meet at, which `python -m trainer.store` serves. Each
    rank is then started by itself. Gloo on CPUs only."""
    min_ranks: int = 1
    """With elastic: fewer ranks than so many end the run."""
    max_ranks: int | None = None
    """With elastic: more ranks than so many are refused."""

    def __post_init__(self) -> None:
        require_types(self)
        require("timeout_s", self.timeout_s, self.timeout_s > 0, "must be above 0 seconds")
        require_at_least(self, 1, "ranks", "min_ranks", "max_ranks")
        off = self.elastic is None
        require("min_ranks", self.min_ranks, not off or self.min_ranks == 1, "needs world.elastic")
        require("max_ranks", self.max_ranks, not off or self.max_ranks is None, "needs world.elastic")
        begins = self.begins_with
        require("min_ranks", self.min_ranks, self.min_ranks <= begins, f"more than world.ranks = {begins}")
        fits = self.max_ranks is None or self.max_ranks >= begins
        require("max_ranks", self.max_ranks, fits, f"fewer than the {begins} ranks that the run begins with")
        mend = "cannot be elastic; choose gloo, or restart from checkpoints with torchrun --max-restarts"
        require("backend", self.backend, off or self.backend != "nccl", mend)

    @property
    def begins_with(self) -> int:
        """Ranks that an elastic run begins with."""
        return self.ranks or self.min_ranks


@dataclass(frozen=True)
class DataConfig:
    """The data set and how it is shared out."""

    name: str = "fashion_mnist"
    """fashion_mnist, mnist, cifar10, cifar100, imagefolder, fake, or module:callable (root, train) -> dataset."""
    root: str = "data"
    """Folder of the data set's files (imagefolder: holds train/ and val/)."""
    partition: str = "iid"
    """How samples are shared out to the ranks or devices: iid, dirichlet (by label), dirichlet_device, classes, shards,
    quantity, natural, file, or a registered name."""
    alpha: float = 0.5
    """Concentration of dirichlet, dirichlet_device and quantity: small is skewed, large near iid."""
    classes_per_device: int = 2
    """Classes that a device holds (classes), or pieces of one (shards)."""
    min_samples: int = 1
    """Fewest samples of a rank or device."""
    partition_file: str | None = None
    """For file: the device of every sample, a number a line."""
    test_share: float = 0.0
    """Share of each device's samples that is held out to judge the model on its own data."""
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
        require_types(self)
        require_at_least(self, 0, "workers", "crop_padding")
        require_at_least(self, 1, "image_size", "train_limit", "test_limit", "classes_per_device", "min_samples")
        require("alpha", self.alpha, self.alpha > 0, "must be above 0")
        require("test_share", self.test_share, 0 <= self.test_share < 1, "must be 0 or more, and below 1")
        named = (self.partition == "file") == (self.partition_file is not None)
        require("partition_file", self.partition_file, named, "goes with data.partition = file, and only with it")


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
        require_types(self)
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
        require_types(self)
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
        require_types(self)
        require_at_least(self, 1, "max_micro_batch", "max_skipped_steps")


@dataclass(frozen=True)
class EvalConfig:
    """When the consensus model is evaluated."""

    every_samples: int | None = 12_000
    """Samples (over all ranks) between two evaluations, at a round's end; the end is always evaluated."""
    batch: int = 500
    """Samples of a rank in one forward pass."""

    def __post_init__(self) -> None:
        require_types(self)
        require_at_least(self, 1, "every_samples", "batch")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written."""

    every_s: float = 600.0
    """Seconds between two checkpoints, by rank 0's clock; 0 for none. All ranks write them at one local step, at the
    next observation."""
    every_samples: int | None = None
    """Samples (over all ranks) between two checkpoints, besides; one is written at the end and one when told to stop in
    any case."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        require_types(self)
        require("every_s", self.every_s, self.every_s >= 0, "must be 0 or more seconds")
        require_at_least(self, 1, "every_samples", "keep")


@dataclass(frozen=True)
class RecordConfig:
    """What is shown and recorded while training."""

    progress: bool = True
    """Show progress: a bar on a terminal, plain lines elsewhere."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    report: bool = True
    """Draw the run's page, report.html, at its end."""
    reference_s: float = 3.0
    """Seconds that rank 0 times itself alone for scaling_speedup; 0: not at all."""

    def __post_init__(self) -> None:
        require_types(self)
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
    federated: FederatedConfig = FederatedConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", policy_of(self.policy))
        require_types(self)
        try:
            if self.federated.is_on:
                check_federated(self.federated, self.sync, self.policy.plans())
            else:
                check_plans(self.sync, self.policy.plans())
            check_scaler(self.sync, used=self.step.precision == "fp16")
        except ConfigError as error:
            raise ConfigError(f"sync.{error}") from None
        try:
            check_local_optimizer(self.federated, self.optim.name)
        except ConfigError as error:
            raise ConfigError(f"federated.{error}") from None
        self._check_elastic()
        held = self.data.test_share == 0 or self.federated.is_on
        require("data.test_share", self.data.test_share, held, "needs federated.devices")

    def _check_elastic(self) -> None:
        """Refuse what goes with a fixed world only."""
        if self.world.elastic is None:
            return
        mend = "not where ranks come and go; leave it out, or leave out world.elastic"
        for field, value, fits in (
            ("federated.devices", self.federated.devices, not self.federated.is_on),
            ("data.partition", self.data.partition, self.data.partition == "iid"),
            ("sync.node_period_steps", self.sync.node_period_steps, self.sync.node_period_steps is None),
            ("sync.ranks_per_node", self.sync.ranks_per_node, self.sync.ranks_per_node is None),
            ("sync.gradient_format", self.sync.gradient_format, self.sync.gradient_format != "powersgd"),
        ):
            require(field, value, fits, mend)

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
    if config.world.elastic is None and wanted is not None and wanted != ranks:
        raise ConfigError(
            f"world.ranks = {wanted}: the launcher started {ranks}; mend its --nnodes or --nproc-per-node"
        )
    devices = config.federated.devices
    require("federated.devices", devices, devices is None or devices >= ranks, f"fewer than the {ranks} ranks")
    require("run.samples", config.run.samples, config.run.samples >= ranks, f"must be at least one a rank ({ranks})")
