"""The tokens that heads may draft: the most frequent ones of what the backbone says (FR-Spec, 2502.14856).

A quarter of the vocabulary costs a quarter of the projection and hardly any acceptance; the verified output does not
know of it. Letters: C hidden size, V vocabulary, V' tokens that can be drafted.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.kernels.cpu import PackedLinear
from gorgon_engine.models.linear import DenseLinear, Int8Linear
from gorgon_protocol.errors import TrainingError
from gorgon_trainer.mixture import ShardMixture
from gorgon_trainer.shards import ShardSet

T = TypeVar("T")


def draft_vocabulary(shards: ShardSet | ShardMixture, size: int | None) -> Tensor | None:
    """The `size` tokens most frequent in the training answers, ascending ids [V'] int64; None = all tokens.

    Of equals the lower id, so that the same shards give the same tokens. Raises `TrainingError` for a size that is
    above the vocabulary's, or below 1.
    """
    if size is None:
        return None
    vocab_size = shards.index.vocab_size
    if not 1 <= size <= vocab_size:
        raise TrainingError(f"draft_vocab_size must be between 1 and the vocabulary's {vocab_size}: got {size}")
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    folders = shards.folders if isinstance(shards, ShardMixture) else (shards,)
    for batch in _batched(chain.from_iterable(folder.sequences("train") for folder in folders), 1024):
        said = torch.cat([sequence.tokens[sequence.loss_mask.bool()] for sequence in batch]).long()
        counts += torch.bincount(said, minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def lm_head_weight(backbone: Backbone, tokens: Tensor | None) -> Tensor:
    """The lm_head's rows [V', C] of the given tokens (None: of all), as the backbone multiplies with them."""
    chosen = torch.arange(backbone.config.vocab_size) if tokens is None else tokens
    linear = backbone.lm_head.select_outputs(chosen.to(backbone.device))
    if isinstance(linear, DenseLinear):
        return linear.weight
    if isinstance(linear, PackedLinear):
        return linear.dequantized()
    assert isinstance(linear, Int8Linear), type(linear)
    return linear.dequantize()


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
