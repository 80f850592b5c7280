"""Keep the accepted branch of every tree, in all layers, in one launch: slice the cache, write the history, pick the
next root.

    keys, values[:, slot, :, start + d] = keys, values[:, slot, :, start + path[d]]     for d < num_committed
    history[slot, start + 1 + d]        = tokens[d]                                     for all E places
    lengths[slot]                       = start + num_committed
    root  = tokens[num_committed - 1],   hidden' = hidden[path[num_committed - 1]]

One program a (sequence, layer, KV head): it alone touches that strip of the cache, so the moves, which overlap, need no
copy elsewhere: all its rows are read before the first is written, a barrier between. (Rows moved one after another,
ascending, would do too: a path is strictly ascending and `path[d] >= d`, so place d, once written, is nobody's source
any more.) Where nothing moves, as in plain decoding, nothing is read or written. Every program reads where the branch
starts from `starts`, a copy: `lengths` itself changes under them.

Further programs a sequence, behind those, copy the hidden state piece by piece; the first of them does the rest.

Letters: B sequences, E places of a path, L layers, S slots, G KV heads, P positions of a slot, D head dimension,
C hidden size, N nodes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECE = 1024  # of a hidden state


class NextRoots(NamedTuple):
    """What the next step starts from."""

    root_tokens: Tensor  # [B] int64
    hidden: Tensor  # [B, C]


@triton.jit(do_not_specialize=["num_slots", "num_positions", "num_nodes", "history_stride"])
def _kv_commit_kernel(  # type: ignore[no-untyped-def]
    keys_ptr, values_ptr, slots_ptr, starts_ptr, path_ptr, num_committed_ptr, lengths_ptr,
    tokens_ptr, history_ptr, hidden_ptr, root_tokens_ptr, out_hidden_ptr,
    num_slots, num_positions, num_nodes, history_stride,
    NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    NUM_PLACES: tl.constexpr, PLACES: tl.constexpr, HIDDEN_SIZE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    start = tl.load(starts_ptr + row)
    num_committed = tl.load(num_committed_ptr + row)
    place = tl.arange(0, PLACES)
    if strip < NUM_LAYERS * NUM_KV_HEADS:
        path = tl.load(path_ptr + row * NUM_PLACES + place, mask=place < NUM_PLACES, other=0)
        moves = (place < NUM_PLACES) & (place < num_committed) & (path != place)
        if tl.max(moves.to(tl.int32), 0) > 0:
            layer = strip // NUM_KV_HEADS
            head = strip % NUM_KV_HEADS
            first = ((layer * num_slots + slot) * NUM_KV_HEADS + head) * num_positions
            dims = tl.arange(0, DIMS)
            mask = moves[:, None] & (dims < HEAD_DIM)[None, :]
            source = (first + start + path)[:, None] * HEAD_DIM + dims[None, :]
            target = (first + start + place)[:, None] * HEAD_DIM + dims[None, :]
            keys = tl.load(keys_ptr + source, mask=mask, other=0.0)
            values = tl.load(values_ptr + source, mask=mask, other=0.0)
            tl.debug_barrier()
            tl.store(keys_ptr + target, keys, mask=mask)
            tl.store(values_ptr + target, values, mask=mask)
    else:
        piece = strip - NUM_LAYERS * NUM_KV_HEADS
        if piece == 0:
            tl.store(lengths_ptr + slot, start + num_committed)
        if HIDDEN_SIZE > 0:
            if piece == 0:
                inside = place < NUM_PLACES
                token = tl.load(tokens_ptr + row * NUM_PLACES + place, mask=inside, other=0)
                tl.store(history_ptr + slot * history_stride + start + 1 + place, token, mask=inside)
                tl.store(root_tokens_ptr + row, tl.load(tokens_ptr + row * NUM_PLACES + num_committed - 1))
            dims = piece * PIECE + tl.arange(0, PIECE)
            inside = dims < HIDDEN_SIZE
            node = tl.load(path_ptr + row * NUM_PLACES + num_committed - 1)
            hidden = tl.load(hidden_ptr + (row * num_nodes + node) * HIDDEN_SIZE + dims, mask=inside, other=0.0)
            tl.store(out_hidden_ptr + row * HIDDEN_SIZE + dims, hidden, mask=inside)


def kv_commit(
    keys: Tensor, values: Tensor, lengths: Tensor, *, slots: Tensor, starts: Tensor, path: Tensor, num_committed: Tensor
) -> None:
    """Slice the cache alone. keys, values: [L, S, G, P, D], changed in place, as lengths: [S] int64; slots: [B] int64,
    each at most once; starts: [B] int64, what `lengths` holds of them, in other memory; path: [B, E] int64,
    strictly ascending up to num_committed: [B] int64. All contiguous.
    """
    _launch(keys, values, lengths, slots, starts, path, num_committed)


def kv_commit_step(
    keys: Tensor, values: Tensor, lengths: Tensor, *,
    slots: Tensor, starts: Tensor, path: Tensor, num_committed: Tensor,
    tokens: Tensor, history: Tensor, hidden: Tensor,
) -> NextRoots:  # fmt: skip
    """As `kv_commit`, and all else that a commit changes. tokens: [B, E] int64; history: [S, more than P] int64, dense
    rows, changed in place; hidden: [B, N, C] of any floating dtype, contiguous.
    """
    batch, _, hidden_size = hidden.shape
    assert tokens.shape == path.shape, (tokens.shape, path.shape)
    assert tokens.dtype == history.dtype == torch.int64, (tokens.dtype, history.dtype)
    assert history.stride(1) == 1, history.stride()
    after = NextRoots(torch.empty_like(slots), hidden.new_empty(batch, hidden_size))
    _launch(
        keys, values, lengths, slots, starts, path, num_committed,
        rest=(tokens.contiguous(), history, hidden.contiguous(), *after),
    )  # fmt: skip
    return after


def _launch(
    keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor, starts: Tensor, path: Tensor, num_committed: Tensor,
    rest: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    num_layers, num_slots, num_kv_heads, num_positions, head_dim = keys.shape
    batch, num_places = path.shape
    assert keys.shape == values.shape, (keys.shape, values.shape)
    assert keys.is_contiguous(), keys.stride()
    assert values.is_contiguous(), values.stride()
    for tensor in (lengths, slots, starts, path, num_committed):
        assert tensor.dtype == torch.int64, tensor.dtype
    assert slots.shape == starts.shape == num_committed.shape == (batch,), (slots.shape, starts.shape)
    assert starts.data_ptr() != lengths.data_ptr(), "starts must be a copy"
    hidden_size = 0 if rest is None else rest[2].shape[2]
    grid = (num_layers * num_kv_heads + max(1, triton.cdiv(hidden_size, _PIECE)), batch)
    _kv_commit_kernel[grid](
        keys, values, slots.contiguous(), starts.contiguous(), path.contiguous(), num_committed.contiguous(), lengths,
        *(rest or (path, path, keys, slots, keys)),  # not touched
        num_slots, num_positions, 0 if rest is None else rest[2].shape[1], 0 if rest is None else rest[1].stride(0),
        NUM_LAYERS=num_layers, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, DIMS=triton.next_power_of_2(head_dim),
        NUM_PLACES=num_places, PLACES=triton.next_power_of_2(num_places), HIDDEN_SIZE=hidden_size, PIECE=_PIECE,
        num_warps=2,
    )  # fmt: skip


def reference(
    keys: Tensor, values: Tensor, lengths: Tensor, *,
    slots: Tensor, starts: Tensor, path: Tensor, num_committed: Tensor,
    tokens: Tensor, history: Tensor, hidden: Tensor,
) -> NextRoots:  # fmt: skip
    """`kv_commit_step` one row at a time, in plain loops."""
    after = NextRoots(torch.empty_like(slots), hidden.new_empty(slots.shape[0], hidden.shape[2]))
    old_keys, old_values = keys.clone(), values.clone()
    for b, slot in enumerate(slots.tolist()):
        start, count = int(starts[b]), int(num_committed[b])
        for d in range(count):
            source = start + int(path[b, d])
            keys[:, slot, :, start + d] = old_keys[:, slot, :, source]
            values[:, slot, :, start + d] = old_values[:, slot, :, source]
        history[slot, start + 1 : start + 1 + tokens.shape[1]] = tokens[b]
        lengths[slot] = start + count
        after.root_tokens[b] = tokens[b, count - 1]
        after.hidden[b] = hidden[b, path[b, count - 1]]
    return after
