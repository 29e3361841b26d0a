"""How much is read twice when sequences outgrow the memory for keys and values?

    python -m benchmarks.kv_memory [--share 0.25] [--soon 0 1 4 8 16]

Requests of 10 to 100 tokens of prompt and 50 to 380 of answer come at once, to an engine whose
memory holds `--share` of what its running sequences would fill. Before a request starts, `--soon`
blocks of 16 tokens are kept free for each that runs: with few of them sequences are paused and read
again, with many there are fewer at once. Steps are counted, not timed: the base is tiny, and its
weights are random.
"""

import argparse
import random
from collections import Counter
from dataclasses import dataclass, replace

import torch
from rich.progress import track

from benchmarks.engine_step import SMOLLM2_135M, no_fetch, random_weights
from serving.engine import core
from serving.engine.boundary import GenerateRequest, SamplingParams
from serving.engine.build import assemble
from serving.engine.kv_cache import BLOCK, block_bytes, blocks_of
from serving.engine.linear import Linear
from serving.engine.model import Model
from serving.engine.ops import Operators
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Row
from serving.engine.sequence import Sequence as Request
from serving.engine.settings import EngineSettings

PROMPT, ANSWER = (10, 100), (50, 380)  # tokens, from and to
LONGEST = PROMPT[1] + ANSWER[1]
SPEC = replace(
    SMOLLM2_135M,
    vocab=64,
    layers=1,
    hidden=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    intermediate=32,
    inverse_frequencies=tuple(100.0 ** (-i / 8) for i in range(8)),
    windows=(None,),
    context=LONGEST,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of all requests."""

    steps: int
    paused: int
    running: float  # mean of all steps
    again: float  # tokens that were read again over those that are of use


def run(count: int, running: int, share: float, soon: int) -> Outcome:
    """Serve `count` requests in `share` of the memory of `running` ones."""
    cpu = torch.device("cpu")
    core.SOON = soon
    settings = EngineSettings(
        device="cpu",
        max_running=running,
        kv_cache_bytes=int(running * blocks_of(LONGEST) * share) * block_bytes(SPEC, torch.float32),
        prefix_cache_bytes=0,
    )
    with torch.inference_mode():
        weights = random_weights(SPEC, torch.float32, cpu, Linear)
        model = Model(SPEC, weights, Operators(), LONGEST)
        engine = assemble(model, no_fetch, settings).core
        rng = random.Random(1)
        for index in range(count):
            prompt = tuple(rng.randrange(64) for _ in range(rng.randint(*PROMPT)))
            sampling = SamplingParams(
                max_tokens=rng.randint(*ANSWER), temperature=0, ignore_eos=True
            )
            engine.add(Request(GenerateRequest(str(index), prompt, sampling, None)))
        again, beside = _count_repeated(engine.scheduler), 0
        while engine.scheduler.running or engine.scheduler.waiting:
            engine.step()
            beside += len(engine.scheduler.running)
    counters = engine.counters
    useful = counters.prompt_tokens + counters.generated_tokens
    return Outcome(
        counters.steps, counters.paused, beside / counters.steps, again["tokens"] / useful
    )


def _count_repeated(scheduler: Scheduler) -> Counter[str]:
    """Return where tokens that were read before are counted from now on."""
    again, charge = Counter[str](), scheduler.charge

    def counted(row: Row, sampled: bool) -> None:
        again["tokens"] += row.repeated
        charge(row, sampled)

    scheduler.charge = counted  # type: ignore[method-assign]  # of this one, for its figures
    return again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--soon", type=int, nargs="+", default=[0, 1, 4, 8, 16])
    args = parser.parse_args()
    found = {
        soon: run(args.requests, args.running, args.share, soon)
        for soon in track(args.soon, "serving")
    }
    print("| kept free, tokens | steps | paused | read again | run at once |")
    print("|---:|---:|---:|---:|---:|")
    for soon, each in found.items():
        figures = f"{each.steps} | {each.paused} | {each.again:.0%} | {each.running:.1f}"
        print(f"| {soon * BLOCK} | {figures} |")


if __name__ == "__main__":
    main()
