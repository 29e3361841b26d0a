"""Rows of many lengths as one row of tokens: only attention sees them apart, and pads them.

Linears, norms and the head run over tokens that exist; with rows of different tenants side by
side, padding all of them to the longest would be a third of the work and more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from training.batches import Sample
from training.errors import RecipeError
from training.together.lora import Span

ATTENTION = "wardrobe_packed"  # what `attend` is called among transformers' attention functions


@dataclass(frozen=True, slots=True)
class Places:
    """Where each packed token stands when the rows are padded to one length."""

    index: torch.Tensor  # [tokens] into rows · length
    rows: int
    length: int


@dataclass(frozen=True, slots=True)
class Packed:
    """One mixed batch. The tokens of an adapter are neighbours."""

    ids: torch.Tensor  # [1, tokens]
    positions: torch.Tensor  # [1, tokens], from 0 in every row
    places: Places
    spans: tuple[Span, ...]
    asking: torch.Tensor  # [answers] tokens whose logits are to predict a token of an answer
    answers: torch.Tensor  # [answers] what they are to predict
    counts: tuple[int, ...]  # answers of each adapter, in the order of the spans


def pack(batches: Sequence[tuple[int, Sequence[Sample]]], device: torch.device) -> Packed:
    """Lay out the rows of each (adapter, its own batch)."""
    rows = [sample for _, samples in batches for sample in samples]
    longest = max(len(sample.ids) for sample in rows)
    ids: list[int] = []
    positions: list[int] = []
    index: list[int] = []
    asking: list[int] = []
    answers: list[int] = []
    for number, sample in enumerate(rows):
        length = len(sample.ids)
        asking += range(len(ids) + sample.prompt_length - 1, len(ids) + length - 1)
        answers += sample.ids[sample.prompt_length :]
        ids += sample.ids
        positions += range(length)
        index += range(number * longest, number * longest + length)

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    return Packed(
        ids=on_device(ids)[None],
        positions=on_device(positions)[None],
        places=Places(on_device(index), len(rows), longest),
        spans=_spans(batches),
        asking=on_device(asking),
        answers=on_device(answers),
        counts=tuple(sum(len(s.ids) - s.prompt_length for s in samples) for _, samples in batches),
    )


def _spans(batches: Sequence[tuple[int, Sequence[Sample]]]) -> tuple[Span, ...]:
    spans: list[Span] = []
    start = 0
    for adapter, samples in batches:
        stop = start + sum(len(sample.ids) for sample in samples)
        spans.append(Span(adapter, start, stop))
        start = stop
    return tuple(spans)


def attend(
    module: torch.nn.Module,  # noqa: ARG001  # the interface
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # the interface; there is none
    *,
    places: Places,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each row: [1, heads, tokens, d] → [1, tokens, heads, d].

    The signature is that of transformers' attention functions. Rows are padded on the
    right and attention is causal, so that no token sees padding.
    """
    if dropout or softcap or (sliding_window and sliding_window < places.length):
        raise RecipeError(
            f"The base's attention has dropout {dropout}, softcap {softcap} and a window of "
            f"{sliding_window}; together it is trained plain. Train these recipes one by one."
        )
    q, k, v = (_pad(part, places) for part in (query, key, value))
    if query.device.type == "cpu":  # its bf16 gradient takes three times as long as its fp32 one
        q, k, v = q.float(), k.float(), v.float()
    mixed = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    packed = mixed.transpose(1, 2).flatten(0, 1).index_select(0, places.index)
    return packed.to(query.dtype)[None], None


def _pad(packed: torch.Tensor, places: Places) -> torch.Tensor:
    """Return [rows, heads, length, d] of [1, heads, tokens, d]."""
    tokens = packed[0].transpose(0, 1)
    padded = tokens.new_zeros(places.rows * places.length, *tokens.shape[1:])
    padded = padded.index_copy(0, places.index, tokens)
    return padded.unflatten(0, (places.rows, places.length)).transpose(1, 2)
