"""Replayed acceptance against the engine itself, step for step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.base import DraftContext, Drafter
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.heads import HeadsDrafter
from gorgon_engine.drafters.hydra import HydraDrafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import TokenEvent
from gorgon_engine.heads.eagle import EagleShape
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.tokenizer import Tokenizer
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_protocol.errors import BadRequestError, DataError
from gorgon_trainer.evaluation.replayed import Answers, Replayed, count_accepted, replay, replay_answers
from gorgon_trainer.shards import TokenSequence
from support.drafters import OracleDrafter, WrongDrafter, forest
from support.eagle import make_head

PROMPTS = ([3, 17, 90], [200, 201, 202, 203, 204, 205], [5], [44, 44, 301, 9, 44])
LIMITS = (40, 33, 1, 2)  # one answer without a step, one with a single one
# The only tokens said: answers repeat themselves, and what random heads draft of these few is now and then right.
SAID = (9, 44, 90, 201, 202, 301)

Answered = dict[tuple[int, ...], list[int]]


@dataclass
class PartlyRightDrafter:
    """An oracle in a comb of three siblings a depth, wrong at every fifth position of the text."""

    oracle: OracleDrafter
    vocab_size: int
    name: str = "partly right"

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        depth = -(-max_nodes // 3)
        right = self.oracle.propose(context, depth)
        positions = context.history_lengths[:, None] + torch.arange(depth)
        spine = torch.where(positions % 5 == 0, (right.tokens + 7) % self.vocab_size, right.tokens)
        siblings = torch.stack([spine + 1, spine, spine + 2], dim=2) % self.vocab_size  # [B, depth, 3]
        parents = (3 * torch.arange(depth) - 2).clamp(min=-1)[:, None].expand(-1, 3)
        log_probs = right.log_probs[:, :, None].expand(-1, -1, 3)
        return forest(
            siblings.flatten(1)[:, :max_nodes],
            parents.flatten()[:max_nodes].expand(len(siblings), -1),
            log_probs.flatten(1)[:, :max_nodes],
            self.name,
        )


def run_engine(
    backbone: Backbone, tokenizer: Tokenizer, drafters: Sequence[Drafter], max_nodes: int
) -> tuple[Answered, Replayed]:
    """The answers to the prompts, and the steps that they took: each alone, as a batch takes a plain step when a
    sequence joins that has no drafts."""
    config = EngineConfig(adaptive=False, max_nodes=max_nodes, num_slots=1, context=200)
    answers: Answered = {}
    given: list[int] = []  # by each step
    for prompt, limit in zip(PROMPTS, LIMITS, strict=True):
        engine = Engine(backbone=backbone, tokenizer=tokenizer, drafters=drafters, config=config)
        sampling = SamplingParams(max_tokens=limit, ignore_eos=True, logit_bias=dict.fromkeys(SAID, 100.0))
        request = engine.request(prompt, sampling)
        pieces = [event.token_ids for event in engine.generate(request) if isinstance(event, TokenEvent)]
        given += [len(piece) for piece in pieces[1:]]  # the first token comes from prefill
        answers[tuple(prompt)] = [token for piece in pieces for token in piece]
    histogram = tuple(given.count(number + 1) for number in range(max(given)))
    return answers, Replayed(len(given), sum(given), histogram)


def sequences_of(answered: Answered) -> list[TokenSequence]:
    return [
        TokenSequence.from_lists([*prompt, *answer], [0] * len(prompt) + [1] * len(answer))
        for prompt, answer in answered.items()
    ]


def steps_only(replayed: Replayed) -> Replayed:
    """Without the histogram's zeros at the end: the replay also knows of drafts at places where no step began."""
    counts = list(replayed.accepted_histogram)
    while not counts[-1]:
        counts.pop()
    return replace(replayed, accepted_histogram=tuple(counts))


@pytest.fixture(scope="module")
def answered(backbone: Backbone, tokenizer: Tokenizer) -> Answered:
    return run_engine(backbone, tokenizer, [], 1)[0]


def oracle(backbone: Backbone, answered: Answered) -> Drafter:
    return OracleDrafter(answered)


