"""Options that several commands share, and what they build.

Nothing here imports the engine before a command runs: torch takes a second that `--help` and a mistyped option need not
wait for. The choices are therefore spelled out; a test holds them equal to the engine's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gorgon_cli.loading import import_engine
from gorgon_engine.runtime import may_run_native
from gorgon_protocol.errors import BadRequestError

if TYPE_CHECKING:
    from gorgon_engine.engine import EngineConfig

F = TypeVar("F", bound=Callable[..., Any])

DRAFTERS = ("heads", "ngram", "both", "none")
HEADS_TREES = ("dynamic", "sparse", "cartesian")
QUANTIZATIONS = ("none", "nf4", "int8")
KERNELS = ("auto", "native", "triton", "torch")
KERNELS_HELP = "The project's own, for CPUs (native) or GPUs (triton), or torch's. auto: its own where they run."
ACCEPTANCE_RULES = ("lossless", "rejection", "typical")
DTYPES = ("float32", "bfloat16")
MAX_NODES = 128


@dataclass(frozen=True, slots=True)
class EngineArguments:
    model: str
    heads: str | None
    drafter: str | None
    heads_tree: str
    draw_drafts: bool
    max_nodes: int
    fixed_tree: bool
    quantization: str | None
    dtype: str | None
    device: str | None
    kernels: str
    graphs: bool
    run_ahead: bool
    context: int | None
    threads: int | None

    @property
    def wants_native_kernels(self) -> bool:
        return may_run_native(self.device, self.kernels, self.quantization)

    def config(self, *, num_slots: int = 1) -> "EngineConfig":
        import torch

        from gorgon_engine.backbone.select import BackboneOptions, Kernels
        from gorgon_engine.drafters.select import DrafterKind, HeadsTree
        from gorgon_engine.engine import EngineConfig
        from gorgon_engine.models.loading import Quantization

        # An unset shell variable must not quietly mean the default model, or the current folder.
        for option, value in (("--model", self.model), ("--heads", self.heads)):
            if value == "":
                raise BadRequestError(f"{option} is empty: give a path or a name, or leave it out")
        drafter = self._drafter_without_heads() if self.heads == "none" else self.drafter
        return EngineConfig(
            model=self.model,
            backbone=BackboneOptions(
                quantization=None if self.quantization is None else Quantization(self.quantization),
                dtype=None if self.dtype is None else getattr(torch, self.dtype),
                device=self.device,
                kernels=Kernels(self.kernels),
            ),
            heads=None if self.heads is None or self.heads == "none" else Path(self.heads),
            drafter=None if drafter is None else DrafterKind(drafter),
            heads_tree=HeadsTree(self.heads_tree),
            draw_drafts=self.draw_drafts,
            max_nodes=self.max_nodes,
            adaptive=not self.fixed_tree,
            num_slots=num_slots,
            context=self.context,
            graphs=self.graphs,
            run_ahead=self.run_ahead,
        )

    def _drafter_without_heads(self) -> str:
        """The drafter of `--heads none`, which switches off the heads that come with the program as well."""
        if self.drafter in ("heads", "both"):
            raise BadRequestError(f"--heads none leaves --drafter {self.drafter} no heads: leave one of the two out")
        return self.drafter or "ngram"


def engine_options(command: F) -> F:
    """Which model, on which kernels, with which drafters; the command gets them as `engine_arguments`."""
    names = list(EngineArguments.__dataclass_fields__)

    def wrapper(**values: Any) -> Any:
        import_engine()
        arguments = EngineArguments(**{name: values.pop(name) for name in names})
        return command(engine_arguments=arguments, **values)

    return _decorate(
        wrapper,
        command,
        click.option("--model", default="smollm2", show_default=True, metavar="PATH|NAME",
                     help="Model folder, name in `gorgon models list`, or hub name."),
        click.option("--heads", metavar="PATH|none",
                     help="Checkpoint folder of trained draft heads. "
                     "Default: those that come with the program for this model."),
        click.option("--drafter", type=click.Choice(DRAFTERS),
                     help="Who guesses: trained heads, the text so far (ngram), both, or nobody. "
                     "Default: all there are."),
        click.option("--heads-tree", type=click.Choice(HEADS_TREES), default="dynamic",
                     show_default=True, help="How the heads' guesses become a tree."),
        click.option("--draw-drafts", is_flag=True,
                     help="Draw the heads' guesses instead of taking the likeliest (for --acceptance rejection)."),
        click.option("--max-nodes", type=click.IntRange(1, MAX_NODES), default=32, show_default=True,
                     help="Most rows of a verification pass, root included; 1 is plain decoding."),
        click.option("--fixed-tree", is_flag=True,
                     help="Always verify all that was guessed, instead of what pays on this machine."),
        click.option("--quantization", type=click.Choice(QUANTIZATIONS),
                     help="Default: int8 on a CPU, nf4 on a GPU."),
        click.option("--dtype", type=click.Choice(DTYPES), help="Of unquantised weights; 4-bit ones compute in it."),
        click.option("--device", metavar="cpu|cuda[:N]", help="Default: a GPU where there is one."),
        click.option("--kernels", type=click.Choice(KERNELS), default="auto", show_default=True, help=KERNELS_HELP),
        click.option("--graphs/--no-graphs", default=True, show_default=True,
                     help="On a GPU: record each size of step, and launch it as one CUDA graph."),
        click.option("--run-ahead/--no-run-ahead", default=True, show_default=True,
                     help="With graphs: launch a step before the one before it is read."),
        click.option("--context", type=click.IntRange(min=2), metavar="N",
                     help="Positions for prompt and answer. Default: the model's, at most 8192."),
        click.option("--threads", type=click.IntRange(min=1), metavar="N",
                     help="CPU threads. Default: one for each physical core."),
    )  # fmt: skip


def sampling_options(command: F) -> F:
    """How tokens are drawn; the command gets them as `sampling`, a `SamplingParams`."""

    def wrapper(**values: Any) -> Any:
        from gorgon_engine.sampling import SamplingParams

        sampling = SamplingParams(
            max_tokens=values.pop("max_tokens"),
            temperature=values.pop("temperature"),
            top_p=values.pop("top_p"),
            top_k=values.pop("top_k"),
            min_p=values.pop("min_p"),
            repetition_penalty=values.pop("repetition_penalty"),
            presence_penalty=values.pop("presence_penalty"),
            frequency_penalty=values.pop("frequency_penalty"),
            logit_bias=_logit_bias(values.pop("logit_bias")),
            seed=values.pop("seed"),
            stop=tuple(values.pop("stop")),
            stop_token_ids=tuple(values.pop("stop_token_id")),
            ignore_eos=values.pop("ignore_eos"),
            logprobs=values.pop("logprobs"),
        )
        return command(sampling=sampling, **values)

    return _decorate(
        wrapper,
        command,
        click.option("--max-tokens", type=int, default=256, show_default=True, help="Most tokens of the answer."),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 = greedy."),
        click.option("--top-p", type=float, default=1.0, help="Keep the likeliest tokens of this total probability."),
        click.option("--top-k", type=int, default=0, help="Keep this many likeliest tokens; 0 = all."),
        click.option("--min-p", type=float, default=0.0, help="Keep tokens above this share of the likeliest one's."),
        click.option("--repetition-penalty", type=float, default=1.0, help="Over prompt and answer; 1 = none."),
        click.option("--presence-penalty", type=float, default=0.0, help="As OpenAI defines it, -2..2."),
        click.option("--frequency-penalty", type=float, default=0.0, help="As OpenAI defines it, -2..2."),
        click.option("--logit-bias", multiple=True, metavar="TOKEN=BIAS", help="Add BIAS to a token id's logit."),
        click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same tokens."),
        click.option("--stop", multiple=True, help="End before this text; may be given several times."),
        click.option("--stop-token-id", multiple=True, type=int, help="End at this token; may be given several times."),
        click.option("--ignore-eos", is_flag=True, help="Go on past the model's own end."),
        click.option("--logprobs", type=int, metavar="N", help="Report log-probabilities and N alternatives (--json)."),
    )


def speculation_options(command: F) -> F:
    """What to accept; the command gets it as `speculation`."""

    def wrapper(**values: Any) -> Any:
        from gorgon_engine.acceptance import AcceptanceRule
        from gorgon_engine.sequence import SpeculationParams

        rule = AcceptanceRule(values.pop("acceptance"))
        return command(speculation=SpeculationParams(acceptance=rule), **values)

    return _decorate(
        wrapper,
        command,
        click.option("--acceptance", type=click.Choice(ACCEPTANCE_RULES), default="lossless",
                     show_default=True, help="lossless: the tokens of plain decoding. rejection: its distribution. "
                     "typical: faster and LOSSY."),
    )  # fmt: skip


def _decorate(wrapper: Callable[..., Any], command: F, *options: Callable[[Any], Any]) -> F:
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__click_params__ = list(getattr(command, "__click_params__", []))  # type: ignore[attr-defined]
    decorated: Any = wrapper
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def _logit_bias(items: tuple[str, ...]) -> dict[int, float]:
    bias = {}
    for item in items:
        token, separator, value = item.partition("=")
        try:
            bias[int(token)] = float(value if separator else "")
        except ValueError:
            raise BadRequestError(f"--logit-bias takes TOKEN=BIAS, like 1234=-5: got {item!r}") from None
    return bias
