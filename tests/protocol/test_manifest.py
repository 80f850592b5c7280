"""The manifest against a golden file, and one clear line for everything that is wrong with one."""

import json
from pathlib import Path
from typing import Any

import pytest

from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import HeadsManifest

GOLDEN = (Path(__file__).parent / "golden_manifest.json").read_bytes()


def parse(content: bytes) -> HeadsManifest:
    return HeadsManifest.from_json(content, source="manifest.json")


def changed(**values: Any) -> bytes:
    """The golden manifest with other fields; `...` removes one."""
    content = json.loads(GOLDEN) | values
    return json.dumps({name: value for name, value in content.items() if value is not ...}).encode()


def test_the_golden_manifest_reads_and_writes_the_same() -> None:
    manifest = parse(GOLDEN)
    assert manifest.offsets == (1, 2, 3, 4)
    assert manifest.recommended_tree == ((0,), (0, 0), (1,), (0, 0, 0))
    assert manifest.training is not None
    assert manifest.training.settings == {
        "learning_rate": 0.003,
        "epochs": 2,
        "loss": "cross-entropy",
        "shuffled": True,
    }
    assert json.loads(manifest.to_json()) == json.loads(GOLDEN)
    assert parse(manifest.to_json()) == manifest


HYDRA: dict[str, Any] = {"family": "hydra", "offsets": [2, 3, 4, 5]}
LAYER = {"num_query_heads": 9, "num_kv_heads": 3, "head_dim": 64, "intermediate_size": 1536, "rope_theta": 1e5}
EAGLE: dict[str, Any] = {"family": "eagle", "offsets": [2, 3, 4, 5], "num_blocks": 1, "layer": LAYER}


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [((1, 2, 3, 4), (1, 2, 3)), ((2, 3, 4, 5), (0, 1, 2, 3)), ((1, 2, 4, 5), (1,)), ((1, 3, 4, 5), ())],
)
def test_each_depth_is_guessed_by_the_head_one_further(offsets: tuple[int, ...], expected: tuple[int, ...]) -> None:
    manifest = parse(changed(offsets=offsets, recommended_tree=None))
    assert manifest.tree_heads == expected
    assert [manifest.offsets[head] for head in manifest.tree_heads] == list(range(2, 2 + len(expected)))


def test_what_is_optional_may_be_left_out() -> None:
    manifest = parse(changed(training=..., accuracies=..., recommended_tree=..., draft_vocab_size=...))
    assert (manifest.training, manifest.accuracies, manifest.recommended_tree) == (None, None, None)
    assert manifest.draft_vocab_size is None


def test_a_manifest_of_before_the_hydra_family_still_reads() -> None:
    later = ("projection_bias", "normalised", "residual", "draft_vocab_size", "family", "layer")
    manifest = parse(changed(**dict.fromkeys(later, ...)))
    assert (manifest.family, manifest.residual, manifest.layer) == ("medusa", "hidden", None)
    assert not manifest.projection_bias
    assert not manifest.normalised


def test_rows_of_a_projection_are_the_tokens_that_can_be_drafted() -> None:
    assert parse(GOLDEN).num_draft_tokens == 16384
    assert parse(changed(draft_vocab_size=None)).num_draft_tokens == 49152
    assert parse(changed(draft_vocab_size=49152)).num_draft_tokens == 49152


@pytest.mark.parametrize("residual", ["hidden", "matrix"])
@pytest.mark.parametrize("normalised", [True, False])
def test_hydra_heads_have_settings_of_their_own(residual: str, normalised: bool) -> None:
    values = HYDRA | {"residual": residual, "normalised": normalised}
    manifest = parse(changed(**values, projection="own", projection_bias=True))
    assert manifest.tree_heads == (0, 1, 2, 3)
    assert parse(manifest.to_json()) == manifest


