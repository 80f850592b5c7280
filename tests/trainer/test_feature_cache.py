"""Cached features are the computed ones, and are made again where they are missing or of something else."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gorgon_engine.backbone.base import Backbone
from gorgon_protocol.errors import DataError
from gorgon_trainer import feature_cache
from gorgon_trainer.dataset import PackedDataset, collate
from gorgon_trainer.feature_cache import CachedFeatures, ComputedFeatures
from gorgon_trainer.shards import ShardSet
from support.training import CAN_MOUNT, run_killed, run_on_small_disk

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"pack_length": 32, "offsets": (2, 3)}


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_PACKS_PER_FILE", 5)


@pytest.fixture
def dataset(cycles: ShardSet) -> PackedDataset:
    return PackedDataset(cycles.sequences("train"), pack_length=32, offsets=(2, 3))


def made(folder: Path, dataset: PackedDataset, backbone: Backbone, fingerprint: str = "x") -> CachedFeatures:
    cached = CachedFeatures(folder, dataset, backbone, fingerprint=fingerprint)
    cached.fill(progress=False)
    return cached


def age(folder: Path) -> None:
    """Make every file old, so that those written from now on can be told."""
    for path in folder.iterdir():
        os.utime(path, (1, 1))


def numbers(folder: Path, *, new: bool = False) -> set[int]:
    """Of the files that are there. new: written since `age`."""
    paths = [path for path in folder.iterdir() if not new or path.stat().st_mtime > 1]
    return {int(path.stem.removeprefix("features-")) for path in paths}


def script(cycles: ShardSet, model: Path, folder: str, then: str) -> str:
    """A process that fills a cache, its backbone wrapped by `when`."""
    return (
        "from pathlib import Path\n"
        "from gorgon_protocol.errors import DataError\n"
        "from gorgon_trainer import feature_cache\n"
        "from gorgon_trainer.dataset import PackedDataset\n"
        "from gorgon_trainer.shards import ShardSet\n"
        "from support.training import load_fp32, mortal\n"
        "feature_cache._PACKS_PER_FILE = 5\n"
        f"folder = Path({folder!r})\n"
        f"dataset = PackedDataset(ShardSet.open(Path({str(cycles.folder)!r})).sequences('train'), **{OPTIONS!r})\n"
        f"backbone = load_fp32(Path({str(model)!r}))\n"
        f"{then}\n"
    )


@pytest.mark.parametrize("packs", [[0], [7, 1, 23], [4, 5], [3, 3], list(range(24))])
def test_cached_is_computed(tmp_path: Path, dataset: PackedDataset, small_backbone: Backbone, packs: list[int]) -> None:
    assert len(dataset) == 24
    cached = made(tmp_path / "features", dataset, small_backbone)
    assert cached.num_files == 5
    batch = collate([dataset[pack] for pack in packs])
    hidden = cached.hidden(batch, packs)
    assert torch.equal(hidden, ComputedFeatures(small_backbone).hidden(batch, packs))
    assert hidden.shape == (32 * len(packs), small_backbone.config.hidden_size)
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == [
        f"features-{number:05d}.safetensors" for number in range(5)
    ]


def test_what_is_there_is_not_made_again(tmp_path: Path, dataset: PackedDataset, small_backbone: Backbone) -> None:
    made(tmp_path, dataset, small_backbone)
    age(tmp_path)
    made(tmp_path, dataset, small_backbone)
    assert numbers(tmp_path, new=True) == set()

    lost, cut = tmp_path / "features-00001.safetensors", tmp_path / "features-00003.safetensors"
    contents = lost.read_bytes(), cut.read_bytes()
    lost.unlink()
    cut.write_bytes(contents[1][:-9])
    os.utime(cut, (1, 1))
    made(tmp_path, dataset, small_backbone)
    assert numbers(tmp_path, new=True) == {1, 3}
    assert (lost.read_bytes(), cut.read_bytes()) == contents


def test_features_of_something_else_are_made_again(
    tmp_path: Path, cycles: ShardSet, dataset: PackedDataset, small_backbone: Backbone
) -> None:
    made(tmp_path, dataset, small_backbone)
    age(tmp_path)
    made(tmp_path, dataset, small_backbone, fingerprint="y")
    assert numbers(tmp_path, new=True) == {0, 1, 2, 3, 4}

    longer = PackedDataset(cycles.sequences("train"), pack_length=64, offsets=(2, 3))
    cached = made(tmp_path, longer, small_backbone, fingerprint="y")
    batch = collate([longer[2]])
    assert torch.equal(cached.hidden(batch, [2]), ComputedFeatures(small_backbone).hidden(batch, [2]))


def test_several_processes_make_a_share_each(tmp_path: Path, dataset: PackedDataset, small_backbone: Backbone) -> None:
    cached = CachedFeatures(tmp_path, dataset, small_backbone, fingerprint="x")
    cached.fill(progress=False, rank=1, world_size=2)
    assert numbers(tmp_path) == {1, 3}
    cached.fill(progress=False, rank=0, world_size=2)
    assert numbers(tmp_path) == {0, 1, 2, 3, 4}
    batch = collate([dataset[pack] for pack in range(24)])
    assert torch.equal(cached.hidden(batch, range(24)), ComputedFeatures(small_backbone).hidden(batch, range(24)))


def test_a_killed_run_makes_what_is_missing(
    tmp_path: Path, cycles: ShardSet, dataset: PackedDataset, small_model: Path, small_backbone: Backbone
) -> None:
    then = (
        "second = folder / 'features-00001.safetensors'\n"
        "mortal_one = mortal(backbone, second.exists)\n"
        "feature_cache.CachedFeatures(folder, dataset, mortal_one, fingerprint='x').fill(progress=False)\n"
    )
    run_killed(script(cycles, small_model, str(tmp_path / "features"), then))
    assert numbers(tmp_path / "features") == {0, 1}
    age(tmp_path / "features")
    cached = made(tmp_path / "features", dataset, small_backbone)
    assert numbers(tmp_path / "features", new=True) == {2, 3, 4}
    batch = collate([dataset[pack] for pack in range(24)])
    assert torch.equal(cached.hidden(batch, range(24)), ComputedFeatures(small_backbone).hidden(batch, range(24)))


@pytest.mark.parametrize("damage", ["cut", "text", "other tensors", "gone"])
def test_a_file_damaged_under_way_is_named(
    tmp_path: Path, dataset: PackedDataset, small_backbone: Backbone, damage: str
) -> None:
    cached = made(tmp_path, dataset, small_backbone)
    path = tmp_path / "features-00001.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "text":
        path.write_text("no features")
    elif damage == "gone":
        path.unlink()
    else:
        save_file({"other": torch.zeros(3)}, path)
    batch = collate([dataset[7]])
    with pytest.raises(DataError, match="cannot be read: ") as caught:
        cached.hidden(batch, [7])
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be read: ")
    assert message.endswith(": remove it and start again")
    assert "\n" not in message


def test_a_place_that_cannot_be_written(tmp_path: Path, dataset: PackedDataset, small_backbone: Backbone) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/features: features cannot be written: Not a directory"):
        made(tmp_path / "file" / "features", dataset, small_backbone)


if CAN_MOUNT:

    def test_a_full_disk(tmp_path: Path, cycles: ShardSet, small_model: Path) -> None:
        then = (
            "try:\n"
            "    feature_cache.CachedFeatures(folder, dataset, backbone, fingerprint='x').fill(progress=False)\n"
            "except DataError as error:\n"
            "    print(error, *(path.name for path in folder.iterdir()), sep='|')\n"
        )
        printed = run_on_small_disk(tmp_path, 48, script(cycles, small_model, "disk/features", then))
        message, *files = printed.strip().split("|")
        assert message == "disk/features: features cannot be written: No space left on device"
        assert files == ["features-00000.safetensors"]
