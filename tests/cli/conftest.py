"""A tiny model with a tokenizer and a chat template, and the command line in this process."""

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
