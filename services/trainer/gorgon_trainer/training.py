"""Training draft heads on a frozen backbone: one loop for one device or many, resumable to the bit.

    batch -> hidden states (frozen) -> examples -> loss of every head -> step

Letters: K heads, C hidden size, V' tokens that can be drafted.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.heads.checkpoint import LoadedHeads
from gorgon_engine.heads.families import DraftHeads
from gorgon_protocol.errors import DataError, TrainingError
from gorgon_trainer.dataset import JoinedPacks, PackBatch, collate
from gorgon_trainer.feature_cache import CachedFeatures, ComputedFeatures, Features, FeatureSource, RememberedFeatures
from gorgon_trainer.features import Examples, examples
from gorgon_trainer.files import written_whole
from gorgon_trainer.heldout import HeldOut, held_out
from gorgon_trainer.mixture import ShardMixture
from gorgon_trainer.objective import FrozenBackbone, Objective
from gorgon_trainer.run_log import RunLog
from gorgon_trainer.sampler import ResumableSampler
from gorgon_trainer.shards import ShardSet
from gorgon_trainer.starting_heads import empty_heads, read_initial, starting_heads
from gorgon_trainer.train_config import TrainConfig
from gorgon_trainer.vocabulary import draft_vocabulary, lm_head_weight

if TYPE_CHECKING:
    from gorgon_trainer.metrics import TrainerMetrics

STATE_FILE = "state.pt"
_HELD_OUT_PACKS = 64
_HOST_THREADS = 4  # beside a GPU


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The best heads of a run by held-out acceptance length, and what they cost."""

    heads: DraftHeads  # float32, on the CPU
    draft_vocabulary: Tensor | None  # [V'] int64, ascending, on the CPU
    held_out: HeldOut
    num_steps: int
    num_positions: int  # with a target, all processes together
    seconds: float  # of training, evaluations and savings included, all calls of a resumed run together
    positions_per_second: float  # while training, without evaluations
    peak_memory_bytes: int | None  # of one GPU; None on a CPU
    stopped_early: bool


@dataclass(slots=True)
class _Progress:
    """What a resumed run goes on from, beside the weights."""

    step: int = 0
    num_positions: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    best_length: float = 0.0
    evaluations_since_best: int = 0
    stopped_early: bool = False


def train(
    shards: ShardSet | ShardMixture,
    folder: Path,
    *,
    backbone: Backbone,
    config: TrainConfig,
    accelerator: Accelerator,
    initial: Path | None = None,
    progress: bool = True,
    metrics: "TrainerMetrics | None" = None,
) -> TrainResult:
    """Train heads on the shards' answers; `folder` keeps the run's state, history and TensorBoard logs.

    shards: of one folder, or of several, mixed by the config's shares. All of them count alike in the drafting
    vocabulary and in the held-out figures, where they are pooled by size.
    initial: a checkpoint to begin with, of the same family, shape and drafting vocabulary size; its drafting vocabulary
    stays. A run that was killed goes on where it last saved, and ends with the same weights as one that was not. Raises
    `TrainingError` where the folder is of a run with other settings or data, or cannot be written, or where `initial`
    is of other heads; `HeadsError` where that cannot be read; `DataError` for shards without data.
    """
    mixture = shards if isinstance(shards, ShardMixture) else ShardMixture([shards])
    mixture.check_shares(config.shares)
    started = None if initial is None else read_initial(initial, mixture, config)
    if backbone.device.type == "cuda":
        # What is left to the host are small operations: on all cores of a large machine their threads wait for each
        # other, at half of the speed.
        torch.set_num_threads(min(torch.get_num_threads(), _HOST_THREADS))
    return _Training(mixture, folder, backbone, config, accelerator, started, progress=progress, metrics=metrics).run()


