"""From the settings of a process to an engine. Runs on the model's thread, and imports torch there."""

from pathlib import Path
from typing import TYPE_CHECKING

from gorgon_engine.server.settings import EngineSettings
from gorgon_engine.server.worker import LoadProgress
from gorgon_protocol.errors import BadRequestError

if TYPE_CHECKING:
    from gorgon_engine.engine import Engine, EngineConfig


def load_engine(settings: EngineSettings, progress: LoadProgress) -> "Engine":
    """Raises `GorgonError` subclasses in one line."""
    progress("importing", 0.0)
    from gorgon_engine.engine import Engine, load_parts
    from gorgon_engine.runtime import may_run_native, set_threads, silence_libraries

    silence_libraries()
    native = may_run_native(settings.device, settings.kernels, settings.quantization)
    set_threads(settings.device, native=native, threads=settings.threads)
    config = engine_config(settings)
    progress("reading the model", 0.2)
    parts = load_parts(config)
    progress("measuring this machine", 0.7)
    return Engine.of_parts(parts, config)


def engine_config(settings: EngineSettings) -> "EngineConfig":
    """Raises `BadRequestError`; `HeadsError` where heads at a URL cannot be fetched."""
    import torch

    from gorgon_engine.backbone.select import BackboneOptions, Kernels
    from gorgon_engine.drafters.select import DrafterKind
    from gorgon_engine.engine import EngineConfig
    from gorgon_engine.heads.store import local_heads
    from gorgon_engine.models.loading import Quantization

    heads: Path | None = None
    drafter = None if settings.drafter is None else DrafterKind(settings.drafter)
    if settings.heads == "none":
        if drafter in (DrafterKind.HEADS, DrafterKind.BOTH):
            raise BadRequestError(f"GORGON_ENGINE_HEADS none leaves the drafter {drafter} no heads: unset one of them")
        drafter = drafter or DrafterKind.NGRAM
    elif settings.heads is not None:
        heads = local_heads(settings.heads)
    return EngineConfig(
        model=settings.model,
        backbone=BackboneOptions(
            quantization=None if settings.quantization is None else Quantization(settings.quantization),
            dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
            device=settings.device,
            kernels=Kernels(settings.kernels),
        ),
        heads=heads,
        drafter=drafter,
        max_nodes=settings.max_nodes,
        num_slots=settings.num_slots,
        max_waiting=settings.max_waiting,
        context=settings.context,
        graphs=settings.graphs,
        run_ahead=settings.run_ahead,
    )


def model_name(settings: EngineSettings) -> str:
    """What callers call the model: never a path of this machine."""
    from gorgon_engine.models.catalog import CATALOG

    if settings.served_name is not None:
        return settings.served_name
    if settings.model in CATALOG:
        return settings.model
    path = Path(settings.model).expanduser()
    return path.resolve().name if path.exists() else settings.model
