"""An EAGLE-style drafter (2401.15077), to compare the head families of the trainer with.

One decoder layer of the backbone's own shape goes on in the backbone's feature space, a token at a time:

    x_t   = fc([norm(f_t), norm(e(token_{t+1}))])
    f_t+1 = norm(layer(x_t))        causal attention, SwiGLU MLP, RMSNorms, RoPE; read by the backbone's own lm_head

f_t is the backbone's hidden state at position t. Where that is not known yet, the layer reads what it predicted itself:
step j at position t reads its own feature of step j - 1 and the token j places on. Step j attends to step 1's keys of
positions <= t, which are made of true features, and to those of its own steps 2..j: the published training-time test
(EAGLE-3, 2503.01840, section 3.2) with its exact keys, at the price of attention written out in plain torch.

Letters: B packs or sequences, N positions, M positions of the prefix, W paths in the beam, J steps of a path so far,
H query heads, G KV heads, R = H / G, D head dimension, C hidden size, V tokens that can be drafted, P = B * N.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, rms_norm, silu, smooth_l1_loss
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.torch_backbone import apply_rope
from gorgon_engine.drafters.choices import top_log_probs
from gorgon_engine.drafters.hydra import BeamLimits
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.rope import RotaryEmbedding
from gorgon_engine.tree.builders import best_first
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_trainer.dataset import IGNORE, PackBatch, PackedDataset, collate
from gorgon_trainer.evaluation.replayed import Answers, Replayed, replay_answers
from gorgon_trainer.features import hidden_states
from gorgon_trainer.objective import FrozenBackbone, Loss
from gorgon_trainer.sampler import ResumableSampler
from gorgon_trainer.shards import ShardSet, Split
from gorgon_trainer.training import TrainConfig

_HELD_OUT_PACKS = 64


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """What `TrainConfig` does not say. Its family, heads and blocks mean nothing here."""

    unroll: int = 1  # steps that are trained on, each reading the feature of the one before
    feature_weight: float = 0.0  # of the smooth L1 distance to the backbone's features, beside 1 of the tokens' loss
    depth: int = 4  # of the tree

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(range(2, 2 + max(self.unroll, self.depth)))


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Step 1's keys and values, and which of them each position may see."""

    keys: Tensor  # [B, M, G, D]
    values: Tensor  # [B, M, G, D]
    mask: Tensor  # [B, N, M] bool

    def rows(self, chosen: Tensor) -> "Prefix":
        """For some of the positions [N'] alone."""
        return Prefix(self.keys, self.values, self.mask[:, chosen])


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """W continuations of every position: the last feature, and the keys and values of the steps behind the first."""

    features: Tensor  # [B, N, W, C]
    keys: Tensor  # [B, N, W, J, G, D]
    values: Tensor  # [B, N, W, J, G, D]

    def rows(self, chosen: Tensor) -> "Paths":
        """Of some of the positions [N'] alone."""
        return Paths(self.features[:, chosen], self.keys[:, chosen], self.values[:, chosen])

    def select(self, parents: Tensor) -> "Paths":
        """The paths to go on with: parents [B, N, W']."""

        def pick(values: Tensor) -> Tensor:
            index = parents.reshape(*parents.shape, *[1] * (values.ndim - 3))
            return values.gather(2, index.expand(*parents.shape, *values.shape[3:]))

        return Paths(pick(self.features), pick(self.keys), pick(self.values))


