"""Where the shards of a checkpoint come from that is not on the disk."""

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.hub import HubShards
from qie.compiler.checkpoint.shards import ShardSource
from qie.compiler.synthetic.shards import SyntheticShards

__all__ = ["shard_source"]


def shard_source(checkpoint: Checkpoint) -> ShardSource | None:
    """The source of the shards of ``checkpoint``; None for one that has its weights in a folder or in the cache.

    Raises:
        CheckpointError: the hub does not answer.
    """
    made = SyntheticShards.open(checkpoint.path)
    if made is not None:
        return made
    if checkpoint.missing_bytes() == 0:
        return None
    return HubShards(checkpoint.name, str(checkpoint.revision))
