"""The token ids of a conversation: training and serving make them here, so that they are equal."""

import re
import secrets
from collections.abc import Sequence
from typing import Any, cast

from tokenizers import Tokenizer


class Control(str):
    """A piece of a message that is no user's: a control token in it is one."""


class ChatEncoder:
    """A base's tokenizer and chat template. It may be used by several threads at once."""

    def __init__(self, loaded: Any) -> None:
        """Take a tokenizer as transformers loads it."""
        self._template = loaded
        self._tokenizer: Tokenizer = loaded.backend_tokenizer
        self._literal = Tokenizer.from_str(self._tokenizer.to_str())
        self._literal.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        specials = sorted((t.content for t in added.values() if t.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def ids(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the ids of (role, content) messages, up to where the assistant speaks."""
        return self.ids_of([{"role": role, "content": said} for role, said in messages])

    def ids_of(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Return the ids of messages that may call and answer tools, with the tools on offer.

        Text inside a message that looks like a control token is encoded as plain text, so that
        nobody can end their own turn and speak as the system. Added tokens that are not special
        (`<think>`) open no turn: they stay the tokens that the base was trained on. A text may come
        in pieces, as a tuple, of which some are `Control`.
        Raises jinja2.TemplateError when the template does not take the messages.
        """
        nonce = secrets.token_hex(8)  # nobody can write a mark that they cannot guess
        literals: list[str] = []

        def plain(value: Any) -> Any:
            if isinstance(value, Control):
                return str(value)
            if isinstance(value, str):
                return self._special.sub(mark, value)
            if isinstance(value, tuple):
                return "".join(map(plain, cast("tuple[str, ...]", value)))
            if isinstance(value, list):
                return [plain(each) for each in cast("list[Any]", value)]
            if isinstance(value, dict):
                found = cast("dict[str, Any]", value)
                return {plain(key): plain(each) for key, each in found.items()}
            return value

        def mark(match: re.Match[str]) -> str:
            literals.append(match[0])
            return f"\ue000{nonce}:{len(literals) - 1}\ue001"

        text = self.text(plain([*messages]), plain([*tools]))
        if not literals:
            return self._encode(text)
        ids: list[int] = []
        for index, piece in enumerate(re.split(f"\ue000{nonce}:([0-9]+)\ue001", text)):
            if index % 2:
                literal = literals[int(piece)]
                ids += self._literal.encode(literal, add_special_tokens=False).ids
            elif piece:
                ids += self._encode(piece)
        return ids

    def text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        *,
        answer: bool = True,
    ) -> str:
        """Render as the template has it; `answer`: up to where the assistant speaks."""
        offered = [*tools] or None
        return self._template.apply_chat_template(
            [*messages],
            tools=offered,
            xml_tools=offered,  # their name in SmolLM3's template
            tokenize=False,
            add_generation_prompt=answer,
        )

    def _encode(self, text: str) -> list[int]:
        # A batch of one: `encode` holds the interpreter lock all the time, a batch does not.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