class EagleLayer(nn.Module):
    """The drafter's weights: float32 until they are cast to draft."""

    def __init__(self, config: BackboneConfig, *, device: torch.device) -> None:
        super().__init__()
        size, heads, groups, width = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self._config = config
        self._rope = RotaryEmbedding(config.rope, device)

        def matrix(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device)

        def gain() -> nn.Parameter:
            return nn.Parameter(torch.ones(size, device=device))

        self.feature_norm, self.embedding_norm = gain(), gain()
        self.attention_norm, self.mlp_norm, self.norm = gain(), gain(), gain()
        self.fc = matrix(2 * size, size)
        self.qkv = matrix(size, (heads + 2 * groups) * width)
        self.o = matrix(heads * width, size)
        self.gate_up = matrix(size, 2 * config.intermediate_size)
        self.down = matrix(config.intermediate_size, size)

    @torch.no_grad()
    def start_as_pass_through(self, hidden_rms: float) -> None:
        """Start by repeating the feature, at the scale (root mean square) that the backbone's projection is used to."""
        size = self._config.hidden_size
        for part in (self.fc, self.qkv, self.gate_up):
            nn.init.normal_(part.weight, std=0.5 * part.in_features**-0.5)
        self.fc.weight[:, :size].zero_().fill_diagonal_(1.0)
        for part in (self.o, self.down):
            nn.init.zeros_(part.weight)
        self.norm.fill_(hidden_rms)

    def begin(self, features: Tensor, embeddings: Tensor, positions: Tensor, mask: Tensor) -> tuple[Prefix, Paths]:
        """Step 1 at every position of some sequences, from the backbone's own features.

        features, embeddings of the tokens behind them [B, N, C]; positions [B, N]; mask [B, N, N] bool.
        """
        x = self._inputs(features[:, :, None], embeddings[:, :, None])  # [B, N, 1, C]
        query, keys, values = self._query_key_value(x, positions)
        prefix = Prefix(keys[:, :, 0], values[:, :, 0], mask)
        no_steps = keys[:, :, :, None][:, :, :, :0]
        return prefix, Paths(self._outputs(x, _attend(query, prefix, no_steps, no_steps)), no_steps, no_steps)

    def extend(self, prefix: Prefix, paths: Paths, embeddings: Tensor, positions: Tensor) -> Paths:
        """One step more of every path. embeddings [B, N, W, C] of its newest token; positions [B, N] of the inputs."""
        x = self._inputs(paths.features, embeddings)
        query, key, value = self._query_key_value(x, positions)
        keys = torch.cat([paths.keys, key[:, :, :, None]], dim=3)
        values = torch.cat([paths.values, value[:, :, :, None]], dim=3)
        return Paths(self._outputs(x, _attend(query, prefix, keys, values)), keys, values)

    def _inputs(self, features: Tensor, embeddings: Tensor) -> Tensor:
        parts = [self._normed(features, self.feature_norm), self._normed(embeddings, self.embedding_norm)]
        return self.fc(torch.cat([part.to(features.dtype) for part in parts], dim=-1))

    def _query_key_value(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, W, C] -> [B, N, W, H or G or G, D]."""
        config, (num_rows, width) = self._config, x.shape[1:3]
        counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        wide = self.qkv(self._normed(x, self.attention_norm)).unflatten(3, (sum(counts), config.head_dim))
        query, key, value = wide.split(counts, dim=3)
        angles = self._rope.cos_sin(positions, torch.zeros_like(positions))
        cos, sin = (part.repeat_interleave(width, dim=1) for part in angles)  # [B, N W, D / 2]

        def rotate(part: Tensor) -> Tensor:
            return apply_rope(part.flatten(1, 2), cos, sin).unflatten(1, (num_rows, width))

        return rotate(query), rotate(key), value

    def _outputs(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.o(attended)
        gate, up = self.gate_up(self._normed(x, self.mlp_norm)).chunk(2, dim=-1)
        return self._normed(x + self.down(silu(gate) * up), self.norm)

    def _normed(self, x: Tensor, gain: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), gain.to(x.dtype), eps=self._config.rms_norm_eps)


def _attend(query: Tensor, prefix: Prefix, keys: Tensor, values: Tensor) -> Tensor:
    """query [B, N, W, H, D] over the prefix and over the path's own steps [B, N, W, J, G, D] -> [B, N, W, H D]."""
    num_groups, width = prefix.keys.shape[2:]
    grouped = query.unflatten(3, (num_groups, -1)) * width**-0.5  # [B, N, W, G, R, D]
    seen = torch.einsum("bnwgrd,bmgd->bnwgrm", grouped, prefix.keys)
    seen = seen.masked_fill(~prefix.mask[:, :, None, None, None], -torch.inf)
    own = torch.einsum("bnwgrd,bnwjgd->bnwgrj", grouped, keys)
    weights = torch.softmax(torch.cat([seen, own], dim=5).float(), dim=5).to(prefix.values.dtype)
    of_prefix, of_path = weights.split([seen.shape[5], own.shape[5]], dim=5)
    out = torch.einsum("bnwgrm,bmgd->bnwgrd", of_prefix, prefix.values)
    out = out + torch.einsum("bnwgrj,bnwjgd->bnwgrd", of_path, values)
    return out.flatten(3)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Packs as the layer reads them, on the training device."""

    hidden: Tensor  # [B, N, C]
    embeddings: tuple[Tensor, ...]  # [j - 1] = [B, N, C] of the tokens j places on, anything where there is none
    positions: Tensor  # [B, N] in their sequences
    mask: Tensor  # [B, N, N] bool
    chosen: tuple[Tensor, ...]  # [j - 1] = [n] the positions, of all P, with a target at step j
    targets: tuple[Tensor, ...]  # [j - 1] = [n] int64 tokens
    num_positions: int  # with a target at any step

    @classmethod
    def of(cls, batch: PackBatch, backbone: Backbone, *, pack_length: int, num_steps: int) -> "_Batch":
        """batch: on the CPU, its target row j - 1 of step j."""
        device = backbone.device
        # Features come out of inference mode: what is differentiated through needs a copy of its own.
        hidden = hidden_states(backbone, batch).clone().unflatten(0, (-1, pack_length))
        owners = torch.arange(len(batch.starts)).repeat_interleave(batch.lengths)
        offsets = torch.arange(len(owners)) - (batch.lengths.cumsum(0) - batch.lengths)[owners]
        places = batch.starts[owners] + offsets
        positions = torch.zeros_like(batch.tokens).index_put((places,), offsets).view(-1, pack_length).to(device)
        # Padding is a sequence like another: its rows see themselves, so that no softmax is empty.
        segments = torch.full_like(batch.tokens, -1).index_put((places,), owners).view(-1, pack_length).to(device)
        causal = torch.ones((pack_length, pack_length), dtype=torch.bool, device=device).tril()
        tokens = batch.tokens.to(device)
        following = [tokens.roll(-step).view(-1, pack_length) for step in range(1, num_steps + 1)]
        counted = batch.targets[:num_steps] != IGNORE
        chosen = [row.nonzero().flatten() for row in counted]
        return cls(
            hidden=hidden,
            embeddings=tuple(backbone.embed(row).to(hidden.dtype) for row in following),
            positions=positions,
            mask=(segments[:, :, None] == segments[:, None]) & causal,
            chosen=tuple(rows.to(device) for rows in chosen),
            targets=tuple(batch.targets[step, rows].to(device) for step, rows in enumerate(chosen)),
            num_positions=int(counted.any(dim=0).sum()),
        )


def _unroll(layer: EagleLayer, batch: _Batch) -> Iterator[Tensor]:
    """The features of step 1, 2, ..., [P, C] each, the right tokens given."""
    prefix, paths = layer.begin(batch.hidden, batch.embeddings[0], batch.positions, batch.mask)
    yield paths.features.flatten(0, 2)
    for step, embeddings in enumerate(batch.embeddings[1:], start=2):
        paths = layer.extend(prefix, paths, embeddings[:, :, None], batch.positions + step - 1)
        yield paths.features.flatten(0, 2)


def _loss(
    layer: EagleLayer, frozen: FrozenBackbone, batch: _Batch, config: TrainConfig, feature_weight: float
) -> Tensor:
    """sum over steps j of decay^(j - 1) * (tokens' loss + feature_weight * smooth L1 of the feature)."""
    total = torch.zeros((), device=batch.hidden.device)
    hidden = batch.hidden.flatten(0, 1)
    for number, features in enumerate(_unroll(layer, batch)):
        chosen = batch.chosen[number]
        feature, truth = features[chosen], hidden[chosen + number + 1]
        targets = frozen.rows(batch.targets[number])
        logits = frozen.project(feature).float()
        if config.loss is Loss.CROSS_ENTROPY:
            summed = cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        else:
            teacher = torch.softmax(linear(truth.to(frozen.lm_head.dtype), frozen.lm_head).float(), dim=1)
            summed = (-(teacher * torch.log_softmax(logits, dim=1)).sum(dim=1)).where(targets != IGNORE, 0.0).sum()
        loss = summed / (targets != IGNORE).sum().clamp(min=1)
        if feature_weight and len(chosen):
            loss = loss + feature_weight * smooth_l1_loss(feature.float(), truth.float())
        total = total + config.decay**number * loss
    return total


@dataclass(frozen=True, slots=True)
class EagleResult:
    layer: EagleLayer  # cast as it drafts
    top_1: tuple[float, ...]  # [depth - 1]: share of held-out positions, the right tokens above given
    num_steps: int
    seconds: float  # of training, the held-out measurement included
    positions_per_second: float  # while training
    peak_memory_bytes: int | None


def train_eagle(
    shards: ShardSet, *, backbone: Backbone, frozen: FrozenBackbone, config: TrainConfig, eagle: EagleConfig
) -> EagleResult:
    """Train on the same batches and with the same optimizer and schedule as `gorgon_trainer.training.train`.

    config.max_steps: how many steps. Raises `DataError` for shards without data.
    """
    assert config.max_steps is not None
    device = backbone.device
    on_gpu = device.type == "cuda"
    torch.manual_seed(config.seed)
    dataset = _packed(shards, "train", config, eagle)
    sampler = ResumableSampler(len(dataset), batch_size=config.packs_per_batch, seed=config.seed)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=4 if on_gpu else 0,
        prefetch_factor=8 if on_gpu else None,
    )
    batches = iter(loader)
    held_out = _held_out_batches(_packed(shards, "heldout", config, eagle), config.packs_per_batch)
    layer = EagleLayer(backbone.config, device=device)
    layer.start_as_pass_through(float(hidden_states(backbone, held_out[0]).float().square().mean().sqrt()))
    optimizer = torch.optim.AdamW(
        layer.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=on_gpu,
    )
    schedule = LambdaLR(optimizer, _learning_rate_shares(config, config.max_steps))
    num_positions, began = 0, time.perf_counter()
    for _ in range(config.max_steps):
        batch = _Batch.of(next(batches), backbone, pack_length=config.pack_length, num_steps=eagle.unroll)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = _loss(layer, frozen, batch, config, eagle.feature_weight)
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        num_positions += batch.num_positions
    if not math.isfinite(float(loss.detach())):  # waits for the device
        raise ArithmeticError(f"the loss is {float(loss.detach())} after {config.max_steps} steps")
    train_seconds = time.perf_counter() - began
    layer = layer.to(backbone.cache_dtype if on_gpu else torch.float32).requires_grad_(False).eval()
    top_1 = _top_1(layer, frozen, backbone, held_out, config.pack_length, eagle.depth)
    return EagleResult(
        layer=layer,
        top_1=top_1,
        num_steps=config.max_steps,
        seconds=time.perf_counter() - began,
        positions_per_second=num_positions / train_seconds,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
    )


