"""Head families and training choices on one data set: what each buys, at equal numbers of training steps.

    python benchmarks/trainer/ablation.py --shards FOLDER --model FOLDER --out ablation.jsonl --steps 1500

FOLDER of shards: what `gorgon train distill` made with the same model. For every configuration: training time, top-1
accuracy a depth of the tree on held-out packs, and tokens a step over held-out answers for trees of 8 to 64 rows
(`gorgon_trainer.evaluation.replayed`: exact for the answers as they are, whatever temperature gave them; shards do not
say which). *First choices* are the answers of which at least 97 % of the tokens are the backbone's first choice: the
greedy ones, and now and then a short one that was drawn. *Drawn* are the others.

A configuration that fails prints why, and the others go on. Results are appended to --out as they come.
"""

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, load_backbone
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.heads import HeadsDrafter
from gorgon_engine.drafters.hydra import HydraDrafter
from gorgon_engine.heads.eagle import EagleHead
from gorgon_engine.heads.hydra import HydraHeads
from gorgon_engine.models.loading import Quantization
from gorgon_protocol.errors import GorgonError
from gorgon_trainer.evaluation.replayed import Answers, Replayed, replay_answers
from gorgon_trainer.objective import Loss
from gorgon_trainer.shards import ShardSet, TokenSequence
from gorgon_trainer.train_config import TrainConfig
from gorgon_trainer.training import TrainResult, train

NODES = (8, 16, 32, 64)  # rows of a verification pass, root included
GREEDY_SHARE = 0.97  # rounding moves the first choice at one token in a hundred
BATCH_POSITIONS = 1024


@dataclass(frozen=True, slots=True)
class Configuration:
    """One line of the table."""

    name: str
    train: TrainConfig
    steps_share: float = 1.0


# Five medusa heads, as the first one repeats the root: all trees are four deep, but for those of the two with five.
MEDUSA = TrainConfig(family="medusa", num_heads=5, num_blocks=1)
HYDRA = TrainConfig(family="hydra", num_heads=4, num_blocks=4)
EAGLE = TrainConfig(family="eagle", num_heads=4, num_blocks=1, feature_loss_weight=0.0)
# The published loss of EAGLE-1: soft targets at a tenth of the features' weight.
EAGLE_FEATURES = replace(EAGLE, loss=Loss.KL, feature_loss_weight=10.0)
CONFIGURATIONS = (
    Configuration("medusa-1-block", MEDUSA),
    Configuration("medusa-2-blocks", replace(MEDUSA, num_blocks=2)),
    Configuration("hydra", HYDRA),
    Configuration("hydra-kl", replace(HYDRA, loss=Loss.KL)),
    Configuration("hydra-dropout", replace(HYDRA, dropout=0.2)),
    Configuration("hydra-16k-vocabulary", replace(HYDRA, draft_vocab_size=16384)),
    Configuration("hydra-5-heads", replace(HYDRA, num_heads=5)),
    Configuration("hydra-half-steps", HYDRA, steps_share=0.5),
    Configuration("hydra-double-steps", HYDRA, steps_share=2.0),
    Configuration("eagle-unroll-1", EAGLE),
    Configuration("eagle-unroll-5", replace(EAGLE, num_heads=5, unroll=5)),
    Configuration("eagle-features", EAGLE_FEATURES),
    Configuration("eagle-features-unroll-3", replace(EAGLE_FEATURES, unroll=3)),
    Configuration("eagle-features-dropout", replace(EAGLE_FEATURES, dropout=0.1)),
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What one configuration's training gave."""

    replay: Callable[[Answers, int], Replayed]
    top_1: tuple[float, ...]  # [depth - 1]
    num_parameters: int
    num_steps: int
    train_seconds: float
    positions_per_second: float
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table and of the results' file."""

    name: str
    num_parameters: int
    num_steps: int
    train_seconds: float
    positions_per_second: float
    peak_memory_bytes: int | None
    top_1: tuple[float, ...]
    replayed: dict[str, dict[int, Replayed]]  # kind of answers -> number of nodes -> steps
    replay_seconds: float

    def lengths(self) -> dict[str, dict[int, float]]:
        """Tokens a step: kind of answers, or `all`, -> number of nodes -> length."""
        every: dict[int, Replayed] = {}
        for by_nodes in self.replayed.values():
            for nodes, steps in by_nodes.items():
                every[nodes] = every[nodes] + steps if nodes in every else steps
        kinds = {"all": every} | self.replayed
        return {kind: {n: steps.acceptance_length for n, steps in row.items()} for kind, row in kinds.items()}

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"acceptance_lengths": self.lengths()}


