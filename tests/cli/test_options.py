"""What the shared options make of each other, and what reaches the engine."""

import json
from functools import partial
from pathlib import Path

import click
import pytest
import torch
from cli.conftest import Gorgon
from cli.test_errors import one_line
from click.testing import CliRunner

from gorgon_cli.options import DRAFTERS, HEADS_TREES, KERNELS, EngineArguments, engine_options
from gorgon_engine.backbone.select import Kernels
from gorgon_engine.drafters import select
from gorgon_engine.drafters.select import DrafterKind, HeadsTree
from gorgon_engine.engine import EngineConfig
from gorgon_engine.heads.bundled import bundled_heads
from gorgon_engine.heads.checkpoint import save_heads
from gorgon_engine.heads.families import family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.identity import backbone_identity
from gorgon_protocol.manifest import HeadsManifest


def parsed(*arguments: str) -> EngineArguments:
    """What a command with these options is told."""
    told: list[EngineArguments] = []

    @click.command()
    @engine_options
    def command(engine_arguments: EngineArguments) -> None:
        told.append(engine_arguments)

    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return told[0]


def config(*arguments: str) -> EngineConfig:
    """What a command with these options builds."""
    return parsed(*arguments).config()


def test_choices_are_the_engines_own() -> None:
    assert tuple(DrafterKind) == DRAFTERS
    assert tuple(HeadsTree) == HEADS_TREES
    assert tuple(Kernels) == KERNELS


@pytest.mark.parametrize(
    ("arguments", "kernels", "graphs", "run_ahead"),
    [
        ((), Kernels.AUTO, True, True),
        (("--kernels", "triton", "--graphs"), Kernels.TRITON, True, True),
        (("--no-run-ahead",), Kernels.AUTO, True, False),
        (("--kernels", "torch", "--no-graphs"), Kernels.TORCH, False, True),
    ],
)
def test_kernels_and_graphs_reach_the_engine(
    arguments: tuple[str, ...], kernels: Kernels, graphs: bool, run_ahead: bool
) -> None:
    built = config(*arguments)
    assert (built.backbone.kernels, built.graphs, built.run_ahead) == (kernels, graphs, run_ahead)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), True),
        (("--kernels", "native"), True),
        (("--kernels", "triton"), False),
        (("--kernels", "torch"), False),
        (("--quantization", "nf4"), False),
        (("--device", "cuda"), False),
    ],
)
def test_threads_are_left_to_the_native_kernels_where_they_may_serve(
    arguments: tuple[str, ...], expected: bool
) -> None:
    assert parsed(*arguments).wants_native_kernels is expected


@pytest.mark.parametrize(
    ("arguments", "heads", "drafter"),
    [
        ((), None, None),
        (("--heads", "folder"), Path("folder"), None),
        (("--heads", "folder", "--drafter", "heads"), Path("folder"), DrafterKind.HEADS),
        (("--drafter", "both"), None, DrafterKind.BOTH),
        (("--heads", "none"), None, DrafterKind.NGRAM),
        (("--heads", "none", "--drafter", "ngram"), None, DrafterKind.NGRAM),
        (("--heads", "none", "--drafter", "none"), None, DrafterKind.NONE),
        (("--heads", "./none"), Path("none"), None),
    ],
)
def test_heads_none_leaves_what_needs_no_heads(
    arguments: tuple[str, ...], heads: Path | None, drafter: DrafterKind | None
) -> None:
    built = config(*arguments)
    assert (built.heads, built.drafter) == (heads, drafter)


@pytest.mark.parametrize("drafter", ["heads", "both"])
def test_a_drafter_of_heads_needs_some(gorgon: Gorgon, tiny: Path, drafter: str) -> None:
    status, out, err = gorgon(
        "generate", "--model", tiny, "--prompt", "a", "--heads", "none", "--drafter", drafter, "--max-tokens", 2
    )
    assert (status, out) == (1, "")
    assert f"--heads none leaves --drafter {drafter} no heads" in one_line(err)


def test_an_empty_value_is_no_choice(gorgon: Gorgon, tiny: Path) -> None:
    """An unset shell variable."""
    status, _, err = gorgon("generate", "--model", tiny, "--prompt", "a", "--heads", "")
    assert status == 1
    assert "--heads is empty" in one_line(err)


def test_the_default_is_named_in_the_help(gorgon: Gorgon) -> None:
    status, out, _ = gorgon("generate", "--help")
    assert status == 0
    assert "those that come with the program for this model." in " ".join(out.split())


def test_heads_of_the_program_serve_until_they_are_switched_off(
    gorgon: Gorgon, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken ones show who reads them: the command that serves them, and none that was told not to."""
    shape = BackboneConfig.from_folder(tiny)
    torch.manual_seed(0)
    heads = HydraHeads(HydraShape(hidden_size=shape.hidden_size, num_heads=2, num_blocks=1))
    fields = {
        "name": "tiny",
        "version": "1",
        "backbone": {"identity": backbone_identity(tiny), "name": "Tiny"},
        "vocab_size": shape.vocab_size,
        "offsets": (2, 3),
        "dtype": "float32",
        "quantization": "nf4",
    }
    save_heads(tmp_path / "tiny" / "tiny@1", heads, HeadsManifest.model_validate(fields | family_fields(heads)))
    (tmp_path / "tiny" / "latest").write_text("tiny@1\n")
    monkeypatch.setattr(select, "bundled_heads", partial(bundled_heads, store=tmp_path))

    def generate(*arguments: object) -> tuple[int, str, str]:
        return gorgon("generate", "--model", tiny, "--prompt", "the cat", "--max-tokens", 12, "--context", 100,
                      "--ignore-eos", "--json", *arguments)  # fmt: skip

    status, out, err = generate()
    assert (status, err) == (0, ""), "served in another precision than trained for, and nothing to say about it"
    expected = json.loads(out)["token_ids"]
    weights = tmp_path / "tiny" / "tiny@1" / "heads.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    status, _, err = generate()
    assert status == 1
    assert "heads.safetensors" in one_line(err)
    for arguments in (("--heads", "none"), ("--heads", "none", "--drafter", "none"), ("--drafter", "ngram")):
        status, out, _ = generate(*arguments)
        assert status == 0
        assert json.loads(out)["token_ids"] == expected
