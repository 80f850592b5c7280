import json
import subprocess
import sys

import pytest
import sentencepiece
from transformers import AutoTokenizer

from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.errors import BadRequestError, ModelError
from support.vocabularies import CHATML, byte_fallback_bpe, byte_level_bpe, save, with_added_tokens

TEXTS = ["", "the cat", " the  cat\n\n", "12 345", "猫 🐈 naïve", "</|im_end|>", "<s>the</s>", "a\x00b"]
MESSAGES = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "cat"}]


@pytest.fixture
def chatty(tmp_path):
    folder = save(byte_level_bpe(), tmp_path / "chatty", bos="<|im_start|>", eos="<|im_end|>", chat_template=CHATML)
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def llama2(tmp_path):
    folder = save(byte_fallback_bpe(), tmp_path / "llama2", bos="<s>", eos="</s>")
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["chatty", "llama2"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_text_and_tokens_are_transformers_own(kind, text, special, request):
    ours, theirs = request.getfixturevalue(kind)
    tokens = ours.encode(text, add_special_tokens=special)
    assert tokens == theirs.encode(text, add_special_tokens=special)
    for skip in (True, False):
        expected = theirs.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(tokens, skip_special=skip) == expected
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("generation", [True, False])
def test_a_chat_is_written_by_the_models_own_template(chatty, generation):
    ours, theirs = chatty
    tokens = ours.encode_chat(MESSAGES, add_generation_prompt=generation)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=generation)
    assert tokens == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(tokens, skip_special=False) == text
    assert tokens.count(ours.bos_token_id) == 2 + generation


def test_the_begin_token_of_a_template_is_not_doubled(tmp_path):
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    folder = save(byte_fallback_bpe(), tmp_path / "model", bos="<s>", eos="</s>", chat_template=template)
    assert Tokenizer.from_folder(folder).encode_chat(MESSAGES).count(1) == 1


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_the_class_that_a_folder_names_changes_nothing(tmp_path, name, add_bos):
    folder = save(byte_fallback_bpe(), tmp_path / "model", bos="<s>", eos="</s>")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name, "add_bos_token": add_bos}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours, file = Tokenizer.from_folder(folder), byte_fallback_bpe()
    for text in TEXTS:
        assert ours.encode(text) == file.encode(text).ids


def test_chats_that_cannot_be_written(chatty, llama2, tmp_path):
    with pytest.raises(BadRequestError, match="no chat template: give a plain prompt"):
        llama2[0].encode_chat(MESSAGES)
    for message in ({"role": "user"}, {"role": "user", "content": None}, {"content": "the"}):
        with pytest.raises(BadRequestError, match="message 1 needs a role and a content"):
            chatty[0].encode_chat([MESSAGES[0], message])
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    folder = save(byte_level_bpe(), tmp_path / "strict", bos="<|im_start|>", eos="<|im_end|>", chat_template=strict)
    with pytest.raises(BadRequestError, match="refuses these messages: system first"):
        Tokenizer.from_folder(folder).encode_chat(MESSAGES)
    broken = save(byte_level_bpe(), tmp_path / "broken", bos="<|im_start|>", eos="<|im_end|>", chat_template="{% if %}")
    with pytest.raises(BadRequestError, match="refuses these messages"):
        Tokenizer.from_folder(broken).encode_chat(MESSAGES)


def test_half_a_surrogate_pair_is_the_callers_mistake(chatty):
    with pytest.raises(BadRequestError, match="half a surrogate pair at character 3"):
        chatty[0].encode("the\ud800")


def test_single_tokens_to_look_at(chatty, llama2):
    ours, _ = chatty
    (cat,) = [token for token in range(ours.vocab_size) if ours.token(token) == "Ġcat"]
    assert ours.token_text(cat) == " cat"
    assert ours.token_text(1) == "<|im_start|>"
    assert ours.token_text(ours.vocab_size + 5) == ""
    first_byte = ours.encode("猫", add_special_tokens=False)[0]
    assert "\ufffd" in ours.token_text(first_byte) or ours.token_text(first_byte) == "猫"
    assert llama2[0].token_text(3 + 0xE7) == "\ufffd"
    assert llama2[0].token_text(3 + 0x41) == "A"


def test_a_sentencepiece_file_alone_is_converted(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat\nthree cats and two dogs\nthe hat\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
        )
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours = Tokenizer.from_folder(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("the cat", "three hats 猫"):
        assert ours.encode(text) == [1, *theirs.encode(text)]
        assert ours.decode(ours.encode(text)) == text


def test_folders_without_a_usable_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="lacks a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    for content in ("{}", "not json", '{"model": {"type": "Magic"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match="the tokenizer cannot be read: ") as caught:
            Tokenizer.from_folder(tmp_path)
        assert "\n" not in str(caught.value)


def test_an_unknown_decoder_is_named(tmp_path):
    decoder = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    tokenizer = json.loads(byte_level_bpe().to_str()) | {"decoder": decoder}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r'decoder \{"type": "CTC"'):
        Tokenizer.from_folder(tmp_path)


def test_the_bundled_model(smollm2):
    ours, theirs = Tokenizer.from_folder(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id) == (49152, 1, 2)
    for text in (*TEXTS, "def f(x):\n    return x ** 2  # 1234\n\tend"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special=False) == text
    assert ours.encode("</|im_end|>") != ours.encode("<|im_end|>") == [2]
    # Every digit is a token of its own, also behind spaces.
    assert [ours.token_text(token) for token in ours.encode("a  12")] == ["a", "  ", "1", "2"]
    chat = ours.decode(ours.encode_chat([{"role": "user", "content": "hi"}]), skip_special=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_no_torch_is_needed(tmp_path):
    folder = save(with_added_tokens(byte_level_bpe()), tmp_path / "model", bos="<|im_start|>", eos="<|im_end|>")
    script = (
        "import sys; from pathlib import Path; from gorgon_engine.tokenizer import Tokenizer\n"
        f"Tokenizer.from_folder(Path({str(folder)!r})).encode('the cat'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