class _Training:
    def __init__(
        self,
        shards: ShardMixture,
        folder: Path,
        backbone: Backbone,
        config: TrainConfig,
        accelerator: Accelerator,
        initial: LoadedHeads | None,
        *,
        progress: bool,
        metrics: "TrainerMetrics | None",
    ) -> None:
        self._folder = folder
        self._metrics = metrics
        self._config = config
        self._backbone_config = backbone.config
        self._accelerator = accelerator
        self._show = progress and accelerator.is_main_process
        self._fingerprint: dict[str, Any] = {"config": config.as_json(), "shards": shards.fingerprint}
        if initial is not None:
            self._fingerprint["initial"] = {name: file.sha256 for name, file in initial.manifest.files.items()}
        torch.manual_seed(config.seed)

        self._vocabulary = (
            draft_vocabulary(shards, config.draft_vocab_size) if initial is None else initial.draft_vocabulary
        )
        lm_head = lm_head_weight(backbone, self._vocabulary)
        self._frozen = FrozenBackbone(
            embed=backbone.embed,
            lm_head=lm_head,
            draft_vocabulary=None if self._vocabulary is None else self._vocabulary.to(backbone.device),
            vocab_size=backbone.config.vocab_size,
        )
        self._dataset = shards.packed("train", config)
        self._sampler = ResumableSampler(
            self._dataset.sizes,
            batch_size=config.packs_per_batch,
            shares=config.shares,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self._num_steps = config.max_steps or max(1, round(config.num_epochs * self._sampler.batches_per_epoch))
        self._features = self._feature_source(backbone, shards)
        computed = ComputedFeatures(backbone)
        self._held_out_batches = [
            [
                made
                for batch in batches
                if (made := self._examples(batch, computed.hidden(batch, ()), teachers=False)).num_positions
            ]
            for batches in self._held_out_packs(shards)
        ]
        for one, batches in zip(shards.folders, self._held_out_batches, strict=True):
            if not batches:
                raise DataError(f"{one.folder}: the held-out answers are too short for offsets {list(config.offsets)}")
        heads = starting_heads(config, backbone, lm_head, initial, like=self._held_out_batches[0][0].hidden)
        objective = Objective(heads, self._frozen, config.objective)
        optimizer = torch.optim.AdamW(
            objective.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=backbone.device.type == "cuda",
        )
        self._scheduler = LambdaLR(optimizer, self._learning_rate_share)
        self._objective, self._optimizer = accelerator.prepare(objective, optimizer)
        self._heads = heads
        self._best = _copy(heads)
        self._state = _Progress()
        self._saved_at: float | None = None  # Unix time

    def run(self) -> TrainResult:
        self._resume()
        try:
            self._train()
        except OSError as error:
            raise TrainingError(f"{self._folder}: cannot be written: {error.strerror or error}") from error
        self._accelerator.wait_for_everyone()
        return self._result()

    def _train(self) -> None:
        steps = tqdm(
            total=self._num_steps,
            initial=self._state.step,
            desc="training",
            unit="step",
            disable=not self._show or None,
        )
        run_log = RunLog(
            self._folder,
            self._state.step,
            on=self._accelerator.is_main_process,
            max_steps=self._num_steps,
            saved_at=self._saved_at,
            metrics=self._metrics,
        )
        with steps, run_log as log:
            batches = self._batches()
            mark = time.perf_counter()
            while self._state.step < self._num_steps and not self._state.stopped_early:
                loss, own, count = self._step(*next(batches))
                self._state.step += 1
                self._state.num_positions += count
                steps.update(1)
                log.stepped(self._state.step, count)
                done = self._state.step >= self._num_steps
                evaluate = done or self._state.step % self._config.eval_every == 0
                save = done or self._state.step % self._config.save_every == 0
                if not (evaluate or save or self._state.step % 20 == 0):
                    continue
                loss_value, own_values = float(loss), own.tolist()  # waits for the device
                elapsed = time.perf_counter() - mark
                self._state.train_seconds += elapsed
                record = self._record(loss_value, own_values)
                self._check_finite(loss_value)
                if evaluate:
                    record |= self._evaluate()
                log.write(record)
                steps.set_postfix_str(f"loss {loss_value:.3f}", refresh=False)
                self._state.seconds += time.perf_counter() - mark
                mark = time.perf_counter()
                if save or self._state.stopped_early:
                    self._save()
                    log.saved(self._state.step)
                    self._state.seconds += time.perf_counter() - mark
                    mark = time.perf_counter()

    def _check_finite(self, loss: float) -> None:
        """Before anything of it is measured, logged or saved. The loss is of the weights before the latest step."""
        if not math.isfinite(loss):
            what = f"the loss is {loss}"
        elif not all(bool(weight.isfinite().all()) for weight in self._heads.parameters()):
            what = "weights are not finite"
        else:
            return
        raise TrainingError(
            f"{self._folder}: {what} at step {self._state.step}: lower the learning rate and start a new run"
        )

    def _step(self, batch: PackBatch, packs: list[int]) -> tuple[Tensor, Tensor, int]:
        hidden = self._features.hidden(batch, packs)
        chosen = self._examples(batch, hidden, teachers=self._config.objective.needs_teachers)
        if self._config.dropout:
            # By the step, not out of a state: resumed runs drop the same, and each process drops its own.
            torch.manual_seed(_seed(self._config.seed, self._state.step, self._accelerator.process_index))
        loss, own = self._objective(chosen)
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._objective.parameters(), self._config.max_grad_norm)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        return loss.detach(), own, chosen.num_positions * self._accelerator.num_processes

    def _examples(self, batch: PackBatch, hidden: Tensor, *, teachers: bool) -> Examples:
        pack_length = self._config.pack_length if self._config.family == "eagle" else None
        return examples(batch, hidden, self._config.offsets, teachers=teachers, pack_length=pack_length)

    def _evaluate(self) -> dict[str, Any]:
        """Every process measures the same batches with the same weights, and so decides the same."""
        folders = self._measure(self._heads)
        measured = HeldOut.pooled(folders)
        self._heads.train()
        offsets = self._config.offsets
        length = measured.acceptance_length(offsets)
        if length > self._state.best_length:
            self._state.best_length, self._state.evaluations_since_best = length, 0
            self._best = _copy(self._heads)
        else:
            self._state.evaluations_since_best += 1
            self._state.stopped_early = 0 < self._config.patience <= self._state.evaluations_since_best
        record: dict[str, Any] = {"held_out": _held_out_record(measured, self._config)}
        if len(folders) > 1:
            record["held_out_of_each"] = [one.acceptance_length(offsets) for one in folders]
        return record

    def _measure(self, heads: DraftHeads) -> list[HeldOut]:
        """Of every shard folder."""
        with self._accelerator.autocast():
            return [held_out(heads, self._frozen, batches) for batches in self._held_out_batches]

    def _result(self) -> TrainResult:
        heads = empty_heads(self._config, self._backbone_config, self._frozen.lm_head)
        heads.load_state_dict(self._best)
        device = next(self._heads.parameters()).device
        measured = HeldOut.pooled(self._measure(heads.to(device)))
        state = self._state
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return TrainResult(
            heads=heads.cpu().eval(),
            draft_vocabulary=self._vocabulary,
            held_out=measured,
            num_steps=state.step,
            num_positions=state.num_positions,
            seconds=state.seconds,
            positions_per_second=state.num_positions / state.train_seconds if state.train_seconds else 0.0,
            peak_memory_bytes=peak,
            stopped_early=state.stopped_early,
        )

    def _batches(self) -> Iterator[tuple[PackBatch, list[int]]]:
        on_gpu = self._accelerator.device.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            _Numbered(self._dataset),
            batch_sampler=self._sampler,
            collate_fn=_collate_numbered,
            num_workers=4 if on_gpu else 0,
            prefetch_factor=8 if on_gpu else None,
        )
        yield from loader

    def _held_out_packs(self, shards: ShardMixture) -> list[list[PackBatch]]:
        """Of every shard folder: evenly spaced ones, at least one."""
        dataset = shards.packed("heldout", self._config)
        step, size = max(1, len(dataset) // _HELD_OUT_PACKS), self._config.packs_per_batch
        chosen = [range(0, len(part), step) for part in dataset.parts]
        return [
            [collate([part[index] for index in indices[at : at + size]]) for at in range(0, len(indices), size)]
            for part, indices in zip(dataset.parts, chosen, strict=True)
        ]

    def _feature_source(self, backbone: Backbone, shards: ShardMixture) -> FeatureSource:
        if self._config.features is Features.COMPUTED:
            return ComputedFeatures(backbone)
        if self._config.features is Features.MEMORY:
            return RememberedFeatures(backbone, self._dataset)
        key = f"{shards.fingerprint}/{backbone.kernels}/{self._config.seed}"
        cached = CachedFeatures(self._folder / "features", self._dataset, backbone, fingerprint=key)
        cached.fill(
            progress=self._show, rank=self._accelerator.process_index, world_size=self._accelerator.num_processes
        )
        self._accelerator.wait_for_everyone()
        return cached

    def _learning_rate_share(self, step: int) -> float:
        warmup, low = self._config.warmup_steps, self._config.min_learning_rate_share
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, self._num_steps - warmup))
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))

    def _record(self, loss: float, own: list[float]) -> dict[str, Any]:
        state = self._state
        return {
            "step": state.step,
            "epoch": round(state.step / self._sampler.batches_per_epoch, 3),
            "num_positions": state.num_positions,
            "loss": loss,
            "head_losses": own,
            "learning_rate": self._scheduler.get_last_lr()[0],
            "positions_per_second": state.num_positions / state.train_seconds if state.train_seconds else 0.0,
        }

    def _save(self) -> None:
        if not self._accelerator.is_main_process:
            return
        state = {
            "fingerprint": json.dumps(self._fingerprint, sort_keys=True),
            "progress": asdict(self._state),
            "heads": self._heads.state_dict(),
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "sampler": self._sampler.state_dict(num_batches=self._state.step),
            "random": torch.get_rng_state(),
        }
        try:
            with written_whole(self._folder / STATE_FILE) as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise TrainingError(f"{self._folder / STATE_FILE}: cannot be written: {_first_line(error)}") from error

    def _resume(self) -> None:
        path = self._folder / STATE_FILE
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self._folder}: cannot be made: {error.strerror}") from error
        if not path.exists():
            return
        device = next(self._heads.parameters()).device
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            was = json.loads(state["fingerprint"])
        except Exception as error:  # whatever a damaged file makes torch raise
            raise TrainingError(
                f"{path}: cannot be read: {_first_line(error)}: remove it to start the run again"
            ) from error
        _check_same_run(path, was, self._fingerprint)
        self._state = _Progress(**state["progress"])
        self._saved_at = path.stat().st_mtime
        self._heads.load_state_dict(state["heads"])
        self._best = state["best"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._sampler.load_state_dict(state["sampler"])
        torch.set_rng_state(state["random"].cpu())


class _Numbered(torch.utils.data.Dataset[Any]):
    """Packs with their indices."""

    def __init__(self, dataset: JoinedPacks) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return index, self._dataset[index]


def _collate_numbered(items: list[Any]) -> tuple[PackBatch, list[int]]:
    return collate([pack for _, pack in items]), [index for index, _ in items]


def _held_out_record(measured: HeldOut, config: TrainConfig) -> dict[str, Any]:
    return {
        "acceptance_length": measured.acceptance_length(config.offsets),
        "accuracies": [[round(share, 5) for share in row] for row in measured.accuracies],
        "losses": measured.losses,
    }


def _seed(*numbers: int) -> int:
    """64 mixed bits of a tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _first_line(error: Exception) -> str:
    """torch explains itself at length."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _copy(heads: DraftHeads) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in heads.state_dict().items()}


def _check_same_run(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if was.get("initial") != now.get("initial"):
        raise TrainingError(f"{path}: the run was begun with other weights: give the same --init, or another folder")
    if was["shards"] != now["shards"]:
        raise TrainingError(f"{path}: the run was begun on other data: give another folder, or remove this one")
    for name, value in now["config"].items():
        if was["config"].get(name) != value:
            raise TrainingError(
                f"{path}: the run was begun with {name} {was['config'].get(name)} and cannot go on with {value}: "
                "resume it as it was begun, or give another folder"
            )
