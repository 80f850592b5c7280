"""Publishing to folders and to fsspec's stores: whole or not at all, `latest` last, whatever happens on the way."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import fsspec
import pytest
import torch
from fsspec import AbstractFileSystem

from gorgon_engine.heads.checkpoint import read_manifest, resolve_heads, save_heads, verify_heads
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.heads.store import (
    backbone_folder,
    bundled_store,
    fetch_remote,
    list_versions,
    local_heads,
    next_version,
)
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import BackboneReference, HeadsManifest
from gorgon_trainer.publish import publish

HIDDEN = 16


def checkpoint(folder: Path, *, seed: int = 0, identity: str = "ab" * 32, **fields: Any) -> Path:
    torch.manual_seed(seed)
    heads = MedusaHeads(HIDDEN, num_heads=3)
    torch.nn.init.normal_(heads.weight)
    values: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "backbone": BackboneReference(identity=identity, name="org/Tiny model"),
        "hidden_size": HIDDEN,
        "vocab_size": 23,
        "num_heads": 3,
        "offsets": (2, 3, 4),
        "num_blocks": 1,
        "projection": "shared",
        "dtype": "float32",
        "quantization": "int8",
    }
    # Several files, so that there is a middle of an upload.
    save_heads(
        folder,
        heads,
        HeadsManifest(**(values | fields)),
        max_file_bytes=3 * HIDDEN * HIDDEN * 4,
        extra_files={"report.md": b"# What it is\n"},
    )
    return folder


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "made" / "first")


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "made" / "second", seed=1, version="2")


class Bucket(AbstractFileSystem):
    """An object store that keeps its objects in a folder, where a test can damage them, and that can break down."""

    protocol = "bucket"
    cachable = False
    root: ClassVar[Path]
    puts_left: ClassVar[int]

    def place(self, path: str) -> Path:
        return self.root / self._strip_protocol(path).lstrip("/")

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        type(self).puts_left -= 1
        if self.puts_left < 0:
            raise _GoneError("the store is gone\n  request 17")
        self.place(path).parent.mkdir(parents=True, exist_ok=True)
        self.place(path).write_bytes(value)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        place = self.place(path)
        if not place.exists():
            raise FileNotFoundError(path)
        found = sorted(place.iterdir()) if place.is_dir() else [place]
        return [
            {
                "name": str(entry.relative_to(self.root)),
                "size": entry.stat().st_size,
                "type": "directory" if entry.is_dir() else "file",
            }
            if detail
            else str(entry.relative_to(self.root))
            for entry in found
        ]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> BinaryIO:
        if mode != "rb":
            raise NotImplementedError("objects are put whole")
        return self.place(path).open("rb")


class _GoneError(Exception):
    """As client libraries have them: of no family that we know."""


@pytest.fixture
def bucket(tmp_path: Path) -> type[Bucket]:
    """The class behind `bucket://`: how many writes it still takes, and the folder that it keeps."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    Bucket.root = tmp_path / "bucket"
    Bucket.root.mkdir()
    Bucket.puts_left = 1000
    return Bucket


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of an empty store in this process's memory."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield "memory://heads"
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


STORES = ["folder", "file", "memory", "bucket"]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("memory", "bucket"):
        fixture = request.getfixturevalue(request.param)
        return str(fixture) if request.param == "memory" else "bucket://heads"
    return ("" if request.param == "folder" else "file://") + str(tmp_path / "store")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GORGON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


BACKBONE = "org--Tiny-model"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_published_is_found_through_latest(store: str, first: Path, second: Path) -> None:
    place = publish(first, store)
    assert place == f"{store}/{BACKBONE}/tiny@1"
    assert files(local_heads(place)) == files(first)
    assert files(local_heads(f"{store}/{BACKBONE}")) == files(first)
    publish(second, store, BACKBONE)
    assert files(local_heads(f"{store}/{BACKBONE}")) == files(second)
    listed = [(heads.backbone, heads.version, heads.is_latest) for heads in list_versions(store)]
    assert listed == [(BACKBONE, "tiny@1", False), (BACKBONE, "tiny@2", True)]
    assert [heads.manifest for heads in list_versions(f"{store}/{BACKBONE}")] == [
        read_manifest(first),
        read_manifest(second),
    ]


def test_latest_stays_where_it_is_told_to(store: str, first: Path, second: Path) -> None:
    publish(first, store)
    publish(second, store, move_latest=False)
    assert [(heads.version, heads.is_latest) for heads in list_versions(store)] == [("tiny@1", True), ("tiny@2", False)]


