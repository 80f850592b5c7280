"""Packed token sequences with time-shifted targets, as a PyTorch `Dataset`.

Head k predicts the token `offsets[k]` positions after the one whose hidden state it reads. For the sequence
[A, B, C, D, E] and the input [A, B, C, D]:

    offset 1 -> [B, C, D, E]      offset 2 -> [C, D, E, _]      offset 3 -> [D, E, _, _]      (_ = IGNORE)

A pack is L positions that hold several whole sequences one after another; the backbone sees each alone. A target is
IGNORE where it lies beyond its sequence or is not the assistant's token. Where it is not, the tokens between input and
target are in the same segment too, so that heads which read drafted tokens can take them from the pack.

Letters: L positions a pack, S segments (sequences or pieces of one) in it, K heads, P positions of a batch of packs.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from gorgon_protocol.errors import DataError, TrainingError
from gorgon_trainer.shards import TokenSequence

IGNORE: Final = -100  # torch's cross_entropy leaves these targets out by itself
_WINDOW = 4096  # pieces sorted by length together: similar lengths meet, and packs still differ between seeds
_PADDING_TOKEN = 0


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One item of the dataset. Positions of no segment are padding: token 0, targets IGNORE."""

    tokens: Tensor  # int64 [L]
    targets: Tensor  # int64 [K, L]
    starts: Tensor  # int64 [S]
    lengths: Tensor  # int64 [S]


@dataclass(frozen=True, slots=True, eq=False)
class PackBatch:
    """Several packs one after another: P = number of packs * L."""

    tokens: Tensor  # int64 [P]
    targets: Tensor  # int64 [K, P]
    starts: Tensor  # int64 [S], in the batch
    lengths: Tensor  # int64 [S]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackBatch":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return PackBatch(move(self.tokens), move(self.targets), move(self.starts), move(self.lengths))

    def pin_memory(self) -> Self:
        """Called by a DataLoader with `pin_memory=True`."""
        return type(self)(
            self.tokens.pin_memory(), self.targets.pin_memory(), self.starts.pin_memory(), self.lengths.pin_memory()
        )


def shifted_targets(tokens: Tensor, loss_mask: Tensor, offsets: Sequence[int]) -> Tensor:
    """The targets of K heads at every position of one sequence.

    tokens: [T], integers. loss_mask: [T], nonzero = a target. Returns int64 [K, T]: tokens[t + offsets[k]], or IGNORE
    where that is beyond the end or not a target.
    """
    wanted = torch.where(loss_mask.bool(), tokens.long(), IGNORE)  # [T]
    targets = wanted.new_full((len(offsets), len(wanted)), IGNORE)  # [K, T]
    for row, offset in zip(targets, offsets, strict=True):
        row[:-offset] = wanted[offset:]
    return targets


def collate(packs: Sequence[Pack]) -> PackBatch:
    """A DataLoader's `collate_fn`. The packs have the same L."""
    sizes = torch.tensor([0, *(pack.tokens.numel() for pack in packs[:-1])]).cumsum(0).tolist()
    return PackBatch(
        tokens=torch.cat([pack.tokens for pack in packs]),
        targets=torch.cat([pack.targets for pack in packs], dim=1),
        starts=torch.cat([pack.starts + base for pack, base in zip(packs, sizes, strict=True)]),
        lengths=torch.cat([pack.lengths for pack in packs]),
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the dataset's tokens that becomes one segment."""

    start: int
    length: int


class PackedDataset(Dataset[Pack]):
    """Sequences in packs of L positions, every token in exactly one.

    A sequence longer than L is cut into pieces without overlap; each piece is then a sequence of its own, which costs
    its first tokens their context and `offset` targets a cut. Sequences of similar length share a pack, because the
    backbone's features are computed a sequence at a time, padded to the longest of a batch. Which ones: by the seed.
    """

    def __init__(
        self, sequences: Iterable[TokenSequence], *, pack_length: int, offsets: Sequence[int], seed: int = 0
    ) -> None:
        """Holds all tokens in memory, 5 bytes each.

        offsets: ascending, one a head. Raises `TrainingError` for a pack length that leaves the farthest head no
        target, `DataError` where there are no tokens.
        """
        if not offsets or min(offsets) < 1 or sorted(set(offsets)) != list(offsets):
            raise TrainingError(f"offsets must be ascending numbers from 1, one a head: got {list(offsets)}")
        if pack_length <= max(offsets):
            raise TrainingError(
                f"pack_length {pack_length} leaves the head of offset {max(offsets)} no target: make it longer"
            )
        self.pack_length = pack_length
        self.offsets = tuple(offsets)
        kept = [sequence for sequence in sequences if len(sequence)]
        if not kept:
            raise DataError("no sequence to train on: the split is empty")
        self._tokens = torch.cat([sequence.tokens for sequence in kept])  # int32 [T]
        self._loss_mask = torch.cat([sequence.loss_mask for sequence in kept])  # uint8 [T]
        self._packs = _pack(_pieces([len(sequence) for sequence in kept], pack_length), pack_length, seed)

    @property
    def num_tokens(self) -> int:
        return self._tokens.numel()

    @property
    def fill(self) -> float:
        """Share of the packs' positions that hold a token."""
        return self.num_tokens / (len(self) * self.pack_length)

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> Pack:
        pieces = self._packs[index]
        tokens = torch.full((self.pack_length,), _PADDING_TOKEN)  # [L]
        targets = torch.full((len(self.offsets), self.pack_length), IGNORE)  # [K, L]
        starts, position = [], 0
        for piece in pieces:
            source = slice(piece.start, piece.start + piece.length)
            target = slice(position, position + piece.length)
            tokens[target] = self._tokens[source]
            targets[:, target] = shifted_targets(self._tokens[source], self._loss_mask[source], self.offsets)
            starts.append(position)
            position += piece.length
        return Pack(
            tokens=tokens,
            targets=targets,
            starts=torch.tensor(starts),
            lengths=torch.tensor([piece.length for piece in pieces]),
        )


class JoinedPacks(ConcatDataset[Pack]):
    """The packs of several datasets of one pack length, numbered through."""

    def __init__(self, parts: Sequence[PackedDataset]) -> None:
        super().__init__(parts)
        self.parts = tuple(parts)
        self.sizes = tuple(len(part) for part in parts)
        self.pack_length = parts[0].pack_length
        assert all(part.pack_length == self.pack_length for part in parts)


def _pieces(lengths: Iterable[int], pack_length: int) -> list[_Piece]:
    pieces, start = [], 0
    for length in lengths:
        end = start + length
        pieces += [_Piece(at, min(pack_length, end - at)) for at in range(start, end, pack_length)]
        start = end
    return pieces


def _pack(pieces: list[_Piece], pack_length: int, seed: int) -> list[tuple[_Piece, ...]]:
    random.Random(seed).shuffle(pieces)
    packs: list[tuple[_Piece, ...]] = []
    pack: list[_Piece] = []
    used = 0
    for begin in range(0, len(pieces), _WINDOW):
        # Neighbours of the same length stay in shuffled order: the sort is stable.
        for piece in sorted(pieces[begin : begin + _WINDOW], key=lambda piece: piece.length):
            if used + piece.length > pack_length:
                packs.append(tuple(pack))
                pack, used = [], 0
            pack.append(piece)
            used += piece.length
    packs.append(tuple(pack))
    return packs
