"""A dead actor, told from an exception of ours; and its many-line message brought to one.

    RayActorError        the actor's process is gone (ActorDiedError) or does not answer
    WorkerCrashedError   a worker process is gone
    NodeDiedError        its node is
    OutOfMemoryError     the node's memory monitor killed it
    ObjectLostError      what it was sent, or sent back, is gone with its node

They share no root but RayError, which RayTaskError (our exception, raised over there) has too.
"""

from __future__ import annotations

from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

DEATHS: tuple[type[BaseException], ...] = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    OutOfMemoryError,
    ObjectLostError,
)

MESSAGE_CHARS = 300


def is_unclear(error: BaseException) -> bool:
    """Whether an actor does not answer and nobody knows yet why: Ray needs 15 s to see that a node
    is gone, and until then calls to its actors end like this."""
    return isinstance(error, ActorUnavailableError)


def is_node_loss(error: BaseException) -> bool:
    """Whether a node went, and with it an actor that had done nothing to deserve it."""
    return (
        isinstance(error, NodeDiedError | ActorUnavailableError)
        or bool(getattr(error, "preempted", False))
        or "its node has died" in str(error)
    )


def one_line(error: BaseException) -> str:
    """What a person needs of an error of Ray's: no traceback, no ids, one line."""
    if isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False):
        lines = [line for line in str(error).splitlines() if line.strip()]
        return lines[-1].strip()[:MESSAGE_CHARS] if lines else type(error).__name__
    lines = [x for x in str(error).splitlines() if x and not x.startswith("\t")]
    text = " ".join(" ".join(lines).split())
    text = text.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0]
    return f"{type(error).__name__}: {text}"[:MESSAGE_CHARS]
