"""The settings of a training run."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gorgon_protocol.errors import TrainingError
from gorgon_trainer.feature_cache import Features
from gorgon_trainer.objective import Loss, ObjectiveConfig

_EAGLE_SETTINGS = ("unroll", "feature_loss_weight")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What to train and how. Everything but the device and the number of processes: a run is resumed with the same."""

    family: Literal["medusa", "hydra", "eagle"] = "hydra"
    num_heads: int = 4  # eagle: depths that its one layer drafts
    num_blocks: int = 4  # eagle: 1
    own_projection: bool = False
    draft_vocab_size: int | None = None  # the most frequent tokens of the training answers; None = all
    loss: Loss = Loss.CROSS_ENTROPY
    decay: float = 1.0  # weight of head k is decay^k; 1 = the plain sum
    unroll: int = 1  # eagle: depths that are trained, each on the feature that the one before predicted
    feature_loss_weight: float = 10.0  # eagle: of the distance to the backbone's features, beside 1 for the tokens
    dropout: float = 0.0  # share of what each head reads that is dropped in training
    learning_rate: float = 3e-3
    min_learning_rate_share: float = 0.05  # where the cosine ends
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    pack_length: int = 1024
    packs_per_batch: int = 8  # on each device
    num_epochs: float = 1.0
    max_steps: int | None = None  # instead of whole epochs
    eval_every: int = 200  # steps; also at the end
    patience: int = 0  # evaluations without a better held-out acceptance length before it stops; 0 = never
    save_every: int = 200  # steps; also at the end
    features: Features = Features.COMPUTED
    shares: tuple[float, ...] | None = None  # of several shard folders in the batches, any unit; None = by their size
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("num_heads", "num_blocks", "packs_per_batch", "eval_every", "save_every", "pack_length")
        for name in positive:
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1: got {getattr(self, name)}")
        for name in ("learning_rate", "num_epochs", "decay", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainingError(f"{name} must be above 0 and finite: got {getattr(self, name)}")
        for name in ("min_learning_rate_share", "warmup_steps", "weight_decay", "patience", "seed"):
            if not getattr(self, name) >= 0:
                raise TrainingError(f"{name} must not be below 0: got {getattr(self, name)}")
        if self.shares is not None and not all(0 < share < math.inf for share in self.shares):
            raise TrainingError(f"shares must be above 0 and finite: got {', '.join(map(str, self.shares))}")
        if not 0 <= self.dropout < 1:
            raise TrainingError(f"dropout must be a share from 0 up to, not including, 1: got {self.dropout}")
        if self.family == "eagle":
            self._check_eagle()
        if self.max_steps is not None and self.max_steps < 1:
            raise TrainingError(f"max_steps must be at least 1: got {self.max_steps}")
        if max(self.offsets) < 2:
            raise TrainingError("medusa heads must be 2 at least: the first one guesses what the backbone says itself")

    def _check_eagle(self) -> None:
        if self.num_blocks != 1:
            raise TrainingError(f"an eagle head is one layer: num_blocks must be 1: got {self.num_blocks}")
        if self.own_projection:
            raise TrainingError("an eagle head predicts what the backbone's projection reads: it has none of its own")
        if not 1 <= self.unroll <= self.num_heads:
            raise TrainingError(f"unroll must be between 1 and num_heads {self.num_heads}: got {self.unroll}")
        if not 0 <= self.feature_loss_weight < math.inf:
            raise TrainingError(f"feature_loss_weight must not be below 0, and finite: got {self.feature_loss_weight}")

    @property
    def offsets(self) -> tuple[int, ...]:
        """Head k (0-based) of the medusa family guesses offset k + 1, of the others k + 2."""
        first = 1 if self.family == "medusa" else 2
        return tuple(range(first, first + self.num_heads))

    @property
    def objective(self) -> ObjectiveConfig:
        own = {name: getattr(self, name) for name in _EAGLE_SETTINGS} if self.family == "eagle" else {}
        return ObjectiveConfig(loss=self.loss, decay=self.decay, dropout=self.dropout, **own)

    def as_json(self) -> dict[str, Any]:
        """Without the settings of another family, which change nothing."""
        shares = None if self.shares is None else ",".join(map(str, self.shares))
        settings = asdict(self) | {"loss": str(self.loss), "features": str(self.features), "shares": shares}
        others = () if self.family == "eagle" else _EAGLE_SETTINGS
        return {name: value for name, value in settings.items() if name not in others}
