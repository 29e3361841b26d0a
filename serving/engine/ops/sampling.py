"""From scores to tokens: greedy, and by temperature with top-k, top-p and min-p."""

from dataclasses import dataclass

import torch

FIRST_WIDTH = 64  # candidates looked at before more are asked for


@dataclass(frozen=True, slots=True)
class Shape:
    """How each row's distribution is shaped; every tensor is [rows], float64 but top_k."""

    temperature: torch.Tensor  # above 0
    top_k: torch.Tensor  # int64, 0 is off
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor  # the row's own random number in [0, 1)


def greedy(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's first most likely token, and whether all scores of the row are finite.

    `max` is four times as fast as argmax in bfloat16. A sum is finite only when every term is, and
    it is the cheapest pass over the scores.
    """
    finite = scores.sum(-1, dtype=torch.float32).isfinite()
    return scores.max(dim=-1).indices, finite


def sample(scores: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Draw one token for each row of scores [rows, vocab] by inverting its distribution.

    Temperature first, then min-p, then top-k, then top-p of what top-k left, as vLLM does.
    """
    scores = scores - scores.amax(-1, keepdim=True)  # so that no small temperature overflows
    probs = torch.softmax(scores.double() / shape.temperature[:, None], dim=-1)
    floor = shape.min_p[:, None] * probs.amax(-1, keepdim=True)
    probs = probs.masked_fill(probs < floor, 0.0)
    cut = (shape.top_k > 0) | (shape.top_p < 1.0)
    tokens = torch.empty(len(probs), dtype=torch.int64, device=probs.device)
    for rows, draw in ((~cut, _draw_whole), (cut, _draw_cut)):
        if rows.any():
            tokens[rows] = draw(probs[rows], _rows_of(shape, rows))
    return tokens


def _draw_whole(probs: torch.Tensor, shape: Shape) -> torch.Tensor:
    return _invert(probs, shape.uniform)


def _draw_cut(probs: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Draw from the candidates that top-k and top-p keep, most likely first.

    Sorting the whole vocabulary costs more than the model; a few dozen candidates nearly always
    hold the mass that top-p asks for, and when they do not, more are taken.
    """
    vocab = probs.shape[-1]
    limit = torch.where(shape.top_k > 0, shape.top_k.clamp(max=vocab), vocab)
    width = min(vocab, max(FIRST_WIDTH, int(shape.top_k.max())))
    while True:
        top, candidates = probs.topk(width, dim=-1)
        mass = top.cumsum(-1)
        within = torch.arange(width, device=probs.device)[None] < limit[:, None]
        total = torch.where(
            limit <= width,
            mass.gather(-1, (limit.clamp(max=width) - 1)[:, None])[:, 0],
            probs.sum(-1),
        )
        wanted = (shape.top_p * total)[:, None]
        enough = (limit[:, None] <= width) | (mass[:, -1:] >= wanted)
        if width == vocab or bool(enough.all()):
            break
        width = min(vocab, width * 8)
    kept = within & ((mass - top) < wanted)
    kept[:, 0] = True  # top_p of 0 keeps the most likely token
    chosen = _invert(top.masked_fill(~kept, 0.0), shape.uniform)
    return candidates.gather(-1, chosen[:, None])[:, 0]


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the first index whose running sum exceeds uniform · total; never one of weight 0."""
    mass = weights.cumsum(-1)
    total = mass[:, -1]
    aim = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, aim[:, None], right=True)[:, 0].clamp(max=mass.shape[-1] - 1)


def _rows_of(shape: Shape, rows: torch.Tensor) -> Shape:
    return Shape(
        shape.temperature[rows],
        shape.top_k[rows],
        shape.top_p[rows],
        shape.min_p[rows],
        shape.uniform[rows],
    )
