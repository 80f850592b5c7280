"""Log-probabilities of emitted tokens, from the backbone's own logits before any sampling parameter touched them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.acceptance import Acceptance


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One emitted token's log-probability (natural log) and the likeliest alternatives, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def gather_logprobs(logits: Tensor, accepted: Acceptance, num_alternatives: int) -> dict[str, Tensor]:
    """Tensors for the read-back: `logprob` [B, E], `top_logprobs` and `top_ids` [B, E, num_alternatives].

    logits: [B, N, V]. Place d of the path gave token d, so its logits are those of path node d.
    """
    rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
    log_probs = torch.log_softmax(logits[rows, accepted.path].float(), dim=2)  # [B, E, V]
    chosen = log_probs.gather(2, accepted.tokens[:, :, None])[:, :, 0]
    values, ids = log_probs.topk(num_alternatives, dim=2)
    return {"logprob": chosen, "top_logprobs": values, "top_ids": ids}


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
