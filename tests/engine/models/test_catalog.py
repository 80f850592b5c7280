import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gorgon_engine.models.catalog import CATALOG, resolve_model
from gorgon_protocol.errors import ModelNotFoundError

SCRIPT = """
import sys
from gorgon_engine.models.catalog import resolve_model
from gorgon_protocol.errors import ModelNotFoundError
try:
    print(resolve_model(sys.argv[1]))
except ModelNotFoundError as error:
    print("refused:", error)
"""


@pytest.fixture
def hub(tmp_path):
    """A hub cache with one repository, laid out as `huggingface_hub` does, and an offline process to resolve in it."""
    snapshot = tmp_path / "hub" / "models--org--tiny.model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)

    def resolve(name: str) -> str:
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", SCRIPT, name]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return snapshot, resolve


def test_a_catalogue_name_is_its_folder_once_fetched(tmp_path):
    for name in (None, "smollm2"):
        with pytest.raises(ModelNotFoundError, match="run `gorgon models fetch smollm2`"):
            resolve_model(name, cache_dir=tmp_path)
    folder = CATALOG["smollm2"].folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve_model(None, cache_dir=tmp_path) == resolve_model("smollm2", cache_dir=tmp_path) == folder


def test_a_folder_is_itself_even_if_it_looks_like_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model") == Path("org/model")
    assert resolve_model(tmp_path / "org") == tmp_path / "org"


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "nowhere", "a/b/c", "org/", "../up"])
def test_a_path_that_is_not_there_is_named(name):
    with pytest.raises(ModelNotFoundError, match=r"no such model folder; models known by name: smollm2") as caught:
        resolve_model(name)
    assert str(caught.value).startswith(name)


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFoundError, match="not a folder"):
        resolve_model(tmp_path / "model.gguf")


def test_a_cached_hub_model_needs_no_network(hub, tiny):
    snapshot, resolve = hub
    _, folder = tiny(shard_size="60KB")
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    (snapshot / "tokenizer.json").write_text("{}")
    assert resolve("org/tiny.model") == str(snapshot)


def test_an_incomplete_or_absent_hub_model_offline_is_one_line(hub, tiny):
    snapshot, resolve = hub
    _, folder = tiny(shard_size="60KB")
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    (snapshot / "tokenizer.json").write_text("{}")
    sorted(snapshot.glob("*.safetensors"))[1].unlink()
    answer = resolve("org/tiny.model")
    assert answer.startswith(f"refused: org/tiny.model: {snapshot} is incomplete: the hub cannot be reached")
    answer = resolve("org/absent")
    assert answer.startswith("refused: org/absent: no such folder here, and the Hugging Face hub cannot be reached")
    assert "\n" not in answer
