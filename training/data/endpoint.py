"""Ask a model behind an OpenAI-compatible endpoint: our own server, or anybody's."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.errors import EndpointFailed

if TYPE_CHECKING:
    from openai import AsyncOpenAI

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
        if not self.url.startswith(("http://", "https://")):
            raise EndpointFailed(f"{self.url!r} is no http:// or https:// URL.")
        try:
            from openai import OpenAIError
        except ModuleNotFoundError as error:
            raise EndpointFailed(
                "Asking a model for rows needs the package openai: "
                "pip install 'wardrobe[generate]'."
            ) from error
        try:
            return asyncio.run(self._all(questions))  # Ctrl-C breaks off what is being asked
        except OpenAIError as error:
            raise EndpointFailed(
                f"{self.url} did not answer for the model {self.model!r}: {error} The rows "
                "written so far stay; the same command goes on from there."
            ) from error

    async def _all(self, questions: Sequence[Question]) -> list[Answer]:
        from openai import AsyncOpenAI

        async with AsyncOpenAI(
            base_url=self.url, api_key=self.key, max_retries=4, timeout=120
        ) as client:
            return await asyncio.gather(*(self._one(client, question) for question in questions))

    async def _one(self, client: "AsyncOpenAI", question: Question) -> Answer:
        completion = await client.chat.completions.create(
            model=self.model,
            messages=[{"role": role, "content": text} for role, text in question.messages],  # type: ignore[misc]  # the client has one type a role
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=question.seed,
        )
        choice = completion.choices[0]
        return Answer(choice.message.content or "", choice.finish_reason != "length")
