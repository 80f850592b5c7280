"""Processing and drawing: against transformers' processors and against the distribution itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gorgon_engine.kernels.cpu import load_library
from gorgon_engine.random import Stream, gumbel_noise, philox, uniform
from gorgon_engine.sampling import SamplingBatch, SamplingParams, TokenCounts, process_logits, sample
from gorgon_protocol.errors import BadRequestError
from support.native import num_threads
from support.statistics import chi_square_pvalue

VOCAB = 211


def batch_of(*params: SamplingParams, vocab: int = VOCAB) -> SamplingBatch:
    return SamplingBatch.of(list(params), vocab_size=vocab, device=torch.device("cpu"))


def test_philox_matches_the_published_vectors() -> None:
    """Known-answer vectors of Random123 (philox4x32, 10 rounds)."""

    def words(*values: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(v) for v in values)

    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi[:4], pi[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        got = philox(words(*counter), words(*key))  # type: ignore[arg-type]
        assert tuple(int(w) for w in got) == expected


def test_random_numbers_depend_on_seed_position_and_stream_only() -> None:
    seeds, positions = torch.tensor([1, 1, 2**62 + 1]), torch.tensor([5, 6, 5])
    together = uniform(seeds, positions, 1001, Stream.TARGET)
    assert ((together > 0) & (together < 1)).all()
    for row in range(3):
        alone = uniform(seeds[row], positions[row], 1001, Stream.TARGET)
        assert torch.equal(alone, together[row])
    assert len({tuple(row.tolist()) for row in together}) == 3
    assert not torch.equal(uniform(seeds, positions, 1001, Stream.ACCEPT), together)
    assert stats.kstest(together.flatten().numpy(), "uniform").pvalue > 1e-4
    noise = gumbel_noise(seeds, positions, 20000)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 50),
    # Closer to 1 the cut lies among probabilities so small that the order of summation decides.
    top_p=st.floats(0.05, 0.99) | st.just(1.0),
    min_p=st.floats(0.0, 0.3),
    repetition=st.floats(0.5, 2.0),
)
def test_processing_equals_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, repetition: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, VOCAB, generator=generator) * 3
    prompt = torch.randint(VOCAB, (1, 12), generator=generator)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition
    )
    counts = TokenCounts(torch.zeros(1, VOCAB, dtype=torch.bool), torch.zeros(1, VOCAB, dtype=torch.int32))
    counts.in_prompt[0, prompt[0]] = True
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(repetition), TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        warpers.append(MinPLogitsWarper(min_p))
    expected = torch.softmax(warpers(prompt, logits.clone()), dim=1)
    got = torch.softmax(process_logits(logits, batch_of(params), counts), dim=1)
    # A cut that falls between two rounding errors may take or leave one borderline token: everything else is equal.
    differing = ((got > 0) != (expected > 0)).sum()
    assert differing <= 1
    if differing == 0:
        assert torch.allclose(got, expected, atol=1e-5)


def test_openai_penalties_count_the_output_only() -> None:
    logits = torch.zeros(1, 5)
    counts = TokenCounts(torch.zeros(1, 5, dtype=torch.bool), torch.tensor([[0, 1, 3, 0, 0]], dtype=torch.int32))
    counts.in_prompt[0, 4] = True
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    got = process_logits(logits, batch_of(params, vocab=5), counts)
    assert got.tolist() == [[0.0, -0.75, -1.25, 0.0, 0.0]]


def test_bias_moves_greedy_and_bans() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    batch = batch_of(SamplingParams(logit_bias={0: 5.0}), vocab=3)
    assert sample(process_logits(logits, batch, None), batch, torch.tensor([0])).item() == 0
    with pytest.raises(BadRequestError, match="logit_bias names token 7: the vocabulary has 3 tokens"):
        batch_of(SamplingParams(logit_bias={7: 1.0}), vocab=3)


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [700, 300]] = 1.0
    batch = batch_of(SamplingParams(), vocab=1000)
    assert sample(process_logits(logits, batch, None), batch, torch.tensor([3])).item() == 300


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.3, top_k=20, min_p=0.02, presence_penalty=0.7),
    ],
)
@pytest.mark.parametrize(("vocab", "draws"), [(12, 4000), (49152, 600)])
def test_draws_follow_the_processed_distribution(params: SamplingParams, vocab: int, draws: int) -> None:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(7)) * (1.2 if vocab < 100 else 3.5)
    counts = TokenCounts(torch.zeros(1, vocab, dtype=torch.bool), torch.zeros(1, vocab, dtype=torch.int32))
    counts.in_output[0, :: max(1, vocab // 10)] = 2
    batch = batch_of(params, vocab=vocab)
    target = process_logits(logits, batch, counts)
    tokens = torch.cat(
        [
            sample(target.expand(100, -1), batch_of(*[params] * 100, vocab=vocab), torch.arange(start, start + 100))
            for start in range(0, draws, 100)
        ]
    )
    assert chi_square_pvalue(tokens, torch.softmax(target[0].double(), dim=0)) > 1e-4
    assert (torch.softmax(target, dim=1)[0, tokens] > 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("max_tokens", 0),
        ("seed", -1),
        ("logprobs", 21),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(BadRequestError, match=f"{field} must be .* got"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(BadRequestError, match="stop"):
        SamplingParams(stop=("a", ""))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    position=st.integers(0, 2**40),
    vocab=st.sampled_from([1, 3, 257, 2003, 16_391]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_the_native_sampler_draws_the_same_token(
    seed: int, temperature: float, position: int, vocab: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab, generator=generator) * float(torch.rand((), generator=generator)) * 20
    logits[1, torch.rand(vocab, generator=generator) < 0.5] = -torch.inf  # as filters leave it
    logits[1, seed % vocab] = 0.0
    batch = batch_of(*[SamplingParams(temperature=temperature, seed=seed + row) for row in range(3)], vocab=vocab)
    positions = torch.tensor([position, position + 1, position])
    target = process_logits(logits, batch, None)
    noise = gumbel_noise(batch.seeds, positions, vocab) if temperature else 0.0
    with num_threads(load_library(), threads):
        assert torch.equal(sample(target, batch, positions), (target + noise).argmax(dim=1))


def test_the_native_sampler_survives_what_is_no_distribution() -> None:
    logits = torch.stack([torch.full((5000,), torch.nan), torch.full((5000,), -torch.inf), torch.full((5000,), 1.0)])
    batch = batch_of(*[SamplingParams(temperature=1.0, seed=row) for row in range(3)], vocab=5000)
    tokens = sample(logits, batch, torch.tensor([7, 7, 7]))
    assert tokens[:2].tolist() == [0, 0]
    assert tokens[2] == gumbel_noise(batch.seeds[2], torch.tensor(7), 5000).argmax()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.sampled_from([0, 5, 1024, 1025, 3000]),
    # Closer to 1 the cut lies among probabilities so small that the order of summation decides.
    top_p=st.floats(0.2, 0.99) | st.just(1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.2]),
)
def test_the_head_shortcut_keeps_the_same_tokens(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(seed)) * 3
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    got = process_logits(logits, batch_of(params, params, vocab=5000), None)
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(torch.zeros(2, 1, dtype=torch.int64), logits.clone()) if len(warpers) else logits
    assert ((got > -torch.inf) != (expected > -torch.inf)).sum() <= 1
    assert torch.equal(got[got > -torch.inf], logits[got > -torch.inf])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(6)), count=st.integers(1, 6))
def test_a_row_never_depends_on_the_others(seed: int, order: list[int], count: int) -> None:
    """Greedy, drawn, filtered by head and by sort, penalised, with ties at every cut: alone as in any company."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(6, 5000, generator=generator) * 4).round() / 2
    positions = torch.randint(1000, (6,), generator=generator)
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=seed),
        SamplingParams(temperature=1.3, top_p=0.9, seed=3),
        SamplingParams(temperature=1.0, top_k=40, repetition_penalty=1.3, seed=4),
        SamplingParams(temperature=0.9, top_k=2000, frequency_penalty=0.3, seed=5),
        SamplingParams(frequency_penalty=0.7, presence_penalty=-0.5),
    ]
    counts = TokenCounts(
        in_prompt=torch.rand(6, 5000, generator=generator) < 0.1,
        in_output=torch.randint(3, (6, 5000), generator=generator, dtype=torch.int32),
    )

    def run(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = batch_of(*[params[row] for row in rows], vocab=5000)
        target = process_logits(logits[rows], batch, counts.select(torch.tensor(rows)))
        return target, sample(target, batch, positions[rows])

    company = order[:count]
    targets, tokens = run(company)
    for place, row in enumerate(company):
        target, token = run([row])
        assert torch.equal(targets[place], target[0])
        assert tokens[place] == token[0]
