"""A ``tokenizer.json`` from the metadata of a GGUF file: byte-level BPE, as Llama 3 and SmolLM2 use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tokenizers
from jaxzip.models.config import UnsupportedConfigError
from tokenizers import decoders, models, pre_tokenizers, processors

if TYPE_CHECKING:
    import gguf

#: ``tokenizer.ggml.token_type`` values: control tokens are never shown, user-defined ones are.
_CONTROL, _USER_DEFINED = 3, 4

#: How Llama 3 cuts text into words, as its tokenizer.json writes it.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_json_from_gguf(reader: gguf.GGUFReader) -> str:
    """The tokenizer of a GGUF file in the format of Hugging Face's ``tokenizer.json``.

    Args:
      reader: ``gguf.GGUFReader`` of the file; only its metadata is read.

    Raises:
      UnsupportedConfigError: the file has no tokenizer, one that is no byte-level BPE, or cuts words in a way that is
        not known here.
    """
    kind = field(reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedConfigError(
            f'gguf: tokenizer.ggml.model is {kind!r}; only "gpt2" (byte-level BPE) is converted'
        )
    words = field(reader, "tokenizer.ggml.pre", "gpt-2")
    if words not in _PRE_TOKENIZERS:
        raise UnsupportedConfigError(f"gguf: tokenizer.ggml.pre is {words!r}, known are {', '.join(_PRE_TOKENIZERS)}")
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = field(reader, "tokenizer.ggml.merges")
    if not tokens or merges is None:
        raise UnsupportedConfigError("gguf: tokenizer.ggml.tokens or .merges is missing")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # A token may contain no space (byte-level BPE writes it as another character), so one space separates the pair.
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=words == "llama-bpe"))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[words]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, field(reader, "tokenizer.ggml.token_type", ()), strict=False):
        if type_ in (_CONTROL, _USER_DEFINED):
            added = tokenizers.AddedToken(token, special=type_ == _CONTROL, normalized=False)
            (tokenizer.add_special_tokens if type_ == _CONTROL else tokenizer.add_tokens)([added])
    if field(reader, "tokenizer.ggml.add_bos_token", words == "llama-bpe"):
        _prepend(tokenizer, tokens, field(reader, "tokenizer.ggml.bos_token_id"))
    return tokenizer.to_str()


def _prepend(tokenizer: tokenizers.Tokenizer, tokens: list[str], bos: int | None) -> None:
    if bos is None:
        return
    name = tokens[bos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[name, "$A"], pair=[name, "$A", name, "$B"], special_tokens=[(name, bos)]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS = {"gpt-2": _gpt2, "smollm": _smollm, "llama-bpe": _llama3}


def field(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    """The metadata value ``name`` as a Python value (str, number, bool, or a list of them)."""
    found = reader.get_field(name)
    if found is None:
        return default
    types = [kind.name for kind in found.types]
    if types[-1] == "STRING":
        values = [bytes(found.parts[i]).decode() for i in found.data]
    else:
        values = [found.parts[i][0].item() for i in found.data]
    return values if types[0] == "ARRAY" else values[0]
