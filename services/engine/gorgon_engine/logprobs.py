"""Log-probabilities of emitted tokens, from the backbone's own logits before any sampling parameter touched them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.acceptance import Acceptance
from gorgon_engine.backbone.base import RowLogits


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One emitted token's log-probability (natural log) and the likeliest alternatives, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def gather_logprobs(
    logits: RowLogits, accepted: Acceptance, num_alternatives: int, rows: Tensor | None = None
) -> dict[str, Tensor]:
    """Tensors for the read-back: `logprob` [B, E], `top_logprobs` and `top_ids` [B, E, num_alternatives].

    Place d of the path gave token d, so its logits are those of path node d. rows: [R] int64, of those who want them,
    None = all; the others' are zeros.
    """
    batch = accepted.path.shape[0]
    index = torch.arange(batch, device=accepted.path.device) if rows is None else rows
    log_probs = torch.log_softmax(logits.at(index[:, None], accepted.path[index]).float(), dim=2)  # [R, E, V]
    chosen = log_probs.gather(2, accepted.tokens[index][:, :, None])[:, :, 0]
    values, ids = log_probs.topk(num_alternatives, dim=2)
    gathered = {"logprob": chosen, "top_logprobs": values, "top_ids": ids}
    if rows is None:
        return gathered
    return {
        name: part.new_zeros((batch, *part.shape[1:])).index_copy_(0, rows, part) for name, part in gathered.items()
    }


def token_logprobs(read: dict[str, Tensor], row: int, tokens: list[int]) -> list[TokenLogprobs]:
    """The read-back tensors of one sequence as a list, a place an emitted token."""
    return [
        TokenLogprobs(
            token=token,
            logprob=float(read["logprob"][row, place]),
            top=[
                (int(i), float(v))
                for i, v in zip(read["top_ids"][row, place], read["top_logprobs"][row, place], strict=True)
            ],
        )
        for place, token in enumerate(tokens)
    ]
