"""Settings of whole runs, made for a model: what `gorgon train --preset NAME` does, stage by stage."""

from collections.abc import Mapping
from dataclasses import dataclass

from gorgon_engine.models.loading import Quantization
from gorgon_trainer.distill import DistillConfig
from gorgon_trainer.feature_cache import Features
from gorgon_trainer.objective import Loss
from gorgon_trainer.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """One model's run. `None` for a quantisation or a number of slots: what fits the device."""

    name: str
    title: str
    model: str  # a catalogue or hub name
    checkpoint: str  # the name of the heads
    distill: DistillConfig
    train: TrainConfig
    prompts: tuple[str, ...]  # as `gorgon train data --fetch` names them
    limit: int | None = None  # records
    quantization: Quantization | None = None
    gpu_slots: int = 1024
    evaluation_prompts: int = 80
    evaluation_tokens: int = 256
    evaluation_nodes: tuple[int, ...] = (4, 8, 16, 32, 64)
    evaluation_seeds: tuple[int, ...] = (0, 1, 2)
    evaluation_slots: int = 1


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke",
            title="everything once, in minutes on two CPU cores; heads of little use",
            model="smollm2",
            checkpoint="smoke-hydra",
            prompts=("questions",),
            limit=96,
            distill=DistillConfig(num_passes=1, max_new_tokens=96, context=256, max_turns=1, num_slots=8),
            train=TrainConfig(
                num_heads=2,
                num_blocks=2,
                draft_vocab_size=4096,
                pack_length=256,
                packs_per_batch=4,
                num_epochs=3,
                warmup_steps=5,
                eval_every=20,
                save_every=20,
                features=Features.DISK,
            ),
            evaluation_prompts=4,
            evaluation_tokens=48,
            evaluation_nodes=(4, 16),
            evaluation_seeds=(0,),
        ),
        Preset(
            name="smollm2",
            title="the heads that come with the program: one data-centre GPU, a quarter of an hour",
            model="smollm2",
            checkpoint="eagle",
            prompts=("sharegpt", "questions", "openings", "statements"),
            quantization=Quantization.NONE,
            distill=DistillConfig(num_passes=4, max_new_tokens=384, max_text_tokens=40, context=1024, max_turns=4),
            train=TrainConfig(
                family="eagle",
                num_heads=8,
                num_blocks=1,
                unroll=3,
                loss=Loss.KL,
                draft_vocab_size=16384,
                packs_per_batch=32,
                num_epochs=3,
                eval_every=500,
                save_every=500,
                features=Features.MEMORY,
            ),
            gpu_slots=2048,
            evaluation_slots=320,
        ),
        Preset(
            name="llama3-8b",
            title="Llama-3-8B-Instruct in NF4, as it is served: one GPU of 24 GB and up, or several by torchrun",
            model="meta-llama/Meta-Llama-3-8B-Instruct",
            checkpoint="hydra",
            prompts=("sharegpt", "questions", "openings"),
            quantization=Quantization.NF4,
            distill=DistillConfig(num_passes=2, max_new_tokens=512, context=1536, max_turns=2, jobs_per_shard=256),
            train=TrainConfig(
                num_heads=4,
                draft_vocab_size=32768,
                loss=Loss.KL,
                learning_rate=1e-3,
                pack_length=2048,
                packs_per_batch=2,
                num_epochs=2,
                eval_every=500,
                save_every=250,
            ),
            gpu_slots=64,
            evaluation_slots=16,
        ),
    )
}
