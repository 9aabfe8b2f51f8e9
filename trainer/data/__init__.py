"""Data that stays where it is: named sets, shards by global rank, batches whose size may change at every step."""

from trainer.data.device_data import DevicePictures
from trainer.data.partition import (
    PARTITIONERS,
    Sharing,
    held_out,
    keys_of,
    labels_of,
    register_partition,
    shard_of,
    share_out,
)
from trainer.data.sets import DataPart, open_part
from trainer.data.stream import ShardStream, split_evenly
from trainer.data.transform import Transform

__all__ = [
    "PARTITIONERS",
    "DataPart",
    "DevicePictures",
    "ShardStream",
    "Sharing",
    "Transform",
    "held_out",
    "keys_of",
    "labels_of",
    "open_part",
    "register_partition",
    "shard_of",
    "share_out",
    "split_evenly",
]
