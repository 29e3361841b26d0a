"""What an adapter does to its rows beside B(A(x)): vectors, and positions before the prompt.

A vector costs what it is long, and an embedding or a head of its own is the rows that are not the
base's. Which rows wear one is known once a step (`dressed_rows`), and a step in which nobody wears
any runs as if there were none.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from serving.engine.ops.lora import Worn, merge_runs
from serving.engine.slots import Slot

ALIGNMENT = 64  # bytes, a cache line

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows in the place of the embedding's or the head's, for some tokens.

    Virtual tokens, which stand before a prompt, have ids below 0.
    """

    ids: torch.Tensor  # [k], ascending
    rows: torch.Tensor  # [k, hidden]; those of a head as the operators multiply with them

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where in `ids` tokens of these are, and which row each of them has."""
        place = torch.searchsorted(self.ids, ids).clamp_(max=len(self.ids) - 1)
        here = (self.ids[place] == ids).nonzero().flatten()
        return here, place[here]


HeadProduct = Callable[[torch.Tensor, TokenRows], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Vectors:
    """The vectors of one adapter; what it does not change is None or not there."""

    # group → scale and shift, float32 [layers, outputs]: y = scale · y + shift, after LoRA
    outputs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    norms: torch.Tensor | None  # [norms, hidden], in the order of `BaseLayers.norms`
    embedding: TokenRows | None
    head: TokenRows | None
    # keys and values of the positions before the prompt, [layers, kv_heads, virtual, dim]
    prefix: tuple[torch.Tensor, torch.Tensor] | None
    virtual: int  # positions before the prompt, those of `prefix` or of `embedding`

    def tensors(self) -> list[torch.Tensor]:
        found = [tensor for pair in self.outputs.values() for tensor in pair]
        found += [tensor for tensor in (self.norms, *(self.prefix or ())) if tensor is not None]
        for tokens in (self.embedding, self.head):
            found += [] if tokens is None else [tokens.ids, tokens.rows]
        return found

    @property
    def size_bytes(self) -> int:
        """Of the memory that they are laid out in."""
        return sum(map(_aligned, self.tensors()))

    def laid_out(self, memory: torch.Tensor) -> "Vectors":
        """Return tensors of these shapes, one behind the other in `memory`, as it is there."""
        parts = iter(memory.view(torch.uint8).split([*map(_aligned, self.tensors())]))

        def see(tensor: torch.Tensor) -> torch.Tensor:
            return next(parts)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

        def see_rows(tokens: TokenRows | None) -> TokenRows | None:
            return tokens and TokenRows(see(tokens.ids), see(tokens.rows))

        return Vectors(  # in the order of `tensors`
            outputs={name: (see(s), see(b)) for name, (s, b) in self.outputs.items()},
            norms=None if self.norms is None else see(self.norms),
            prefix=self.prefix and (see(self.prefix[0]), see(self.prefix[1])),
            embedding=see_rows(self.embedding),
            head=see_rows(self.head),
            virtual=self.virtual,
        )


def _aligned(tensor: torch.Tensor) -> int:
    """Return its bytes, up to where another one of any type may begin."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


Dressed = Sequence[tuple[slice, Vectors]]  # rows of a step, and what they wear


def dressed_rows(worn: Worn, vectors: Mapping[Slot, Vectors]) -> Dressed:
    """Return the rows that wear vectors; mostly there are none, and it costs nothing."""
    if not vectors:
        return ()
    return tuple(
        (slice(run.start, run.stop), vectors[run.slot])
        for run in merge_runs(worn)
        if run.slot in vectors
    )


def dress_embeddings(
    x: torch.Tensor, ids: torch.Tensor, dressed: Dressed, scale: torch.Tensor | None = None
) -> None:
    """Put the rows of changed and virtual tokens into x [rows, hidden].

    Some bases scale what they read from the embedding; virtual tokens are not read from it.
    """
    for rows, vectors in dressed:
        if vectors.embedding is not None:
            here, place = vectors.embedding.find(ids[rows])
            own = vectors.embedding.rows[place]
            if scale is not None:
                own = torch.where(ids[rows][here, None] < 0, own, own * scale)
            x[rows][here] = own


def dress_outputs(y: torch.Tensor, group: str, layer: int, dressed: Dressed) -> None:
    """Scale and shift what a linear and its LoRA gave, y [rows, outputs]."""
    for rows, vectors in dressed:
        if group in vectors.outputs:
            scale, shift = (each[layer] for each in vectors.outputs[group])
            y[rows] = y[rows] * scale + shift


def dress_norm(
    h: torch.Tensor, x: torch.Tensor, norm: Norm, eps: float, index: int, dressed: Dressed
) -> None:
    """Compute h = norm(x) again where the weight of norm number `index` is another."""
    for rows, vectors in dressed:
        if vectors.norms is not None:
            h[rows] = norm(x[rows], vectors.norms[index], eps)


def dress_logits(
    logits: torch.Tensor, h: torch.Tensor, dressed: Dressed, product: HeadProduct
) -> None:
    """Compute the logits of changed tokens, for logits [rows, vocab] of h [rows, hidden]."""
    for rows, vectors in dressed:
        if vectors.head is not None:
            changed = product(h[rows], vectors.head)
            if len(vectors.head.ids) == logits.shape[1]:
                logits[rows] = changed
            else:
                logits[rows, vectors.head.ids] = changed


def sampled_of(dressed: Dressed, sampled: torch.Tensor) -> Dressed:
    """Return which of the sampled rows wear what; `sampled` is ascending."""
    if not dressed:
        return dressed
    order = sampled.tolist()
    found = (
        (slice(bisect_left(order, rows.start), bisect_left(order, rows.stop)), vectors)
        for rows, vectors in dressed
    )
    return tuple((rows, vectors) for rows, vectors in found if rows.start < rows.stop)
