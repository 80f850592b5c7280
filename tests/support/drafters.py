"""Drafters that no product needs: random, always wrong, always right. Drafts must never change the output."""

from dataclasses import dataclass, field

import torch

from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.tree.candidates import CandidateTree


def forest(tokens: torch.Tensor, parents: torch.Tensor, log_probs: torch.Tensor, source: str) -> CandidateTree:
    return CandidateTree(tokens, parents, log_probs, torch.zeros_like(tokens), source=source)


@dataclass
class RandomDrafter:
    """Random tokens in random shapes, siblings and whole branches repeated now and then."""

    vocab_size: int
    seed: int = 0
    name: str = "random"
    is_costly: bool = False
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        batch = context.root_tokens.shape[0]
        tokens = torch.randint(self.vocab_size, (batch, max_nodes), generator=self.generator)
        # Half of the tokens come from the history: some of them will be accepted.
        seen = torch.rand((batch, max_nodes), generator=self.generator)
        picks = (seen * context.history_lengths[:, None]).long()
        use = torch.rand((batch, max_nodes), generator=self.generator) < 0.5
        tokens = torch.where(use, context.history.gather(1, picks), tokens)
        above = torch.rand((batch, max_nodes), generator=self.generator) * torch.arange(max_nodes)
        parents = above.long() - 1
        log_probs = -torch.arange(1, max_nodes + 1).float().expand(batch, -1) / 10
        return forest(tokens, parents, log_probs, self.name)


@dataclass
class OracleDrafter:
    """Knows each sequence's future, keyed by its prompt: a chain that is always right."""

    futures: dict[tuple[int, ...], list[int]]
    name: str = "oracle"
    is_costly: bool = False

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        rows = []
        for history, length in zip(context.history.tolist(), context.history_lengths.tolist(), strict=True):
            rows.append(self._continuation(history[:length], max_nodes))
        tokens = torch.tensor(rows)
        parents = torch.arange(max_nodes).expand_as(tokens) - 1
        log_probs = torch.where(tokens < 0, -torch.inf, -0.01 * torch.arange(1, max_nodes + 1))
        return forest(tokens.clamp(min=0), parents, log_probs, self.name)

    def _continuation(self, history: list[int], count: int) -> list[int]:
        for prompt, future in self.futures.items():
            if tuple(history[: len(prompt)]) == prompt:
                said = len(history) - len(prompt)
                guess = future[said : said + count]
                return guess + [-1] * (count - len(guess))
        raise AssertionError("a history that no prompt begins")


@dataclass
class WrongDrafter:
    """An oracle whose every token is off by one: nothing may ever be accepted."""

    oracle: OracleDrafter
    vocab_size: int
    name: str = "wrong"
    is_costly: bool = False

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        right = self.oracle.propose(context, max_nodes)
        return forest((right.tokens + 1) % self.vocab_size, right.parents, right.log_probs, self.name)