class Ablation:
    """What all configurations share: the backbone, the shards, the answers to replay."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
        backbone_options = BackboneOptions(quantization=Quantization.NONE, dtype=dtype, device=options.device)
        self.backbone, notices = load_backbone(options.model, backbone_options)
        for notice in notices:
            print(notice)
        self.on_gpu = self.backbone.device.type == "cuda"
        self._shards = ShardSet.open(options.shards, partial=True)
        self._accelerator = Accelerator(cpu=not self.on_gpu, mixed_precision="bf16" if self.on_gpu else "no")
        self.answers = answers_by_kind(self.backbone, self._shards, options.replay_sequences)
        self.nodes = tuple(nodes for nodes in NODES if nodes <= options.max_nodes)

    def run(self, configuration: Configuration) -> Row:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        num_steps = max(1, round(self._options.steps * configuration.steps_share))
        config = replace(
            configuration.train,
            max_steps=num_steps,
            eval_every=num_steps,
            save_every=num_steps,
            pack_length=self._options.pack_length,
            packs_per_batch=self._options.packs_per_batch,
        )
        trained = self._train(config)
        began = time.perf_counter()
        replayed = {
            kind: {nodes: trained.replay(answers, nodes) for nodes in self.nodes}
            for kind, answers in self.answers.items()
        }
        return Row(
            name=configuration.name,
            num_parameters=trained.num_parameters,
            num_steps=trained.num_steps,
            train_seconds=trained.train_seconds,
            positions_per_second=trained.positions_per_second,
            peak_memory_bytes=trained.peak_memory_bytes,
            top_1=trained.top_1,
            replayed=replayed,
            replay_seconds=time.perf_counter() - began,
        )

    def free(self) -> None:
        self._accelerator.free_memory()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _train(self, config: TrainConfig) -> Trained:
        with tempfile.TemporaryDirectory() as folder:
            result = train(
                self._shards,
                Path(folder),
                backbone=self.backbone,
                config=config,
                accelerator=self._accelerator,
                progress=False,
            )
        drafter = heads_drafter(result, config, self.backbone)

        def replay(answers: Answers, max_nodes: int) -> Replayed:
            informed = answers.known_to(drafter)
            return replay_answers(
                answers,
                lambda rows: informed.propose(answers.context(rows), max_nodes - 1),
                batches=answers.batches(BATCH_POSITIONS),
                max_nodes=max_nodes,
            )

        rows = zip(result.held_out.accuracies, config.offsets, strict=True)
        return Trained(
            replay=replay,
            top_1=tuple(ranks[0] for ranks, offset in rows if offset > 1),
            num_parameters=sum(parameter.numel() for parameter in result.heads.parameters()),
            num_steps=result.num_steps,
            train_seconds=result.seconds,
            positions_per_second=result.positions_per_second,
            peak_memory_bytes=result.peak_memory_bytes,
        )


def heads_drafter(result: TrainResult, config: TrainConfig, backbone: Backbone) -> Drafter:
    """The trained heads as the engine drafts with them on this device, in dynamic trees."""
    dtype = torch.float32 if backbone.device.type == "cpu" else backbone.cache_dtype
    heads = result.heads.to(backbone.device, dtype).requires_grad_(False)
    vocabulary = None if result.draft_vocabulary is None else result.draft_vocabulary.to(backbone.device)
    project = backbone.project if vocabulary is None else backbone.project_to(vocabulary)
    if isinstance(heads, EagleHead):
        return EagleDrafter(heads, embed=backbone.embed, project=project, draft_vocabulary=vocabulary)
    if isinstance(heads, HydraHeads):
        return HydraDrafter(heads, embed=backbone.embed, project=project, draft_vocabulary=vocabulary)
    used = [head for head, offset in enumerate(config.offsets) if offset > 1]
    return HeadsDrafter(heads.select(used), project, draft_vocabulary=vocabulary)


@torch.inference_mode()
def answers_by_kind(backbone: Backbone, shards: ShardSet, count: int) -> dict[str, Answers]:
    """`count` held-out sequences from all over the split, those of first choices apart from the drawn ones."""
    every = [sequence for sequence in shards.sequences("heldout") if int(sequence.loss_mask[1:].sum()) > 1]
    chosen = every[:: max(1, len(every) // count)][:count]
    answers = Answers.of(backbone, chosen)
    hits = []
    for rows in answers.batches(BATCH_POSITIONS):
        places = answers.places[rows]
        hits.append(backbone.project(answers.hidden[places]).argmax(dim=1) == answers.tokens[places + 1])
    expected = torch.cat(hits).double().cpu()
    kinds: dict[str, list[TokenSequence]] = {"first choices": [], "drawn": []}
    for sequence, rows in answers.of_each_sequence():
        greedy = float(expected[rows].mean()) >= GREEDY_SHARE
        kinds["first choices" if greedy else "drawn"].append(chosen[sequence])
    return {kind: Answers.of(backbone, sequences) for kind, sequences in kinds.items() if sequences}


def print_table(rows: Sequence[Row]) -> None:
    """One line a configuration, columns aligned."""
    kinds = list(rows[0].lengths())
    nodes = list(rows[0].lengths()["all"])
    titles = ["configuration", "parameters", "steps", "seconds", "positions/s", "GB"]
    titles += [f"{kind} {n}" for kind in kinds for n in nodes] + ["top-1 of depth 1, 2, ..."]
    lines = [titles]
    for row in rows:
        peak = "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e9:.1f}"
        cells = [row.name, f"{row.num_parameters / 1e6:.2f}M", str(row.num_steps), f"{row.train_seconds:.0f}"]
        cells += [f"{row.positions_per_second:,.0f}", peak]
        cells += [f"{row.lengths()[kind][n]:.3f}" for kind in kinds for n in nodes]
        lines.append([*cells, " ".join(f"{share:.3f}" for share in row.top_1)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    for line in lines:
        print(line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)))


def parse_options() -> tuple[argparse.Namespace, list[Configuration]]:
    names = [configuration.name for configuration in CONFIGURATIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="results are appended, a JSON object a line")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the backbone")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of a configuration")
    parser.add_argument("--configs", default=",".join(names), help="names, separated by commas; default: %(default)s")
    parser.add_argument("--replay-sequences", type=int, default=200)
    parser.add_argument("--max-nodes", type=int, default=64, help="the largest of the tree sizes 8, 16, 32, 64")
    parser.add_argument("--pack-length", type=int, default=MEDUSA.pack_length)
    parser.add_argument("--packs-per-batch", type=int, default=MEDUSA.packs_per_batch)
    parser.add_argument(
        "--max-seconds", type=float, default=float("inf"), help="begin no configuration after this time"
    )
    options = parser.parse_args()
    wanted = [name.strip() for name in options.configs.split(",")]
    for name in wanted:
        if name not in names:
            parser.error(f"no configuration {name!r}: there are {', '.join(names)}")
    for name in ("steps", "replay_sequences"):
        if getattr(options, name) < 1:
            parser.error(f"{name} must be at least 1: got {getattr(options, name)}")
    if options.max_nodes < NODES[0]:
        parser.error(f"max_nodes must be at least {NODES[0]}: got {options.max_nodes}")
    try:
        options.out.touch()
    except OSError as error:
        parser.error(f"{options.out}: cannot be written: {error.strerror}")
    return options, [configuration for configuration in CONFIGURATIONS if configuration.name in wanted]


def main() -> None:
    options, configurations = parse_options()
    began = time.perf_counter()
    try:
        ablation = Ablation(options)
    except GorgonError as error:
        raise SystemExit(f"ablation: {error}") from error
    device = torch.cuda.get_device_name() if ablation.on_gpu else "cpu"
    places = {kind: len(answers.places) for kind, answers in ablation.answers.items()}
    print(f"{device}, torch {torch.__version__}, {ablation.backbone.kernels}; places in held-out answers: {places}")
    rows = []
    for configuration in configurations:
        elapsed = time.perf_counter() - began
        if elapsed > options.max_seconds:
            print(f"{elapsed:.0f} s: {configuration.name} and what follows it are left out")
            break
        try:
            row = ablation.run(configuration)
            with options.out.open("a") as file:
                file.write(json.dumps(row.as_json() | {"device": device, "torch": torch.__version__}) + "\n")
        except Exception:  # whatever it is: one configuration must not take the others with it
            print(f"{configuration.name} failed:", flush=True)
            traceback.print_exc()
        else:
            rows.append(row)
            lengths = {nodes: round(length, 3) for nodes, length in row.lengths()["all"].items()}
            print(f"{time.perf_counter() - began:.0f} s: {row.name}: {lengths}", flush=True)
        ablation.free()
    if not rows:
        raise SystemExit("no configuration ended well")
    print()
    print_table(rows)


if __name__ == "__main__":
    main()
