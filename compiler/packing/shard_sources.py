"""Where the shards of a checkpoint come from that is not on the disk."""

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.hub import HubShards
from qie.compiler.checkpoint.shards import ShardSource
from qie.compiler.synthetic.shards import SyntheticShards
from qie.engines.errors import CheckpointError

__all__ = ["check_whole", "shard_source"]


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


def check_whole(checkpoint: Checkpoint) -> None:
    """Reject a checkpoint whose weights can only be streamed.

    Raises:
        CheckpointError: its shards are made on demand.
    """
    if SyntheticShards.open(checkpoint.path) is not None:
        raise CheckpointError(
            f"{checkpoint.path} has no weights, and they can be made one shard at a time; stream them", option="stream"
        )
