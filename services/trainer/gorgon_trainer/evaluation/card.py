"""The model card of published heads: what they are, what they were made of and how well they do."""

from collections.abc import Mapping

from gorgon_protocol.manifest import HeadsManifest
from gorgon_trainer.evaluation.markdown import Cell, code, document, section, table
from gorgon_trainer.evaluation.report import ReportInputs, accuracy_table, lengths_table, time_table

CARD_FILE = "README.md"

_FAMILIES = {
    "medusa": (
        "Medusa heads ([2401.10774](https://arxiv.org/abs/2401.10774)): every head guesses one of the next tokens from "
        "the same hidden state"
    ),
    "hydra": (
        "Hydra heads ([2402.05109](https://arxiv.org/abs/2402.05109)): every head also sees the tokens drafted before "
        "it"
    ),
    "eagle": (
        "EAGLE heads ([2401.15077](https://arxiv.org/abs/2401.15077)): one decoder layer that predicts the backbone's "
        "hidden states, one after the other, from the tokens drafted so far"
    ),
}

_LIMITATIONS = """\
- They work with this backbone alone: its weights and tokenizer are checked by their hash when the heads are loaded.
- They only ever guess. Every guess is verified by the backbone, so the text is the backbone's own, with all its faults;
  on text unlike the training data fewer guesses are right, and answers come more slowly, never worse.
- Figures of greedy answers are flattered by answers that loop, as small models' do: see the figures without them.
- How much faster answers come depends on the machine, the load and the text. Tokens per step are not a speed."""


def model_card(manifest: HeadsManifest, inputs: ReportInputs, *, licence: str = "Apache-2.0") -> str:
    """Markdown with the metadata block that model hubs read.

    inputs: as for the report; its figures, commands, times and hardware are shown as far as they are given.
    """
    training = manifest.training
    settings: dict[str, Cell] = {**(training.settings if training else {}), **inputs.settings}
    return document(
        _metadata(manifest, licence),
        f"# {manifest.name}@{manifest.version}: draft heads for {manifest.backbone.name}",
        _what(manifest, licence),
        section("Figures", lengths_table(inputs), _accuracy(inputs)),
        section("How to use", _usage(manifest)),
        section("Training data", _training_data(manifest), _pairs(inputs.data)),
        section(
            "How it was made",
            code(inputs.commands) if inputs.commands else "",
            table(["", ""], inputs.hardware.rows()) if inputs.hardware else "",
            time_table(inputs),
            _pairs(settings),
            _pairs({**training.figures} if training else {}),
        ),
        section("Limitations", _LIMITATIONS),
    ).decode()


def _metadata(manifest: HeadsManifest, licence: str) -> str:
    lines = [
        f"license: {licence.lower()}",
        f"base_model: {manifest.backbone.name!r}",
        "library_name: gorgon",
        f"tags: [speculative-decoding, draft-heads, {manifest.family}]",
    ]
    return "\n".join(["---", *lines, "---"])


def _what(manifest: HeadsManifest, licence: str) -> str:
    vocabulary = (
        "all tokens can be drafted"
        if manifest.draft_vocab_size is None
        else f"the {manifest.draft_vocab_size:,} most frequent of {manifest.vocab_size:,} tokens can be drafted"
    )
    projection = "share the backbone's projection" if manifest.projection == "shared" else "have their own projections"
    size = sum(record.size for record in manifest.files.values())
    rows: list[tuple[str, Cell]] = [
        ("backbone", f"{manifest.backbone.name} ({manifest.backbone.identity[:12]})"),
        ("quantisation while training", manifest.quantization),
        ("depths" if manifest.family == "eagle" else "heads", manifest.num_heads),
        ("offsets", ", ".join(map(str, manifest.offsets))),
        ("decoder layers" if manifest.family == "eagle" else "residual blocks a head", manifest.num_blocks),
        ("precision", manifest.dtype),
        *([("files", f"{size / 1e6:.1f} MB")] if size else []),
        ("licence", licence),
    ]
    text = (
        f"{_FAMILIES[manifest.family]}. They {projection}; {vocabulary}. Offset 1 is the token that the backbone "
        "itself says next, offset d + 1 is depth d of the drafted tree."
    )
    return f"{text}\n\n{table(['', ''], rows)}"


def _accuracy(inputs: ReportInputs) -> str:
    accuracy = accuracy_table(inputs)
    return f"Share of held-out positions where the head's choice was the right token:\n\n{accuracy}" if accuracy else ""


def _usage(manifest: HeadsManifest) -> str:
    folder = f"{manifest.name}@{manifest.version}"
    commands = (
        f'gorgon probe "Once upon a time" --model MODEL --heads {folder}',
        f'gorgon generate --model MODEL --heads {folder} --chat --prompt "Hello!"',
    )
    return f"{code(commands)}\n\nMODEL is the backbone: a folder, or a name in `gorgon models list`."


def _training_data(manifest: HeadsManifest) -> str:
    said = manifest.training.data if manifest.training else "Not recorded."
    return said if said.endswith(".") else f"{said}."


def _pairs(values: Mapping[str, Cell]) -> str:
    return table(["", ""], values.items()) if values else ""
