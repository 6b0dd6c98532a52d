"""Batches are cut and put together again without a row lost, doubled or swapped; the runner."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.made_frames import make_frames
from vidbatch.batching import Batcher, predict_chunk
from vidbatch.data import (
    Batch,
    BoxRows,
    Frames,
    Geometry,
    LabelRows,
    Model,
    ModelSpec,
    Pixels,
    Predictions,
)
from vidbatch.errors import ModelError
from vidbatch.models.runner import Answers, Runner
from vidbatch.models.staging import Piece

SMALL = Geometry(width_px=4, height_px=2)
TALL = Geometry(width_px=3, height_px=5)
POISON = 255
"""A pixel value that `Echo` refuses."""


@dataclass
class Echo:
    """Whole numbers of everything it is given, so that a swapped or stale frame shows exactly."""

    name: str = "echo"
    geometry: Geometry = SMALL
    context: int = 0
    batch: int = 3
    room: int = 1_000
    """Frames at which "memory" runs out."""
    sizes: list[int] = field(default_factory=list)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            name=self.name,
            version="v1",
            adapter="python",
            kind="echo",
            geometry=self.geometry,
            gives=("detections", "labels", "embeddings", "features"),
            labels=("even", "odd"),
            features=("sum", "previous"),
            dim=2,
            normalised=False,
            context=1 if self.context else 0,
            batch=self.batch,
        )

    def load(self, device: str) -> None:
        pass

    def close(self) -> None:
        pass

    def predict(self, batch: Batch) -> Predictions:
        n = len(batch.pixels)
        self.sizes.append(n)
        if n > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if (batch.pixels == POISON).any():
            raise ZeroDivisionError("poison")
        sums = batch.pixels.sum(dim=(1, 2, 3)).numpy()
        before = np.full(n, -1)
        if batch.previous is not None:
            found = batch.previous.sum(dim=(1, 2, 3)).numpy()
            before = np.where(batch.has_previous.numpy(), found, -1)
        odd = np.flatnonzero(sums % 2)
        return Predictions(
            n=n,
            features=np.stack([sums, before], 1).astype(np.float32),
            embeddings=batch.source_px.astype(np.float32),
            labels=LabelRows(
                item=np.arange(n), label_id=sums % 2, score=np.full(n, 0.5, np.float32)
            ),
            boxes=BoxRows(
                item=odd,
                label_id=np.ones(len(odd), np.int64),
                score=np.ones(len(odd), np.float32),
                xyxy=np.repeat((sums[odd] % 97 / 100).astype(np.float32)[:, None], 4, axis=1),
            ),
        )


def picture(value: int, size: tuple[int, int] = (10, 12)) -> Pixels:
    out = np.full((*size, 3), value % 250, np.uint8)
    out[0, 0] = value // 250
    return out


def chunk(first: int, rows: int, context: bool = False) -> Frames:
    """Pictures whose pixels and sizes tell which frame of which clip they are."""
    n = rows + int(context)
    made = [picture(first + i, (10 + first % 7, 12 + i)) for i in range(n)]
    return make_frames(made, [SMALL, TALL], context=context, first=first)


def three_models(batch: int) -> list[Model]:
    return [
        Echo("plain", SMALL, 0, batch),
        Echo("pair", SMALL, 1, batch + 1),
        Echo("tall", TALL, 1, 2),
    ]


def assert_equal(one: Predictions | ModelError, other: Predictions | ModelError) -> None:
    assert isinstance(one, Predictions) and isinstance(other, Predictions)
    assert one.n == other.n
    np.testing.assert_array_equal(one.features, other.features)
    np.testing.assert_array_equal(one.embeddings, other.embeddings)
    for a, b in ((one.labels, other.labels), (one.boxes, other.boxes)):
        np.testing.assert_array_equal(a.item, b.item)
        np.testing.assert_array_equal(a.label_id, b.label_id)
        np.testing.assert_array_equal(a.score, b.score)
    np.testing.assert_array_equal(one.boxes.xyxy, other.boxes.xyxy)


CHUNK = st.tuples(
    st.integers(0, 7),
    st.booleans(),
    st.none() | st.frozensets(st.sampled_from(["plain", "pair", "tall"])),
)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(CHUNK, min_size=1, max_size=8),
    batch=st.integers(1, 9),
    model_batch=st.integers(1, 4),
    min_items=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_batches_of_any_mixture_give_what_each_chunk_gives_alone(
    shapes: list[tuple[int, bool, frozenset[str] | None]],
    batch: int,
    model_batch: int,
    min_items: int,
    seed: int,
) -> None:
    order = random.Random(seed)
    models = three_models(model_batch)
    chunks = {t: chunk(100 * t, rows, context) for t, (rows, context, _) in enumerate(shapes)}
    batcher, runner = Batcher(batch), Runner(models)
    under_way: list[tuple[list[Piece], list[Answers]]] = []
    done: dict[object, Answers] = {}

    def step(min_items: int) -> bool:
        pieces = batcher.take(min_items)
        assert sum(len(p) for p in pieces) <= batch
        if pieces:
            under_way.append((pieces, runner.run(pieces)))
        while under_way and (not pieces or order.random() < 0.5):  # answers come in any order
            ready = under_way.pop(order.randrange(len(under_way)))
            for ticket, answers in batcher.scatter(*ready):
                assert ticket not in done
                done[ticket] = answers
        return bool(pieces)

    for ticket, frames in chunks.items():
        batcher.add(ticket, frames, shapes[ticket][2])
        while order.random() < 0.5 and step(min_items):
            pass
    while len(batcher) or under_way:
        step(1)

    assert set(done) == set(chunks)
    for ticket, frames in chunks.items():
        wanted = shapes[ticket][2]
        mine = {m.spec.name: m for m in models if wanted is None or m.spec.name in wanted}
        alone = predict_chunk(mine, frames, "cpu")
        assert set(done[ticket]) == set(alone) == set(mine)
        for name in mine:
            assert_equal(done[ticket][name], alone[name])


@pytest.mark.parametrize("context", [False, True])
def test_what_a_chunk_gives(context: bool) -> None:
    """The expectation written out once: sums, sums before, sizes; the context frame is no row."""
    frames = chunk(40, 5, context)
    pixels = frames.pixels[SMALL.key].astype(np.int64)
    sums = pixels.sum(axis=(1, 2, 3))
    model = Echo("pair", SMALL, 1, batch=2)
    answer = predict_chunk({"pair": model}, frames, "cpu")["pair"]
    assert isinstance(answer, Predictions) and answer.n == 5
    rows = slice(int(context), None)
    np.testing.assert_array_equal(answer.features[:, 0], sums[rows])
    before = sums[:-1] if context else [-1, *sums[:-1]]
    np.testing.assert_array_equal(answer.features[:, 1], before)
    np.testing.assert_array_equal(answer.embeddings, frames.source_px[rows])
    np.testing.assert_array_equal(answer.labels.item, np.arange(5))
    assert model.sizes == [2, 2, 1]  # never more than spec.batch


def test_a_batch_is_filled_from_several_clips_in_turn() -> None:
    batcher = Batcher(8)
    for ticket, rows in (("a", 5), ("b", 2), ("c", 4)):
        batcher.add(ticket, chunk(0, rows))
    assert len(batcher) == 11
    assert batcher.take(min_items=12) == []
    first = batcher.take(min_items=8)
    assert [(p.ticket, p.lo, p.hi) for p in first] == [("a", 0, 5), ("b", 0, 2), ("c", 0, 1)]
    assert [(p.ticket, p.lo, p.hi) for p in batcher.take()] == [("c", 1, 4)]
    assert batcher.take() == [] and len(batcher) == 0


def test_an_empty_chunk_is_answered_too() -> None:
    batcher, runner = Batcher(4), Runner([Echo()])
    batcher.add("empty", chunk(0, 0))
    pieces = batcher.take()
    ((ticket, answers),) = batcher.scatter(pieces, runner.run(pieces))
    answer = answers["echo"]
    assert ticket == "empty" and isinstance(answer, Predictions)
    assert answer.n == 0 and answer.embeddings.shape == (0, 2)


class TestScatterRefuses:
    @pytest.fixture
    def waiting(self) -> Iterator[tuple[Batcher, list[Piece], list[Answers]]]:
        batcher = Batcher(8)
        batcher.add("a", chunk(10, 3))
        batcher.add("b", chunk(20, 3))
        pieces = batcher.take()
        yield batcher, pieces, Runner([Echo()]).run(pieces)

    def test_frames_of_another_chunk(
        self, waiting: tuple[Batcher, list[Piece], list[Answers]]
    ) -> None:
        batcher, pieces, answers = waiting
        b = pieces[1]
        stranger = Piece(ticket="a", chunk=b.chunk, lo=0, hi=3)
        with pytest.raises(ValueError, match="other frames"):
            batcher.scatter([stranger, b], answers)
        assert [t for t, _ in batcher.scatter(pieces, answers)] == ["a", "b"]  # nothing was kept

    def test_answers_given_twice(self, waiting: tuple[Batcher, list[Piece], list[Answers]]) -> None:
        batcher, pieces, answers = waiting
        batcher.scatter(pieces, answers)
        with pytest.raises(ValueError, match="answered before"):
            batcher.scatter(pieces, answers)

    def test_too_few_rows(self, waiting: tuple[Batcher, list[Piece], list[Answers]]) -> None:
        batcher, pieces, answers = waiting
        with pytest.raises(ValueError, match="answered 0 rows of 3"):
            batcher.scatter(pieces, [{"echo": Predictions(n=0)}, answers[1]])

    def test_a_ticket_twice(self, waiting: tuple[Batcher, list[Piece], list[Answers]]) -> None:
        with pytest.raises(ValueError, match="still waiting"):
            waiting[0].add("a", chunk(0, 1))


class TestFaults:
    def poisoned(self) -> Frames:
        return make_frames([picture(1), np.full((9, 9, 3), POISON, np.uint8)], [SMALL, TALL])

    def test_one_bad_clip_costs_only_its_own_rows(self) -> None:
        batcher, runner = Batcher(8), Runner([Echo(batch=8)])
        batcher.add("good", chunk(0, 3))
        batcher.add("bad", self.poisoned())
        batcher.add("also good", chunk(50, 3))
        pieces = batcher.take()
        done = dict(batcher.scatter(pieces, runner.run(pieces)))
        error = done["bad"]["echo"]
        assert isinstance(error, ModelError) and error.kind == "model_raised"
        assert "model echo: raised ZeroDivisionError on 2 frames" in str(error)
        for ticket, first in (("good", 0), ("also good", 50)):
            alone = predict_chunk({"echo": Echo()}, chunk(first, 3), "cpu")
            assert_equal(done[ticket]["echo"], alone["echo"])

    def test_a_chunk_that_fails_in_one_piece_has_failed(self) -> None:
        batcher, runner = Batcher(1), Runner([Echo()])
        batcher.add("bad", self.poisoned())
        done: list[object] = []
        while pieces := batcher.take():
            done += batcher.scatter(pieces, runner.run(pieces))
        ((_, answers),) = done  # type: ignore[misc]
        assert isinstance(answers["echo"], ModelError)  # type: ignore[has-type]

    def test_one_bad_model_takes_no_other_with_it(self) -> None:
        models = {"a": Echo("a"), "b": Echo("b", TALL), "c": Echo("c", room=0)}
        answers = predict_chunk(models, chunk(0, 4), "cpu")
        assert isinstance(answers["a"], Predictions) and isinstance(answers["b"], Predictions)
        error = answers["c"]
        assert isinstance(error, ModelError) and error.kind == "out_of_memory"

    def test_a_wrong_answer_is_an_error_of_the_model(self) -> None:
        class Short(Echo):
            def predict(self, batch: Batch) -> Predictions:
                return Predictions(n=1)

        answer = predict_chunk({"echo": Short()}, chunk(0, 3), "cpu")["echo"]
        assert isinstance(answer, ModelError) and answer.kind == "model_answer"

    def test_out_of_memory_halves_and_goes_on(self) -> None:
        model = Echo(batch=64, room=5)
        runner = Runner([model])
        piece = Piece(ticket=0, chunk=chunk(0, 30), lo=0, hi=30)
        (answers,) = runner.run([piece])
        assert_equal(answers["echo"], predict_chunk({"echo": Echo()}, piece.chunk, "cpu")["echo"])
        assert model.sizes[:4] == [30, 15, 7, 3] and set(model.sizes[4:]) == {3}
        assert runner.halved == 3
        runner.run([piece])
        assert runner.halved == 3  # it remembers

    def test_a_model_that_is_not_here(self) -> None:
        piece = Piece(ticket=0, chunk=chunk(0, 1), lo=0, hi=1, models=frozenset({"other"}))
        with pytest.raises(KeyError, match="other"):
            Runner([Echo()]).run([piece])


def test_seconds_are_counted() -> None:
    runner = Runner(three_models(2))
    runner.load()
    runner.run([Piece(ticket=0, chunk=chunk(0, 9), lo=0, hi=9)])
    assert runner.seconds["compute"] > 0 and runner.seconds["collating"] > 0
    assert runner.seconds["uploading"] == 0  # on a CPU nothing is
    runner.close()


def test_staging_ahead_gives_the_same() -> None:
    """Two batches staged before the first is computed do not share a buffer."""
    runner = Runner(three_models(4))
    pieces = [Piece(ticket=i, chunk=chunk(100 * i, 6, context=bool(i)), lo=0, hi=6) for i in (0, 1)]
    staged = [runner.stage([p]) for p in pieces]
    for piece, s in zip(pieces, staged, strict=True):
        (answers,) = runner.compute(s)
        alone = predict_chunk({m.spec.name: m for m in runner.models}, piece.chunk, "cpu")
        for name, answer in answers.items():
            assert_equal(answer, alone[name])
