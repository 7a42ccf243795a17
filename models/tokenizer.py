"""``Tokenizer``: text to token ids and back, with chat prompts and UTF-8 safe streaming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A tokenizer in the ``tokenizer.json`` format of the ``tokenizers`` package.

    Which tokens begin and end a text is not in that format: it is the model's configuration that says so.

    Attributes:
      bos_token_id: token that begins a text, or ``None``.
      eos_token_ids: tokens that end one.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
    ):
        self._inner = inner
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)

    @classmethod
    def from_json(cls, text: str | bytes, **special: Any) -> Tokenizer:
        """From the content of a ``tokenizer.json``; ``special`` is as in the class.

        Raises:
          ValueError: the text is no ``tokenizer.json``.
        """
        try:
            inner = tokenizers.Tokenizer.from_str(text.decode() if isinstance(text, bytes) else text)
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        return cls(inner, **special)

    @classmethod
    def from_file(cls, path: str | Path, **special: Any) -> Tokenizer:
        """From a ``tokenizer.json`` file.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is no ``tokenizer.json``.
        """
        return cls.from_json(Path(path).read_bytes(), **special)

    def to_json(self) -> str:
        """The content of a ``tokenizer.json``; :meth:`from_json` inverts it, up to ``special``."""
        return self._inner.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._inner.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """Id of one token by its name, ``None`` if there is no such token."""
        return self._inner.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Names of special tokens in the text become those tokens.

        Args:
          add_special_tokens: what the tokenizer puts around a text, for instance a beginning-of-text token.
        """
        return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def has_chat(self) -> bool:
        """Whether the vocabulary has the tokens of a chat format that :meth:`encode_chat` knows."""
        return self._chat_format() is not None

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ending where the assistant's answer begins.

        Args:
          messages: ``{"role": "system" | "user" | "assistant", "content": text}`` each. Nothing is added: models that
            were trained with a default system message want it here.

        Raises:
          ValueError: the vocabulary has no chat tokens (a base model), or a message lacks role or content, or has a
            role that the model's chats do not have.
        """
        found = self._chat_format()
        if found is None:
            raise ValueError(
                "this tokenizer has no chat tokens (looked for "
                f"{', '.join(form['needs'][0] for form in _CHAT_FORMATS)}): a base model? Encode plain text instead"
            )
        text = found["begin"]
        for i, message in enumerate(messages):
            if not {"role", "content"} <= set(message):
                raise ValueError(f"message {i} has keys {sorted(message)}, expected role and content")
            role = found.get("roles", {}).get(message["role"], message["role"])
            if role is None:
                raise ValueError(
                    f"message {i} is of {message['role']!r}, which this model's chats do not have; put its text in "
                    "front of the user's"
                )
            text += found["message"].format(role=role, content=message["content"])
        return self.encode(text + found["answer"], add_special_tokens=False)

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes one token at a time."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    def _chat_format(self) -> Mapping[str, Any] | None:
        known = (form for form in _CHAT_FORMATS if all(self.token_id(token) is not None for token in form["needs"]))
        return next(known, None)


#: ChatML (SmolLM2, Qwen), Llama 3's headers and Gemma's turns; ``roles``: by another name, or ``None``: not there.
_CHAT_FORMATS = (
    {
        "needs": ("<|im_start|>", "<|im_end|>"),
        "begin": "",
        "message": "<|im_start|>{role}\n{content}<|im_end|>\n",
        "answer": "<|im_start|>assistant\n",
    },
    {
        "needs": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"),
        "begin": "<|begin_of_text|>",
        "message": "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "answer": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    },
    {
        "needs": ("<start_of_turn>", "<end_of_turn>", "<bos>"),
        "begin": "<bos>",
        "message": "<start_of_turn>{role}\n{content}<end_of_turn>\n",
        "answer": "<start_of_turn>model\n",
        "roles": {"assistant": "model", "system": None},
    },
)


class StreamDecoder:
    """Turns tokens into text as they come; holds a token back while its bytes are only part of a character.

    The pieces joined are what ``Tokenizer.decode`` gives for all tokens at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        # `_context` are shown tokens, decoded again each time: some decoders treat the first token differently.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that ``token`` completes, often empty."""
        self._pending.append(token)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """What is held back, at the end of the tokens."""
        text = self._new_text()
        self._context, self._pending = [], []
        return text

    def _new_text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]
