"""The manifest of a heads checkpoint: what `manifest.json` beside `heads.safetensors` says.

A checkpoint is refused where the manifest does not fit the backbone or the files, so everything that an engine has to
know before it reads a tensor stands here.
"""

import json
from typing import Annotated, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gorgon_protocol.errors import HeadsError

SCHEMA_VERSION: Final = 1
HEADS_FILE = "heads.safetensors"
MANIFEST_FILE = "manifest.json"

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_SHA256 = r"^[0-9a-f]{64}$"

Name = Annotated[str, Field(pattern=_NAME)]
Sha256 = Annotated[str, Field(pattern=_SHA256)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneReference(_Frozen):
    """The backbone that heads were trained against."""

    identity: Sha256 = Field(description="hash of its config, original weights and tokenizer")
    name: str = Field(min_length=1, max_length=200, description="for people, e.g. SmolLM2-135M-Instruct")


class FileRecord(_Frozen):
    sha256: Sha256
    size: int = Field(ge=0, description="bytes")


class TrainingRecord(_Frozen):
    """How the heads came about: for people and comparisons; nothing in it is needed to serve them."""

    data: str = Field(description="what they were trained on")
    created: AwareDatetime | None = None
    settings: dict[str, bool | int | float | str] = Field(default_factory=dict, description="the trainer's own")
    figures: dict[str, float] = Field(default_factory=dict, description="losses, seconds, tokens per step, ...")


class DecoderLayer(_Frozen):
    """The shape of the decoder layer that the eagle family drafts with: grouped-query attention and a SwiGLU MLP."""

    num_query_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2, description="even: rotary embeddings turn pairs of dimensions")
    intermediate_size: int = Field(ge=1)
    rope_theta: float = Field(gt=0.0, description="of plain rotary embeddings, whatever scaling the backbone has")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_query_heads} query heads are not a multiple of {self.num_kv_heads} KV heads")
        return self


