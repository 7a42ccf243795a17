"""The tokenizer: round trips, streaming of multi-byte text, chat prompts, and conversion from GGUF metadata."""

import json

import gguf
import numpy as np
import pytest
import tokenizers
from jaxzip.models import Tokenizer
from jaxzip.models.tokenizer_gguf import tokenizer_json_from_gguf
from tokenizers import pre_tokenizers

from jaxzip.errors import JaxzipError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "r l", "1 2", "Ġ hello"]
TEXTS = ["hello world", "a12 123\n\nhello", "naïve 東京 🦙🏽", "  tabs\tand  spaces ", "", "'s don't 😀"]


def write_gguf(path, *, pre="smollm", model="gpt2", specials=SPECIAL, **extra):
    tokens = [*specials, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(specials) + [1] * (len(tokens) - len(specials)))
    writer.add_token_merges(MERGES)
    for name, value in extra.items():
        getattr(writer, name)(value)
    writer.add_tensor("t", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(str(path))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    reader = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    return Tokenizer.from_json(tokenizer_json_from_gguf(reader), bos_token_id=0, eos_token_ids=[2])


def pieces(tokenizer, text):
    return [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.encode(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_and_single_digits(tokenizer):
    assert pieces(tokenizer, "hello world") == ["hello", " wo", "rl", "d"]
    assert pieces(tokenizer, "a12 hello") == ["a", "1", "2", " hello"]  # "1 2" is a merge, but digits stay apart


def test_gpt2_joins_digits(tmp_path):
    gpt2 = Tokenizer.from_json(tokenizer_json_from_gguf(write_gguf(tmp_path / "g.gguf", pre="gpt-2")))
    assert pieces(gpt2, "a12") == ["a", "12"]


def test_llama3_splits_and_begins(tmp_path):
    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    reader = write_gguf(
        tmp_path / "l.gguf", pre="llama-bpe", specials=specials, add_bos_token_id=0, add_add_bos_token=True
    )
    llama = Tokenizer.from_json(tokenizer_json_from_gguf(reader))
    assert pieces(llama, "hello12345") == ["<|begin_of_text|>", "hello", "12", "3", "4", "5"]
    assert llama.encode("hello", add_special_tokens=False) == llama.encode("hello")[1:]
    chat = llama.decode(llama.encode_chat([{"role": "user", "content": "hi"}]), skip_special_tokens=False)
    assert chat == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_special_tokens_are_tokens_and_hidden(tokenizer):
    ids = tokenizer.encode("hello<|im_end|>")
    assert ids[-1] == tokenizer.token_id("<|im_end|>") == 2 and tokenizer.eos_token_ids == (2,)
    assert tokenizer.decode(ids) == "hello" and tokenizer.decode(ids, skip_special_tokens=False) == "hello<|im_end|>"
    assert tokenizer.vocab_size == len(SPECIAL) + 256 + len(MERGES)


def test_json_round_trip(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    for again in (Tokenizer.from_json(tokenizer.to_json().encode()), Tokenizer.from_file(path)):
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        Tokenizer.from_json("{}")


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_never_shows_part_of_a_character(tokenizer, text):
    decoder = tokenizer.stream_decoder()
    shown = [decoder.push(token) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) + decoder.flush() == text


def test_streaming_flushes_what_is_no_character(tokenizer):
    decoder, ids = tokenizer.stream_decoder(), tokenizer.encode("a🦙")[:-1]
    assert "".join(map(decoder.push, ids)) == "a"
    assert decoder.flush() == tokenizer.decode(ids)[1:] != ""


def test_chat(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    text = tokenizer.decode(tokenizer.encode_chat(messages), skip_special_tokens=False)
    assert text == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="message 0 has keys"):
        tokenizer.encode_chat([{"content": "x"}])


def test_gemmas_chat():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate("adehilmorsu\n")}, []))
    inner.add_special_tokens(["<bos>", "<start_of_turn>", "<end_of_turn>"])
    messages = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    text = "".join(inner.id_to_token(i) for i in Tokenizer(inner).encode_chat(messages))
    turns = [f"<start_of_turn>{role}\nhi<end_of_turn>\n" for role in ("user", "model", "user")]
    assert text == "<bos>" + "".join(turns) + "<start_of_turn>model\n"
    with pytest.raises(ValueError, match="message 0 is of 'system'"):
        Tokenizer(inner).encode_chat([{"role": "system", "content": "hi"}])


def test_a_base_model_has_no_chat():
    plain = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])))
    assert not plain.has_chat
    with pytest.raises(ValueError, match="no chat tokens"):
        plain.encode_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("change, message", [({"model": "llama"}, "'llama'"), ({"pre": "qwen2"}, "'qwen2'")])
def test_unknown_gguf_tokenizers_are_refused(tmp_path, change, message):
    with pytest.raises(JaxzipError, match=message):
        tokenizer_json_from_gguf(write_gguf(tmp_path / "x.gguf", **change))


def test_smollm_pre_tokenizer_is_digits_then_byte_level(tokenizer):
    steps = json.loads(tokenizer.to_json())["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]
