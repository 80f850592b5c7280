"""Every acceptance rule against the distribution it promises, and the walk against a plain restatement."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.acceptance import TYPICAL_ALPHA, TYPICAL_THRESHOLD, AcceptanceRule, accept
from gorgon_engine.backbone.base import RowLogits
from gorgon_engine.random import Stream, gumbel_noise
from gorgon_engine.sampling import SamplingBatch, SamplingParams, TokenCounts, process_logits, sample
from gorgon_engine.tree.tree import TreeBatch, ancestor_words
from support.statistics import chi_square_pvalue

PARAMS = {
    "plain": SamplingParams(temperature=1.0),
    "top_p": SamplingParams(temperature=0.8, top_p=0.85),
    "penalties": SamplingParams(temperature=1.2, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
}


def make_tree(
    tokens: torch.Tensor,
    parents: torch.Tensor,
    *,
    ranks: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
) -> TreeBatch:
    batch, num_nodes = tokens.shape
    depths = torch.zeros_like(parents)
    for node in range(1, num_nodes):
        depths[:, node] = depths.gather(1, parents[:, node : node + 1])[:, 0] + 1
    return TreeBatch(
        tokens=tokens,
        parents=parents,
        depths=depths,
        ancestors=ancestor_words(parents),
        log_probs=-depths.float(),
        ranks=torch.zeros_like(tokens) if ranks is None else ranks,
        sources=torch.zeros_like(tokens),
        num_nodes=torch.full((batch,), num_nodes),
        source_names=("test",),
        draft_probs=draft_probs,
        draft_rows=None if draft_probs is None else torch.zeros_like(tokens),
    )


def sampling_rows(params: SamplingParams, seeds: torch.Tensor, vocab: int) -> SamplingBatch:
    one = SamplingBatch.of([params], vocab_size=vocab, device=torch.device("cpu")).repeat(seeds.shape[0])
    return SamplingBatch(**{name: getattr(one, name) for name in one.__slots__ if name != "seeds"}, seeds=seeds)


def histories(batch: int, vocab: int) -> TokenCounts:
    counts = TokenCounts(torch.zeros(batch, vocab, dtype=torch.bool), torch.zeros(batch, vocab, dtype=torch.int32))
    counts.in_prompt[:, : vocab // 3] = True
    counts.in_output[:, 1 : vocab // 2 : 2] = 2
    return counts


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize(("vocab", "draws"), [(9, 6000), (49152, 500)])
@pytest.mark.parametrize("rule", [AcceptanceRule.LOSSLESS, AcceptanceRule.REJECTION])
def test_the_emitted_token_follows_the_backbone(name: str, vocab: int, draws: int, rule: AcceptanceRule) -> None:
    """Trees with good, bad and impossible children: the first emitted token must still be the backbone's."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(1, 1, vocab, generator=generator) * (1.2 if vocab < 100 else 3.5)
    target = process_logits(
        logits[0], SamplingBatch.of([PARAMS[name]], vocab_size=vocab, device=torch.device("cpu")), histories(1, vocab)
    )
    target_probs = torch.softmax(target[0].double(), dim=0)
    # A draft distribution that is wrong in places: flatter, and blind to a third of the vocabulary.
    draft = torch.softmax(logits[0, 0] * 0.5 + torch.randn(vocab, generator=generator), dim=0)
    draft[::3] = 0
    draft /= draft.sum()
    num_children, drawn = 3, []
    for start in range(0, draws, 100):
        seeds = torch.arange(start, min(start + 100, draws))
        batch = seeds.shape[0]
        if rule is AcceptanceRule.REJECTION:
            noise = gumbel_noise(seeds, torch.full_like(seeds, 41), vocab, Stream.DRAFT)
            children = (draft.log() + noise).topk(num_children, dim=1).indices
        else:
            children = torch.tensor([[int(target_probs.argmax()), 2, 5]]).expand(batch, -1)
        tokens = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), children], dim=1)
        parents = torch.tensor([[-1, 0, 0, 0]]).expand(batch, -1)
        ranks = torch.tensor([[0, 0, 1, 2]]).expand(batch, -1)
        tree = make_tree(
            tokens,
            parents,
            ranks=ranks,
            draft_probs=draft.expand(batch, 1, -1) if rule is AcceptanceRule.REJECTION else None,
        )
        result = accept(
            tree,
            RowLogits.of(logits.expand(batch, 4, -1)),
            positions=torch.full((batch,), 40),
            sampling=sampling_rows(PARAMS[name], seeds, vocab),
            counts=histories(batch, vocab),
            rule=rule,
            max_depth=2,
        )
        accepted = (children == result.tokens[:, :1]).any(dim=1)
        assert torch.equal(result.num_committed, 1 + accepted.long())
        drawn.append(result.tokens[:, 0])
    tokens = torch.cat(drawn)
    assert chi_square_pvalue(tokens, target_probs) > 1e-4
    assert (target_probs[tokens] > 0).all()


def test_rejection_accepts_more_than_chance_and_a_perfect_draft_always() -> None:
    vocab, batch = 40, 500
    logits = torch.randn(1, 1, vocab, generator=torch.Generator().manual_seed(3))
    draft = torch.softmax(logits[0, 0], dim=0)
    seeds = torch.arange(batch)
    child = (draft.log() + gumbel_noise(seeds, torch.full_like(seeds, 8), vocab, Stream.DRAFT)).argmax(dim=1)
    tree = make_tree(
        torch.stack([torch.zeros_like(child), child], dim=1),
        torch.tensor([[-1, 0]]).expand(batch, -1),
        draft_probs=draft.expand(batch, 1, -1),
    )
    result = accept(
        tree,
        RowLogits.of(logits.expand(batch, 2, -1)),
        positions=torch.full((batch,), 7),
        sampling=sampling_rows(SamplingParams(temperature=1.0), seeds, vocab),
        counts=None,
        rule=AcceptanceRule.REJECTION,
        max_depth=1,
    )
    assert (result.num_committed == 2).all()


