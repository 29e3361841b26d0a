"""Text to token ids and back, with the base model's own tokenizer and chat template.

Encoding runs in a thread of its own, after a bound on the bytes: no prompt stops the event loop.
Neither tokenizer nor template ever comes from a request or an adapter.
"""

import asyncio
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from registry.chat import ChatEncoder
from registry.errors import WardrobeError
from serving.calls import CallFormat
from serving.detokenizer import Detokenizer
from serving.template import ToolTemplate, ask_template, calls_in_text
from serving.tools import Tool

# One Unicode character takes at most this many UTF-8 bytes.
_UTF8_MAX = 4


class PromptTooLong(WardrobeError):
    """The prompt and what it asks for do not fit into the context."""

    code = "context_length_exceeded"

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param  # the field that holds the prompt


class TemplateRefused(WardrobeError):
    """The base's chat template does not take these messages."""

    code = "invalid_messages"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made, as history."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()  # of the role assistant
    call_id: str = ""  # of the role tool: which call this answers

    def rendered(self, in_text: CallFormat | None) -> dict[str, Any]:
        """The message as chat templates read it: a key that says nothing is not there.

        `in_text`: the format of calls of a template that writes none.
        """
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls and in_text:
            calls = calls_in_text(in_text, [(call.name, call.arguments) for call in self.calls])
            message["content"] = (self.content, "\n", *calls) if self.content else calls
        elif self.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.calls
            ]
        if self.call_id:
            message["tool_call_id"] = self.call_id
        return message


class Tokens:
    """The tokenizer of one base model. Close it after use."""

    def __init__(self, folder: Path) -> None:
        """Load from a base's folder: local files only, and no code from there."""
        loaded: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_fast=True
        )
        self.has_chat_template = bool(loaded.chat_template)
        self._tokenizer: Tokenizer = loaded.backend_tokenizer
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._chat = ChatEncoder(loaded)
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self._longest_token = max(map(len, vocabulary)) * _UTF8_MAX
        self._byte_level = _byte_level_alphabet() if _is_byte_level(self._tokenizer) else None
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokens")
        self._token_bytes = lru_cache(maxsize=65536)(self._find_token_bytes)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, max_tokens: int) -> list[int]:
        """Encode a raw prompt. Control tokens written in it count as such: it is all the client's.

        Raises PromptTooLong before any work when even the longest tokens could not make it fit.
        """
        self._check_bytes(text, max_tokens, "prompt")
        return await self._in_thread(lambda: self._encode(text))

    async def encode_chat(
        self, messages: Sequence[ChatMessage], max_tokens: int, tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Render messages, and the tools on offer, with the base's template and encode them.

        What looks like a control token inside a message is plain text: see `ChatEncoder.ids`.
        Raises PromptTooLong, and TemplateRefused when the template does not take the messages.
        """
        text = "".join(message.content for message in messages)
        self._check_bytes(text, max_tokens, "messages")
        return await self._in_thread(lambda: self._encode_chat(messages, tools))

    @cached_property
    def tool_template(self) -> ToolTemplate | None:
        """How the base's chat template has tools; None: in no way that is known."""
        return ask_template(self._chat) if self.has_chat_template else None

    def special_id(self, text: str) -> int | None:
        """Return the id of the control token that this text is, or None."""
        return self._special.get(text)

    def detokenizer(self, shown: Collection[str] = ()) -> Detokenizer:
        """Return one that leaves control tokens out, but for those of `shown`."""
        hidden = {token_id for text, token_id in self._special.items() if text not in shown}
        if len(hidden) == len(self._special):
            return Detokenizer(self.decode)

        def decode(ids: Sequence[int]) -> str:
            seen = [token_id for token_id in ids if token_id not in hidden]
            return self._tokenizer.decode(seen, skip_special_tokens=False)

        return Detokenizer(decode)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a whole sequence, without control tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        """Return one token as text; bytes that are no whole character read as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, so that a client can put split characters together."""
        return self._token_bytes(token_id)

    async def _in_thread(self, work: Any) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _check_bytes(self, text: str, max_tokens: int, param: str) -> None:
        least = len(text) // self._longest_token
        if least > max_tokens:
            raise PromptTooLong(
                f"The prompt has {len(text)} characters, which is at least {least} tokens, and "
                f"this model's context is {max_tokens} tokens. Send a shorter prompt.",
                param,
            )

    def _encode(self, text: str) -> list[int]:
        # A batch of one: `encode` holds the interpreter lock all the time, a batch does not.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=True)[0].ids

    def _encode_chat(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[int]:
        if not self.has_chat_template:
            raise TemplateRefused(
                "This base model has no chat template. Use /v1/completions with a raw prompt."
            )
        template = self.tool_template if any(message.calls for message in messages) else None
        in_text = template.form if template and template.in_text else None
        try:
            return self._chat.ids_of(
                [message.rendered(in_text) for message in messages],
                [tool.described for tool in tools],
            )
        except TemplateError as error:
            raise TemplateRefused(
                f"The base model's chat template refuses these messages: {error}"
            ) from error

    def _find_token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""  # padding rows of the embedding have no text
        if self._byte_level is not None:
            if all(character in self._byte_level for character in token):
                return bytes(self._byte_level[character] for character in token)
            return token.encode()
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return "ByteLevel" in repr(tokenizer.decoder)


def _byte_level_alphabet() -> dict[str, int]:
    """Return character → byte of GPT-2's byte-level alphabet.

    Printable bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
