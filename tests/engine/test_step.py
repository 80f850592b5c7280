"""The step against its promises: any drafts, any batch, any tree: the tokens and the cache of plain decoding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.backbone.base import Backbone, ForwardInputs, LogitsFor
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.batch import RunningBatch
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.loading import Quantization
from gorgon_engine.outcome import StepResult
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.step import SpeculativeStep, Wanted
from support.drafters import OracleDrafter, RandomDrafter, WrongDrafter
from support.models import VOCAB, tiny_llama
from support.steps import prefill as run_prompt

CPU = torch.device("cpu")
SAMPLINGS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.9, top_p=0.95, seed=5),
    "penalised": SamplingParams(temperature=0.7, repetition_penalty=1.2, frequency_penalty=0.5, seed=9),
    "biased": SamplingParams(temperature=1.0, top_k=30, min_p=0.01, logit_bias={3: 2.0, 4: -50.0}, seed=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8"])
def backbone(request: pytest.FixtureRequest, folder: Path) -> Backbone:
    options = {
        "fp32": BackboneOptions(dtype=torch.float32, kernels=Kernels.NATIVE),
        "bf16": BackboneOptions(dtype=torch.bfloat16, kernels=Kernels.NATIVE),
        "int8": BackboneOptions(quantization=Quantization.INT8, kernels=Kernels.NATIVE),
    }
    return load_backbone(folder, options[request.param])[0]


@pytest.fixture(scope="module")
def fp32(folder: Path) -> Backbone:
    return load_backbone(folder, BackboneOptions(dtype=torch.float32, kernels=Kernels.NATIVE))[0]


def make_step(backbone: Backbone, drafters: list[Drafter], *, slots: int = 4, max_nodes: int = 16) -> SpeculativeStep:
    config = backbone.config
    cache = KVCache(
        num_layers=config.num_layers,
        num_slots=slots,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        capacity=256,
        max_scratch=128,
        dtype=backbone.cache_dtype,
        device=CPU,
    )
    return SpeculativeStep(backbone, cache, drafters, max_nodes=max_nodes, max_depth=16)


def prefill(step: SpeculativeStep, prompt: list[int], sampling: SamplingParams, *, chunk: int = 7) -> StepResult:
    return run_prompt(step, prompt, sampling, chunk=chunk, wanted=Wanted(draft=bool(step.drafters)))


def decode(
    step: SpeculativeStep,
    prompt: list[int],
    sampling: SamplingParams,
    count: int,
    *,
    rule: AcceptanceRule = AcceptanceRule.LOSSLESS,
    sizes: Callable[[StepResult], int] | None = None,
) -> tuple[list[int], RunningBatch]:
    """At least `count` tokens of one sequence, and the state after them."""
    result = prefill(step, prompt, sampling)
    tokens = list(result.tokens[0])
    while len(tokens) < count:
        nodes = 1 + sum(p > 0 for p in result.path_probs[0])
        nodes = min(nodes, sizes(result)) if sizes else nodes
        result = step.run(
            result.batch,
            [nodes],
            max_length=len(prompt) + len(tokens) - 1,
            rule=rule,
            wanted=Wanted(draft=bool(step.drafters)),
        )
        assert result.num_drafted[0] == nodes - 1
        tokens += result.tokens[0]
    return tokens, result.batch


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(list(SAMPLINGS)),
    max_nodes=st.sampled_from([1, 2, 8, 32, 65, 128]),
)
def test_random_drafts_never_change_the_tokens(backbone: Backbone, seed: int, name: str, max_nodes: int) -> None:
    """On row-invariant kernels bit-exactness leaves no room for luck: every precision, every tree."""
    prompt = torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
    plain, _ = decode(make_step(backbone, []), prompt, SAMPLINGS[name], 24)
    drafters: list[Drafter] = [RandomDrafter(VOCAB, seed), RandomDrafter(VOCAB, seed + 1, name="second")]
    speculative, _ = decode(make_step(backbone, drafters, max_nodes=max_nodes), prompt, SAMPLINGS[name], 24)
    assert speculative[:24] == plain[:24]


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("rule", [AcceptanceRule.LOSSLESS])
def test_an_oracle_is_believed_and_a_liar_is_not(fp32: Backbone, name: str, rule: AcceptanceRule) -> None:
    prompt = [5, 6, 7, 8]
    plain, _ = decode(make_step(fp32, []), prompt, SAMPLINGS[name], 60)
    oracle = OracleDrafter({tuple(prompt): plain})
    step = make_step(fp32, [oracle])
    result = prefill(step, prompt, SAMPLINGS[name])
    steps, tokens = 0, list(result.tokens[0])
    while len(tokens) < 40:
        length = len(prompt) + len(tokens) - 1
        result = step.run(result.batch, [16], max_length=length, rule=rule, wanted=Wanted())
        tokens += result.tokens[0]
        steps += 1
        assert len(result.tokens[0]) == 16
    assert tokens == plain[: len(tokens)]

    wrong = make_step(fp32, [WrongDrafter(oracle, VOCAB)])
    result = prefill(wrong, prompt, SAMPLINGS[name])
    tokens = list(result.tokens[0])
    for _ in range(10):
        length = len(prompt) + len(tokens) - 1
        result = wrong.run(result.batch, [16], max_length=length, rule=rule, wanted=Wanted())
        assert len(result.tokens[0]) == 1
        tokens += result.tokens[0]
    assert tokens == plain[: len(tokens)]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_after_any_acceptance_the_cache_is_a_fresh_prefill(fp32: Backbone, seed: int) -> None:
    prompt = torch.randint(VOCAB, (11,), generator=torch.Generator().manual_seed(seed)).tolist()
    step = make_step(fp32, [RandomDrafter(VOCAB, seed)], max_nodes=48)
    tokens, batch = decode(step, prompt, SAMPLINGS["sampled"], 30)
    kept = prompt + tokens[:-1]
    slot = int(batch.slots[0])
    assert int(step.cache.lengths[slot]) == len(kept)

    fresh = make_step(fp32, [])
    other = fresh.cache.acquire()
    inputs = ForwardInputs.chain(torch.tensor(kept), slot=other, length=0, prompt_length=len(kept))
    output = fp32.forward(inputs, fresh.cache, logits_for=LogitsFor.LAST)
    for mine, expected in ((step.cache.keys, fresh.cache.keys), (step.cache.values, fresh.cache.values)):
        assert torch.equal(mine[:, slot, :, : len(kept)], expected[:, other, :, : len(kept)])
    assert torch.equal(batch.hidden[0], output.hidden[0, -1])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(list(SAMPLINGS)))
def test_batches_equal_single_runs(backbone: Backbone, seed: int, name: str) -> None:
    """Ragged lengths and different trees in one pass."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (3, 17, 8)]
    params = [SAMPLINGS[name]] * 3
    singles = [decode(make_step(backbone, []), prompt, SAMPLINGS[name], 20)[0] for prompt in prompts]

    step = make_step(backbone, [RandomDrafter(VOCAB, seed)], max_nodes=12)
    results = [prefill(step, prompt, SAMPLINGS[name]) for prompt in prompts]
    tokens = [list(result.tokens[0]) for result in results]
    batch = results[0].batch.join(results[1].batch, params[:2]).join(results[2].batch, params)
    for turn in range(12):
        length = max(len(p) + len(t) - 1 for p, t in zip(prompts, tokens, strict=True))
        sizes = [1 + (turn + row) % 12 for row in range(3)]
        result = step.run(batch, sizes, max_length=length, rule=AcceptanceRule.LOSSLESS, wanted=Wanted())
        batch = result.batch
        for row in range(3):
            tokens[row] += result.tokens[row]
    for row in range(3):
        count = min(len(tokens[row]), 20)
        assert tokens[row][:count] == singles[row][:count]


