"""Logits → tokens: penalties, biases, grammars, end-of-text rules, choice, log-probabilities."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from serving.engine.boundary import RequestFailed, SamplingParams, TokenLogprob
from serving.engine.grammar import Allowed, Constraint, GrammarFailed
from serving.engine.ops.sampling import Shape, sample
from serving.engine.sequence import Sequence

# scores [rows, vocab] → each row's most likely token, and whether all its scores are finite
Greedy = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# float32 scores [rows, vocab] → a token drawn for each row
Sample = Callable[[torch.Tensor, Shape], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None


class Sampler:
    """Chooses one token for each row of logits; no row's result depends on another row."""

    def __init__(self, greedy: Greedy, eos_ids: frozenset[int], sample: Sample = sample) -> None:
        self.greedy, self.sample = greedy, sample
        self.eos_ids = sorted(eos_ids)

    def choose(
        self, logits: torch.Tensor, sequences: Rows[Sequence]
    ) -> list[Sampled | RequestFailed]:
        """Return a token, or the failure of that row alone, for logits [rows, vocab]."""
        best, finite = self.greedy(logits)
        failures = {
            sequence: _not_finite(sequence)
            for ok, sequence in zip(finite.tolist(), sequences, strict=True)
            if not ok
        }
        allowed: dict[Sequence, Allowed] = {}
        for sequence in sequences:
            try:
                if sequence.constraint is not None:
                    allowed[sequence] = self._allowed(sequence, sequence.constraint)
            except GrammarFailed as error:
                failures[sequence] = RequestFailed(str(error))
        tokens = self._tokens(logits, best.tolist(), sequences, allowed)
        logprobs = self._logprobs(logits, tokens, sequences)
        return [
            failures.get(sequence) or Sampled(token, logprob)
            for token, logprob, sequence in zip(tokens, logprobs, sequences, strict=True)
        ]

    def _tokens(
        self,
        logits: torch.Tensor,
        tokens: list[int],
        sequences: Rows[Sequence],
        allowed: Mapping[Sequence, Allowed],
    ) -> list[int]:
        """Return the most likely tokens, or others where a request wants it so."""
        special: list[int] = []
        for i, sequence in enumerate(sequences):
            if not self._plain(sequence):
                special.append(i)
            elif sequence in allowed:
                tokens[i] = _most_likely(logits[i], tokens[i], allowed[sequence])
        if not special:
            return tokens
        scores = logits[special].float()
        chosen = self._shaped(scores, [sequences[i] for i in special], allowed)
        for i, token in zip(special, chosen, strict=True):
            tokens[i] = token
        return tokens

    def _plain(self, sequence: Sequence) -> bool:
        """Tell whether the answer is the most likely token of the raw logits that is allowed."""
        params = sequence.sampling
        return (
            params.temperature == 0
            and not _penalised(params)
            and not params.logit_bias
            and (sequence.constraint is not None or not self._must_go_on(sequence))
        )

    def _must_go_on(self, sequence: Sequence) -> bool:
        params = sequence.sampling
        return sequence.produced < params.min_tokens and not params.ignore_eos

    def _shaped(
        self,
        scores: torch.Tensor,
        sequences: Rows[Sequence],
        allowed: Mapping[Sequence, Allowed],
    ) -> list[int]:
        for row, sequence in zip(scores, sequences, strict=True):
            if _penalised(sequence.sampling):
                _penalise(row, sequence)
            if sequence.sampling.logit_bias:
                ids, values = zip(*sequence.sampling.logit_bias, strict=True)
                row[list(ids)] += torch.tensor(values, device=row.device)
            if sequence in allowed:
                row.masked_fill_(torch.from_numpy(~allowed[sequence]).to(row.device), -torch.inf)
            elif self._must_go_on(sequence) and self.eos_ids:
                row[self.eos_ids] = -torch.inf
        drawn = [i for i, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
        if len(drawn) == len(sequences):
            return self.sample(scores, _shape(sequences, scores.device)).tolist()
        tokens = scores.max(dim=-1).indices
        if drawn:
            shape = _shape([sequences[i] for i in drawn], scores.device)
            tokens[drawn] = self.sample(scores[drawn], shape)
        return tokens.tolist()

    def _allowed(self, sequence: Sequence, constraint: Constraint) -> Allowed:
        """Return what the grammar allows; an unwanted end of text only where all else ends."""
        allowed = constraint.allowed()
        if self._must_go_on(sequence) or sequence.sampling.ignore_eos:
            longer = allowed.copy()
            longer[self.eos_ids] = False
            allowed = longer if longer.any() else allowed
        return allowed

    def _logprobs(
        self, logits: torch.Tensor, tokens: Rows[int], sequences: Rows[Sequence]
    ) -> list[TokenLogprob | None]:
        result: list[TokenLogprob | None] = [None] * len(sequences)
        asked = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None]
        if not asked:
            return result
        table = torch.log_softmax(logits[asked].float(), dim=-1)
        most = max(sequences[i].sampling.logprobs or 0 for i in asked)
        values, ids = table.topk(min(most, table.shape[-1]), dim=-1)
        chosen = table.gather(-1, torch.tensor([[tokens[i]] for i in asked], device=table.device))
        for i, own, top_ids, top in zip(
            asked, chosen[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True
        ):
            k = sequences[i].sampling.logprobs or 0
            pairs = tuple(zip(top_ids[:k], top[:k], strict=True))
            result[i] = TokenLogprob(tokens[i], own, pairs)
        return result


def _most_likely(row: torch.Tensor, best: int, allowed: Allowed) -> int:
    """Return the first most likely allowed token of scores [vocab], whose most likely is `best`."""
    if allowed[best]:
        return best  # nearly always, for a model that knows the form
    ids = torch.from_numpy(allowed.nonzero()[0]).to(row.device)
    return int(ids[row[ids].max(dim=-1).indices])


def _penalised(params: SamplingParams) -> bool:
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    )


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    """Change the scores [vocab] in place.

    Repetition (arXiv 1909.05858, over prompt and output) first, then OpenAI's frequency and
    presence penalties over the output.
    """
    params = sequence.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens[sequence.virtual :])), device=row.device)
        scores, penalty = row[seen], params.repetition_penalty
        row[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.produced:
        ids, counts = np.unique(sequence.tokens[sequence.prompt_length :], return_counts=True)
        times = torch.from_numpy(counts).to(row)
        row[torch.from_numpy(ids).to(row.device)] -= (
            times * params.frequency_penalty + params.presence_penalty
        )


def _shape(sequences: Rows[Sequence], device: torch.device) -> Shape:
    def column(values: Rows[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    params = [sequence.sampling for sequence in sequences]
    return Shape(
        temperature=column([p.temperature for p in params]),
        top_k=torch.tensor([p.top_k for p in params], device=device),
        top_p=column([p.top_p for p in params]),
        min_p=column([p.min_p for p in params]),
        uniform=column([sequence.draws[sequence.produced] for sequence in sequences]),
    )


def _not_finite(sequence: Sequence) -> RequestFailed:
    worn = sequence.adapter.label if sequence.adapter else "the base model"
    return RequestFailed(
        f"Request {sequence.request.request_id}: the logits of {worn} are not finite numbers "
        f"after {len(sequence.tokens)} tokens. Its weights overflow; push a version that does not."
    )
