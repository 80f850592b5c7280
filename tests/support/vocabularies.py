"""Tiny tokenizers of the two kinds that models of the Llama family use, saved as their folders hold them."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_TEXT = ["the cat sat on the mat", "  12 cats and 3 dogs, 456 in all", "naïve café über 猫 🐈"] * 5
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_bpe() -> Tokenizer:
    """As SmolLM2's: every digit is split off first, then characters stand for bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def byte_fallback_bpe(*, metaspace: bool = False) -> Tokenizer:
    """As Llama 2's, TinyLlama's and Mistral's: U+2581 for spaces, one byte token for each byte of rare characters."""
    pieces = ["▁", "a", "b", "c", "t", "h", "e", ",", "猫", "▁▁", "▁t", "th", "▁th", "▁the", "▁c", "at", "▁cat"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "▁"), ("▁", "t"), ("t", "h"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("a", "t"), ("▁c", "at")]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: rank for rank, piece in enumerate(vocab)},
            merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False), decoders.Fuse()]
        )
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def with_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Tokens that are not special, spelt in ways that a decoder may trip over."""
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in ("<tool call>", "<think>", "über", "\n\n猫", "  ")]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, *, bos: str, eos: str, chat_template: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