def test_a_sequence_that_leaves_does_not_disturb_the_others(fp32: Backbone) -> None:
    prompts = [[4, 5, 6], [7, 8, 9, 10], [11, 12]]
    singles = [decode(make_step(fp32, []), prompt, SamplingParams(), 20)[0] for prompt in prompts]
    step = make_step(fp32, [RandomDrafter(VOCAB, 3)], max_nodes=8)
    results = [prefill(step, prompt, SamplingParams()) for prompt in prompts]
    tokens = [list(result.tokens[0]) for result in results]
    params = [SamplingParams()] * 3
    batch = results[0].batch.join(results[1].batch, params[:2]).join(results[2].batch, params)
    rows = [0, 1, 2]
    for turn in range(10):
        if turn == 4:
            batch, rows = batch.select([0, 2], params[:2]), [0, 2]
        length = max(len(prompts[r]) + len(tokens[r]) - 1 for r in rows)
        result = step.run(batch, [8] * len(rows), max_length=length, rule=AcceptanceRule.LOSSLESS, wanted=Wanted())
        batch = result.batch
        for row, emitted in zip(rows, result.tokens, strict=True):
            tokens[row] += emitted
    for row in range(3):
        count = min(len(tokens[row]), 20)
        assert tokens[row][:count] == singles[row][:count]


def test_traces_tell_the_tree_and_what_was_accepted(fp32: Backbone) -> None:
    prompt = [9, 8, 7]
    plain, _ = decode(make_step(fp32, []), prompt, SamplingParams(), 12)
    step = make_step(fp32, [OracleDrafter({tuple(prompt): plain[:4]}), RandomDrafter(VOCAB, 1)], max_nodes=10)
    result = prefill(step, prompt, SamplingParams())
    result = step.run(
        result.batch, [10], max_length=len(prompt), rule=AcceptanceRule.LOSSLESS, wanted=Wanted(trace=True)
    )
    assert result.traces is not None
    trace = result.traces[0]
    assert len(trace.tokens) == len(trace.parents) == len(trace.accepted) == result.num_drafted[0] == 9
    assert [t for t, a in zip(trace.tokens, trace.accepted, strict=True) if a] == result.tokens[0][:-1] == plain[1:4]
    assert all(-1 <= parent < node for node, parent in enumerate(trace.parents))
    assert set(trace.sources) == {"oracle", "random"}
    assert trace.depths == sorted(trace.depths)


def test_logprobs_are_the_backbones(fp32: Backbone) -> None:
    prompt = [9, 8, 7]
    plain, _ = decode(make_step(fp32, []), prompt, SamplingParams(), 12)
    step = make_step(fp32, [OracleDrafter({tuple(prompt): plain})], max_nodes=6)
    result = prefill(step, prompt, SamplingParams())
    result = step.run(
        result.batch, [6], max_length=len(prompt), rule=AcceptanceRule.LOSSLESS, wanted=Wanted(num_logprobs=3)
    )
    assert result.logprobs is not None
    fresh = make_step(fp32, [])
    inputs = ForwardInputs.chain(torch.tensor(prompt + plain), slot=fresh.cache.acquire(), length=0, prompt_length=3)
    expected = fp32.forward(inputs, fresh.cache).logits[0].log_softmax(dim=1)
    for place, entry in enumerate(result.logprobs[0]):
        row = expected[len(prompt) + place]
        assert entry.token == plain[1 + place]
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
        values, ids = row.topk(3)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)
