"""Tiny random models, made by transformers as users' folders are."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 67


def tiny_llama(
    folder: Path, *, seed: int = 0, max_positions: int = 512, vocab_size: int = VOCAB, hidden_size: int = 48
) -> Path:
    """A grouped-query Llama of three layers with sharp enough logits that sampling and argmax have something to do."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=vocab_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
