"""One depth of the search for likely paths: of all that the beam's paths propose the likeliest, and the next beam.

    score[b, w M + m] = value[b, w] + log_prob[b, w, m]           sorted descending, the lower column first among equals

The first `num_kept` are the depth's nodes; the first W' go on: which path each continues, its token, its value, its
place among all nodes, and the ancestor word that its row of the layer attends by. The same as `beam.likeliest_tree`
does in a dozen operations (EAGLE-2, 2406.16858, section 4). One program a sequence: a candidate's place is the number
of candidates before it, so nothing is sorted.

Letters: B sequences, W paths, M choices a path, T nodes of all depths, W' paths of the next depth.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_J = tl.constexpr(32)


@dataclass(frozen=True, slots=True)
class FoundNodes:
    """The nodes of all depths, depth by depth, each depth's likeliest first."""

    tokens: Tensor  # [B, T] int64
    parents: Tensor  # [B, T] int64, index into the nodes, -1 = the root
    log_probs: Tensor  # [B, T] float32, of the path
    ranks: Tensor  # [B, T] int64

    @classmethod
    def empty(cls, batch: int, num_nodes: int, device: torch.device) -> "FoundNodes":
        def made(dtype: torch.dtype) -> Tensor:
            return torch.empty((batch, num_nodes), dtype=dtype, device=device)

        return cls(made(torch.int64), made(torch.int64), made(torch.float32), made(torch.int64))


