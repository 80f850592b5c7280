"""The weights that a training run begins with: a checkpoint's, or fresh ones.

Letters: n positions, C hidden size, V' tokens that can be drafted.
"""

from pathlib import Path

from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.heads.checkpoint import LoadedHeads, read_heads
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.families import DraftHeads, family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.models.config import BackboneConfig
from gorgon_protocol.errors import TrainingError
from gorgon_trainer.mixture import ShardMixture
from gorgon_trainer.train_config import TrainConfig


def read_initial(folder: Path, shards: ShardMixture, config: TrainConfig) -> LoadedHeads:
    """A checkpoint to begin with. Raises `TrainingError` where it is of other heads, `HeadsError` where unreadable."""
    loaded = read_heads(folder)
    manifest = loaded.manifest
    for what, theirs, ours in (
        ("family", manifest.family, config.family),
        ("backbone", manifest.backbone.identity[:12], shards.index.backbone.identity[:12]),
        ("drafting vocabulary", manifest.draft_vocab_size, config.draft_vocab_size),
    ):
        if theirs != ours:
            raise TrainingError(f"{folder}: the run cannot begin with these heads: {what} {theirs}, not {ours}")
    return loaded


def empty_heads(config: TrainConfig, backbone: BackboneConfig, lm_head: Tensor) -> DraftHeads:
    """Float32 heads on the CPU. lm_head: [V', C], the size of own projections, and what those of medusa heads are."""
    size = backbone.hidden_size
    if config.family == "medusa":
        own = lm_head.cpu().float() if config.own_projection else None
        return MedusaHeads(size, num_heads=config.num_heads, num_blocks=config.num_blocks, lm_head=own)
    if config.family == "eagle":
        shape = EagleShape(
            hidden_size=size,
            num_query_heads=backbone.num_heads,
            num_kv_heads=backbone.num_kv_heads,
            head_dim=backbone.head_dim,
            intermediate_size=backbone.intermediate_size,
            rope_theta=backbone.rope.parameters["rope_theta"],
            num_heads=config.num_heads,
        )
        return EagleHead(shape)
    own_rows = lm_head.shape[0] if config.own_projection else None
    return HydraHeads(
        HydraShape(size, num_heads=config.num_heads, num_blocks=config.num_blocks, own_projection=own_rows)
    )


def starting_heads(
    config: TrainConfig, backbone: Backbone, lm_head: Tensor, initial: LoadedHeads | None, *, like: Tensor
) -> DraftHeads:
    """Float32 heads on the backbone's device: with a checkpoint's weights, or fresh ones for hidden states `like`
    [n, C]. Raises `TrainingError` where the checkpoint's heads are of another shape."""
    heads = empty_heads(config, backbone.config, lm_head)
    if initial is not None:
        if family_fields(heads) != family_fields(initial.heads):
            raise TrainingError(
                f"heads {initial.manifest.name}@{initial.manifest.version} are of another shape than the run's: "
                "give the settings that they were trained with, or begin with fresh ones"
            )
        heads.load_state_dict(initial.heads.state_dict())
        return heads.to(backbone.device)
    rms = float(like.float().square().mean().sqrt())
    if isinstance(heads, HydraHeads):
        heads.start_as_pass_through(hidden_rms=rms, lm_head=lm_head.cpu().float())
    elif isinstance(heads, EagleHead):
        heads.start_as_pass_through(hidden_rms=rms)
    return heads.to(backbone.device)
