import json
import os

import pytest

from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.models.loading import load_weights
from gorgon_protocol.errors import ModelError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GORGON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_tokenizer(folder, vocab, indent=None):
    content = {"added_tokens": [{"content": "<s>", "id": 9}], "model": {"type": "BPE", "vocab": vocab}}
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=indent))


def test_it_is_the_same_for_the_same_model_wherever_it_lies(tiny, tmp_path):
    _, folder = tiny()
    identity = backbone_identity(folder)
    assert len(identity) == 64
    assert load_weights(folder).identity == identity
    moved = folder.rename(tmp_path / "elsewhere")
    assert backbone_identity(moved) == identity


def test_it_changes_with_weights_architecture_and_vocabulary(tiny, edit):
    _, folder = tiny()
    _, other = tiny(seed=5)
    identities = [backbone_identity(folder), backbone_identity(other)]
    edit(folder / "config.json", rms_norm_eps=1e-3)
    identities.append(backbone_identity(folder))
    edit(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    identities.append(backbone_identity(folder))
    write_tokenizer(folder, {"a": 0, "b": 1})
    identities.append(backbone_identity(folder))
    write_tokenizer(folder, {"a": 1, "b": 0, "c": 2})
    identities.append(backbone_identity(folder))
    assert len(set(identities)) == len(identities)


def test_it_does_not_change_with_what_is_not_computed(tiny, edit):
    _, folder = tiny()
    write_tokenizer(folder, {"a": 0, "b": 1})
    identity = backbone_identity(folder)
    edit(folder / "config.json", eos_token_id=5, dtype="bfloat16", transformers_version="9")
    write_tokenizer(folder, {"b": 1, "a": 0}, indent=2)
    assert backbone_identity(folder) == identity


def test_files_are_hashed_again_only_when_they_change(tiny, cache):
    _, folder = tiny()
    identity = backbone_identity(folder)
    (entry,) = (cache / "checksums").iterdir()
    known = json.loads(entry.read_text())
    entry.write_text(json.dumps(known | {"sha256": "believed"}))
    assert backbone_identity(folder) != identity  # taken from the cache
    status = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert backbone_identity(folder) == identity
    entry.write_text("damaged")
    assert backbone_identity(folder) == identity


def test_a_cache_that_cannot_be_written_is_done_without(tiny, cache):
    _, folder = tiny()
    cache.write_text("a file where the folder should be")
    assert len(backbone_identity(folder)) == 64


def test_a_broken_tokenizer_is_named(tiny):
    _, folder = tiny()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a readable tokenizer"):
        backbone_identity(folder)