@dataclass(frozen=True, slots=True)
class BeamPaths:
    """W paths of every sequence."""

    rows: Tensor  # [B W] int64: the row of the depth above that each continues
    tokens: Tensor  # [B W] int64: what it continues it with
    values: Tensor  # [B, W] float32, log-probability of the path
    index: Tensor  # [B, W] int64: its place among all nodes
    words: Tensor  # [B, W, 1] int64: its row and those of its ancestors, by `first_bit` and so on

    @classmethod
    def empty(cls, batch: int, width: int, device: torch.device) -> "BeamPaths":
        def made(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64, device=device)

        values = torch.empty((batch, width), dtype=torch.float32, device=device)
        return cls(made(batch * width), made(batch * width), values, made(batch, width), made(batch, width, 1))


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    log_probs_ptr, values_ptr, lane, sequence, num_paths, num_choices, IS_FIRST: tl.constexpr
):
    inside = lane < num_paths * num_choices
    at = sequence * num_paths * num_choices + lane
    score = tl.load(log_probs_ptr + at, mask=inside, other=float("-inf"))
    if not IS_FIRST:
        score += tl.load(values_ptr + sequence * num_paths + lane // num_choices, mask=inside, other=0.0)
    return score


@triton.jit(do_not_specialize=["num_paths", "num_choices", "num_kept", "width", "first_node", "num_nodes", "first_bit"])
def _eagle_beam_kernel(  # type: ignore[no-untyped-def]
    log_probs_ptr, choices_ptr, vocabulary_ptr, values_ptr, index_ptr, words_ptr,
    node_tokens_ptr, node_parents_ptr, node_log_probs_ptr, node_ranks_ptr,
    next_rows_ptr, next_tokens_ptr, next_values_ptr, next_index_ptr, next_words_ptr,
    num_paths, num_choices, num_kept, width, first_node, num_nodes, first_bit,
    IS_FIRST: tl.constexpr, HAS_VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    count = num_paths * num_choices
    score = _scores(log_probs_ptr, values_ptr, lane, sequence, num_paths, num_choices, IS_FIRST)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, _BLOCK_J):
        other_lane = start + tl.arange(0, _BLOCK_J)
        other = _scores(log_probs_ptr, values_ptr, other_lane, sequence, num_paths, num_choices, IS_FIRST)
        is_tie_before = (other[None, :] == score[:, None]) & (other_lane[None, :] < lane[:, None])
        before = ((other[None, :] > score[:, None]) | is_tie_before) & (other_lane < count)[None, :]
        place += tl.sum(before.to(tl.int32), 1)
    inside = lane < count
    path = lane // num_choices
    token = tl.load(choices_ptr + sequence * count + lane, mask=inside, other=0)
    if HAS_VOCABULARY:
        token = tl.load(vocabulary_ptr + token, mask=inside, other=0)
    if IS_FIRST:
        parent = tl.full([BLOCK], -1, tl.int64)
        word = tl.zeros([BLOCK], tl.int64)
    else:
        parent = tl.load(index_ptr + sequence * num_paths + path, mask=inside, other=-1)
        word = tl.load(words_ptr + sequence * num_paths + path, mask=inside, other=0)

    kept = inside & (place < num_kept)
    at = sequence * num_nodes + first_node + place
    tl.store(node_tokens_ptr + at, token, mask=kept)
    tl.store(node_parents_ptr + at, parent, mask=kept)
    tl.store(node_log_probs_ptr + at, score, mask=kept)
    tl.store(node_ranks_ptr + at, (lane % num_choices).to(tl.int64), mask=kept)

    goes_on = inside & (place < width)
    at = sequence * width + place
    tl.store(next_rows_ptr + at, sequence * num_paths + path, mask=goes_on)
    tl.store(next_tokens_ptr + at, token, mask=goes_on)
    tl.store(next_values_ptr + at, score, mask=goes_on)
    tl.store(next_index_ptr + at, (first_node + place).to(tl.int64), mask=goes_on)
    bit = (first_bit + place).to(tl.int64)
    tl.store(next_words_ptr + at, word | (tl.full([BLOCK], 1, tl.int64) << bit), mask=goes_on)


def eagle_beam(
    log_probs: Tensor, choices: Tensor, above: BeamPaths | None, found: FoundNodes, *,
    vocabulary: Tensor | None, first_node: int, num_kept: int, width: int, first_bit: int,
) -> BeamPaths:  # fmt: skip
    """log_probs: [B, W, M] float32 and choices: [B, W, M] int64, rows of `vocabulary` ([V] int64, the token of each;
    None = the token itself); above: the paths that they continue, None = the empty ones, W = 1.

    Writes nodes first_node .. first_node + num_kept - 1 of `found`, and gives the `width` paths of the next depth
    (num_kept >= width, possibly 0), whose rows are bits first_bit, ... (below 64) of ancestor words. Contiguous.
    """
    batch, num_paths, num_choices = log_probs.shape
    assert choices.shape == log_probs.shape, (choices.shape, log_probs.shape)
    assert (log_probs.dtype, choices.dtype) == (torch.float32, torch.int64), (log_probs.dtype, choices.dtype)
    assert width <= num_kept <= num_paths * num_choices, (width, num_kept, log_probs.shape)
    assert first_node + num_kept <= found.tokens.shape[1], (first_node, num_kept, found.tokens.shape)
    assert first_bit + width <= 64, (first_bit, width)
    assert above is not None or num_paths == 1, log_probs.shape
    assert above is None or above.values.shape == (batch, num_paths), (above.values.shape, log_probs.shape)
    for tensor in (log_probs, choices, *(() if vocabulary is None else (vocabulary,))):
        assert tensor.is_contiguous(), tensor.stride()
    following = BeamPaths.empty(batch, width, log_probs.device)
    given = following if above is None else above
    _eagle_beam_kernel[(batch,)](
        log_probs, choices, choices if vocabulary is None else vocabulary, given.values, given.index, given.words,
        found.tokens, found.parents, found.log_probs, found.ranks,
        following.rows, following.tokens, following.values, following.index, following.words,
        num_paths, num_choices, num_kept, width, first_node, found.tokens.shape[1], first_bit,
        IS_FIRST=above is None, HAS_VOCABULARY=vocabulary is not None,
        BLOCK=triton.next_power_of_2(num_paths * num_choices), num_warps=4,
    )  # fmt: skip
    return following


def reference(
    log_probs: Tensor, choices: Tensor, above: BeamPaths | None, found: FoundNodes, *,
    vocabulary: Tensor | None, first_node: int, num_kept: int, width: int, first_bit: int,
) -> BeamPaths:  # fmt: skip
    """The same in torch operations."""
    batch, num_paths, num_choices = log_probs.shape
    scores = log_probs if above is None else log_probs + above.values[:, :, None]
    kept, picked = (part[:, :num_kept] for part in scores.flatten(1).sort(dim=1, descending=True, stable=True))
    path = picked // num_choices
    tokens = choices.flatten(1).gather(1, picked)
    tokens = tokens if vocabulary is None else vocabulary[tokens]
    here = slice(first_node, first_node + num_kept)
    found.tokens[:, here], found.log_probs[:, here], found.ranks[:, here] = tokens, kept, picked % num_choices
    found.parents[:, here] = -1 if above is None else above.index.gather(1, path)
    rows = torch.arange(batch, device=path.device)[:, None] * num_paths + path[:, :width]
    number = torch.arange(width, device=path.device)
    words = torch.ones_like(number).expand(batch, -1) << (first_bit + number)
    if above is not None:
        words = words | above.words[:, :, 0].gather(1, path[:, :width])
    index = (first_node + number).expand(batch, -1)
    return BeamPaths(rows.flatten(), tokens[:, :width].flatten(), kept[:, :width], index, words[:, :, None])
