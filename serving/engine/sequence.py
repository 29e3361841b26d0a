"""One request while it lives in the engine."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from registry.adapter import AdapterRef
from serving.engine.boundary import GenerateRequest, SamplingParams
from serving.engine.grammar import Constraint


class Draws:
    """A request's own random numbers: number i is the same whoever else is in the batch.

    Asking again for the same number gives it again, so a step can be repeated.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._count = 0
        self._last = 0.0

    @cached_property
    def _generator(self) -> np.random.Generator:  # a greedy request never needs one
        # numpy takes no negative seed; two's complement keeps different seeds different.
        return np.random.default_rng(None if self._seed is None else self._seed % (1 << 64))

    def __getitem__(self, index: int) -> float:
        assert self._count - 1 <= index, "draws are asked for in order"
        while self._count <= index:
            self._last = self._generator.random()
            self._count += 1
        return self._last


class Sequence:
    """Prompt and output tokens, how far the model has read them, and where its state is."""

    def __init__(self, request: GenerateRequest, constraint: Constraint | None = None) -> None:
        self.request = request
        self.constraint = constraint  # where the output is in its grammar
        self.tokens: list[int] = list(request.prompt_ids)
        self.prompt_length = len(request.prompt_ids)
        self.virtual = 0  # of the prompt, tokens that are the adapter's; their ids are below 0
        self.computed = 0  # tokens whose keys and values are in the cache
        self.read = 0  # tokens ever computed: more than `computed` after a pause
        self.sat_out = 0  # steps in a row, up to now, that went on without it
        self.kv_slot = -1  # -1 until admitted
        self.share = 0.0  # size of its adapter over that of the base's linears
        self.is_new = False  # it started just after its adapter had been loaded by a call
        self.part = 0  # tokens of its prompt in a step at most; 0: as many as the step has room for
        self.cached = 0  # prompt tokens that were in the prefix cache when it started
        self.block_keys: list[bytes] = []  # of the blocks that its tokens fill, see PrefixCache
        self.awaits = b""  # key of the block that it needs next, while another one reads it
        self.kept = 0  # of those, how many were offered to the prefix cache, or came from it
        self.draws = Draws(request.sampling.seed)

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def adapter(self) -> AdapterRef | None:
        return self.request.adapter

    @property
    def produced(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def cached_prompt(self) -> int:
        """Tokens of the request's own prompt that were in the prefix cache."""
        return max(0, self.cached - self.virtual)

    def lead(self, count: int) -> None:
        """Put virtual tokens before the prompt, before anything of it was read."""
        self.tokens[:0] = range(-count, 0)
        self.virtual = count
        self.prompt_length += count

    @property
    def remaining(self) -> int:
        """Tokens the model has not read: 1 while decoding, more before that."""
        return len(self.tokens) - self.computed

    @property
    def unread(self) -> int:
        """Tokens to be read before it decodes."""
        return self.remaining if self.remaining > 1 else 0

    def advance(self, row: "Row") -> None:
        """Note that a row of this sequence has been computed."""
        self.computed = row.stop
        self.read = max(self.read, row.stop)


@dataclass(frozen=True, slots=True)
class Row:
    """What one step does for one sequence: read `count` tokens from `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Tell whether the last token read is the last one there is."""
        return self.stop == len(self.sequence.tokens)

    @property
    def new_prompt_tokens(self) -> int:
        """Prompt tokens in it that were never read before; ask before `advance`."""
        sequence = self.sequence
        return max(0, min(self.stop, sequence.prompt_length) - max(self.start, sequence.read))

    @property
    def repeated(self) -> int:
        """Tokens in it that had been read before a pause; ask before `advance`."""
        return max(0, min(self.stop, self.sequence.read) - self.start)
