"""Token ids of a prompt and of its answer, exactly as the server makes and stops them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from registry.chat import ChatEncoder
from training.data.examples import Example, Turn
from training.errors import BaseUnavailable, DataError


@dataclass(frozen=True, slots=True)
class Prompter:
    """The base's own tokenizer and chat template, and the recipe's system prompt."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatEncoder
    system: str
    end_of_turn: int  # the token the model says when it has answered; generation stops on it

    def prompt_ids(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """Render system prompt and turns, up to where the assistant speaks.

        Raises BaseUnavailable when the base's chat template refuses them.
        """
        messages = [("system", self.system)] if self.system else []
        messages += [(turn.role, turn.content) for turn in turns]
        try:
            return tuple(self.chat.ids(messages))
        except TemplateError as error:
            roles = ", ".join(role for role, _ in messages)
            raise BaseUnavailable(
                f"The base's chat template refuses a conversation of {roles}: {error}. Take a base "
                "whose template knows these turns."
            ) from error

    def completion_ids(self, completion: str) -> tuple[int, ...]:
        """Return the answer as the model is to generate it, its end included."""
        ids = self.tokenizer.encode(completion, add_special_tokens=False)
        if self.end_of_turn in ids:
            raise DataError(
                f"The answer {completion!r} holds the stop token itself: the model would learn "
                "to stop in the middle. Take the token out of the data."
            )
        return (*ids, self.end_of_turn)

    def answer(self, output_ids: Sequence[int]) -> str:
        """Decode generated tokens up to the end of the turn."""
        ids = list(output_ids)
        if self.end_of_turn in ids:
            ids = ids[: ids.index(self.end_of_turn)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def encode(self, example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.prompt_ids(example.turns), self.completion_ids(example.completion)


def load_prompter(base: Path, system: str) -> Prompter:
    """Read the tokenizer of a base folder. Raises BaseUnavailable when it cannot chat."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    if not tokenizer.chat_template:
        raise BaseUnavailable(
            f"The base model in {base} has no chat template, so nothing says where an answer "
            "ends. Put its chat_template.jinja into the folder, or take an instruct model."
        )
    end = _end_of_turn(tokenizer, stop_ids(base, tokenizer), base)
    return Prompter(tokenizer, ChatEncoder(tokenizer), system, end)


def stop_ids(base: Path, tokenizer: Any) -> set[int]:
    """Return the ids that end a generation: of the generation config and of the tokenizer."""
    stops: set[int] = set()
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    if (base / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(base, local_files_only=True).eos_token_id
        stops.update([named] if isinstance(named, int) else named or [])
    return stops


def _end_of_turn(tokenizer: Any, stops: set[int], base: Path) -> int:
    """Find the stop token that the chat template writes right after an answer.

    A tokenizer's `eos_token` may end documents while turns end with another token; a model that
    is taught the wrong one never stops.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        prompt, whole = render(messages[:1], add_generation_prompt=True), render(messages)
    except TemplateError as error:
        raise BaseUnavailable(
            f"The chat template in {base} refuses a question and its answer: {error}. Take an "
            "instruct model, whose template knows both."
        ) from error
    ending = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
    for token in ending:
        if token in stops:
            return token
    raise BaseUnavailable(
        f"The chat template in {base} writes none of the stop tokens {sorted(stops)} after an "
        f"answer, only {whole[len(prompt) :]!r}. Set eos_token_id in generation_config.json."
    )
