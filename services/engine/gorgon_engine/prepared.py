"""Drafters ready to be taken up: heads read, checked and packed, on any thread."""

from dataclasses import dataclass
from pathlib import Path

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.select import DrafterKind, HeadsTree, make_drafters
from gorgon_engine.heads.bundled import bundled_heads
from gorgon_engine.heads.checkpoint import read_manifest, resolve_heads
from gorgon_protocol.errors import HeadsError

_WITH_HEADS = (None, DrafterKind.HEADS, DrafterKind.BOTH)


@dataclass(frozen=True, slots=True)
class HeadsDescription:
    """Which heads they are."""

    name: str
    version: str
    family: str
    num_heads: int


@dataclass(frozen=True, slots=True, eq=False)
class PreparedHeads:
    """The drafters of one backbone, with heads or without."""

    drafters: tuple[Drafter, ...]
    heads: HeadsDescription | None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DrafterMaker:
    """Makes the drafters of one backbone with one heads' checkpoint after another. Thread-safe: it holds no state."""

    backbone: Backbone
    folder: Path  # the backbone's
    kind: DrafterKind | None = None
    tree: HeadsTree = HeadsTree.DYNAMIC
    draw: bool = False

    def first(self, heads: Path | None) -> PreparedHeads:
        """Those of an engine that starts. heads: as `make_drafters` takes them: None = those of the program, if any.

        Raises `BadRequestError`, `HeadsError`.
        """
        checkpoint = None if heads is None or self.kind not in _WITH_HEADS else resolve_heads(heads)
        made = self._make(self.kind, checkpoint or heads)
        if heads is None and self.kind in _WITH_HEADS:
            checkpoint = bundled_heads(self.folder, self.backbone.config)
        return PreparedHeads(made.drafters, _describe(checkpoint), made.notices)

    def next(self, heads: Path | None) -> PreparedHeads:
        """Other ones: with these heads (a checkpoint, or a store's folder of the backbone), or with none at all.

        Raises `HeadsError` for heads that cannot be read or do not fit, and where the engine was told to use none.
        """
        if heads is None:
            return self._make(DrafterKind.NONE if self.kind is DrafterKind.HEADS else DrafterKind.NGRAM, None)
        if self.kind not in _WITH_HEADS:
            raise HeadsError(f"{heads}: the engine's drafter is {self.kind}: start it with another to use heads")
        checkpoint = resolve_heads(heads)
        made = self._make(self.kind, checkpoint)
        return PreparedHeads(made.drafters, _describe(checkpoint), made.notices)

    def _make(self, kind: DrafterKind | None, heads: Path | None) -> PreparedHeads:
        drafters, notices = make_drafters(
            kind, heads, backbone=self.backbone, folder=self.folder, tree=self.tree, draw=self.draw
        )
        return PreparedHeads(tuple(drafters), None, tuple(notices))


def _describe(checkpoint: Path | None) -> HeadsDescription | None:
    if checkpoint is None:
        return None
    manifest = read_manifest(checkpoint)
    return HeadsDescription(manifest.name, manifest.version, manifest.family, manifest.num_heads)
