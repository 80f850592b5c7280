"""Inputs for the checks of the step's kernels, random and adversarial."""

import torch
from torch import Tensor

from gorgon_engine.tree.candidates import CandidateTree


def random_forest(
    batch: int, count: int, *, vocab_size: int, generator: torch.Generator, device: str = "cpu"
) -> CandidateTree:
    """Candidates, parents first, with many equal paths (a small vocabulary), ties and padding, NaN among it."""
    parents, log_probs = torch.full((batch, count), -1), torch.zeros(batch, count)
    dice = torch.rand(3, batch, count, generator=generator)
    for b in range(batch):
        for m in range(count):
            parents[b, m] = int(torch.randint(-1, m, (), generator=generator)) if m else -1
            above = log_probs[b, parents[b, m]] if parents[b, m] >= 0 else 0.0
            # Few different values: equal ones decide nothing but must decide it alike.
            log_probs[b, m] = above - int(3 * dice[0, b, m]) * 0.5
    log_probs[dice[1] < 0.1] = -torch.inf
    log_probs[dice[1] < 0.02] = torch.nan
    return CandidateTree(
        tokens=torch.randint(vocab_size, (batch, count), generator=generator).to(device),
        parents=parents.to(device),
        log_probs=log_probs.to(device),
        ranks=torch.randint(5, (batch, count), generator=generator).to(device),
        source="test",
    )


def closed_forest(forest: CandidateTree) -> CandidateTree:
    """The same where what hangs below padding is padding: what drafters promise, and a layout relies on."""
    log_probs = forest.log_probs.clone().nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    for node in range(log_probs.shape[1]):
        parent = forest.parents[:, node]
        above = log_probs.gather(1, parent.clamp(min=0)[:, None])[:, 0]
        log_probs[(parent >= 0) & (above == -torch.inf), node] = -torch.inf
    return CandidateTree(forest.tokens, forest.parents, log_probs, forest.ranks, source=forest.source)


def random_parents(batch: int, num_nodes: int, *, generator: torch.Generator) -> Tensor:
    """[B, N] parents of breadth-first trees: chains, bushes and what lies between."""
    parents = torch.full((batch, num_nodes), -1)
    for b in range(batch):
        reach = [1, 3, num_nodes][b % 3]
        for node in range(1, num_nodes):
            parents[b, node] = int(torch.randint(max(0, node - reach), node, (), generator=generator))
    return parents


def assert_same(got: object, want: object, names: tuple[str, ...]) -> None:
    """Equal to the bit, in every one of these fields."""
    for name in names:
        ours, theirs = getattr(got, name), getattr(want, name)
        same = torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
        assert same, f"{name}:\n{ours}\nnot\n{theirs}"
