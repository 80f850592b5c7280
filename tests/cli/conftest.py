"""A tiny model with a tokenizer and a chat template, and the command line in this process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gorgon_cli.main import main
from support.models import tiny_llama
from support.vocabularies import CHATML, byte_level_bpe, save


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("cli") / "tiny", vocab_size=352, hidden_size=64)
    return save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def long(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for answers that last longer than a test."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("long") / "long"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    return folder


Gorgon = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gorgon(capfd: pytest.CaptureFixture[str]) -> Gorgon:
    """Run the command: (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run
