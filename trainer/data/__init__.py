"""Data that stays where it is: named sets, shards by global rank, batches whose size may change at every step."""

from trainer.data.partition import PARTITIONERS, register_partition, shard_of
from trainer.data.sets import DataPart, open_part
from trainer.data.stream import ShardStream, split_evenly
from trainer.data.transform import Transform

__all__ = [
    "PARTITIONERS",
    "DataPart",
    "ShardStream",
    "Transform",
    "open_part",
    "register_partition",
    "shard_of",
    "split_evenly",
]