def wrong(backbone: Backbone, answered: Answered) -> Drafter:
    return WrongDrafter(OracleDrafter(answered), backbone.config.vocab_size)


def partly_right(backbone: Backbone, answered: Answered) -> Drafter:
    return PartlyRightDrafter(OracleDrafter(answered), backbone.config.vocab_size)


def lookup(backbone: Backbone, answered: Answered) -> Drafter:
    return NgramDrafter()


def medusa(backbone: Backbone, answered: Answered) -> Drafter:
    torch.manual_seed(0)
    heads = MedusaHeads(backbone.config.hidden_size, num_heads=3).requires_grad_(False)
    torch.nn.init.normal_(heads.weight, std=0.05)
    said = torch.tensor(SAID)
    project = backbone.project_to(said)
    return HeadsDrafter(heads, lambda features: project(features.contiguous()), draft_vocabulary=said)


def hydra(backbone: Backbone, answered: Answered) -> Drafter:
    torch.manual_seed(0)
    heads = HydraHeads(HydraShape(backbone.config.hidden_size, num_heads=3, num_blocks=2)).requires_grad_(False)
    said = torch.tensor(SAID)
    return HydraDrafter(heads, embed=backbone.embed, project=backbone.project_to(said), draft_vocabulary=said)


def eagle(backbone: Backbone, answered: Answered) -> Drafter:
    config = backbone.config
    shape = EagleShape(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.intermediate_size,
        num_heads=3,
    )
    head, said = make_head(shape), torch.tensor(SAID)
    head.start_as_pass_through(hidden_rms=1.0)
    torch.nn.init.normal_(head.o.get_parameter("weight"), std=0.3)
    return EagleDrafter(head, embed=backbone.embed, project=backbone.project_to(said), draft_vocabulary=said)


@pytest.mark.parametrize("max_nodes", [2, 16])
@pytest.mark.parametrize("make", [oracle, wrong, partly_right, lookup, medusa, hydra, eagle])
def test_a_replay_takes_the_steps_of_the_engine(
    make: Callable[[Backbone, Answered], Drafter],
    max_nodes: int,
    backbone: Backbone,
    tokenizer: Tokenizer,
    answered: Answered,
) -> None:
    drafter = make(backbone, answered)
    again, expected = run_engine(backbone, tokenizer, [drafter], max_nodes)
    assert again == answered
    for batch_positions in (2048, 7):
        replayed = replay(
            drafter, backbone, sequences_of(answered), max_nodes=max_nodes, batch_positions=batch_positions
        )
        assert steps_only(replayed) == expected
    assert replayed.acceptance_length == expected.num_tokens / expected.num_steps


def test_the_drafters_of_these_tests_are_as_good_as_they_should_be(backbone: Backbone, answered: Answered) -> None:
    """Else the comparison with the engine would be one of plain decoding with itself."""
    sequences = sequences_of(answered)
    lengths = {
        make.__name__: replay(make(backbone, answered), backbone, sequences, max_nodes=16).acceptance_length
        for make in (oracle, wrong, partly_right, lookup, medusa, hydra, eagle)
    }
    assert lengths.pop("wrong") == 1.0
    best = lengths.pop("oracle")
    assert all(1.2 < length < best for length in lengths.values()), lengths


def test_one_node_is_plain_decoding(backbone: Backbone, answered: Answered) -> None:
    replayed = replay(OracleDrafter(answered), backbone, sequences_of(answered), max_nodes=1)
    num_tokens = sum(len(answer) - 1 for answer in answered.values())
    assert replayed == Replayed(num_tokens, num_tokens, (num_tokens,))