def test_a_version_is_never_overwritten(store: str, first: Path, tmp_path: Path) -> None:
    publish(first, store)
    other = checkpoint(tmp_path / "made" / "other", seed=2)
    with pytest.raises(HeadsError, match=r"tiny@1: exists already: .* give a new version") as raised:
        publish(other, store)
    assert "\n" not in str(raised.value)
    assert files(local_heads(f"{store}/{BACKBONE}")) == files(first)
    assert publish(other, store, version="next") == f"{store}/{BACKBONE}/tiny@2"
    published = local_heads(f"{store}/{BACKBONE}")
    assert verify_heads(published).version == "2"
    assert {name: content for name, content in files(published).items() if name != "manifest.json"} == {
        name: content for name, content in files(other).items() if name != "manifest.json"
    }


def test_the_same_checkpoint_again_moves_latest_alone(store: str, first: Path, second: Path) -> None:
    publish(first, store)
    publish(second, store)
    publish(first, store)
    assert [(heads.version, heads.is_latest) for heads in list_versions(store)] == [("tiny@1", True), ("tiny@2", False)]


def test_versions_count_upwards(store: str, tmp_path: Path) -> None:
    assert next_version(store, BACKBONE, "tiny") == "1"
    for version in ("1", "9", "10", "2026.1"):
        publish(checkpoint(tmp_path / "made" / version, version=version), store)
    publish(checkpoint(tmp_path / "made" / "other", name="other", version="70"), store)
    assert next_version(store, BACKBONE, "tiny") == "11"
    assert [heads.version for heads in list_versions(store)] == [
        "other@70",
        "tiny@1",
        "tiny@9",
        "tiny@10",
        "tiny@2026.1",
    ]


def test_heads_of_another_backbone_do_not_get_behind_latest(store: str, first: Path, tmp_path: Path) -> None:
    publish(first, store)
    other = checkpoint(tmp_path / "made" / "other", identity="cd" * 32, version="2")
    with pytest.raises(
        HeadsError, match=r"holds heads for org/Tiny model \(abababababab\), these .* folder of its own"
    ):
        publish(other, store)
    assert len(list_versions(store)) == 1
    publish(other, store, "Tiny-again")
    assert len(list_versions(store)) == 2


def test_only_what_the_manifest_lists_is_published(store: str, first: Path) -> None:
    (first / "notes.txt").write_text("private")
    assert "notes.txt" not in files(local_heads(publish(first, store)))


def test_a_checkpoint_that_is_not_whole_is_not_published(store: str, first: Path) -> None:
    (first / "report.md").write_bytes(b"# What it it\n")
    with pytest.raises(HeadsError, match=r"report\.md: damaged"):
        publish(first, store)
    with pytest.raises(HeadsError, match="no such store"):
        list_versions(store)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "tiny@1", "x" * 129, "a b", "a\n"])
def test_backbone_folders_are_safe_names(tmp_path: Path, first: Path, name: str) -> None:
    with pytest.raises(HeadsError, match="cannot be a backbone's folder"):
        publish(first, str(tmp_path / "store"), name)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("version", ["", "a/b", "../1", "1@2", ".1", "v" * 65, "1\n"])
def test_versions_are_safe_names(tmp_path: Path, first: Path, version: str) -> None:
    with pytest.raises(HeadsError, match="cannot be a folder's name"):
        publish(first, str(tmp_path / "store"), version=version)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama--Meta-Llama-3-8B-Instruct"),
        ("../up", "up"),
        ("a b@1\n", "a-b-1-"),
        ("模型", "backbone"),
        ("x" * 200, "x" * 128),
    ],
)
def test_every_backbone_has_a_folder(name: str, folder: str, tmp_path: Path) -> None:
    assert backbone_folder(name) == folder
    reference = BackboneReference(identity="ab" * 32, name=name)
    place = publish(checkpoint(tmp_path / "made", backbone=reference), str(tmp_path / "store"))
    assert place == f"{tmp_path / 'store'}/{folder}/tiny@1"


def test_stores_that_cannot_be_used(tmp_path: Path, first: Path) -> None:
    (tmp_path / "file").touch()
    for store, message in (
        ("", "an empty name is no place"),
        (str(tmp_path / "file"), "cannot be written: Not a directory|cannot be written: File exists"),
        ("nosuch://bucket", "nosuch://bucket: cannot be opened: Protocol not known: nosuch"),
        ("http://127.0.0.1:9/heads", "127.0.0.1:9/heads"),
    ):
        with pytest.raises(HeadsError, match=message) as raised:
            publish(first, store)
        assert "\n" not in str(raised.value)