@torch.inference_mode()
def _top_1(
    layer: EagleLayer,
    frozen: FrozenBackbone,
    backbone: Backbone,
    held_out: list[PackBatch],
    pack_length: int,
    depth: int,
) -> tuple[float, ...]:
    right, counts = [0] * depth, [0] * depth
    for packs in held_out:
        batch = _Batch.of(packs, backbone, pack_length=pack_length, num_steps=depth)
        for number, features in enumerate(_unroll(layer, batch)):
            choices = frozen.project(features[batch.chosen[number]]).argmax(dim=1)
            right[number] += int((choices == frozen.rows(batch.targets[number])).sum())
            counts[number] += len(choices)
    return tuple(hits / max(count, 1) for hits, count in zip(right, counts, strict=True))


def _packed(shards: ShardSet, split: Split, config: TrainConfig, eagle: EagleConfig) -> PackedDataset:
    sequences = shards.sequences(split)
    return PackedDataset(sequences, pack_length=config.pack_length, offsets=eagle.offsets, seed=config.seed)


def _held_out_batches(dataset: PackedDataset, size: int) -> list[PackBatch]:
    """The packs that the trainer's own held-out figures are of."""
    chosen = list(range(0, len(dataset), max(1, len(dataset) // _HELD_OUT_PACKS)))
    return [collate([dataset[pack] for pack in chosen[at : at + size]]) for at in range(0, len(chosen), size)]


def _learning_rate_shares(config: TrainConfig, num_steps: int) -> Callable[[int], float]:
    def share(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        done = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
        low = config.min_learning_rate_share
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))

    return share


class EagleDrafter:
    """Trees at the places of known answers: a beam of the likeliest paths goes down the depths, as `HydraDrafter`'s."""

    def __init__(
        self,
        layer: EagleLayer,
        frozen: FrozenBackbone,
        answers: Answers,
        *,
        depth: int,
        limits: BeamLimits | None = None,
    ) -> None:
        self._layer = layer
        self._frozen = frozen
        self._answers = answers
        self._depth = depth
        self._limits = limits or BeamLimits()
        self._dtype = next(layer.parameters()).dtype

    def replay(self, max_nodes: int) -> Replayed:
        """As `gorgon_trainer.evaluation.replayed.replay`, a sequence at a time: its prefix is run once."""
        starts = [0, *accumulate(self._answers.lengths)]
        parts = self._answers.of_each_sequence()
        spans = {rows.start: (starts[sequence], starts[sequence + 1]) for sequence, rows in parts}
        return replay_answers(
            self._answers,
            lambda rows: self._propose(*spans[rows.start], rows, max_nodes - 1),
            batches=(rows for _, rows in parts),
            max_nodes=max_nodes,
        )

    def _propose(self, start: int, end: int, rows: slice, max_nodes: int) -> CandidateTree:
        """Candidates at the places `rows` [N] of the sequence tokens[start:end]: more than `max_nodes`, all depths'."""
        prefix, paths, places = self._prefix(start, end, rows)
        beam = torch.zeros((len(places), 1), device=places.device)  # [N, W] log-probabilities
        index = torch.full_like(beam, -1, dtype=torch.int64)  # [N, W] the beam's places among all nodes
        levels: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # tokens, parents, log-probabilities, ranks
        found = 0
        for depth in range(1, self._depth + 1):
            log_probs, tokens = self._choices(paths.features[0])  # [N, W, M]
            num_choices = tokens.shape[2]
            kept, picked = best_first((beam[:, :, None] + log_probs).flatten(1), max_nodes)
            above = torch.div(picked, num_choices, rounding_mode="floor")
            drafted = tokens.flatten(1).gather(1, picked)
            levels.append((drafted, index.gather(1, above), kept, picked % num_choices))
            if depth == self._depth:
                break
            width = min(self._limits.width, kept.shape[1])
            embeddings = self._frozen.embed(drafted[:, :width]).to(self._dtype)
            upper = paths.select(above[None, :, :width])
            paths = self._layer.extend(prefix, upper, embeddings[None], places[None] + depth)
            beam = kept[:, :width]
            index = (found + torch.arange(width, device=places.device)).expand(len(places), -1)
            found += kept.shape[1]
        drafted, parents, scores, ranks = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        return CandidateTree(drafted, parents, scores, ranks, source="eagle")

    def _prefix(self, start: int, end: int, rows: slice) -> tuple[Prefix, Paths, Tensor]:
        """Step 1 over a sequence, and at the places asked for, which are [N] in the sequence."""
        tokens = self._answers.tokens[start:end]
        hidden = self._answers.hidden[None, start:end].to(self._dtype)
        following = self._frozen.embed(tokens.roll(-1)).to(self._dtype)[None]  # behind the last: anything
        positions = torch.arange(len(tokens), device=tokens.device)
        causal = positions <= positions[:, None]
        prefix, paths = self._layer.begin(hidden, following, positions[None], causal[None])
        places = self._answers.places[rows] - start
        return prefix.rows(places), paths.rows(places), places

    def _choices(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens below each path: [N, W, C] -> [N, W, M] twice."""
        log_probs, places = top_log_probs(self._frozen.project(features), self._limits.num_choices)
        vocabulary = self._frozen.draft_vocabulary
        return log_probs, places if vocabulary is None else vocabulary[places]
