"""From a checked request to the engine requests that answer it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from serving.api.errors import RequestError
from serving.api.output import check_bias, grammar_of
from serving.api.schemas import SamplingFields
from serving.api.tools import Toolbox
from serving.engine.boundary import GenerateRequest, Grammar, SamplingParams
from serving.routing import Route
from serving.tokens import PromptTooLong


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything an answer needs. Choice i belongs to requests[i]."""

    route: Route
    requests: tuple[GenerateRequest, ...]
    stops: tuple[str, ...]
    choices: int  # requests that share a prompt, one behind the other
    prompt_tokens: int
    stream: bool
    include_usage: bool
    toolbox: Toolbox | None = None  # what the answer may call
    grammar_field: str = ""  # what asked for a grammar

    @property
    def control_tokens(self) -> tuple[str, ...]:
        return self.toolbox.form.control_tokens if self.toolbox else ()


def make_plan(
    fields: SamplingFields,
    prompts: Sequence[Sequence[int]],
    *,
    request_id: str,
    tenant: str,
    route: Route,
    max_tokens: int,
    logprobs: int | None,
    vocab: int,
    toolbox: Toolbox | None = None,
) -> Plan:
    """Fan out to one engine request for each prompt and choice."""
    if fields.stream_options is not None and not fields.stream:
        raise RequestError(
            "`stream_options` is only for streams. Send `stream: true`.", param="stream_options"
        )
    if fields.min_tokens > max_tokens:
        raise RequestError(
            f"`min_tokens` is {fields.min_tokens}, more than the {max_tokens} tokens this "
            "request may have.",
            param="min_tokens",
        )
    check_bias(fields.logit_bias, vocab)
    grammar, grammar_field = grammar_of(fields.response_format), "response_format"
    if toolbox is not None and toolbox.grammar is not None:
        grammar, grammar_field = toolbox.grammar, "tools"
    requests = [
        GenerateRequest(
            f"{request_id}-{number * fields.n + choice}",
            tuple(prompt),
            sampling(fields, choice, max_tokens, logprobs, grammar),
            route.adapter,
            tenant,
        )
        for number, prompt in enumerate(prompts)
        for choice in range(fields.n)
    ]
    return Plan(
        route=route,
        requests=tuple(requests),
        stops=tuple(fields.stops),
        choices=fields.n,
        prompt_tokens=sum(map(len, prompts)),
        stream=fields.stream,
        include_usage=fields.include_usage,
        toolbox=toolbox,
        grammar_field=grammar_field,
    )


def sampling(
    fields: SamplingFields,
    choice: int,
    max_tokens: int,
    logprobs: int | None,
    grammar: Grammar | None,
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=max(fields.top_k, 0),
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        seed=None if fields.seed is None else seed_of_choice(fields.seed, choice),
        ignore_eos=fields.ignore_eos,
        logprobs=logprobs,
        logit_bias=tuple(sorted(fields.logit_bias.items())),
        grammar=grammar,
    )


def seed_of_choice(seed: int, choice: int) -> int:
    """Return a seed of its own for each choice: 63 bits, never negative.

    Seeds that follow each other must not share choices, so it is a hash and not seed + choice.
    """
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def room_for_answer(
    prompt: Sequence[int], wanted: int, max_model_len: int, param: str, note: str = ""
) -> None:
    """Raise PromptTooLong when prompt and answer do not fit into the context."""
    if len(prompt) + wanted > max_model_len:
        raise PromptTooLong(
            f"This model's context is {max_model_len} tokens. The prompt has {len(prompt)} "
            f"and the answer may have {wanted}, together {len(prompt) + wanted}. "
            f"{note}Shorten the prompt or ask for fewer tokens.",
            param,
        )
