"""Chunks of many clips → full batches → Predictions per clip: the exact inverse of cutting.

    add(A, 5 rows)  add(B, 2)  add(C, 4)        batch = 8
    take   ─▶  A[0:5] B[0:2] C[0:1]             one full batch of three clips
    scatter ─▶  A, B complete                   C waits for its rows [1:4]

A ticket is whatever the caller wants back with the answers. Knows neither tensors nor devices:
`models.runner` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vidbatch.data import Chunk, Model, Predictions
from vidbatch.errors import ModelError
from vidbatch.models.answers import join_predictions
from vidbatch.models.runner import Answers, Runner
from vidbatch.models.staging import Piece


def predict_chunk(
    models: Mapping[str, Model], chunk: Chunk, device: str
) -> dict[str, Predictions | ModelError]:
    """What loaded models say of the rows of one chunk of their kind, at once, in this thread.

    Returns:
        Model name → Predictions (`item` counts the rows, without the context frame), or the
        ModelError of a model that failed; the others are not touched by it.
    """
    piece = Piece(ticket=None, chunk=chunk, lo=0, hi=chunk.num_rows, models=frozenset(models))
    (answers,) = Runner(tuple(models.values()), device).run([piece])
    return answers


@dataclass(slots=True)
class _Waiting:
    """A chunk that is not answered yet."""

    whole: Chunk
    models: frozenset[str] | None
    taken: int = 0
    """Rows that stand in pieces."""
    answered: dict[int, tuple[Piece, Answers]] = field(default_factory=dict)
    """First row of a piece → its answers."""

    @property
    def items(self) -> int:
        """What it counts in a batch: an empty chunk counts as one, so that it is answered too."""
        return max(self.whole.num_rows, 1)


class Batcher:
    """Collects chunks, gives out full batches, puts the answers together again. Not thread-safe."""

    def __init__(self, batch: int) -> None:
        """`batch`: rows of a full batch; the largest `spec.batch` of the models is a good one."""
        if batch < 1:
            raise ValueError(f"batch {batch} is less than 1")
        self.batch = batch
        self._waiting: dict[Hashable, _Waiting] = {}
        self._queue: deque[Hashable] = deque()
        self._items = 0

    def __len__(self) -> int:
        """Items that stand in no piece yet."""
        return self._items

    def add(self, ticket: Hashable, whole: Chunk, models: frozenset[str] | None = None) -> None:
        """Queues a chunk for some models (None = all of its kind).

        Raises:
            ValueError: the ticket is in use.
        """
        if ticket in self._waiting:
            raise ValueError(f"ticket {ticket!r} is still waiting for its answers")
        self._waiting[ticket] = chunk = _Waiting(whole, models)
        self._queue.append(ticket)
        self._items += chunk.items

    def take(self, min_items: int = 1) -> list[Piece]:
        """Up to `batch` items, first come first served; none while fewer than `min_items` wait."""
        pieces: list[Piece] = []
        if self._items < max(min_items, 1):
            return pieces
        room = self.batch
        while room and self._queue:
            ticket = self._queue[0]
            chunk = self._waiting[ticket]
            some = min(room, chunk.items - chunk.taken)
            lo, hi = chunk.taken, min(chunk.taken + some, chunk.whole.num_rows)
            pieces.append(
                Piece(ticket=ticket, chunk=chunk.whole, lo=lo, hi=hi, models=chunk.models)
            )
            chunk.taken += some
            room -= some
            self._items -= some
            if chunk.taken == chunk.items:
                self._queue.popleft()
        return pieces

    def scatter(
        self, pieces: Sequence[Piece], answers: Sequence[Answers]
    ) -> list[tuple[Hashable, Answers]]:
        """Takes the answers of pieces, batches in any order; returns the tickets now complete.

        A model that failed on one piece of a chunk has failed on the chunk.

        Raises:
            ValueError: an answer is of other rows than its piece (keys or counts differ), or of a
                piece that was answered before: a fault of the caller, nothing of it is kept.
        """
        for piece, answer in zip(pieces, answers, strict=True):
            self._check(piece, answer)
        done: list[tuple[Hashable, Answers]] = []
        for piece, answer in zip(pieces, answers, strict=True):
            chunk = self._waiting[piece.ticket]
            chunk.answered[piece.lo] = (piece, answer)
            if sum(len(p) for p, _ in chunk.answered.values()) == chunk.whole.num_rows:
                del self._waiting[piece.ticket]
                done.append((piece.ticket, _join(chunk)))
        return done

    def _check(self, piece: Piece, answer: Answers) -> None:
        chunk = self._waiting.get(piece.ticket)
        if chunk is None or piece.lo in chunk.answered:
            raise ValueError(f"rows [{piece.lo}, {piece.hi}) of {piece.ticket!r}: answered before")
        if not np.array_equal(piece.keys, chunk.whole.keys[piece.lo : piece.hi]):
            raise ValueError(f"{piece.ticket!r}: the answers are of other frames than its rows")
        for name, found in answer.items():
            if isinstance(found, Predictions) and found.n != len(piece):
                raise ValueError(
                    f"{piece.ticket!r}: {name} answered {found.n} rows of {len(piece)}"
                )


def _join(chunk: _Waiting) -> Answers:
    """The answers of a chunk's pieces, in the order of its rows."""
    parts = [answer for _, (_, answer) in sorted(chunk.answered.items())]
    joined: Answers = {}
    for name in parts[0]:
        found = [part[name] for part in parts]
        errors = [x for x in found if isinstance(x, ModelError)]
        joined[name] = (
            errors[0]
            if errors
            else join_predictions([x for x in found if isinstance(x, Predictions)])
        )
    return joined
