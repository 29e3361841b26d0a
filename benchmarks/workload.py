"""The one workload of the throughput benchmark, and its statistics.

Prompts are 112 to 144 tokens of English text without a shared prefix, sent as token ids; every
request asks for 64 greedy tokens and goes on past the end-of-text token. A cell is C clients in a
closed loop over n distinct adapters (request i wears adapter i mod n; n = 0 is the base model).
"""

import pydoc_data.topics
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from transformers import AutoTokenizer

MEAN_PROMPT = 128
OUTPUT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid."""

    clients: int
    adapters: int
    requests: int


CELLS = (
    Cell(1, 0, 8),
    Cell(1, 8, 8),
    Cell(8, 0, 32),
    Cell(8, 1, 32),
    Cell(8, 8, 32),
    Cell(32, 0, 64),
    Cell(32, 1, 64),
    Cell(32, 8, 64),
    Cell(32, 32, 64),
)


@dataclass(slots=True)
class Record:
    """One request: when it was sent, and when each token event came (seconds, monotonic)."""

    sent: float
    events: list[float] = field(default_factory=list[float])
    tokens: int = 0


def prompts(tokenizer_folder: str, count: int, seed: int) -> list[list[int]]:
    """Make `count` prompts as token ids; the same seed gives the same prompts."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[key] for key in sorted(topics))
    rng = random.Random(seed)
    made: list[list[int]] = []
    seen: set[tuple[int, ...]] = set()
    while len(made) < count:
        start = text.find(" ", rng.randrange(len(text) - 2000)) + 1
        length = rng.randint(112, 144)
        ids = tokenizer(text[start : start + 1500])["input_ids"][:length]
        if len(ids) == length and tuple(ids[:8]) not in seen:
            seen.add(tuple(ids[:8]))
            made.append(ids)
    return made


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics; q in 0..100."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def jain(shares: Sequence[float]) -> float:
    """Return (Σx)² / (n Σx²): 1 when all are equal, 1/n when one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares))


@dataclass(frozen=True, slots=True)
class Figures:
    """What one repeat of one cell gave. Times in milliseconds."""

    tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p95: float
    itl_p99: float

    @classmethod
    def of(cls, records: Sequence[Record], wall_seconds: float) -> "Figures":
        ttft = [(r.events[0] - r.sent) * 1e3 for r in records]
        gaps = [(b - a) * 1e3 for r in records for a, b in pairwise(r.events)]
        return cls(
            sum(r.tokens for r in records) / wall_seconds,
            percentile(ttft, 50),
            percentile(ttft, 99),
            percentile(gaps, 50),
            percentile(gaps, 95),
            percentile(gaps, 99),
        )

    @classmethod
    def median(cls, repeats: Sequence["Figures"]) -> "Figures":
        return cls(
            *(
                statistics.median(getattr(r, name) for r in repeats)
                for name in cls.__dataclass_fields__
            )
        )
