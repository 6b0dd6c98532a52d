"""What Ray answers, as calls in the one thread that takes them out of the queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any


class Inbox:
    """Answers in the order they came in; no polling of references, no lock.

    `on` and `wake` may be called from anywhere, signal handlers too; `take` from one thread.
    """

    def __init__(self) -> None:
        self._events: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()

    def on(self, ref: Any, handler: Callable[..., Any], *args: Any) -> None:
        """`take` will call `handler(*args, future)` when there is an answer for an ObjectRef."""
        ref.future().add_done_callback(lambda f: self._events.put((handler, (*args, f))))

    def wake(self) -> None:
        """Ends a wait in `take`."""
        self._events.put((lambda: None, ()))

    def take(self, timeout_s: float) -> Iterator[Any]:
        """Waits for an answer, then handles all there are; yields what handlers return."""
        try:
            handler, args = self._events.get(timeout=timeout_s)
            while True:
                found = handler(*args)
                if found is not None:
                    yield found
                handler, args = self._events.get_nowait()
        except Empty:
            return
