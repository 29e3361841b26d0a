"""What is written down of a request: facts always, what was said only where the tenant wants it."""

from collections import defaultdict
from dataclasses import dataclass, field

DEFAULT_DAYS = 30  # how long the log of a tenant without settings is kept

Said = dict[str, str]  # {"role": …, "content": …}; perhaps `tool_calls`, as JSON


@dataclass(frozen=True, slots=True)
class Entry:
    """The facts of one request. No key, no prompt, no answer, no text of the client's."""

    request_id: str
    at: str  # when it came, ISO 8601, UTC
    tenant: str  # whose key it was; empty for a request without a valid one
    method: str
    route: str  # the template, such as /v1/models/{model}; `none` where no route fits
    endpoint: str
    adapter: str  # NAMESPACE/NAME, or the base's id; empty for what is no inference
    version: str  # acme/support@v7
    digest: str
    experiment: str
    arm: str
    status: int  # 0: nothing was sent
    outcome: str  # why it did not end normally: disconnect, or an error code
    finish: str  # stop or length, one for each choice
    prompt_tokens: int
    completion_tokens: int
    first_token_ms: float | None
    ms: float


@dataclass(frozen=True, slots=True)
class Contents:
    """What was said. `prompt` has the messages of a chat, or one `prompt` a raw prompt."""

    prompt: tuple[Said, ...]
    answers: tuple[str, ...]  # one for each choice, as far as it came

    @property
    def characters(self) -> int:
        texts = [text for said in self.prompt for text in said.values()]
        return sum(map(len, texts)) + sum(map(len, self.answers))


class Transcript:
    """What is said in one request, while it is said."""

    def __init__(self, prompt: tuple[Said, ...]) -> None:
        self._prompt = prompt
        self._answers: defaultdict[int, list[str]] = defaultdict(list)

    def add(self, choice: int, text: str) -> None:
        self._answers[choice].append(text)

    def contents(self) -> Contents:
        answers = (self._answers[choice] for choice in sorted(self._answers))
        return Contents(self._prompt, tuple(map("".join, answers)))


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How one tenant's requests are logged."""

    tenant: str
    sample: float = 0.0  # share of the requests whose prompt and answer are kept
    patterns: dict[str, str] = field(default_factory=dict[str, str])  # name → regular expression
    keep_days: int = DEFAULT_DAYS

    def keeps(self, request_id: str) -> bool:
        """Whether prompt and answer of a request are kept. Its id is random, so this is a draw."""
        return int(request_id[-8:], 16) / 2**32 < self.sample
