"""Hydra heads in the engine: drafts never change the tokens, and heads that are right are accepted."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.hydra import HydraDrafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.native import pack_for_cpu
from gorgon_engine.models.loading import Quantization
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import Request, SpeculationParams
from gorgon_engine.tokenizer import Tokenizer
from gorgon_engine.tree.builders import cartesian_paths
from support.models import tiny_llama
from support.vocabularies import byte_level_bpe, save

VOCAB, CONTEXT = 352, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("hydra") / "tiny", vocab_size=VOCAB)
    return save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>")


@pytest.fixture(scope="module", params=["fp32", "int8"])
def backbone(request: pytest.FixtureRequest, folder: Path) -> Backbone:
    options = {
        "fp32": BackboneOptions(dtype=torch.float32, kernels=Kernels.NATIVE, device="cpu"),
        "int8": BackboneOptions(quantization=Quantization.INT8, kernels=Kernels.NATIVE, device="cpu"),
    }
    return load_backbone(folder, options[request.param])[0]


def make_engine(folder: Path, backbone: Backbone, drafters: Sequence[Drafter], *, max_nodes: int = 16) -> Engine:
    config = EngineConfig(max_nodes=max_nodes, adaptive=False, num_slots=3, context=CONTEXT)
    tokenizer = Tokenizer.from_folder(folder)
    return Engine(backbone=backbone, tokenizer=tokenizer, drafters=drafters, config=config)


def answers(engine: Engine, sampling: SamplingParams, *, speculate: bool) -> tuple[list[list[int]], int, int]:
    """The tokens of four prompts that share three slots, the steps it took, and the accepted drafts."""
    prompts = ([5], [70, 71, 72, 70, 71, 72, 70], list(range(100, 140)), [300, 8, 8, 8])
    speculation = SpeculationParams(enabled=speculate)
    requests: list[Request] = [
        engine.request(prompt, replace(sampling, seed=number), speculation) for number, prompt in enumerate(prompts)
    ]
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    steps = accepted = 0
    for event in engine.generate(*requests):
        if isinstance(event, TokenEvent):
            tokens[event.request_id] += event.token_ids
        elif isinstance(event, FinishedEvent):
            steps += event.metrics.num_spec_steps
            accepted += event.metrics.num_accepted_draft_tokens
    return list(tokens.values()), steps, accepted


def random_drafters(backbone: Backbone) -> Iterator[list[Drafter]]:
    """Random heads of several kinds, alone and beside a lookup."""
    said = torch.arange(3, VOCAB, 2)
    shapes: list[dict[str, Any]] = [
        {"normalised": True},
        {"normalised": False, "matrix_residual": True, "own_projection": said.numel(), "projection_bias": True},
    ]
    for number, shape in enumerate(shapes):
        torch.manual_seed(number)
        size = backbone.config.hidden_size
        heads = HydraHeads(HydraShape(hidden_size=size, num_heads=4, num_blocks=2, **shape)).requires_grad_(False)
        for parameter in heads.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        options: list[dict[str, Any]] = [
            {},
            {"limits": BeamLimits(num_choices=6, width=4, min_path_prob=0.1)},
            {"paths": cartesian_paths([4, 2, 1, 1], 100)},
        ]
        packed = pack_for_cpu(heads, backbone)
        for option in options:
            drafter = HydraDrafter(
                packed, embed=backbone.embed, project=backbone.project_to(said), draft_vocabulary=said, **option
            )
            yield [drafter]
        yield [drafter, NgramDrafter()]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_random_heads_change_nothing(folder: Path, backbone: Backbone, temperature: float) -> None:
    sampling = SamplingParams(max_tokens=24, temperature=temperature, ignore_eos=True)
    expected, _, _ = answers(make_engine(folder, backbone, ()), sampling, speculate=False)
    for drafters, max_nodes in zip(random_drafters(backbone), (16, 30, 3, 16, 2, 16, 30, 16), strict=True):
        engine = make_engine(folder, backbone, drafters, max_nodes=max_nodes)
        assert answers(engine, sampling, speculate=True)[0] == expected


@pytest.fixture(scope="module")
def successor(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The same model without attention and MLP: a token alone says which one follows."""
    copy = tmp_path_factory.mktemp("successor") / "tiny"
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_heads_that_are_right_are_accepted(successor: Path, kind: str, temperature: float) -> None:
    """Weights that copy the embedding of the last drafted token: what the backbone itself will compute there."""
    quantization = Quantization.INT8 if kind == "int8" else Quantization.NONE
    options = BackboneOptions(quantization=quantization, dtype=torch.float32, kernels=Kernels.NATIVE, device="cpu")
    backbone, _ = load_backbone(successor, options)
    size = backbone.config.hidden_size
    heads = HydraHeads(HydraShape(hidden_size=size, num_heads=3, num_blocks=2, matrix_residual=True))
    heads.requires_grad_(False)
    for name, parameter in heads.named_parameters():
        parameter.fill_(1.0 if name == "norm" else 0.0)
        if name.endswith("residual.weight"):
            parameter[:, -size:].fill_diagonal_(1.0)
    packed = pack_for_cpu(heads, backbone)
    sampling = SamplingParams(max_tokens=41, temperature=temperature, ignore_eos=True)
    expected, _, _ = answers(make_engine(successor, backbone, ()), sampling, speculate=False)
    assert len({token for row in expected for token in row}) > 10
    # The likeliest chain, and a tree with room for what the temperature draws instead.
    for paths, max_nodes in (([(0,), (0, 0), (0, 0, 0)], 4), (None, 60)):
        drafter = HydraDrafter(packed, embed=backbone.embed, project=backbone.project, paths=paths)
        engine = make_engine(successor, backbone, [drafter], max_nodes=max_nodes)
        tokens, steps, accepted = answers(engine, sampling, speculate=True)
        assert tokens == expected
        if temperature > 0.0:
            assert accepted / steps > 0.5
        elif kind == "fp32":
            assert (steps, accepted) == (4 * 10, 4 * 30), "all three guesses of every step"
        else:  # int8 rounds the heads' inputs, as it does not round the backbone's embeddings
            assert accepted / steps > 2.5
