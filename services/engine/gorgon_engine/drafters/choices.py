"""The likeliest tokens of a distribution over a vocabulary, which every drafter of trained heads asks for.

Letters: leading dimensions ..., V vocabulary, M choices.
"""

import torch
from torch import Tensor

from gorgon_engine.kernels import dispatch
from gorgon_engine.kernels.cpu.drafting import top_log_probs as native_top_log_probs

_BLOCK = 64


def top_log_probs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest (or all) tokens of logits [..., V]: log-probabilities float32 and ids int64, [..., M].

    Descending. Normalised over all of V, whatever is chosen.
    """
    count = min(count, logits.shape[-1])
    rows = logits.reshape(-1, logits.shape[-1])
    if (found := _in_two_launches(rows, count)) is not None:
        best, places = found
    elif logits.device.type == "cpu":
        best, places = native_top_log_probs(rows.float().contiguous(), count)
    else:
        best, places = top(torch.log_softmax(rows.float(), dim=1), count)
    shape = (*logits.shape[:-1], best.shape[1])
    return best.view(shape), places.view(shape)


def _in_two_launches(rows: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """On a GPU, of logits [R, V]; None elsewhere, and for more choices than the kernels hold."""
    if not dispatch.uses_triton(rows):
        return None
    from gorgon_engine.kernels.triton.top_log_probs import can_choose
    from gorgon_engine.kernels.triton.top_log_probs import top_log_probs as triton_top_log_probs

    if not can_choose(rows, count):
        return None
    return triton_top_log_probs(rows if rows.stride(1) == 1 else rows.contiguous(), count)


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest (or all) of values [R, V] and their places, both [R, M], descending.

    As `topk`, four times as fast over a vocabulary: the M largest lie in the M blocks with the largest maxima.
    """
    vocab_size = values.shape[1]
    count = min(count, vocab_size)
    if vocab_size % _BLOCK or count > vocab_size // _BLOCK:
        best, places = values.topk(count, dim=1)
        return best, places
    blocks = values.unflatten(1, (-1, _BLOCK))
    chosen = blocks.amax(dim=2).topk(count, dim=1).indices  # [R, M]
    near = blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).flatten(1)  # [R, M * block]
    best, places = near.topk(count, dim=1)
    return best, chosen.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK
