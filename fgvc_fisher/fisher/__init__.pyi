from .diagonal import DiagFisher as DiagFisher, weights_sha256 as weights_sha256
from .estimate import estimate_fisher as estimate_fisher
from .shards import (
    shard_fisher as shard_fisher,
    shard_batches as shard_batches,
    tar_shards as tar_shards,
    stream_shards as stream_shards,
)
from .hub import model_card as model_card, push_to_hub as push_to_hub, from_hub as from_hub
