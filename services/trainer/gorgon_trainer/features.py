"""What heads are trained on: the frozen backbone's hidden states of whole sequences, by the very code that serves.

Letters: P positions of a batch of packs, S segments (sequences) in it, N positions of the longest, n chosen positions,
K heads, K' tokens between a position and its farthest target, B packs of L positions, C hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone, ForwardInputs, LogitsFor
from gorgon_engine.kv_cache import KVCache
from gorgon_trainer.dataset import IGNORE, PackBatch

_GROUP_ROWS = 65536  # rows of one forward pass, padding included: a GPU's time, not the host's, should count


@dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """Every position of a batch, for heads that attend to what is before an example in its segment."""

    hidden: Tensor  # [B, L, C]
    next_tokens: Tensor  # [K', B, L] int64: the tokens 1, 2, ..., K' positions later, anything where there are none
    positions: Tensor  # [B, L] int64, in their segments
    segments: Tensor  # [B, L] int64: a number of its own for each; padding is one too
    chosen: Tensor  # [n] int64: the places of the examples among all B L positions

    def mask(self) -> Tensor:
        """[B, L, L] bool: which positions each may see: itself and those before it in its segment."""
        length = self.segments.shape[1]
        causal = torch.ones((length, length), dtype=torch.bool, device=self.segments.device).tril()
        return (self.segments[:, :, None] == self.segments[:, None]) & causal

    @classmethod
    def of(cls, batch: PackBatch, hidden: Tensor, chosen: Tensor, *, pack_length: int, num_steps: int) -> "Packs":
        """batch, chosen: on the CPU; hidden: [P, C] on any device, where the result will be."""
        device = hidden.device
        owners = torch.arange(len(batch.starts)).repeat_interleave(batch.lengths)
        offsets = torch.arange(len(owners)) - (batch.lengths.cumsum(0) - batch.lengths)[owners]
        places = batch.starts[owners] + offsets

        def laid_out(values: Tensor, padding: int) -> Tensor:
            whole = torch.full_like(batch.tokens, padding).index_put((places,), values)
            return whole.view(-1, pack_length).to(device)

        following = torch.stack([batch.tokens.roll(-step) for step in range(1, num_steps + 1)])
        return cls(
            # A copy: features come out of inference mode, whose tensors autograd refuses to keep.
            hidden=hidden.clone().unflatten(0, (-1, pack_length)),
            next_tokens=following.unflatten(1, (-1, pack_length)).to(device),
            positions=laid_out(offsets, 0),
            segments=laid_out(owners, -1),
            chosen=chosen.to(device),
        )


@dataclass(frozen=True, slots=True)
class Examples:
    """The positions of a batch at which some head has a target."""

    hidden: Tensor  # [n, C] of those positions
    # [K', n] int64: the tokens 1, 2, ..., K' positions later, up to the one before the farthest target; anything where
    # there is none.
    next_tokens: Tensor
    targets: Tensor  # [K, n] int64, IGNORE where a head has none
    teachers: Tensor | None  # [K, n, C]: the hidden state that gave each target's distribution; any row where none
    packs: Packs | None = None  # where the examples are from

    @property
    def num_positions(self) -> int:
        return self.hidden.shape[0]


@torch.inference_mode()
def hidden_states(backbone: Backbone, batch: PackBatch) -> Tensor:
    """Hidden states [P, C] of every position of a batch that lies on the CPU; zeros in the padding.

    Each segment is a sequence of its own, prefilled as the engine prefills a prompt.
    """
    device, shape = backbone.device, backbone.config
    tokens = batch.tokens.to(device)
    out = torch.zeros((tokens.shape[0], shape.hidden_size), dtype=torch.float32, device=device)
    if backbone.cache_dtype != torch.float32 and device.type == "cuda":
        out = out.to(backbone.cache_dtype)
    for starts, lengths in _groups(batch.starts, batch.lengths):
        longest = int(lengths.max())
        steps = torch.arange(longest)
        inside = steps < lengths[:, None]  # [S, N]
        places = (starts[:, None] + steps).where(inside, starts[:, None])
        cache = KVCache(
            num_layers=shape.num_layers,
            num_slots=len(starts),
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            capacity=longest,
            max_scratch=0,
            dtype=backbone.cache_dtype,
            device=device,
        )
        counts = lengths.to(device)
        inputs = ForwardInputs(
            tokens=tokens[places.to(device)],
            depths=steps.to(device).expand(len(starts), -1),
            slots=torch.arange(len(starts), device=device),
            lengths=torch.zeros_like(counts),
            num_rows=counts,
            prompt_lengths=counts,
            max_positions=longest,
        )
        hidden = backbone.forward(inputs, cache, logits_for=LogitsFor.NONE).hidden  # [S, N, C]
        rows = inside.flatten().nonzero().flatten().to(device)
        out[places.flatten().to(device)[rows]] = hidden.flatten(0, 1)[rows].to(out.dtype)
    return out


def _groups(starts: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Segments of similar lengths, as many as fill a forward pass."""
    order = lengths.argsort()
    groups, begin = [], 0
    for end in range(1, len(order) + 1):
        following = int(lengths[order[end]]) if end < len(order) else 0
        if end == len(order) or (end - begin + 1) * following > _GROUP_ROWS:
            chosen = order[begin:end]
            groups.append((starts[chosen], lengths[chosen]))
            begin = end
    return groups


def examples(
    batch: PackBatch, hidden: Tensor, offsets: tuple[int, ...], *, teachers: bool, pack_length: int | None = None
) -> Examples:
    """The training examples of a batch. batch: on the CPU; hidden: [P, C] on any device, where the examples will be.

    teachers: also the hidden states whose distributions the heads should match: that of the position before a target.
    pack_length: also the whole packs, which are that long.
    """
    device = hidden.device
    chosen = (batch.targets != IGNORE).any(dim=0).nonzero().flatten()  # [n]
    last = batch.tokens.shape[0] - 1
    steps = torch.arange(1, max(offsets))
    following = (chosen + steps[:, None]).clamp(max=last)
    before_target = (chosen + torch.tensor(offsets)[:, None] - 1).clamp(max=last)
    packs = None
    if pack_length is not None:
        packs = Packs.of(batch, hidden, chosen, pack_length=pack_length, num_steps=len(steps))
    return Examples(
        hidden=hidden[chosen.to(device)],
        next_tokens=batch.tokens[following].to(device),
        targets=batch.targets[:, chosen].to(device),
        teachers=hidden[before_target.to(device)] if teachers else None,
        packs=packs,
    )
