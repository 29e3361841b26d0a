"""CPU time that a grammar costs at each token, and to compile: `python -m benchmarks.grammars`.

Outputs are walked with random allowed tokens of a pulled base's own vocabulary, and no model. The
CPU time of the thread is counted, not the clock, so that other work on the machine counts little.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from registry.base import BaseModel, Bases
from registry.home import default_cache
from serving.engine.boundary import GenerateRequest, Grammar, SamplingParams
from serving.engine.grammar import Constraint, GrammarCompiler
from serving.engine.ops.sampling import greedy
from serving.engine.sampler import Sampler
from serving.engine.sequence import Sequence as Row
from serving.engine.spec import ModelSpec

GRAMMARS = {
    "any object": Grammar("json", '{"type":"object"}'),
    "8 flat properties": Grammar(
        "json",
        json.dumps(
            {
                "type": "object",
                "properties": {f"field_{i}": {"type": "string"} for i in range(8)},
                "required": [f"field_{i}" for i in range(8)],
                "additionalProperties": False,
            }
        ),
    ),
    "a list of objects with numbers": Grammar(
        "json",
        json.dumps(
            {
                "type": "array",
                "minItems": 20,
                "items": {
                    "type": "object",
                    "properties": {"x": {"type": "number"}, "kind": {"enum": ["a", "b", "c"]}},
                    "required": ["x", "kind"],
                    "additionalProperties": False,
                },
            }
        ),
    ),
    "one of 1,000 words": Grammar("json", json.dumps({"enum": [f"word{i}" for i in range(1000)]})),
    "an expression": Grammar("regex", r"([A-Z][a-z]+ ){10,50}[0-9]{4}"),
}


def walk(constraint: Constraint, seed: int, tokens: int) -> Iterator[float]:
    """Yield the CPU microseconds of each token: what may follow, and taking one of it."""
    rng = np.random.default_rng(seed)
    for _ in range(tokens):
        started = time.thread_time()
        allowed = constraint.allowed()
        spent = time.thread_time() - started
        token = int(rng.choice(allowed.nonzero()[0]))
        started = time.thread_time()
        ended = constraint.advance(token)
        yield 1e6 * (spent + time.thread_time() - started)
        if ended:
            return


async def measure(base: BaseModel, walks: int, tokens: int) -> None:
    spec = ModelSpec.read(base.path)
    # Without ends of text: a walk ends where its grammar does.
    compiler = GrammarCompiler(base.path, spec.vocab, frozenset())
    await compiler.start(Grammar("regex", "warm"))
    print(f"{base.id}, {spec.vocab} tokens\n")
    print("| grammar | median µs a token | p99 | most | first start ms |\n|---|---|---|---|---|")
    for name, grammar in GRAMMARS.items():
        started = time.perf_counter()
        await compiler.start(grammar)
        compiling = time.perf_counter() - started
        walked = [walk(await compiler.start(grammar), seed, tokens) for seed in range(walks)]
        spent = sorted(each for one in walked for each in one)
        p99 = spent[int(0.99 * (len(spent) - 1))]
        print(
            f"| {name} | {statistics.median(spent):.0f} | {p99:.0f} | {spent[-1]:.0f} | "
            f"{1e3 * compiling:.0f} |"
        )
    print("\nµs of choosing a step's tokens; the last two at a temperature\n")
    print("| rows | free | held | free | held |\n|---|---|---|---|---|")
    for rows in (1, 8, 32):
        held = [await compiler.start(GRAMMARS["8 flat properties"]) for _ in range(rows)]
        free = [None] * rows
        cases = ((free, 0.0), (held, 0.0), (free, 1.0), (held, 1.0))
        spent = [f"{sample(case, heat, spec.vocab, tokens):.0f}" for case, heat in cases]
        print(f"| {rows} | {' | '.join(spent)} |")
    compiler.close()


def sample(
    constraints: Sequence[Constraint | None], heat: float, vocab: int, repeats: int
) -> float:
    """Return the median CPU microseconds of choosing a step's tokens on one thread."""
    torch.set_num_threads(1)
    logits = torch.randn(len(constraints), vocab).to(torch.bfloat16)
    sampler, params = Sampler(greedy, frozenset()), SamplingParams(temperature=heat)
    sequences = [Row(GenerateRequest("r", (1,), params), each) for each in constraints]
    spent: list[float] = []
    for _ in range(repeats):
        started = time.thread_time()
        sampler.choose(logits, sequences)
        spent.append(1e6 * (time.thread_time() - started))
    return statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--walks", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100)
    options = parser.parse_args()
    base = Bases(default_cache() / "bases").get(options.base)
    asyncio.run(measure(base, options.walks, options.tokens))


if __name__ == "__main__":
    main()
