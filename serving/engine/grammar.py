"""Outputs that follow a JSON schema or an expression: grammars compiled once, walked by requests.

llguidance does the work: at every step it says which tokens may follow. What a request may ask of
it is bounded before anything is allocated: the length of a source, how deep it is nested, the
time and memory of compiling (`grammar_trial`), and the work of one step (its `LIMITS`).
"""

import asyncio
import re
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from serving.engine import grammar_trial
from serving.engine.boundary import (
    EngineBusy,
    EngineError,
    EngineUnavailable,
    Grammar,
    GrammarRefused,
)

MAX_SOURCE_CHARACTERS = 65_536
MAX_DEPTH = 64  # of brackets in a schema
MAX_INTEGER = 2**53 - 1  # llguidance reads a larger one as a float64: another number (RFC 8259 §6)
KEPT = 64  # compiled grammars, the last used ones; refusals count
MAX_REASON_CHARACTERS = 600
TRIAL_SECONDS = 30  # on the clock, for a machine that is busy; the trial's own CPU time is shorter

# A string that does not end takes the rest: looking for its end from each quote would be quadratic.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_NUMBERS = re.compile(r'"(?:[^"\\]|\\.)*+"?|-?\d++[-+.eE\d]*+', re.DOTALL)
_CONTROL_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+"?|<\[[0-9]+\]>', re.DOTALL)
# How a trial ends by what it tries: out of time, out of memory, out of stack.
_FAULTS = (-signal.SIGXCPU, -signal.SIGABRT, -signal.SIGSEGV)

# Between the tokens of a JSON text. Without a bound a model may write spaces for ever.
JSON_SPACE = r"[ \n\t]{0,16}"


Allowed = NDArray[np.bool_]  # [vocab]


class GrammarFailed(EngineError):
    """The grammar cannot go on from here; the request that walks it ends."""


class Constraint:
    """Where one output is in its grammar."""

    def __init__(
        self,
        matcher: LLMatcher,
        vocab: int,
        eos_ids: list[int],
        taken_for_end: list[int],
        on_failure: Callable[[], None],
    ) -> None:
        """`taken_for_end`: what llguidance allows as an end. It guesses where a base has none."""
        self._matcher, self._vocab = matcher, vocab
        self._eos_ids, self._taken_for_end = eos_ids, taken_for_end
        self._on_failure = on_failure

    def allowed(self) -> Allowed:
        """Return which tokens may come next: an end of text where the grammar may end.

        Asking again gives the same. Raises GrammarFailed when that takes too much work.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._vocab, bitorder="little").view(np.bool_)
        allowed[self._taken_for_end] = False
        allowed[self._eos_ids] = self._matcher.is_accepting()
        if not allowed.any():
            raise GrammarFailed("No token of this base model continues the grammar.")
        return allowed

    def advance(self, token_id: int) -> bool:
        """Take a token that was allowed; tell whether the grammar is at its end."""
        self._matcher.consume_token(token_id)
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _check(self) -> None:
        if self._matcher.is_error():
            self._on_failure()
            raise GrammarFailed(
                f"The output's grammar needs more work at one token than is allowed: "
                f"{_reason(self._matcher.get_error())}. Send a simpler schema or expression."
            )


class GrammarCompiler:
    """Compiles grammars for one base's tokenizer, in threads of its own. Close it after use."""

    def __init__(self, folder: Path, vocab: int, eos_ids: frozenset[int]) -> None:
        self._vocab, self._eos_ids = vocab, sorted(eos_ids)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammars")
        # Now, not at the first grammar: reading a large vocabulary would hold running streams up.
        self._tokenizer = self._threads.submit(_read_tokenizer, folder, vocab, self._eos_ids)
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()

    async def start(self, grammar: Grammar) -> Constraint:
        """Return a walk from the grammar's beginning. Raises GrammarRefused with the reason."""
        _check_bounds(grammar)
        future = self._future(grammar)
        forget = partial(self._forget, grammar, future)
        try:
            compiled = await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            if future.cancelled():
                raise EngineUnavailable("The engine is closed.") from None
            raise
        except GrammarRefused:
            raise  # it will be wrong the next time, too
        except Exception:
            forget()
            raise
        ends = self._tokenizer.result().eos_tokens
        # Copies share what the lexer has learned, so one that it is too much for spoils it for all.
        return Constraint(compiled.deep_copy(), self._vocab, self._eos_ids, ends, on_failure=forget)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _forget(self, grammar: Grammar, future: "Future[LLMatcher]") -> None:
        with self._lock:
            if self._compiled.get(grammar) is future:
                del self._compiled[grammar]

    def _future(self, grammar: Grammar) -> "Future[LLMatcher]":
        with self._lock:  # callers may have loops of their own
            future = self._compiled.pop(grammar, None)
            try:
                future = future or self._threads.submit(self._compile, grammar)
            except RuntimeError as error:
                raise EngineUnavailable("The engine is closed.") from error
            self._compiled[grammar] = future
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return future

    def _compile(self, grammar: Grammar) -> LLMatcher:
        source = _translate(grammar)
        _try_apart(_translate(_for_trial(grammar)))
        matcher = LLMatcher(
            self._tokenizer.result(), source, log_level=0, limits=grammar_trial.LIMITS
        )
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return matcher