@pytest.mark.parametrize("rule", list(AcceptanceRule))
def test_greedy_is_greedy_under_every_rule(rule: AcceptanceRule) -> None:
    vocab = 7
    logits = torch.full((1, 4, vocab), -1.0)
    for node, best in enumerate([3, 5, 1, 6]):
        logits[0, node, best] = 4.0
    # root -> {2, 3}, 3 -> {5}: the walk takes 3 (node 2), whose own argmax is 1.
    tree = make_tree(torch.tensor([[0, 2, 3, 5]]), torch.tensor([[-1, 0, 0, 2]]), ranks=torch.tensor([[0, 0, 1, 0]]))
    result = accept(
        tree,
        RowLogits.of(logits),
        positions=torch.tensor([10]),
        sampling=sampling_rows(SamplingParams(), torch.tensor([0]), vocab),
        counts=None,
        rule=rule,
        max_depth=3,
    )
    assert result.num_committed.tolist() == [2]
    assert result.path[0, :2].tolist() == [0, 2]
    assert result.tokens[0, :2].tolist() == [3, 1]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from([*PARAMS, "greedy"]),
    num_nodes=st.integers(1, 10) | st.integers(11, 30),
    counted=st.booleans(),
)
def test_lossless_walk_is_plain_decoding_one_node_at_a_time(
    seed: int, name: str, num_nodes: int, counted: bool
) -> None:
    """The walk equals sampling at the root, then at the child that was drawn, ... with the growing history."""
    params = PARAMS.get(name, SamplingParams())
    vocab, batch = 5, 2
    generator = torch.Generator().manual_seed(seed)
    parents = torch.tensor(
        [[int(torch.randint(0, n, (1,), generator=generator)) if n else -1 for n in range(num_nodes)]] * batch
    )
    tokens = torch.randint(vocab, (batch, num_nodes), generator=generator)
    logits = torch.randn(batch, num_nodes, vocab, generator=generator) * 3
    seeds = torch.randint(2**40, (batch,), generator=generator)
    tree = make_tree(tokens, parents)
    counts = histories(batch, vocab) if counted or name == "penalties" else None
    result = accept(
        tree,
        RowLogits.of(logits),
        positions=torch.tensor([30, 77]),
        sampling=sampling_rows(params, seeds, vocab),
        counts=counts,
        rule=AcceptanceRule.LOSSLESS,
        max_depth=num_nodes,
    )
    for b in range(batch):
        history, node, path, emitted = histories(1, vocab), 0, [], []
        row = sampling_rows(params, seeds[b : b + 1], vocab)
        while True:
            target = process_logits(logits[b, node][None], row, history)
            position = torch.tensor([(30, 77)[b] + len(path) + 1])
            token = sample(target, row, position)
            history.add(token, torch.tensor([True]))
            path.append(node)
            emitted.append(int(token))
            children = [n for n in range(num_nodes) if parents[b, n] == node and tokens[b, n] == token]
            if not children:
                break
            node = children[0]
        stop = int(result.num_committed[b])
        assert result.path[b, :stop].tolist() == path
        assert result.tokens[b, :stop].tolist() == emitted
        assert counts is None or torch.equal(counts.in_output[b], history.in_output[0])
        assert all(int(result.path[b, d]) >= d for d in range(result.path.shape[1]))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), num_nodes=st.integers(1, 16))
def test_typical_keeps_the_deepest_passing_path(seed: int, num_nodes: int) -> None:
    vocab = 6
    generator = torch.Generator().manual_seed(seed)
    parents = torch.tensor(
        [[int(torch.randint(max(0, n - 3), n, (1,), generator=generator)) if n else -1 for n in range(num_nodes)]]
    )
    tokens = torch.randint(vocab, (1, num_nodes), generator=generator)
    logits = torch.randn(1, num_nodes, vocab, generator=generator) * 2
    tree, params, counts = make_tree(tokens, parents), PARAMS["penalties"], histories(1, vocab)
    row = sampling_rows(params, torch.tensor([5]), vocab)
    result = accept(
        tree,
        RowLogits.of(logits),
        positions=torch.tensor([3]),
        sampling=row,
        counts=counts,
        rule=AcceptanceRule.TYPICAL,
        max_depth=num_nodes,
    )

    def passes(node: int) -> bool:
        history, path = histories(1, vocab), []
        at = int(parents[0, node])
        while at > 0:
            path.append(int(tokens[0, at]))
            at = int(parents[0, at])
        for token in path:
            history.add(torch.tensor([token]), torch.tensor([True]))
        probs = torch.softmax(process_logits(logits[0, parents[0, node]][None], row, history)[0], dim=0)
        entropy = float(-(probs * probs.log()).sum())
        threshold = min(TYPICAL_THRESHOLD, TYPICAL_ALPHA * float(torch.exp(torch.tensor(-entropy))))
        return float(probs[tokens[0, node]]) > threshold

    whole = {0}
    for node in range(1, num_nodes):
        if int(parents[0, node]) in whole and passes(node):
            whole.add(node)
    deepest = max(int(tree.depths[0, node]) for node in whole)
    stop = int(result.num_committed[0])
    assert stop == deepest + 1
    path = result.path[0, :stop].tolist()
    assert set(path) <= whole
    assert all(int(parents[0, child]) == parent for parent, child in itertools.pairwise(path))
    assert result.tokens[0, : stop - 1].tolist() == tokens[0, path[1:]].tolist()
    assert int(counts.in_output.sum()) == int(histories(1, vocab).in_output.sum()) + stop
