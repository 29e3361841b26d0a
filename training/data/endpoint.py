"""Ask a model behind an OpenAI-compatible endpoint: our own server, or anybody's."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.errors import EndpointFailed

if TYPE_CHECKING:
    from openai import OpenAI

Messages = Sequence[tuple[str, str]]  # (role, content)


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation to answer, and the seed to answer it with."""

    messages: Messages
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said."""

    text: str
    whole: bool  # False: it was cut off at max_tokens


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask, which model, and how."""

    url: str  # such as http://127.0.0.1:8000/v1
    key: str
    model: str
    temperature: float
    max_tokens: int = 128

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answers in order, asked all at once. Raises EndpointFailed.

        A rate limit is waited out for some seconds.
        """
        try:
            from openai import OpenAI, OpenAIError
        except ModuleNotFoundError as error:
            raise EndpointFailed(
                "Asking a model for rows needs the package openai: "
                "pip install 'wardrobe[generate]'."
            ) from error
        if not self.url.startswith(("http://", "https://")):
            raise EndpointFailed(f"{self.url!r} is no http:// or https:// URL.")
        client = OpenAI(base_url=self.url, api_key=self.key, max_retries=4, timeout=120)
        with client, ThreadPoolExecutor(len(questions)) as threads:
            try:
                return list(threads.map(lambda question: self._one(client, question), questions))
            except OpenAIError as error:
                raise EndpointFailed(
                    f"{self.url} did not answer for the model {self.model!r}: {error} The rows "
                    "written so far stay; the same command goes on from there."
                ) from error

    def _one(self, client: "OpenAI", question: Question) -> Answer:
        completion = client.chat.completions.create(
            model=self.model,
            messages=[{"role": role, "content": text} for role, text in question.messages],  # type: ignore[misc]  # the client has one type a role
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=question.seed,
        )
        choice = completion.choices[0]
        return Answer(choice.message.content or "", choice.finish_reason != "length")
