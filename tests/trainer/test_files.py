"""Files and folders that appear whole or not at all, kills and failures included."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gorgon_trainer.files import folder_written_whole, restore_replaced, written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str, *, replace: bool = False) -> None:
    with folder_written_whole(folder, replace=replace) as made:
        (made / "a").write_text(text)


def kill_in_the_middle(body: str) -> None:
    """Run a script in a process of its own and kill it where it sleeps."""
    script = f"import os, time\nfrom pathlib import Path\nfrom gorgon_trainer.files import *\n{body}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def test_a_file_is_seen_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_block_that_raises_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with written_whole(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file[1]"  # no pattern
    path.write_text("old")
    body = "    file.write(b'half'); print('here', flush=True); time.sleep(60)"
    kill_in_the_middle(f"with written_whole(Path({str(path)!r})) as file:\n{body}")
    assert len(names(tmp_path)) == 2
    assert path.read_text() == "old"
    with written_whole(path) as file:
        file.write(b"new")
    assert names(tmp_path) == ["file[1]"]


def test_a_folder_is_seen_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    with folder_written_whole(folder) as made:
        (made / "a").write_text("1")
        assert not folder.exists()
    assert (folder / "a").read_text() == "1"
    assert names(folder.parent) == ["folder"]


def test_a_folder_with_contents_is_replaced_only_on_demand(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")
    with pytest.raises(OSError, match="not empty") as caught:
        fill(tmp_path / "folder", "new")
    assert caught.value.errno == errno.ENOTEMPTY
    assert (tmp_path / "folder" / "a").read_text() == "old"
    assert names(tmp_path) == ["folder"]
    fill(tmp_path / "folder", "new", replace=True)
    assert (tmp_path / "folder" / "a").read_text() == "new"
    assert names(tmp_path) == ["folder"]


def test_a_replacement_that_raises_leaves_the_earlier_folder(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")

    def failing() -> None:
        with folder_written_whole(tmp_path / "folder", replace=True) as made:
            (made / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert (tmp_path / "folder" / "a").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_replacement_killed_while_filling_leaves_the_earlier_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(folder, "old")
    body = "    print('here', flush=True); time.sleep(60)"
    kill_in_the_middle(f"with folder_written_whole(Path({str(folder)!r}), replace=True) as made:\n{body}")
    assert (folder / "a").read_text() == "old"
    fill(folder, "new", replace=True)
    assert names(tmp_path) == ["folder"]


def test_a_replacement_killed_between_its_renames_is_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(folder, "old")
    # The second rename never comes: the process sleeps in its place.
    body = (
        "rename = Path.rename\n"
        "def stop(self, target):\n"
        "    if self.name.endswith('.tmp'):\n"
        "        print('here', flush=True); time.sleep(60)\n"
        "    return rename(self, target)\n"
        "Path.rename = stop\n"
        f"with folder_written_whole(Path({str(folder)!r}), replace=True) as made:\n"
        "    (made / 'a').write_text('new')\n"
    )
    kill_in_the_middle(body)
    assert not folder.exists()
    restore_replaced(folder)
    assert (folder / "a").read_text() == "old"
    restore_replaced(folder)
    assert (folder / "a").read_text() == "old"
    fill(folder, "newer", replace=True)
    assert names(tmp_path) == ["folder"]
