"""The KV cache: a flat strip of positions per slot, the only place that knows where a (slot, position) lives.

Committed positions come first; the rows of the step in flight are scratch right behind them. Accepting a branch slices
the cache: the branch's rows move down to the positions that their depths name, everything behind is overwritten by the
next step. Only this class moves the lengths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.kernels import dispatch
from gorgon_protocol.errors import CapacityError


@dataclass(frozen=True, slots=True)
class NextRoots:
    """What the next step starts from."""

    tokens: Tensor  # [B] int64: emitted, not yet in the cache
    hidden: Tensor  # [B, C]: the hidden states that predicted them


class KVCache:
    """Keys and values of `num_slots` sequences of up to `capacity` committed positions each.

    Letters: L layers, S slots, G KV heads, P positions (capacity + scratch), D head dimension.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        max_scratch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.max_scratch = max_scratch
        shape = (num_layers, num_slots, num_kv_heads, capacity + max_scratch, head_dim)
        # Zeros, not empty: masked attention multiplies stale rows by zero, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [L, S, G, P, D]
        self.values = torch.zeros(shape, dtype=dtype, device=device)  # [L, S, G, P, D]
        self.lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)  # [S]
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_slots(self) -> int:
        return self.keys.shape[1]

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    @property
    def num_positions(self) -> int:
        """Of a slot, scratch included."""
        return self.keys.shape[3]

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def acquire(self) -> int:
        """Take a free slot, its length zero. Raises `CapacityError` when every slot is taken."""
        if not self._free:
            raise CapacityError(f"all {self.num_slots} KV cache slots are in use: wait, or start with more slots")
        slot = self._free.pop()
        self.lengths[slot] = 0
        return slot

    def empty(self, slot: int) -> None:
        """Forget what is committed in a slot, in the device's order."""
        self.lengths[slot].zero_()

    def release(self, slot: int) -> None:
        assert slot not in self._free, f"slot {slot} released twice"
        self._free.append(slot)

    def write(self, layer: int, slots: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put rows behind the committed length of their slots. keys, values: [B, N, G, D]; slots, lengths: [B]."""
        position = lengths[:, None] + torch.arange(keys.shape[1], device=lengths.device)  # [B, N]
        index = slots[:, None]
        # [B, 1] and [B, N] over dims 0 and 2 put [B, N] first, which is how the rows come.
        self.keys[layer][index, :, position] = keys.to(self.keys.dtype)
        self.values[layer][index, :, position] = values.to(self.values.dtype)

    def append(self, slots: int | Tensor, num_rows: int | Tensor) -> None:
        """Commit the first `num_rows` scratch rows of a slot, or of each of several different ones, in place."""
        self.lengths[slots] += num_rows

    def commit(self, slots: Tensor, path: Tensor, num_committed: Tensor) -> None:
        """Keep one branch of each sequence's tree and drop the rest.

        slots: [B]; path: [B, E] node indices along the branch, root first, `path[b, d] >= d`; entries past
        `num_committed[b]` may be anything in range. num_committed: [B] nodes to keep, root included.
        Static-shaped on a GPU: one launch, or without Triton all E rows are moved, those past `num_committed` into
        scratch, to be overwritten.
        """
        lengths = self.lengths[slots]  # [B]
        if dispatch.uses_triton(path):
            from gorgon_engine.kernels.triton.kv_commit import kv_commit

            where = {"slots": slots, "starts": lengths, "path": path, "num_committed": num_committed}
            kv_commit(self.keys, self.values, self.lengths, **where)
            return
        depth = torch.arange(path.shape[1], device=path.device)
        source = lengths[:, None] + path  # [B, E]
        target = lengths[:, None] + depth  # [B, E]
        if path.device.type == "cpu":
            # Where values are at hand only what moves is copied: nothing in a plain step, little along a chain.
            row, place = ((path != depth) & (depth < num_committed[:, None])).nonzero(as_tuple=True)
            self._move(slots[row], source[row, place], target[row, place])
        else:
            self._move(slots[:, None], source, target)
        self.lengths[slots] = lengths + num_committed

    def commit_step(
        self, slots: Tensor, path: Tensor, num_committed: Tensor, *, tokens: Tensor, history: Tensor, hidden: Tensor
    ) -> NextRoots:
        """`commit`, and what goes with it: the history gets the emitted tokens, the last of them is the next root.

        tokens: [B, E] int64, entries past `num_committed` in range; history: [S, P + 1] int64, changed in place: a
        root stands where its row of the cache will be; hidden: [B, N, C] of the nodes. One launch on a GPU.
        """
        lengths = self.lengths[slots]  # [B]
        if dispatch.uses_triton(path):
            from gorgon_engine.kernels.triton.kv_commit import kv_commit_step

            after = kv_commit_step(
                self.keys, self.values, self.lengths, slots=slots, starts=lengths, path=path,
                num_committed=num_committed, tokens=tokens, history=history, hidden=hidden,
            )  # fmt: skip
            return NextRoots(after.root_tokens, after.hidden)
        self.commit(slots, path, num_committed)
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        history[slots[:, None], lengths[:, None] + places] = tokens
        rows, last = torch.arange(slots.shape[0], device=slots.device), num_committed - 1
        return NextRoots(tokens[rows, last], hidden[rows, path[rows, last]])

    def _move(self, slots: Tensor, source: Tensor, target: Tensor) -> None:
        if slots.numel() == 0:
            return
        # Index tensors over dims 1 and 3 put their own dimensions first: gather to a new tensor, then scatter, so that
        # an overlapping source and target cannot corrupt each other.
        self.keys[:, slots, :, target] = self.keys[:, slots, :, source]
        self.values[:, slots, :, target] = self.values[:, slots, :, source]