def _read_tokenizer(folder: Path, vocab: int, eos_ids: list[int]) -> LLTokenizer:
    path = folder / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=vocab, eos_token=eos_ids or None)
    except (OSError, ValueError) as error:
        raise GrammarRefused(
            f"This base model's output cannot be held to a grammar: {path.name}: {error}"
        ) from error


def _check_bounds(grammar: Grammar) -> None:
    length = len(grammar.source)
    if length > MAX_SOURCE_CHARACTERS:
        raise GrammarRefused(
            f"The grammar has {length} characters; it may have {MAX_SOURCE_CHARACTERS}."
        )
    if grammar.kind == "regex":
        return
    if (depth := _depth(grammar.source)) > MAX_DEPTH:
        raise GrammarRefused(f"The schema is nested {depth} deep; it may be {MAX_DEPTH}.")
    if large := next(filter(_is_too_large, _NUMBERS.findall(grammar.source)), None):
        raise GrammarRefused(
            f"The schema has the integer {large[:40]}; it may have those from -{MAX_INTEGER} to "
            f"{MAX_INTEGER}. Send a larger one as a string."
        )


def _depth(source: str) -> int:
    """Return how deep brackets are nested outside of strings."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(source):
        if bracket in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif bracket in "]}":
            depth -= 1
    return deepest


def _is_too_large(token: str) -> bool:
    digits = token.removeprefix("-")
    longer = len(digits) > len(str(MAX_INTEGER))  # Python reads no integer of 5,000 digits
    return digits.isdecimal() and (longer or int(digits) > MAX_INTEGER)


def _for_trial(grammar: Grammar) -> Grammar:
    """Return it with control tokens that the trial has: it has few, and which makes no difference.

    Only tools' grammars name such, outside of strings. What stands in strings, and in a schema or
    expression, is a user's: another text could be one that passes where that one does not.
    """
    if grammar.kind != "lark":
        return grammar

    def of_the_trial(found: re.Match[str]) -> str:
        return found[0] if found[0].startswith('"') else "<[256]>"

    return replace(grammar, source=_CONTROL_TOKENS.sub(of_the_trial, grammar.source))


def _translate(grammar: Grammar) -> str:
    """Return llguidance's form. Raises GrammarRefused for a schema that is not a JSON object."""
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.source)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    try:
        return LLMatcher.grammar_from_json_schema(
            grammar.source, defaults={"whitespace_pattern": JSON_SPACE}
        )
    except ValueError as error:
        raise _refusal(str(error)) from error


def _try_apart(source: str) -> None:
    """Compile in another process. Raises GrammarRefused when it is wrong or takes too much."""
    command = [sys.executable, "-I", str(Path(grammar_trial.__file__))]
    try:
        trial = subprocess.run(  # noqa: S603  # our own file; the grammar goes to its input
            command, input=source, capture_output=True, timeout=TRIAL_SECONDS, encoding="utf-8"
        )
    except subprocess.TimeoutExpired as error:
        raise EngineBusy(
            f"The machine is too busy: the grammar was not compiled in {TRIAL_SECONDS} seconds.",
            TRIAL_SECONDS,
        ) from error
    if trial.returncode in _FAULTS or "MemoryError" in trial.stderr:
        raise GrammarRefused(
            f"The grammar takes more than {grammar_trial.CPU_SECONDS} s of CPU or "
            f"{grammar_trial.MEMORY_BYTES >> 20} MiB to compile. Send a simpler one."
        )
    if trial.returncode:
        raise RuntimeError(
            f"the trial of a grammar ended with {trial.returncode}: {trial.stderr[-2000:]}"
        )
    if trial.stdout:
        raise _refusal(trial.stdout)


def _refusal(reason: str) -> GrammarRefused:
    return GrammarRefused(f"The output cannot be held to this grammar: {_reason(reason)}")


def _reason(message: str) -> str:
    """Return what is wrong. An expression is repeated in its error: a long one is left out."""
    message = message.removesuffix("<non-verbose/>").strip()
    if message == "NoExtensionBias":  # as llguidance calls it
        return "there is no text that it allows."
    if len(message) <= MAX_REASON_CHARACTERS:
        return message
    found = re.search(r"^error: .*", message, re.MULTILINE)
    return (found[0] if found else message)[:MAX_REASON_CHARACTERS]
