"""Saving and loading: what was written comes back, and whatever does not fit is refused in one clear line."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gorgon_engine.heads import checkpoint
from gorgon_engine.heads.checkpoint import (
    LoadedHeads,
    is_version_folder,
    load_heads,
    read_heads,
    read_manifest,
    resolve_heads,
    save_heads,
    verify_heads,
)
from gorgon_engine.heads.families import DraftHeads, family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.models.config import BackboneConfig
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import BackboneReference, FileRecord, HeadsManifest

IDENTITY = "ab" * 32
HIDDEN, VOCAB, HEADS = 16, 23, 3
CONFIG = BackboneConfig.from_hf(
    {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    }
)


def make_heads(*, own: bool = False) -> MedusaHeads:
    torch.manual_seed(0)
    heads = MedusaHeads(HIDDEN, num_heads=HEADS, lm_head=torch.randn(VOCAB, HIDDEN) if own else None)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


def make_manifest(**values: Any) -> HeadsManifest:
    fields: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "backbone": BackboneReference(identity=IDENTITY, name="Tiny"),
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_heads": HEADS,
        "offsets": tuple(range(1, HEADS + 1)),
        "num_blocks": 1,
        "projection": "shared",
        "dtype": "float32",
        "quantization": "int8",
    }
    return HeadsManifest(**(fields | values))


def load(folder: Path, **values: Any) -> LoadedHeads:
    options: dict[str, Any] = {
        "backbone_identity": IDENTITY,
        "config": CONFIG,
        "quantization": "int8",
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    return load_heads(folder, **(options | values))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "store" / "tiny" / "tiny@1"
    save_heads(folder, make_heads(), make_manifest())
    return folder


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_saved_is_loaded(tmp_path: Path, own: bool, dtype: str) -> None:
    heads = make_heads(own=own).to(getattr(torch, dtype))
    manifest = make_manifest(projection="own" if own else "shared", dtype=dtype)
    written = save_heads(tmp_path / "tiny@1", heads, manifest)
    loaded = load(tmp_path / "tiny@1")
    assert loaded.manifest == written
    assert loaded.notices == ()
    assert not any(parameter.requires_grad for parameter in loaded.heads.parameters())
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.heads.state_dict()[name], tensor.float())
    hidden = torch.randn(2, HIDDEN)
    project = torch.randn(VOCAB, HIDDEN)
    with torch.no_grad():
        expected = heads.float()(hidden, lambda features: features @ project.T)
    assert torch.equal(loaded.heads(hidden, lambda features: features @ project.T), expected)


def test_a_checkpoint_is_two_files_that_others_may_read(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"heads.safetensors", "manifest.json"}
    assert [path.name for path in saved.parent.iterdir()] == ["tiny@1"], "no temporary is left"
    manifest = saved / "manifest.json"
    assert stat.S_IMODE((saved / "heads.safetensors").stat().st_mode) == stat.S_IMODE(manifest.stat().st_mode)
    assert read_manifest(saved).files["heads.safetensors"].size == (saved / "heads.safetensors").stat().st_size


def test_published_heads_are_never_overwritten(saved: Path) -> None:
    before = (saved / "manifest.json").read_bytes()
    with pytest.raises(HeadsError, match="exists already"):
        save_heads(saved, make_heads(), make_manifest(dtype="bfloat16"))
    assert (saved / "manifest.json").read_bytes() == before


def test_a_writer_that_was_slower_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny@1"
    real_save = checkpoint.save_file

    def publish_meanwhile(*arguments: Any, **options: Any) -> None:
        folder.mkdir()
        (folder / "manifest.json").write_text("the other's")
        real_save(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", publish_meanwhile)
    with pytest.raises(HeadsError, match="cannot be written"):
        save_heads(folder, make_heads(), make_manifest())
    assert (folder / "manifest.json").read_text() == "the other's"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny@1"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(HeadsError, match="No space left"):
        save_heads(tmp_path / "tiny@1", make_heads(), make_manifest())
    assert list(tmp_path.iterdir()) == []


def test_heads_that_the_manifest_does_not_describe_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match=r"the manifest says .*projection"):
        save_heads(tmp_path / "tiny@1", make_heads(), make_manifest(projection="own"))
    with pytest.raises(HeadsError, match="the manifest says"):
        save_heads(tmp_path / "tiny@1", make_heads(), make_manifest(num_blocks=2))
    assert list(tmp_path.iterdir()) == []


def test_another_quantisation_is_a_notice(saved: Path) -> None:
    (notice,) = load(saved, quantization="none").notices
    assert notice.startswith("heads tiny@1 were trained on the backbone in int8 and it is served in its own precision")


def rewrite(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other tensors with a checksum that fits: wrong when they were published, not damaged later."""
    path = folder / "heads.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)
    record = FileRecord(sha256=checkpoint._sha256(path), size=path.stat().st_size)
    rewrite(folder, files={path.name: record.model_dump()})