def test_every_answer_of_a_conversation_is_replayed_by_itself(backbone: Backbone) -> None:
    """Tokens that rise by one, guessed by a drafter that knows it: answers of 6, 1 and 4 tokens behind their prompts,
    and a sequence that is all answer, whose first token is nobody's."""

    class Counting:
        name = "counting"

        def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
            assert (context.history.gather(1, context.history_lengths[:, None] - 1)[:, 0] == context.root_tokens).all()
            assert (context.history.count_nonzero(dim=1) == context.history_lengths).all()
            steps = torch.arange(1, max_nodes + 1)
            parents = (steps - 2).expand(len(context.root_tokens), -1)
            return forest(context.root_tokens[:, None] + steps, parents, -steps.float().expand_as(parents), self.name)

    sequences = [
        TokenSequence.from_lists(list(range(10, 23)), [0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0]),
        TokenSequence.from_lists(list(range(50, 56)), [0, 0, 1, 1, 1, 1]),
        TokenSequence.from_lists(list(range(100, 106)), [1] * 6),
    ]
    # Two drafts a step: 5 tokens behind the first in steps of 3 and 2, 3 in one, 4 in steps of 3 and 1.
    assert replay(Counting(), backbone, sequences, max_nodes=3) == Replayed(5, 12, (1, 1, 3))
    parts = [replay(Counting(), backbone, [sequence], max_nodes=3) for sequence in sequences]
    assert parts[0] + parts[1] + parts[2] == Replayed(5, 12, (1, 1, 3))


def test_only_the_likeliest_candidates_count(backbone: Backbone, answered: Answered) -> None:
    """More than the tree has room for, the right chain the least likely: as if it were not there."""
    answers = Answers.of(backbone, sequences_of(answered))
    vocab_size = backbone.config.vocab_size

    def propose(rows: slice) -> CandidateTree:
        right = answers.continuations(rows, 1).clamp(min=0)
        tokens = torch.cat([(right + 1) % vocab_size, (right + 2) % vocab_size, right], dim=1)
        return forest(tokens, torch.full_like(tokens, -1), -torch.tensor([1.0, 2.0, 3.0]).expand(tokens.shape), "many")

    def num_accepted(max_nodes: int) -> int:
        whole = [slice(0, len(answers.places))]
        replayed = replay_answers(answers, propose, batches=whole, max_nodes=max_nodes)
        return replayed.num_tokens - replayed.num_steps

    assert num_accepted(3) == 0
    assert num_accepted(4) > 0


def test_places_by_sequence_are_all_places(backbone: Backbone, answered: Answered) -> None:
    answers = Answers.of(backbone, sequences_of(answered))
    parts = answers.of_each_sequence()
    assert [sequence for sequence, _ in parts] == [0, 1, 3]  # the third answer has one token alone
    assert [place for _, rows in parts for place in range(rows.start, rows.stop)] == list(range(len(answers.places)))
    for sequence, rows in parts:
        assert (answers.sequences[rows] == sequence).all()


def test_walks_of_single_trees() -> None:
    """Equal siblings, padding, a right token below a wrong one, and one at a wrong depth."""
    tokens = torch.tensor([[5, 5, 6, 7], [5, 6, 0, 0], [9, 6, 0, 0], [6, 5, 7, 0]])
    parents = torch.tensor([[-1, -1, 1, 2], [-1, 0, -1, -1], [-1, 0, -1, -1], [-1, -1, 0, -1]])
    log_probs = torch.tensor([[-1.0] * 4, [-1, -torch.inf, -torch.inf, -torch.inf], [-1.0] * 4, [-1.0] * 4])
    continuations = torch.tensor([[5, 6, 7, -1], [5, 6, 7, 8], [5, 6, 7, 8], [5, 7, 8, -1]])
    tree = forest(tokens, parents, log_probs, "test")
    assert count_accepted(tree, continuations).tolist() == [3, 1, 0, 1]


@pytest.mark.parametrize("max_nodes", [0, 129])
def test_trees_that_do_not_exist_are_refused(max_nodes: int, backbone: Backbone, answered: Answered) -> None:
    with pytest.raises(BadRequestError, match="between 1 and 128"):
        replay(NgramDrafter(), backbone, sequences_of(answered), max_nodes=max_nodes)


@pytest.mark.parametrize("loss_mask", [[0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 1, 0]])
def test_nothing_to_replay_is_an_error(loss_mask: list[int], backbone: Backbone) -> None:
    with pytest.raises(DataError, match="no answer to replay"):
        replay(NgramDrafter(), backbone, [TokenSequence.from_lists([1, 2, 3], loss_mask)], max_nodes=4)


def test_no_sequences_are_an_error(backbone: Backbone) -> None:
    with pytest.raises(DataError, match="no answer to replay"):
        replay(NgramDrafter(), backbone, [], max_nodes=4)
