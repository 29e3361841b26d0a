"""One example as the base sees it: its lengths in tokens, and what is wrong with it alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from training.data.examples import Example, Turn
from training.prompt import Prompter

# code → what rows with it do. Both lists of `wardrobe data check` and of `generate` name these.
ROW_ERRORS = {
    "unreadable": "cannot be read",
    "columns": "lack a column, or hold something that is no text",
    "roles": "do not alternate user and assistant up to an answer",
    "system": "bring a system message that is not the recipe's",
    "empty_prompt": "ask nothing: the prompt is empty",
    "empty_completion": "answer nothing: the completion is empty",
    "stop_token": "hold the stop token in the answer: the model would learn to stop inside it",
    "template": "are changed by the chat template: what they say is not in its output",
    "too_long": "are longer than train.max_length, and nothing is ever cut",
}


@dataclass(frozen=True, slots=True)
class Row:
    """An example, measured."""

    example: Example
    prompt_tokens: int
    completion_tokens: int  # the end of the turn included
    problems: tuple[str, ...]  # keys of ROW_ERRORS, and "control_token", which is a warning

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def measure(example: Example, prompter: Prompter, max_length: int | None) -> Row:
    """Count the tokens of an example and look for everything that is wrong with it alone."""
    tokenizer: Any = prompter.tokenizer
    prompt = prompter.prompt_ids(example.turns)
    answer = tokenizer.encode(example.completion, add_special_tokens=False)
    problems = list(_empty(example))
    if prompter.end_of_turn in answer:
        problems.append("stop_token")
    elif _controls(prompter, [example.completion, *(turn.content for turn in example.turns)]):
        problems.append("control_token")
    if not problems and not survives(example, prompter):
        problems.append("template")
    if max_length is not None and len(prompt) + len(answer) + 1 > max_length:
        problems.append("too_long")
    return Row(example, len(prompt), len(answer) + 1, tuple(problems))


def survives(example: Example, prompter: Prompter) -> bool:
    """Render an example and find the system prompt, every turn and the answer in it, in order.

    A template that trims texts or leaves turns out changes what is trained on without a word.
    """
    asked = render(prompter, example.turns)
    place = 0
    for text in (prompter.system, *(turn.content for turn in example.turns)):
        found = asked.find(text, place)
        if found < 0:
            return False
        place = found + len(text)
    answered = render(prompter, (*example.turns, Turn("assistant", example.completion)))
    return example.completion in answered[place:]


def render(prompter: Prompter, turns: Sequence[Turn]) -> str:
    """Return the conversation as text, up to where the assistant speaks or after it has."""
    tokenizer: Any = prompter.tokenizer
    messages = [{"role": "system", "content": prompter.system}] if prompter.system else []
    messages += [{"role": turn.role, "content": turn.content} for turn in turns]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=turns[-1].role == "user"
    )


def template_problems(prompter: Prompter) -> Iterator[str]:
    """Say what the base's chat template does wrong, on a conversation that a row could be."""
    turns = (Turn("user", "first-question"), Turn("assistant", "an-answer"))
    more = (*turns, Turn("user", "second-question"))
    try:
        asked, answered = render(prompter, more), render(prompter, (*more, turns[1]))
    except TemplateError as error:
        yield f"The chat template refuses the conversation: {error}."
        return
    place = 0
    said = [("the system prompt", prompter.system)]
    said += [(f"the {turn.role}'s turn", turn.content) for turn in more]
    for what, text in said:
        if text not in asked:
            yield f"The chat template leaves out {what}."
        elif (place := asked.find(text, place)) < 0:
            yield f"The chat template puts {what} before what was said earlier."
            return
    if not answered.startswith(asked):
        yield (
            "The chat template writes a conversation in another way once it is answered: the "
            "prompt that is trained and served is no beginning of it."
        )
    if not _tells_speakers_apart(prompter.tokenizer):
        yield "The chat template does not tell the user's turns from the assistant's."


def _tells_speakers_apart(tokenizer: Any) -> bool:
    said = [[{"role": role, "content": "x"}] for role in ("user", "assistant")]
    try:
        user, assistant = (tokenizer.apply_chat_template(one, tokenize=False) for one in said)
    except TemplateError:  # it wants them in turn, so it knows who speaks
        return True
    return user != assistant


def _empty(example: Example) -> Iterator[str]:
    if not example.text.strip():
        yield "empty_prompt"
    if not example.completion.strip():
        yield "empty_completion"


def _controls(prompter: Prompter, texts: Sequence[str]) -> bool:
    tokenizer: Any = prompter.tokenizer
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return any(
        special.intersection(tokenizer.encode(text, add_special_tokens=False)) for text in texts
    )