def flip_a_bit(folder: Path) -> None:
    path = folder / "heads.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.truncate(f / "heads.safetensors", 100), r"100 bytes long, the manifest says \d{4}"),
        (flip_a_bit, "damaged: sha256 is [0-9a-f]{12}"),
        (lambda f: (f / "heads.safetensors").unlink(), "heads.safetensors: missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda f: (f / "manifest.json").write_bytes(b" " * (1 << 20) + b"{}"), "longer than"),
        (lambda f: rewrite(f, schema_version=9), "schema version 9 is not known, this release reads 1"),
        (lambda f: rewrite(f, files={}), "does not list heads.safetensors"),
        (lambda f: rewrite(f, num_blocks=2), r"bias is .*\[3, 1, 16\], the manifest says .*\[3, 2, 16\]"),
        (lambda f: rewrite(f, dtype="bfloat16"), "torch.float32 .* the manifest says torch.bfloat16"),
        (lambda f: rewrite(f, projection="own"), r"holds tensors \['bias', 'weight'\], expected .*projection"),
        (lambda f: rewrite(f, hidden_size=32), "hidden_size of the heads is 32, of the backbone 16"),
        (lambda f: rewrite(f, vocab_size=24), "vocab_size of the heads is 24, of the backbone 23"),
        (lambda f: replace_tensors(f, lambda t: t.pop("bias")), "holds tensors"),
        (
            lambda f: replace_tensors(f, lambda t: t["weight"].view(-1)[5:6].fill_(torch.nan)),
            "weight holds values that",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(saved: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(saved)
    with pytest.raises(HeadsError, match=message) as raised:
        load(saved)
    assert "\n" not in str(raised.value)
    assert str(saved) in str(raised.value)


def test_a_file_that_is_no_safetensors_is_refused(saved: Path) -> None:
    path = saved / "heads.safetensors"
    path.write_bytes(b"not tensors")
    rewrite(saved, files={path.name: {"sha256": checkpoint._sha256(path), "size": path.stat().st_size}})
    with pytest.raises(HeadsError, match="not a readable safetensors file"):
        load(saved)


def test_heads_of_another_backbone_are_refused(saved: Path) -> None:
    with pytest.raises(HeadsError, match=r"trained for Tiny \(abababababab\), this backbone is cdcdcdcdcdcd"):
        load(saved, backbone_identity="cd" * 32)


def test_a_store_leads_to_its_latest_version(saved: Path) -> None:
    store = saved.parent
    assert resolve_heads(saved) == saved
    with pytest.raises(HeadsError, match=r"no manifest\.json and no latest"):
        resolve_heads(store)
    (store / "latest").write_text("tiny@1\n")
    assert resolve_heads(store) == saved
    (store / "latest").write_text("tiny@2\n")
    with pytest.raises(HeadsError, match="names tiny@2, which has no manifest"):
        resolve_heads(store)
    with pytest.raises(HeadsError, match="no such folder"):
        resolve_heads(store / "elsewhere")


@pytest.mark.parametrize("name", ["../other/tiny@1", "/tiny@1", "tiny", "tiny@1/..", "tiny@1\nx@2", "", "\0"])
def test_latest_names_a_version_and_nothing_else(saved: Path, name: str) -> None:
    (saved.parent / "latest").write_text(name)
    with pytest.raises(HeadsError, match="not the name of a version"):
        resolve_heads(saved.parent)


def test_latest_does_not_lead_outside_the_store(saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    saved.rename(outside)
    saved.symlink_to(outside)
    (saved.parent / "latest").write_text("tiny@1")
    with pytest.raises(HeadsError, match="leads outside the store"):
        resolve_heads(saved.parent)


def make_hydra(**shape: Any) -> HydraHeads:
    torch.manual_seed(0)
    heads = HydraHeads(HydraShape(hidden_size=HIDDEN, num_heads=HEADS, num_blocks=2, **shape))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


HYDRA_OFFSETS = tuple(range(2, HEADS + 2))
DRAFT_TOKENS = torch.tensor([2, 5, 6, 22])


def same_weights(heads: DraftHeads, loaded: DraftHeads) -> bool:
    mine, theirs = dict(heads.named_parameters()), dict(loaded.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"normalised": False},
        {"normalised": False, "matrix_residual": True, "own_projection": VOCAB, "projection_bias": True},
        {"own_projection": VOCAB},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hydra_heads_are_loaded_as_saved(tmp_path: Path, shape: dict[str, Any], dtype: str) -> None:
    heads = make_hydra(**shape).to(getattr(torch, dtype))
    manifest = make_manifest(**family_fields(heads), offsets=HYDRA_OFFSETS, dtype=dtype)
    save_heads(tmp_path / "tiny@1", heads, manifest)
    loaded = read_heads(tmp_path / "tiny@1").heads
    assert isinstance(loaded, HydraHeads)
    assert loaded.shape == heads.shape
    assert same_weights(heads, loaded)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    wide = load(tmp_path / "tiny@1").heads
    assert same_weights(heads.float(), wide)
    hidden, embeddings, lm_head = torch.randn(2, HIDDEN), torch.randn(2, HEADS, HIDDEN), torch.randn(VOCAB, HIDDEN)
    with torch.no_grad():
        ours, theirs = (h(hidden, embeddings, lambda features: features @ lm_head.T) for h in (heads, wide))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_hydra_heads_of_another_shape_are_not_saved(tmp_path: Path) -> None:
    manifest = make_manifest(**family_fields(make_hydra()), offsets=HYDRA_OFFSETS)
    for heads in (make_hydra(normalised=False), make_hydra(matrix_residual=True), make_heads()):
        with pytest.raises(HeadsError, match="the manifest says"):
            save_heads(tmp_path / "tiny@1", heads, manifest)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_bytes", [1, 2 * HIDDEN * HIDDEN * 4, 4 * HIDDEN * HIDDEN * 4, 1 << 30])
def test_weights_in_several_files(tmp_path: Path, max_bytes: int) -> None:
    folder = tmp_path / "tiny@1"
    heads = make_hydra()
    manifest = make_manifest(**family_fields(heads), offsets=HYDRA_OFFSETS)
    written = save_heads(folder, heads, manifest, max_file_bytes=max_bytes)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *written.files}
    assert same_weights(heads, load(folder).heads)
    if max_bytes == 1 << 30:
        assert list(written.files) == ["heads.safetensors"]
        return
    num_tensors = len(list(heads.parameters()))
    names = list(written.files)
    assert names == [f"heads-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) == num_tensors if max_bytes == 1 else 1 < len(names) < num_tensors
    for name in names:
        tensors = load_file(folder / name)
        assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors.values()) <= max_bytes
    (folder / names[1]).unlink()
    with pytest.raises(HeadsError, match=f"{names[1]}: missing"):
        load(folder)
    rewrite(folder, files={name: written.files[name].model_dump() for name in names if name != names[1]})
    with pytest.raises(HeadsError, match=r"holds tensors .*, expected"):
        load(folder)


@pytest.mark.parametrize("own", [True, False])
def test_a_draft_vocabulary_is_kept_beside_the_weights(tmp_path: Path, own: bool) -> None:
    size = DRAFT_TOKENS.numel()
    heads = make_hydra(own_projection=size if own else None)
    manifest = make_manifest(**family_fields(heads), offsets=HYDRA_OFFSETS, draft_vocab_size=size)
    save_heads(tmp_path / "tiny@1", heads, manifest, draft_vocabulary=DRAFT_TOKENS)
    for loaded in (load(tmp_path / "tiny@1"), read_heads(tmp_path / "tiny@1")):
        assert loaded.draft_vocabulary is not None
        assert loaded.draft_vocabulary.dtype == torch.int64
        assert torch.equal(loaded.draft_vocabulary, DRAFT_TOKENS)
        assert same_weights(heads, loaded.heads)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, "the draft vocabulary has None tokens, the manifest says 4"),
        ([1, 2, 3], "has 3 tokens, the manifest says 4"),
        ([1, 2, 2, 3], "must be ascending token ids below 23"),
        ([3, 2, 1, 0], "must be ascending token ids below 23"),
        ([-1, 2, 3, 4], "must be ascending token ids below 23"),
        ([1, 2, 3, 23], "must be ascending token ids below 23"),
    ],
)
def test_draft_vocabularies_that_are_none(tmp_path: Path, tokens: list[int] | None, message: str) -> None:
    manifest = make_manifest(draft_vocab_size=4)
    vocabulary = None if tokens is None else torch.tensor(tokens)
    with pytest.raises(HeadsError, match=message):
        save_heads(tmp_path / "tiny@1", make_heads(), manifest, draft_vocabulary=vocabulary)
    assert list(tmp_path.iterdir()) == []