def test_a_store_whose_package_is_missing(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # Python's own way to make an import fail
    with pytest.raises(HeadsError, match=r"s3://bucket/heads: cannot be opened: its Python package is missing: .*s3fs"):
        publish(first, "s3://bucket/heads")


def test_a_password_in_a_url_is_not_shown(first: Path) -> None:
    with pytest.raises(HeadsError) as raised:
        publish(first, "nosuch://user:secret@host/heads")
    assert "secret" not in str(raised.value)


def test_a_store_that_breaks_down_at_every_point(bucket: type[Bucket], first: Path, second: Path) -> None:
    """Readers find a whole checkpoint at any time, and the next attempt makes good what is half there."""
    publish(first, "bucket://heads")
    num_puts = len(files(second)) + 1
    for puts in range(num_puts):
        bucket.puts_left = puts
        with pytest.raises(HeadsError, match="cannot be written: the store is gone request 17"):
            publish(second, "bucket://heads")
        assert files(local_heads(f"bucket://heads/{BACKBONE}")) == files(first)
        whole = puts >= num_puts - 1
        assert next_version("bucket://heads", BACKBONE, "tiny") == ("3" if whole else "2")
        assert len(list_versions("bucket://heads")) == (2 if whole else 1)
    bucket.puts_left = num_puts
    publish(second, "bucket://heads")
    assert files(local_heads(f"bucket://heads/{BACKBONE}")) == files(second)


def test_a_half_upload_of_something_else_is_replaced(bucket: type[Bucket], first: Path, tmp_path: Path) -> None:
    bucket.puts_left = 2
    with pytest.raises(HeadsError):
        publish(first, "bucket://heads")
    bucket.puts_left = 100
    other = checkpoint(tmp_path / "made" / "other", seed=3)
    assert files(local_heads(publish(other, "bucket://heads"))) == files(other)


def test_what_arrives_short_is_noticed(bucket: type[Bucket], first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Bucket, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes()[:-1])

    monkeypatch.setattr(bucket, "put_file", cut)
    with pytest.raises(HeadsError, match=r"bytes arrived of \d+: publish again"):
        publish(first, "bucket://heads")
    assert list_versions("bucket://heads") == ()


def test_remote_heads_are_fetched_once_and_checked(bucket: type[Bucket], first: Path, cache: Path) -> None:
    place = publish(first, "bucket://heads")
    folder = fetch_remote(place)
    assert folder.is_relative_to(cache)
    remote = bucket.root / "heads" / BACKBONE / "tiny@1"
    weights = "heads-00001-of-00002.safetensors"
    (remote / weights).unlink()
    assert fetch_remote(place) == folder, "from the cache"
    (folder / "report.md").write_text("damaged")
    with pytest.raises(HeadsError, match=r"cannot be fetched: .*No such file"):
        fetch_remote(place)
    (remote / weights).write_bytes((first / weights).read_bytes()[:-1] + b"!")
    with pytest.raises(HeadsError, match=f"{place}/{weights}: damaged"):
        fetch_remote(place)
    shutil.copyfile(first / weights, remote / weights)
    assert files(fetch_remote(place)) == files(first)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny@1"]


def test_remote_places_without_heads(bucket: type[Bucket], first: Path, second: Path) -> None:
    with pytest.raises(HeadsError, match=r"has no manifest\.json and no latest"):
        local_heads("bucket://heads/nowhere")
    publish(first, "bucket://heads")
    latest = bucket.root / "heads" / BACKBONE / "latest"
    latest.write_text("../tiny@1\n")
    with pytest.raises(HeadsError, match=r"latest: '\.\./tiny@1' is not the name of a version"):
        local_heads(f"bucket://heads/{BACKBONE}")
    latest.write_text("tiny@5\n")
    with pytest.raises(HeadsError, match=r"tiny@5: has no manifest\.json"):
        local_heads(f"bucket://heads/{BACKBONE}")
    publish(second, "bucket://heads")
    assert local_heads(f"bucket://heads/{BACKBONE}").name == "tiny@2", "publishing mends a damaged latest"


def test_a_damaged_version_is_listed_with_its_fault(store: str, first: Path, second: Path) -> None:
    publish(first, store)
    publish(second, store)
    filesystem, path = fsspec.core.url_to_fs(store if "://" in store else f"file://{store}")
    filesystem.pipe_file(f"{path}/{BACKBONE}/tiny@1/manifest.json", b"{")
    broken, whole = list_versions(store)
    assert (broken.manifest, whole.fault) == (None, None)
    assert "not valid JSON" in str(broken.fault)
    assert whole.manifest == read_manifest(second)


def test_the_store_that_comes_along() -> None:
    store = bundled_store()
    assert store is None or all(heads.fault is None for heads in list_versions(store))


_KILLED = """
import json, os, signal, sys
from pathlib import Path

from gorgon_engine.heads.checkpoint import resolve_heads, verify_heads
from gorgon_trainer.publish import publish

store, made = Path(sys.argv[1]), Path(sys.argv[2])
folder = store / "org--Tiny-model"
publish(made / "first", str(store))


def child(kill_at):
    # Every way to change the store goes through one of these: opening for it, making, renaming, removing.
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile") and any(
            str(store) in os.fspath(a) for a in arguments if isinstance(a, (str, Path))
        ):
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)
    publish(made / "second", str(store))
    os._exit(0)


report = []
for kill_at in range(1000):
    pid = os.fork()
    if pid == 0:
        child(kill_at)
    _, status = os.waitpid(pid, 0)
    latest = resolve_heads(folder)
    verify_heads(latest)
    versions = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    report.append([os.WIFSIGNALED(status), latest.name, versions])
    if not os.WIFSIGNALED(status):
        break
    if kill_at % 2:  # else the next attempt finds what this one left
        publish(made / "second", str(store))
        verify_heads(resolve_heads(folder))
        report[-1].append([resolve_heads(folder).name, sorted(p.name for p in folder.iterdir())])
        (folder / "latest").unlink()
        import shutil
        shutil.rmtree(folder / "tiny@2")
        publish(made / "first", str(store))
print(json.dumps(report))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_publisher_killed_at_every_step(tmp_path: Path, first: Path, second: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "store"), str(first.parent)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *killed, last = json.loads(done.stdout)
    assert len(killed) > 10, "there is a way to go to a published checkpoint"
    assert all(entry[0] for entry in killed)
    assert {entry[1] for entry in killed} == {"tiny@1"}, "latest is the last thing that changes"
    assert {"tiny@2" in entry[2] for entry in killed} == {True, False}, "killed before and behind the rename"
    for entry in killed:
        if len(entry) > 3:
            assert entry[3] == ["tiny@2", ["latest", "tiny@1", "tiny@2"]], "the next attempt leaves nothing behind"
    assert last[:2] == [False, "tiny@2"]


_CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0

if _CAN_MOUNT:  # a real small disk; elsewhere only the tests above

    def test_a_disk_that_fills_up(tmp_path: Path, first: Path, second: Path) -> None:
        script = (
            "import sys\n"
            "from pathlib import Path\n"
            "from gorgon_protocol.errors import HeadsError\n"
            "from gorgon_engine.heads.checkpoint import resolve_heads, verify_heads\n"
            "from gorgon_trainer.publish import publish\n"
            "publish(Path('made/first'), 'disk')\n"
            "try:\n"
            "    publish(Path('made/second'), 'disk')\n"
            "except HeadsError as error:\n"
            "    print(error)\n"
            f"folder = Path('disk/{BACKBONE}')\n"
            "verify_heads(resolve_heads(folder))\n"
            "print(resolve_heads(folder).name, *sorted(p.name for p in folder.iterdir()))\n"
        )
        (tmp_path / "disk").mkdir()
        shell = f'mount -t tmpfs -o size=28k tmpfs disk && exec {sys.executable} -c "$SCRIPT"'
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", shell],
            cwd=tmp_path, env=os.environ | {"SCRIPT": script}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        message, state = done.stdout.splitlines()
        assert "cannot be written: No space left on device: free some space" in message
        assert state == "tiny@1 latest tiny@1"


def test_a_slower_publisher_gives_way(tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = checkpoint(tmp_path / "made" / "other", seed=5)
    store = str(tmp_path / "store")
    copy: Callable[..., Any] = shutil.copyfile

    def overtaken(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(shutil, "copyfile", copy)
        publish(other, store)
        (tmp_path / "store" / BACKBONE / ".tiny@1.late.tmp").mkdir()
        return copy(other / "report.md", tmp_path / "store" / BACKBONE / ".tiny@1.late.tmp" / "x")

    monkeypatch.setattr(shutil, "copyfile", overtaken)
    with pytest.raises(HeadsError, match=r"tiny@1: cannot be written"):
        publish(first, store)
    assert files(resolve_heads(tmp_path / "store" / BACKBONE)) == files(other)