class HeadsManifest(_Frozen):
    """One published version of a set of draft heads.

    Head i (0-based) predicts the token `offsets[i]` positions after the one whose hidden state it reads. Offset 1 is
    what the backbone itself says next, the root of the tree; offset d + 1 guesses depth d of the tree.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    family: Literal["medusa", "hydra", "eagle"] = "medusa"
    name: Name
    version: Name
    backbone: BackboneReference
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    num_heads: int = Field(ge=1, le=64, description="eagle: times that its one layer runs, a depth each")
    offsets: tuple[Annotated[int, Field(ge=1)], ...]
    num_blocks: int = Field(ge=1, le=64, description="residual blocks a head; eagle: decoder layers, 1")
    projection: Literal["own", "shared"] = Field(description="to the vocabulary: a weight a head, or the backbone's")
    projection_bias: bool = Field(default=False, description="hydra: own projections have a bias")
    normalised: bool = Field(default=False, description="hydra: RMSNorm of every input and before the projection")
    residual: Literal["hidden", "matrix"] = Field(
        default="hidden", description="hydra: what a head adds to: the hidden state, or a matrix of all its inputs"
    )
    layer: DecoderLayer | None = Field(default=None, description="eagle: its decoder layer")
    draft_vocab_size: int | None = Field(
        default=None, ge=1, description="tokens that can be drafted, listed in the tensor draft_vocabulary; None = all"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="of the stored tensors")
    quantization: Literal["none", "nf4", "int8"] = Field(description="of the backbone while training")
    training: TrainingRecord | None = None
    accuracies: tuple[tuple[Share, ...], ...] | None = Field(
        default=None, description="[head][rank]: share of held-out positions where that choice was the right token"
    )
    recommended_tree: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] | None = Field(
        default=None, description="rank paths, parents first, best first: every prefix of the list is a tree"
    )
    files: dict[Name, FileRecord] = Field(default_factory=dict)

    @property
    def tree_heads(self) -> tuple[int, ...]:
        """For each depth of the tree, from 1, the head that guesses it: those of offsets 2, 3, ... without a gap."""
        heads: list[int] = []
        while (offset := len(heads) + 2) in self.offsets:
            heads.append(self.offsets.index(offset))
        return tuple(heads)

    @classmethod
    def from_json(cls, content: bytes, *, source: str) -> Self:
        """Parse a manifest; `source` names it in errors. Raises `HeadsError` in one line."""
        try:
            values = json.loads(content)
        except ValueError as error:
            raise HeadsError(f"{source}: not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise HeadsError(f"{source}: not a JSON object")
        # First of all: a later schema may differ in everything else.
        version = values.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise HeadsError(
                f"{source}: schema version {version!r} is not known, this release reads {SCHEMA_VERSION}: "
                "use heads and engine of matching releases"
            )
        try:
            return cls.model_validate_json(content, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ": ".join(filter(None, [source, ".".join(map(str, first["loc"]))]))
            raise HeadsError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error

    def to_json(self) -> bytes:
        return self.model_dump_json(indent=2).encode() + b"\n"

    @property
    def num_draft_tokens(self) -> int:
        """Rows of a projection: the whole vocabulary, or the part of it that can be drafted."""
        return self.draft_vocab_size or self.vocab_size

    @model_validator(mode="after")
    def _check_family(self) -> Self:
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} is larger than vocab_size {self.vocab_size}")
        if self.family != "medusa" and self.offsets != tuple(range(2, self.num_heads + 2)):
            raise ValueError(
                f"offsets of {self.family} heads must be 2 to {self.num_heads + 1}, each head behind the one before: "
                f"got {list(self.offsets)}"
            )
        if self.family != "hydra":
            for name in ("projection_bias", "normalised", "residual"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is a setting of hydra heads, not of {self.family} heads")
        if (self.layer is not None) != (self.family == "eagle"):
            raise ValueError(f"layer describes eagle heads, which must have it: these are {self.family} heads")
        if self.family == "eagle" and (self.num_blocks, self.projection) != (1, "shared"):
            raise ValueError("eagle heads are one layer (num_blocks 1) that shares the backbone's projection")
        if self.projection_bias and self.projection == "shared":
            raise ValueError("projection_bias needs projections of the heads' own: the backbone's has none")
        return self

    @model_validator(mode="after")
    def _check_offsets(self) -> Self:
        if len(self.offsets) != self.num_heads or sorted(set(self.offsets)) != list(self.offsets):
            raise ValueError(f"offsets must be {self.num_heads} ascending numbers, one a head: got {self.offsets}")
        return self

    @model_validator(mode="after")
    def _check_accuracies(self) -> Self:
        if self.accuracies is None:
            return self
        if len(self.accuracies) != self.num_heads or len({len(row) for row in self.accuracies}) != 1:
            raise ValueError(f"accuracies must be {self.num_heads} rows of equal length, one a head")
        if not self.accuracies[0]:
            raise ValueError("accuracies must have at least one rank")
        for head, row in enumerate(self.accuracies):
            # Only one choice of a position can be right; the margin is for figures rounded to a few digits.
            if sum(row) > 1 + 1e-3 * len(row):
                raise ValueError(f"accuracies of head {head} sum to {sum(row):.3f}: they are shares of one whole")
        return self

    @model_validator(mode="after")
    def _check_recommended_tree(self) -> Self:
        seen: set[tuple[int, ...]] = {()}
        for path in self.recommended_tree or ():
            if not path or path in seen or path[:-1] not in seen:
                raise ValueError(f"recommended_tree: path {list(path)} is empty, repeated or before its parent")
            if len(path) > len(self.tree_heads):
                raise ValueError(
                    f"recommended_tree: path {list(path)} is deeper than the {len(self.tree_heads)} heads that guess "
                    "beyond the next token"
                )
            if max(path) >= self.vocab_size:
                raise ValueError(f"recommended_tree: path {list(path)} has a rank beyond the vocabulary")
            seen.add(path)
        return self