def test_a_draft_vocabulary_that_was_published_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "tiny@1"
    manifest = make_manifest(draft_vocab_size=4)
    save_heads(folder, make_heads(), manifest, draft_vocabulary=DRAFT_TOKENS)
    replace_tensors(folder, lambda t: t.update(draft_vocabulary=t["draft_vocabulary"].flip(0)))
    with pytest.raises(HeadsError, match=r"heads\.safetensors: draft_vocabulary must be ascending"):
        load(folder)
    replace_tensors(folder, lambda t: t.update(draft_vocabulary=torch.arange(4)))
    with pytest.raises(HeadsError, match=r"draft_vocabulary is torch.int64 \[4\], the manifest says torch.int32"):
        load(folder)
    replace_tensors(folder, lambda t: t.pop("draft_vocabulary"))
    with pytest.raises(HeadsError, match=r"expected .*draft_vocabulary"):
        load(folder)


def test_files_beside_the_weights_are_checked_like_them(tmp_path: Path) -> None:
    folder = tmp_path / "tiny@1"
    extra = {"README.md": b"# Heads\n", "accuracy.png": b"\x89PNG"}
    written = save_heads(folder, make_heads(), make_manifest(), extra_files=extra)
    assert set(written.files) == {"heads.safetensors", *extra}
    assert all((folder / name).read_bytes() == content for name, content in extra.items())
    assert verify_heads(folder) == written
    (folder / "README.md").write_bytes(b"# Beads\n")
    for check in (verify_heads, read_heads, load):
        with pytest.raises(HeadsError, match=r"README\.md: damaged"):
            check(folder)


@pytest.mark.parametrize("name", ["manifest.json", "heads.safetensors", "../up", ".hidden", "a/b", ""])
def test_files_beside_the_weights_have_names_of_their_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError):
        save_heads(tmp_path / "tiny@1", make_heads(), make_manifest(), extra_files={name: b""})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_read_without_a_backbone(saved: Path) -> None:
    loaded = read_heads(saved)
    assert same_weights(make_heads(), loaded.heads)
    assert loaded.manifest == read_manifest(saved)
    flip_a_bit(saved)
    with pytest.raises(HeadsError, match="damaged"):
        read_heads(saved)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tiny@1", True), ("a.b-c_d@2026.1", True), ("tiny", False), ("@1", False), (".tiny@1", False), ("a@b@c", False)],
)
def test_names_of_versions(name: str, expected: bool) -> None:
    assert is_version_folder(name) is expected
