"""The interface of a backbone: one forward pass over rows that extend sequences in the KV cache.

Letters in shape comments: B sequences in the batch, N rows (tree nodes or prompt tokens) a sequence, W 64-bit words a
node, C hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.linear import Linear


class LogitsFor(StrEnum):
    """Which rows of a forward pass need logits: the lm_head is a fifth of a small model's work."""

    ALL = "all"
    LAST = "last"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """Rows to run. Row n of sequence b is written to KV position `lengths[b] + n` of its slot.

    With `ancestors` the rows are a tree behind the committed prefix: row n attends to the prefix and to the rows whose
    bits are set in its words (itself included), and its position is `lengths[b] + depths[b, n]`. Without, the rows are
    a causal chain: row n attends to the prefix and to rows 0..n, and `depths` counts 0..N-1.
    """

    tokens: Tensor  # [B, N] int64
    depths: Tensor  # [B, N] int64
    slots: Tensor  # [B] int64, each at most once
    lengths: Tensor  # [B] int64, committed positions
    num_rows: Tensor  # [B] int64: rows past it are padding, their results undefined
    prompt_lengths: Tensor  # [B] int64: RoPE types that depend on the sequence length count the whole prompt
    max_positions: int  # host-side upper bound of lengths + N: how much of the cache has to be looked at
    ancestors: Tensor | None = None  # [B, N, W] int64

    @property
    def positions(self) -> Tensor:
        return self.lengths[:, None] + self.depths  # [B, N]

    @classmethod
    def chain(cls, tokens: Tensor, *, slot: int, length: int, prompt_length: int) -> "ForwardInputs":
        """A prefill chunk of one sequence: tokens [N] behind `length` committed positions."""
        device = tokens.device
        return cls(
            tokens=tokens[None],
            depths=torch.arange(tokens.shape[0], device=device)[None],
            slots=torch.tensor([slot], device=device),
            lengths=torch.tensor([length], device=device),
            num_rows=torch.tensor([tokens.shape[0]], device=device),
            prompt_lengths=torch.tensor([prompt_length], device=device),
            max_positions=length + tokens.shape[0],
        )


@dataclass(frozen=True, slots=True)
class RowLogits:
    """The logits of some rows of each sequence, without padding between them: a vocabulary is too long to copy."""

    flat: Tensor  # [M, V]: sequence by sequence
    starts: Tensor  # [B] int64: place of each sequence's first row
    width: int  # N, the most rows of a sequence

    @classmethod
    def of(cls, logits: Tensor) -> "RowLogits":
        """Of as many rows for every sequence: [B, N, V]."""
        batch, width, vocab_size = logits.shape
        starts = torch.arange(batch, device=logits.device) * width
        return cls(logits.reshape(batch * width, vocab_size), starts, width)

    def places(self, sequences: Tensor, rows: Tensor) -> Tensor:
        """Where the given rows of the given sequences lie in `flat`; somewhere in it for rows that are padding."""
        return (self.starts[sequences] + rows).clamp(max=max(self.flat.shape[0] - 1, 0))

    def at(self, sequences: Tensor, rows: Tensor) -> Tensor:
        """A copy [..., V] of the given rows [...] of the given sequences [...]."""
        return self.flat[self.places(sequences, rows)]

    def first(self) -> Tensor:
        """Each sequence's first row [B, V]; no copy where it is the only one."""
        return self.flat if self.width == 1 else self.flat[self.starts]

    def padded(self) -> Tensor:
        """[B, N, V]; undefined in rows that are padding."""
        batch = self.starts.shape[0]
        if self.flat.shape[0] == batch * self.width:
            return self.flat.view(batch, self.width, self.flat.shape[1])
        rows = torch.arange(self.width, device=self.starts.device).expand(batch, -1)
        return self.flat[self.places(torch.arange(batch, device=self.starts.device)[:, None], rows)]


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    hidden: Tensor  # [B, N, C] after the final norm: what the draft heads read
    row_logits: RowLogits  # of the rows that `logits_for` asked for

    @property
    def logits(self) -> Tensor:
        """[B, N or 1 or 0, V], undefined in rows that are padding."""
        return self.row_logits.padded()


def rows_for_logits(hidden: Tensor, inputs: ForwardInputs, logits_for: LogitsFor) -> Tensor:
    """Of hidden [B, N, C] the rows whose logits are wanted: [B, N or 1 or 0, C]."""
    if logits_for is LogitsFor.ALL:
        return hidden
    if logits_for is LogitsFor.NONE:
        return hidden[:, :0]
    last = (inputs.num_rows - 1)[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, last)


class Backbone(Protocol):
    """A loaded model on one device. Does not move the cache's lengths: only writes rows behind them."""

    @property
    def config(self) -> BackboneConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def cache_dtype(self) -> torch.dtype: ...

    @property
    def kernels(self) -> str:
        """The path in use, for people and metrics: `native-int8`, `torch-bfloat16`, ..."""
        ...

    @property
    def row_invariant(self) -> bool:
        """Whether a row's bits are the same whatever the other rows: then speculation is exact by construction."""
        ...

    def project(self, hidden: Tensor) -> Tensor:
        """The lm_head: hidden [..., C] (after the final norm) -> logits [..., V]. Draft heads may share it."""
        ...

    def project_to(self, tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` to some tokens [V'] int64 alone: hidden [..., C] -> logits [..., V']. Copies the lm_head's rows."""
        ...

    @property
    def lm_head(self) -> Linear:
        """The matrix behind `project`."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings: tokens [...] int64 -> [..., C]."""
        ...

    def forward(
        self, inputs: ForwardInputs, cache: KVCache, *, logits_for: LogitsFor = LogitsFor.ALL
    ) -> ForwardOutput: ...
