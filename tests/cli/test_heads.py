"""`gorgon heads` as a person types it, on real checkpoints and stores."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from cli.conftest import Gorgon
from cli.test_errors import one_line
from safetensors.torch import save_file

from gorgon_cli import heads as command
from gorgon_engine.heads.checkpoint import read_heads, save_heads
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.families import DraftHeads, family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.identity import backbone_identity
from gorgon_protocol.manifest import BackboneReference, HeadsManifest, TrainingRecord
from gorgon_trainer.interop.convert import ExportFormat, ImportFormat


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GORGON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(folder: Path, tiny: Path, *, family: str = "medusa", **fields: Any) -> Path:
    """A checkpoint for the tiny model."""
    config = BackboneConfig.from_folder(tiny)
    torch.manual_seed(0)
    heads: DraftHeads = MedusaHeads(config.hidden_size, num_heads=3)
    if family == "hydra":
        heads = HydraHeads(HydraShape(hidden_size=config.hidden_size, num_heads=3, num_blocks=2, normalised=False))
    elif family == "eagle":
        heads = EagleHead(EagleShape(config.hidden_size, 8, 2, 8, 128, num_heads=3))
    values: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "backbone": BackboneReference(identity=backbone_identity(tiny), name="Tiny"),
        "vocab_size": config.vocab_size,
        "offsets": (2, 3, 4),
        "dtype": "float32",
        "quantization": "int8",
    }
    save_heads(folder, heads, HeadsManifest(**(values | family_fields(heads) | fields)))
    return folder


ACCURACIES = ((0.5, 0.1, 0.05, 0.02, 0.01, 0.0), (0.4, 0.1, 0.0, 0.0, 0.0, 0.0), (0.3, 0.0, 0.0, 0.0, 0.0, 0.0))
TREE = ((0,), (0, 0), (1,), (0, 0, 0), (1, 0), *((rank,) for rank in range(2, 40)))
TRAINING = TrainingRecord(
    data="chats\x1b[2J", settings={"learning_rate": 0.003}, figures={"tokens_per_step": 2.345, "seconds": 12.0}
)


@pytest.fixture
def trained(tmp_path: Path, tiny: Path) -> Path:
    return make(
        tmp_path / "trained", tiny, accuracies=ACCURACIES, recommended_tree=TREE, training=TRAINING, version="7"
    )


def test_choices_are_the_converters_own() -> None:
    assert list(command.IMPORT_FORMATS) == [str(choice) for choice in ImportFormat]
    assert list(command.EXPORT_FORMATS) == [str(choice) for choice in ExportFormat]


def test_help_needs_no_torch() -> None:
    script = (
        "import sys\nfrom gorgon_cli.main import main\n"
        "try:\n    main(['heads', 'import', '--help'])\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


def test_published_heads_are_listed(gorgon: Gorgon, trained: Path, tiny: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    hydra = make(tmp_path / "hydra", tiny, family="hydra", name="wide")
    assert gorgon("heads", "publish", trained, "--store", store) == (0, f"{store}/Tiny/tiny@7\n", "")
    status, out, _ = gorgon("heads", "publish", hydra, "--store", store, "--no-latest", "--version", "next")
    assert (status, out) == (0, f"{store}/Tiny/wide@1\n")
    status, out, err = gorgon("heads", "list", store)
    assert (status, err) == (0, "")
    title, first, second = (line.split() for line in out.splitlines())
    assert title == ["BACKBONE", "HEADS", "FAMILY", "NUMBER", "SIZE", "TOKENS/STEP"]
    assert first == ["Tiny", "tiny@7", "medusa", "3", "50.1", "kB", "2.35", "latest"]
    assert second[:4] == ["Tiny", "wide@1", "hydra", "3"]
    assert second[-1] == "-"
    entries = json.loads(gorgon("heads", "list", store, "--json")[1])
    assert [entry["version"] for entry in entries] == ["tiny@7", "wide@1"]
    assert [entry["is_latest"] for entry in entries] == [True, False]
    assert entries[0]["tokens_per_step"] == 2.345
    assert entries[0]["place"] == f"{store}/Tiny/tiny@7"


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ({"held_out_acceptance_length_32": 2.5}, 2.5),
        ({"held_out_acceptance_length_32": 2.5, "tokens_per_step": 2.4}, 2.4),
        ({"seconds": 12.0}, None),
    ],
)
def test_tokens_per_step_are_measured_or_predicted(
    gorgon: Gorgon, tiny: Path, tmp_path: Path, figures: dict[str, float], shown: float | None
) -> None:
    made = make(tmp_path / "made", tiny, training=TrainingRecord(data="x", figures=figures))
    gorgon("heads", "publish", made, "--store", tmp_path / "store")
    (entry,) = json.loads(gorgon("heads", "list", tmp_path / "store", "--json")[1])
    assert entry["tokens_per_step"] == shown


def test_the_default_list_is_of_the_cache(gorgon: Gorgon, trained: Path, cache: Path) -> None:
    assert gorgon("heads", "list")[0] == 0
    gorgon("heads", "publish", trained, "--store", cache / "heads", "--backbone", "Own-name")
    status, out, _ = gorgon("heads", "list", "--json")
    assert status == 0
    assert ("Own-name", "tiny@7") in [(entry["backbone"], entry["version"]) for entry in json.loads(out)]


def test_an_empty_store_says_so(gorgon: Gorgon, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, out, err = gorgon("heads", "list", tmp_path / "empty")
    assert (status, out) == (0, "")
    assert "no heads in" in one_line(err)
    assert gorgon("heads", "list", tmp_path / "empty", "--json")[1] == "[]\n"


def test_a_broken_version_is_listed_beside_the_others(gorgon: Gorgon, trained: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    gorgon("heads", "publish", trained, "--store", store)
    (store / "Tiny" / "tiny@8").mkdir()
    (store / "Tiny" / "tiny@8" / "manifest.json").write_text("{")
    status, out, _ = gorgon("heads", "list", store)
    assert status == 0
    assert "latest" in out.splitlines()[1]
    assert "unreadable: " in out.splitlines()[2]
    assert "not valid JSON" in json.loads(gorgon("heads", "list", store, "--json")[1])[1]["fault"]


def test_a_manifest_for_people(gorgon: Gorgon, trained: Path) -> None:
    status, out, err = gorgon("heads", "show", trained)
    assert (status, err) == (0, "")
    facts = {line[:18].strip(): line[18:].strip() for line in out.splitlines() if line[:18].strip()}
    assert facts["heads"] == "tiny@7"
    assert facts["family"] == "medusa"
    assert facts["offsets"] == "2 3 4"
    assert facts["parameters"] == f"{3 * (64 * 64 + 64):,}"
    assert facts["projection"] == "shared, 352 of 352 tokens"
    assert facts["files"] == "heads.safetensors (50.1 kB)"
    assert facts["training data"] == "chats [2J", "what a manifest says cannot control the terminal"
    assert facts["settings"] == "learning_rate = 0.003"
    assert facts["figures"] == "tokens_per_step = 2.345"
    assert facts["accuracy"].split() == ["top-1", "top-5"]
    assert facts["offset 2"].split() == ["0.500", "0.680"]
    lines = out.splitlines()
    tree = lines[next(i for i, line in enumerate(lines) if line.startswith("recommended tree")) :]
    assert tree[0].endswith("43 nodes, depth 3, the best 32 shown; ranks:")
    assert tree[1:7] == ["  0", "    0", "      0", "  1", "    0", "  2"]
    assert len(tree) == 33


def test_a_manifest_for_programs(gorgon: Gorgon, trained: Path) -> None:
    assert gorgon("heads", "show", trained, "--json") == (0, (trained / "manifest.json").read_text(), "")


def test_hydra_heads_are_shown_as_such(gorgon: Gorgon, tiny: Path, tmp_path: Path) -> None:
    _, out, _ = gorgon("heads", "show", make(tmp_path / "hydra", tiny, family="hydra"))
    assert "as they are, residual hidden" in out


def test_an_eagle_head_is_shown_verified_and_listed(gorgon: Gorgon, tiny: Path, tmp_path: Path) -> None:
    heads = make(tmp_path / "eagle", tiny, family="eagle")
    _, out, _ = gorgon("heads", "show", heads)
    facts = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert facts["family"] == "eagle"
    assert facts["shape"] == "one decoder layer for 3 depths, hidden size 64, float32"
    assert facts["attention"] == "8 query heads on 2 KV heads of 8"
    assert facts["MLP"] == "SwiGLU of 128"
    # 2 C C + C (8 + 4) 8 + 64 C + 3 C 128 + 5 C of a hidden size C of 64
    assert facts["parameters"] == f"{64 * (128 + 96 + 64 + 3 * 128 + 5):,}"
    status, out, _ = gorgon("heads", "verify", heads, "--model", tiny)
    assert (status, out.startswith("ok: tiny@1")) == (0, True)
    status, out, err = gorgon("heads", "export", heads, tmp_path / "out", "--format", "hydra")
    assert (status, out) == (1, "")
    assert "its heads are of the family eagle, for which there is no foreign layout yet" in one_line(err)


def test_remote_heads_are_shown_verified_and_listed(gorgon: Gorgon, trained: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    _, place, _ = gorgon("heads", "publish", trained, "--store", "memory://heads")
    assert place == "memory://heads/Tiny/tiny@7\n"
    for url in (place.strip(), "memory://heads/Tiny"):
        assert gorgon("heads", "show", url, "--json")[1] == (trained / "manifest.json").read_text()
    assert gorgon("heads", "verify", "memory://heads/Tiny") == (0, "ok: tiny@7: 1 file, 50.1 kB\n", "")
    assert "tiny@7" in gorgon("heads", "list", "memory://heads")[1]
    fsspec.filesystem("memory").store.clear()


def test_whole_heads_are_verified(gorgon: Gorgon, trained: Path, tiny: Path) -> None:
    assert gorgon("heads", "verify", trained) == (0, "ok: tiny@7: 1 file, 50.1 kB\n", "")
    status, out, _ = gorgon("heads", "verify", trained, "--model", tiny)
    assert (status, out) == (0, "ok: tiny@7: 1 file, 50.1 kB, fit tiny\n")


def test_heads_that_are_not_whole_or_do_not_fit(gorgon: Gorgon, trained: Path, tiny: Path, tmp_path: Path) -> None:
    foreign = make(tmp_path / "foreign", tiny, backbone=BackboneReference(identity="cd" * 32, name="Other"))
    assert gorgon("heads", "verify", foreign)[0] == 0
    status, out, err = gorgon("heads", "verify", foreign, "--model", tiny)
    assert (status, out) == (1, "")
    assert "heads of another backbone: trained for Other" in one_line(err)
    weights = trained / "heads.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    for arguments in (("verify", trained), ("publish", trained, "--store", tmp_path / "store")):
        status, out, err = gorgon("heads", *arguments)
        assert (status, out) == (1, "")
        assert "heads.safetensors: damaged" in one_line(err)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("show", "{tmp}/nowhere"), 1, "nowhere: no such folder"),
        (("show", "nosuch://x"), 1, "Protocol not known: nosuch"),
        (("show", ""), 1, "empty name"),
        (("list", "{tmp}/nowhere"), 1, "nowhere: no such store"),
        (("verify", "{heads}", "--model", ""), 1, "--model is empty"),
        (("verify", "{heads}", "--model", "{tmp}/nowhere"), 1, "no such model folder"),
        (("publish", "{heads}"), 2, "--store"),
        (("publish", "{heads}", "--store", "{tmp}/s", "--backbone", "a/b"), 1, "use a--b"),
        (("publish", "{heads}", "--store", "{tmp}/s", "--version", "a/b"), 1, "'a/b' cannot be a folder's name"),
        (("import", "{tmp}/nowhere", "{tmp}/out", "--model", "{model}"), 1, "nowhere: no such folder"),
        (("import", "{heads}", "{tmp}/out"), 2, "--model"),
        (("import", "{heads}", "{tmp}/out", "--model", "{model}", "--format", "eagle"), 2, "--format"),
        (("export", "{heads}", "{tmp}/out", "--format", "hydra"), 1, "its heads are of the family medusa"),
        (("export", "{heads}", "{tmp}/out", "--format", "medusa-v1"), 1, "give the model, or use medusa-v2"),
        (("export", "{heads}", "{heads}", "--format", "medusa-v2"), 1, "exists already"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    gorgon: Gorgon, trained: Path, tiny: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    given = [argument.format(tmp=tmp_path, heads=trained, model=tiny) for argument in arguments]
    code, out, err = gorgon("heads", *given)
    assert (code, out) == (status, "")
    assert message in one_line(err)


@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("medusa", "medusa-v1"),
        ("medusa", "medusa-v2"),
        ("medusa", "vllm-medusa"),
        ("hydra", "hydra"),
    ],
)
def test_heads_go_out_and_come_back(gorgon: Gorgon, tiny: Path, tmp_path: Path, family: str, format: str) -> None:
    heads = make(tmp_path / "heads", tiny, family=family)
    out = tmp_path / "My heads"
    assert gorgon("heads", "export", heads, out, "--format", format, "--model", tiny)[:2] == (0, f"{out}\n")
    status, text, _ = gorgon("heads", "import", out, tmp_path / "back", "--model", tiny, "--quantization", "int8")
    layout = format.removesuffix("-v1").removesuffix("-v2")
    assert (status, text) == (0, f"{tmp_path / 'back'}: 3 {family} heads from the layout {layout}\n")
    assert gorgon("heads", "verify", tmp_path / "back", "--model", tiny)[0] == 0
    first, back = read_heads(heads), read_heads(tmp_path / "back")
    assert (back.manifest.name, back.manifest.version, back.manifest.quantization) == ("My-heads", "1", "int8")
    for name, tensor in first.heads.named_parameters():
        assert torch.equal(tensor, back.heads.get_parameter(name))


def test_notices_of_an_import_are_told(gorgon: Gorgon, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "foreign"
    source.mkdir()
    (source / "config.json").write_text('{"medusa_num_heads": 2, "base_model_name_or_path": "org/\\u001b[2Jmodel"}')
    tensors = {f"{i}.0.linear.weight": torch.ones(64, 64) for i in range(3)}
    tensors |= {f"{i}.0.linear.bias": torch.ones(64) for i in range(3)}
    save_file(tensors, source / "medusa_lm_head.safetensors")
    status, _, err = gorgon(
        "heads", "import", source, tmp_path / "out", "--model", tiny, "--name", "mine", "--version", "3.1"
    )
    assert status == 0
    first, second = err.splitlines()
    assert first == "gorgon: its config counts 2 heads, the tensors are of 3: the tensors decide"
    assert second.startswith("gorgon: its config says that it was trained on org/ [2Jmodel")
    assert read_heads(tmp_path / "out").manifest.version == "3.1"
