"""Every error this project raises on purpose.

KalmError                      exit code 1: the run failed, try again or read on
├── InputError                 exit code 2: the user's input is wrong; the message holds the remedy
│   ├── CheckpointError        a model directory or hub id that cannot be used
│   ├── MismatchError          a table and a model (or a job) that do not belong together
│   ├── MissingIdsError        ids that the table does not hold
│   └── TableError             no table at this address, or one that is not finished
├── CorruptRowError            a stored row that is not what was written
├── NonFiniteError             logits that are NaN or infinite
├── FencedError                another driver took this table over
├── TooManyRejectsError        more bad input rows than --max-rejected allows
└── IncompleteError            shards were given up; everything else is committed
"""

from collections.abc import Sequence


class KalmError(Exception):
    """Base of all errors below; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(KalmError):
    """Something the user gave is wrong; the message names the thing, the value and the remedy."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint that cannot be found, read or used as a KaLM reranker."""


class MismatchError(InputError):
    """A recorded property of a table differs from what the model or the job asks for.

    Attributes:
        field: name of the property, as `kalm status` prints it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return MismatchError, (self.field, str(self))


class MissingIdsError(InputError):
    """Ids that the table does not hold.

    Attributes:
        ids: all missing ids, in the order they were asked for.
        shown: the first of them, for a message.
    """

    def __init__(self, ids: Sequence[str], uri: str) -> None:
        self.shown = ", ".join(repr(i) for i in ids[:10]) + (", …" if len(ids) > 10 else "")
        super().__init__(
            f"{len(ids)} of the ids asked for are not in {uri}: {self.shown}. "
            "Encode them first, or leave them out."
        )
        self.ids = list(ids)
        self.uri = uri

    def __reduce__(self) -> tuple[type, tuple[list[str], str]]:
        return MissingIdsError, (self.ids, self.uri)


class TableError(InputError):
    """No passage table at this address, or one that cannot be read yet."""


class CorruptRowError(KalmError):
    """A stored row whose bytes do not match their checksum, or that is there twice."""


class NonFiniteError(KalmError):
    """The decoder produced NaN or infinite logits."""


class FencedError(KalmError):
    """Another driver has taken over the table; this one must stop."""


class TooManyRejectsError(KalmError):
    """More input rows were rejected than the job allows."""


class IncompleteError(KalmError):
    """Some shards could not be encoded; all others are committed and running again resumes."""
