"""Which drafters an engine runs."""

from enum import StrEnum
from pathlib import Path

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_protocol.errors import BadRequestError


class DrafterKind(StrEnum):
    HEADS = "heads"
    NGRAM = "ngram"
    BOTH = "both"
    NONE = "none"


def make_drafters(
    kind: DrafterKind | None, heads: Path | None, *, backbone: Backbone, folder: Path
) -> tuple[list[Drafter], list[str]]:
    """The drafters of a choice, and notices for the person who made it.

    kind None: all there are. Raises `BadRequestError` where heads are wanted and none given, `HeadsError` for heads
    that do not fit the backbone.
    """
    if kind is None:
        kind = DrafterKind.NGRAM if heads is None else DrafterKind.BOTH
    if kind in (DrafterKind.HEADS, DrafterKind.BOTH) and heads is None:
        raise BadRequestError(f"drafter {kind} needs trained heads: give their folder with --heads")
    drafters: list[Drafter] = []
    if kind in (DrafterKind.NGRAM, DrafterKind.BOTH):
        drafters.append(NgramDrafter(device=backbone.device))
    return drafters, []
