"""Prompts where recorded passes find them: in memory that stays where it is.

A pass over a prompt is a few hundred launches for some milliseconds of work: launched one by one, it is the host that
takes the time. So passes of up to `MAX_ROWS` rows are recorded like steps, by sizes that they are filled up to.

Letters: B prompts, N rows of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gorgon_engine.backbone.base import ForwardInputs
from gorgon_engine.buckets import PROMPT_WIDTHS, Buckets, prompt_width
from gorgon_engine.step import PrefillChunk

MAX_ROWS = PROMPT_WIDTHS[-1]  # of a pass; more of them keep a device busy for longer than launching takes
_NUM_COUNTS = 4  # numbers of a prompt in front of its tokens


@dataclass(frozen=True, slots=True)
class PromptSize:
    """What a recording of a pass is made for."""

    batch: int
    width: int
    length: int  # bound of the positions
    ends: bool  # logits for the last row of each

    @classmethod
    def of(cls, chunks: Sequence[PrefillChunk], buckets: Buckets, num_positions: int) -> "PromptSize | None":
        """None where the pass is too large to be recorded, or filled up would leave a slot. num_positions: of a
        slot."""
        batch, widest = len(chunks), max(chunk.stop - chunk.start for chunk in chunks)
        if batch > buckets.batches[-1] or widest > MAX_ROWS:
            return None
        batch, width = buckets.batch(batch), prompt_width(widest)
        longest = max(chunk.start for chunk in chunks) + width
        if batch * width > MAX_ROWS or longest > num_positions:
            return None
        ends = any(chunk.is_last for chunk in chunks)
        return cls(batch=batch, width=width, length=buckets.length(longest), ends=ends)


class PromptBuffers:
    """The inputs of passes of one size."""

    def __init__(self, size: PromptSize, spare_slot: int | None, device: torch.device) -> None:
        """spare_slot: of the rows that no sequence has; needed where there is more than one."""
        assert size.batch == 1 or spare_slot is not None
        self._size = size
        self._spare = [spare_slot or 0, 0, 1, 1, *[0] * size.width]
        self._values = torch.zeros((size.batch, _NUM_COUNTS + size.width), dtype=torch.int64, device=device)
        self._depths = torch.arange(size.width, device=device).repeat(size.batch, 1)

    def load(self, chunks: Sequence[PrefillChunk]) -> None:
        """In one transfer."""
        size = self._size
        rows = []
        for chunk in chunks:
            tokens = chunk.tokens[chunk.start : chunk.stop]
            rows.append([chunk.slot, chunk.start, len(tokens), chunk.prompt_length, *tokens,
                         *[0] * (size.width - len(tokens))])  # fmt: skip
        rows += [self._spare] * (size.batch - len(rows))
        values = torch.tensor(rows, dtype=torch.int64, pin_memory=self._values.is_cuda)
        self._values.copy_(values, non_blocking=True)

    def inputs(self) -> ForwardInputs:
        """As recordings see them."""
        slots, starts, counts, prompt_lengths = self._values[:, :_NUM_COUNTS].T.contiguous()
        return ForwardInputs(
            tokens=self._values[:, _NUM_COUNTS:].contiguous(),
            depths=self._depths,
            slots=slots,
            lengths=starts,
            num_rows=counts,
            prompt_lengths=prompt_lengths,
            max_positions=self._size.length,
        )
