"""`gorgon bench`: plain against speculative decoding, interleaved in one process over the same prompts."""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from gorgon_cli.generate import decode_utf8
from gorgon_cli.loading import load_engine
from gorgon_cli.options import EngineArguments, engine_options, sampling_options, speculation_options
from gorgon_protocol.errors import BadRequestError

if TYPE_CHECKING:
    from gorgon_cli.terminal import Generation
    from gorgon_engine.engine import Engine
    from gorgon_engine.sampling import SamplingParams
    from gorgon_engine.sequence import Request, SpeculationParams


@click.group()
def bench() -> None:
    """Measure this machine."""


@bench.command("engine")
@click.option("--prompts", type=click.Path(path_type=Path), required=True, metavar="FILE.jsonl",
              help='JSON lines with "turns" (the first is asked as a chat) or "prompt" (continued).')  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N prompts only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options
@sampling_options
@speculation_options
def bench_engine(
    prompts: Path,
    limit: int | None,
    as_json: bool,
    engine_arguments: EngineArguments,
    sampling: "SamplingParams",
    speculation: "SpeculationParams",
) -> int:
    """Compare plain and speculative decoding.

    Every prompt is run both ways, one right after the other and the order alternating, so that a machine whose speed
    drifts favours neither. Speeds are decode speeds, from a request's first token to its last.
    """
    questions = _read_prompts(prompts)[:limit]
    engine = load_engine(engine_arguments)
    # All of them before the first run: a prompt that cannot run is known now, not after an hour.
    requests = [_requests(engine, question, sampling, speculation) for question in questions]
    pairs = []
    for number, (plain, speculative) in enumerate(tqdm(requests, desc="prompts", disable=None, leave=False)):
        pairs.append(_run_pair(engine, plain, speculative, plain_first=number % 2 == 0))
    report = _report(engine, pairs)
    click.echo(json.dumps(report) if as_json else _table(report))
    return 0


@dataclass(frozen=True, slots=True)
class _Question:
    where: str  # file and line
    prompt: str | list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class _Pair:
    plain: "Generation"
    speculative: "Generation"


def _requests(
    engine: "Engine", question: _Question, sampling: "SamplingParams", speculation: "SpeculationParams"
) -> tuple["Request", "Request"]:
    """The same question without and with speculation. Raises `BadRequestError` naming its line."""
    try:
        plain = engine.request(question.prompt, sampling, replace(speculation, enabled=False))
        return plain, engine.request(question.prompt, sampling, speculation)
    except BadRequestError as error:
        raise BadRequestError(f"{question.where}: {error}") from None


def _run_pair(engine: "Engine", plain: "Request", speculative: "Request", *, plain_first: bool) -> _Pair:
    from gorgon_cli import terminal

    def run(request: "Request") -> "Generation":
        generation = terminal.run(engine, request, show=False)
        if generation.cancelled:
            raise KeyboardInterrupt
        return generation

    if plain_first:
        return _Pair(plain=run(plain), speculative=run(speculative))
    second = run(speculative)
    return _Pair(plain=run(plain), speculative=second)


def _report(engine: "Engine", pairs: list[_Pair]) -> dict[str, Any]:
    plain, speculative = [p.plain for p in pairs], [p.speculative for p in pairs]
    speeds = {"plain": _speeds(plain), "speculative": _speeds(speculative)}
    steps = sum(g.end.metrics.num_spec_steps for g in speculative)
    accepted = sum(g.end.metrics.num_accepted_draft_tokens for g in speculative)
    identical = sum(p.plain.token_ids == p.speculative.token_ids for p in pairs)
    times = speeds["plain"]["tokens_per_second"], speeds["speculative"]["tokens_per_second"]
    return {
        "plain": speeds["plain"],
        "speculative": {**speeds["speculative"], "step_milliseconds_by_nodes": _step_times(speculative)},
        "speedup": times[1] / times[0] if all(times) else None,
        "mean_acceptance_length": (accepted + steps) / steps if steps else None,
        "identical_outputs": identical,
        "num_prompts": len(pairs),
        "kernels": engine.backbone.kernels,
        "row_invariant": engine.backbone.row_invariant,
    }


def _speeds(generations: list["Generation"]) -> dict[str, Any]:
    """Tokens a second over everything (tokens / seconds), and how single answers spread around it."""
    rates, tokens, seconds = [], 0, 0.0
    for generation in generations:
        rate = generation.end.tokens_per_second
        if rate:
            rates.append(rate)
            tokens += len(generation.token_ids) - 1
            seconds += (len(generation.token_ids) - 1) / rate
    return {
        "tokens_per_second": tokens / seconds if seconds else None,
        "median": statistics.median(rates) if rates else None,
        "p10": _quantile(rates, 0.1),
        "p90": _quantile(rates, 0.9),
        "num_tokens": sum(len(g.token_ids) for g in generations),
    }


def _quantile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))] if ordered else None


def _step_times(generations: list["Generation"]) -> dict[str, dict[str, float]]:
    by_nodes: dict[int, list[float]] = defaultdict(list)
    for generation in generations:
        for event in generation.steps[1:]:
            seconds = event.seconds
            by_nodes[event.num_nodes].append(seconds.draft + seconds.verify + seconds.accept + seconds.commit)
    return {
        str(nodes): {"median": statistics.median(times) * 1e3, "steps": len(times)}
        for nodes, times in sorted(by_nodes.items())
    }


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'':12} {'tokens/s':>9} {'median':>8} {'p10':>8} {'p90':>8} {'tokens':>8}"]
    for name in ("plain", "speculative"):
        row = report[name]
        cells = [f"{row[key]:8.1f}" if row[key] is not None else f"{'-':>8}" for key in ("median", "p10", "p90")]
        speed = f"{row['tokens_per_second']:9.1f}" if row["tokens_per_second"] is not None else f"{'-':>9}"
        lines.append(f"{name:12} {speed} {' '.join(cells)} {row['num_tokens']:8}")
    if report["speedup"] is not None:
        lines.append(f"speedup {report['speedup']:.2f}x")
    if report["mean_acceptance_length"] is not None:
        lines.append(f"mean acceptance length {report['mean_acceptance_length']:.2f} tokens/step")
    lines.append(f"identical outputs {report['identical_outputs']} of {report['num_prompts']} ({report['kernels']})")
    lines.append("step milliseconds by nodes: " + ", ".join(
        f"{nodes}: {entry['median']:.1f} ({entry['steps']:.0f} steps)"
        for nodes, entry in report["speculative"]["step_milliseconds_by_nodes"].items()
    ))  # fmt: skip
    return "\n".join(lines)


def _read_prompts(path: Path) -> list[_Question]:
    lines = decode_utf8(path.read_bytes(), str(path)).splitlines()
    questions: list[_Question] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadRequestError(f"{where} is not JSON: {error}") from None
        match entry:
            case {"prompt": str(text)}:
                questions.append(_Question(where, text))
            case {"turns": [str(first), *_]}:
                questions.append(_Question(where, [{"role": "user", "content": first}]))
            case _:
                raise BadRequestError(f'{where} has neither a text "prompt" nor a list of texts "turns"')
    if not questions:
        raise BadRequestError(f"{path} holds no prompts")
    return questions
