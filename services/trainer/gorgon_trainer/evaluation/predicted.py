"""What head accuracies promise: the acceptance length of the best tree of a size, and that tree.

A path is accepted where every choice on it is right, so a tree emits 1 + the sum of its paths' probabilities a step
(Medusa, 2401.10774, section 2.3.3; OPT-Tree, 2406.17276, section 3). A path's probability is taken to be the product of
its heads' accuracies. For heads that see the drafted tokens the accuracies are measured with the true tokens above
given, which is what makes the product right for them; heads that see only the hidden state err together, and accept
more than it says.
"""

from collections.abc import Sequence

from gorgon_engine.tree.builders import RankPath, sparse_paths
from gorgon_protocol.errors import BadRequestError

REPORTED_NODES = (4, 8, 16, 32, 64)


def predicted_acceptance_length(accuracies: Sequence[Sequence[float]], num_nodes: int) -> float:
    """Tokens a step of the best tree of `num_nodes` rows, root included.

    accuracies: [depth][rank], of the heads of offsets 2, 3, ... alone (`HeadsManifest.tree_heads`): shares of held-out
    positions. Raises `BadRequestError` for what are no shares, and for less than one node.
    """
    return 1.0 + sum(_probability(path, accuracies) for path in recommended_tree(accuracies, num_nodes))


def predicted_acceptance_lengths(
    accuracies: Sequence[Sequence[float]], nodes: Sequence[int] = REPORTED_NODES
) -> dict[int, float]:
    """Number of nodes -> `predicted_acceptance_length`."""
    return {num_nodes: predicted_acceptance_length(accuracies, num_nodes) for num_nodes in nodes}


def recommended_tree(accuracies: Sequence[Sequence[float]], num_nodes: int = 64) -> list[RankPath]:
    """The rank paths of the best tree of `num_nodes` rows, root included: parents first, best first, as a manifest
    holds them. Fewer where there are no more paths that were ever right. Raises as `predicted_acceptance_length`.
    """
    if num_nodes < 1:
        raise BadRequestError(f"a tree has at least one node, its root: got num_nodes {num_nodes}")
    return sparse_paths(accuracies, num_nodes - 1) if num_nodes > 1 else []


def _probability(path: RankPath, accuracies: Sequence[Sequence[float]]) -> float:
    probability = 1.0
    for depth, rank in enumerate(path):
        probability *= accuracies[depth][rank]
    return probability
