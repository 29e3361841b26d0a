"""Compile a grammar in a process of its own first, with little memory and time.

A few bytes can ask for gigabytes or for ever (`a{100000000}`, two large `multipleOf` under
`allOf`), and a compiler inside the server cannot be stopped. This file is run as a script: it
reads a grammar from standard input and writes what is wrong with it, or nothing. It imports
nothing of wardrobe, so that it starts in a few hundredths of a second.
"""

import os
import resource
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_SECONDS = 1
MEMORY_BYTES = 1 << 30

# Half of llguidance's own, or less, where a step of the engine waits for it.
LIMITS = LLParserLimits(
    max_items_in_row=1_000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=100_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))  # SIGXCPU, then SIGKILL
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)  # running requests go first
    matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # says whether anything can be written at all
    sys.stdout.write(matcher.get_error())


if __name__ == "__main__":
    main()
