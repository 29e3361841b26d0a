"""Prompts to replay: from a file, or from the request log."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from registry.adapter import AdapterName
from registry.errors import WardrobeError
from serving.logs.store import Logs, Wanted
from serving.tokens import ChatMessage


class PromptsInvalid(WardrobeError):
    """Prompts that cannot be replayed."""

    code = "prompts_invalid"


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt: the messages of a chat, or a raw text."""

    key: str  # the same prompt for the second time has another one
    messages: tuple[ChatMessage, ...]
    raw: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Prompts, and a name of where they are from that is the same when they are read again."""

    name: str
    asks: tuple[Ask, ...]
    tools: int = 0  # logged requests with calls of tools, which are left out

    @classmethod
    def of_file(cls, path: Path, limit: int) -> "Source":
        """Read the first lines of a JSON lines file. Raises PromptsInvalid."""
        rows = _lines(path)[:limit]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return cls(digest, _asks(rows, str(path)))

    @classmethod
    def of_logs(cls, home: Path, name: AdapterName, limit: int) -> "Source":
        """Read the latest prompts of an adapter that its callers let be kept.

        Raises PromptsInvalid when there are none.
        """
        with Logs(home) as logs:
            wanted = Wanted(adapter=str(name), with_contents=True)
            found = logs.find(wanted, limit=limit)[::-1]
        if not found:
            raise PromptsInvalid(
                f"The log has no prompt for {name}. Keep them: "
                f"wardrobe logs set {name.namespace} --contents"
            )
        said = [asdict(line.contents) for line in found if line.contents]
        # What tools a request offered is not logged, so their calls cannot be asked for again.
        plain = [{"contents": one} for one in said if not any(map(_of_tools, one["prompt"]))]
        return cls("logs", _asks(plain, "the log"), len(said) - len(plain))


def _of_tools(said: dict[str, str]) -> bool:
    return said["role"] == "tool" or "tool_calls" in said


def _lines(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsInvalid(f"{path} cannot be read: {error}.") from error
    rows: list[Any] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise PromptsInvalid(f"{path}, line {number} is no JSON: {error}.") from error
    if not rows:
        raise PromptsInvalid(f"{path} has no prompt.")
    return rows


def _asks(rows: Iterable[Any], where: str) -> tuple[Ask, ...]:
    """Read rows with `messages`, with `prompt`, or as `wardrobe logs export` writes them.

    An answer at the end of the messages is left out: it is what the versions are asked for.
    """
    seen: Counter[str] = Counter()
    asks: list[Ask] = []
    for number, row in enumerate(rows, start=1):
        messages, raw = _prompt_of(row, f"{where}, row {number}")
        said = json.dumps([[m.role, m.content] for m in messages] or raw, ensure_ascii=False)
        seen[said] += 1
        key = hashlib.sha256(f"{seen[said]}\x1f{said}".encode()).hexdigest()[:32]
        asks.append(Ask(key, messages, raw))
    return tuple(asks)


def _prompt_of(row: Any, where: str) -> tuple[tuple[ChatMessage, ...], str | None]:
    match row:
        case {"contents": {"prompt": [{"role": "prompt", "content": str(text)}, *_]}}:
            return (), text
        case {"contents": {"prompt": [*messages]}} | {"messages": [*messages]}:
            return _messages(messages, where), None
        case {"prompt": str(text)}:
            return (), text
    raise PromptsInvalid(f"{where} has neither `messages` nor `prompt`, nor contents of a log.")


def _messages(given: Sequence[Any], where: str) -> tuple[ChatMessage, ...]:
    messages: list[ChatMessage] = []
    for message in given:
        match message:
            case {"role": "system" | "user" | "assistant" as role, "content": str(content)}:
                messages.append(ChatMessage(role, content))
            case {"role": "developer", "content": str(content)}:
                messages.append(ChatMessage("system", content))
            case _:
                raise PromptsInvalid(f"{where}: a message has no role and content that can be.")
    if messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages:
        raise PromptsInvalid(f"{where} has no message to answer.")
    return tuple(messages)