def test_an_eagle_head_is_one_layer() -> None:
    manifest = parse(changed(**EAGLE))
    assert manifest.tree_heads == (0, 1, 2, 3)
    assert manifest.layer is not None
    assert manifest.layer.model_dump() == LAYER
    assert parse(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (changed(schema_version=2, anything=1), "schema version 2 is not known, this release reads 1"),
        (changed(schema_version=...), "schema version None is not known"),
        (changed(schema_version=True), "schema version True is not known"),
        (changed(surplus=1), "surplus: Extra inputs"),
        (changed(name=...), "name: Field required"),
        (changed(name="../escape"), "name: String should match"),
        (changed(version="1\n"), "version: String should match"),
        (changed(version=""), "version: String should match"),
        (changed(family="falcon"), "family: Input should be 'medusa', 'hydra' or 'eagle'"),
        (changed(projection="tied"), "projection: Input should be"),
        (changed(dtype="int8"), "dtype: Input should be"),
        (changed(hidden_size="576"), "hidden_size: Input should be a valid integer"),
        (changed(num_heads=0), "num_heads: Input should be greater"),
        (changed(offsets=[1, 2, 3]), "offsets must be 4 ascending numbers"),
        (changed(offsets=[1, 2, 2, 3]), "offsets must be 4 ascending numbers"),
        (changed(offsets=[0, 1, 2, 3]), "offsets.0: Input should be greater"),
        (changed(accuracies=[[0.5]]), "accuracies must be 4 rows"),
        (changed(accuracies=[[0.5], [0.5], [0.5], [0.5, 0.1]]), "rows of equal length"),
        (changed(accuracies=[[], [], [], []]), "at least one rank"),
        (changed(accuracies=[[0.7, 0.6]] * 4), "sum to 1.300"),
        (changed(accuracies=[[1.5]] * 4), "accuracies.0.0: Input should be less"),
        (changed(recommended_tree=[[0, 0], [0]]), r"path \[0, 0\] is empty, repeated or before its parent"),
        (changed(recommended_tree=[[0], [0]]), "repeated"),
        (changed(recommended_tree=[[]]), "empty"),
        (changed(recommended_tree=[[49152]]), "rank beyond the vocabulary"),
        (changed(recommended_tree=[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]), "deeper than the 3 heads"),
        (changed(backbone={"identity": "abc", "name": "x"}), "backbone.identity: String should match"),
        (changed(files={"../heads.safetensors": {"sha256": "0" * 64, "size": 1}}), "files"),
        (changed(files={"heads.safetensors": {"sha256": "0" * 64, "size": -1}}), "size: Input should be greater"),
        (changed(draft_vocab_size=0), "draft_vocab_size: Input should be greater"),
        (changed(draft_vocab_size=49153), "draft_vocab_size 49153 is larger than vocab_size 49152"),
        (changed(normalised=True), "normalised is a setting of hydra heads, not of medusa heads"),
        (changed(residual="matrix"), "residual is a setting of hydra heads, not of medusa heads"),
        (changed(projection="own", projection_bias=True), "projection_bias is a setting of hydra heads"),
        (changed(**HYDRA, projection_bias=True), "projection_bias needs projections of the heads' own"),
        (changed(**HYDRA, residual="none"), "residual: Input should be 'hidden' or 'matrix'"),
        (changed(family="hydra"), r"offsets of hydra heads must be 2 to 5, .*: got \[1, 2, 3, 4\]"),
        (changed(**HYDRA | {"offsets": [2, 3, 5, 6]}), r"offsets of hydra heads must be 2 to 5, .* \[2, 3, 5, 6\]"),
        (changed(**EAGLE | {"offsets": [1, 2, 3, 4]}), "offsets of eagle heads must be 2 to 5"),
        (changed(**EAGLE | {"layer": None}), "layer describes eagle heads, which must have it: these are eagle heads"),
        (changed(**HYDRA, layer=LAYER), "layer describes eagle heads, which must have it: these are hydra heads"),
        (changed(**EAGLE | {"num_blocks": 2}), r"eagle heads are one layer \(num_blocks 1\)"),
        (changed(**EAGLE, projection="own"), "that shares the backbone's projection"),
        (changed(**EAGLE, normalised=True), "normalised is a setting of hydra heads, not of eagle heads"),
        (changed(**EAGLE | {"layer": LAYER | {"num_kv_heads": 2}}), "layer: 9 query heads are not a multiple of 2 KV"),
        (changed(**EAGLE | {"layer": LAYER | {"head_dim": 3}}), "layer.head_dim: Input should be a multiple of 2"),
        (changed(**EAGLE | {"layer": LAYER | {"rope_theta": 0}}), "layer.rope_theta: Input should be greater"),
        (changed(**EAGLE | {"layer": LAYER | {"bias": True}}), "layer.bias: Extra inputs"),
        (changed(training={"data": "x", "figures": {"loss": "low"}}), "training.figures.loss"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(content: bytes, message: str) -> None:
    with pytest.raises(HeadsError, match=message) as raised:
        parse(content)
    assert str(raised.value).startswith("manifest.json: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("constant", ["NaN", "Infinity"])
def test_figures_are_numbers(constant: str) -> None:
    with pytest.raises(HeadsError):
        parse(GOLDEN.replace(b"1.94", constant.encode()))


def test_a_manifest_cannot_be_changed() -> None:
    manifest = parse(GOLDEN)
    with pytest.raises(ValueError, match="frozen"):
        manifest.version = "2"  # type: ignore[misc]
