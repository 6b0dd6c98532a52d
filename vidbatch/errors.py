"""Every error vidbatch raises, and what may be done about each.

    VidbatchError
    ├── UsageError            the command, the job file or the model file is wrong            exit 2
    │   └── RefusedError      the output or the plan forbids this run (pinned rule, limits)   exit 2
    ├── InfraError            the surroundings are wrong: store, cluster, disk                exit 1
    │   ├── StoreError        a request to a store failed for good
    │   │   ├── NotFoundInStore   the object is not there
    │   │   ├── ForbiddenByStore  credentials or rights are missing
    │   │   └── SourceChanged     the object is not the version that was planned
    │   ├── ExistsInStore     create-only PUT lost: somebody committed this key before
    │   └── ClusterError      Ray does not answer or is not what was asked for
    ├── MediaError            the cause lies in the bytes of one video                        a row
    ├── DecoderDied           the process that decoded a clip crashed, hung or ran out        a row
    └── ModelError            a model failed on frames it was given                           a row

A message says what happened, to which thing, what it means for the run and what to do.
`kind` is a short stable word for tables and metrics; `retryable` says whether the same input may
succeed later without anybody changing it.
"""

from __future__ import annotations

from typing import ClassVar


class VidbatchError(Exception):
    """The root: catch this at the edge (CLI, job script), nothing broader."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, kind: str = "", advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind or type(self).__name__
        self.advice = advice

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.kind, self.advice))


def _rebuild(cls: type[VidbatchError], message: str, kind: str, advice: str) -> VidbatchError:
    return cls(message, kind=kind, advice=advice)


class UsageError(VidbatchError):
    """What the user wrote cannot be run; nothing was started and nothing written."""

    exit_code = 2


class RefusedError(UsageError):
    """The request is well formed, but the output or a limit forbids it."""


class InfraError(VidbatchError):
    """Store, disk or cluster failed in a way that stops the run."""

    retryable = True


class StoreError(InfraError):
    """A request to a store failed after its retries."""


class NotFoundInStore(StoreError):
    """The object is not there (any more)."""

    retryable = False


class ForbiddenByStore(StoreError):
    """The store refused: wrong credentials or missing rights."""


class SourceChanged(StoreError):
    """The object is no longer the version that was planned; the next run plans the new one."""

    retryable = False


class ExistsInStore(InfraError):
    """A create-only PUT found an object under its key: first writer wins, this one lost."""

    retryable = False


class ClusterError(InfraError):
    """Ray does not answer, or offers not what the job asks for."""


class MediaError(VidbatchError):
    """The bytes of one video cannot be (fully) decoded; permanent until the object changes."""


class DecoderDied(VidbatchError):
    """The decoding process crashed, hung, or passed its memory or time limit on one clip."""

    retryable = True


class ModelError(VidbatchError):
    """A model raised, or returned what its spec does not allow, for frames of one clip."""

    retryable = True
