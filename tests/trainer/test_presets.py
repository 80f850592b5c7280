"""Presets: sound in themselves, and the Llama-3-8B one dry-run on a random model of that shape."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gorgon_engine.heads.checkpoint import read_manifest, verify_heads
from gorgon_engine.models.catalog import CATALOG
from gorgon_trainer.data.builtin import BUILTIN
from gorgon_trainer.data.fetch import PACKAGED
from gorgon_trainer.pipeline import run_preset
from gorgon_trainer.presets import PRESETS
from gorgon_trainer.run_log import read_history
from support.vocabularies import CHATML, byte_level_bpe, save


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_together(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert preset.model in CATALOG or "/" in preset.model
    assert set(preset.prompts) <= set(PACKAGED) | set(BUILTIN)
    assert preset.train.pack_length >= preset.distill.context, "no answer is cut in two"
    assert preset.evaluation_tokens < preset.distill.context


def llama_3_shape(folder: Path) -> Path:
    """Random weights, two of the 32 layers, everything else as Llama-3-8B-Instruct's config says: 3 GB in bf16."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=128000,
        eos_token_id=[128001, 128009],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 22, generator=generator).to(torch.bfloat16) * 0.02
    for name, parameter in model.named_parameters():
        values = parameter.data.view(-1)
        if "norm" in name:
            values.fill_(1.0)
            continue
        for start in range(0, values.numel(), block.numel()):
            piece = values[start : start + block.numel()]
            piece.copy_(block[: piece.numel()].roll(start // block.numel()))
    model.save_pretrained(folder)
    return save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>", chat_template=CHATML)


@pytest.mark.full
def test_llama_3_8b_dry_run(tmp_path: Path) -> None:
    """Every stage of the preset in NF4, with fewer prompts and shorter answers."""
    preset = PRESETS["llama3-8b"]
    short = replace(
        preset,
        prompts=("questions",),
        limit=12,
        distill=replace(
            preset.distill, num_passes=1, max_new_tokens=6, context=96, max_turns=1, jobs_per_shard=8, num_slots=4
        ),
        train=replace(
            preset.train, pack_length=96, packs_per_batch=1, max_steps=2, warmup_steps=1, eval_every=2, save_every=2
        ),
        evaluation_prompts=1,
        evaluation_tokens=4,
        evaluation_nodes=(4,),
        evaluation_seeds=(),
        evaluation_slots=1,
    )
    said: list[str] = []
    folder = llama_3_shape(tmp_path / "Meta-Llama-3-8B-Instruct")
    checkpoint = Path(run_preset(short, tmp_path / "run", model=str(folder), device="cpu", say=said.append))
    manifest = verify_heads(checkpoint)
    assert manifest == read_manifest(checkpoint)
    assert (manifest.hidden_size, manifest.vocab_size, manifest.quantization) == (4096, 128256, "nf4")
    assert manifest.num_draft_tokens == preset.train.draft_vocab_size
    assert len(read_history(tmp_path / "run" / "run")) == 1
    assert any("tokens per step" in line for line in said)
