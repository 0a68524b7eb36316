"""Every error that this project raises on purpose.

KalmError                      exit code 1: the run failed, try again or read on
├── InputError                 exit code 2: the user's input is wrong; the message names the remedy
│   ├── CheckpointError        a model directory or hub id cannot be used
│   ├── MismatchError          a table and a model (or a job) do not belong together
│   ├── MissingIdsError        the table does not hold these ids
│   ├── MissingTextsError      the table does not hold these texts
│   └── TableError             there is no table at this address, or it is not finished
├── CorruptRowError            a stored row is not what was written
├── NonFiniteError             logits are NaN or infinite
├── FencedError                another driver took this table over
├── TooManyRejectsError        more input rows are bad than --max-rejected allows
└── IncompleteError            shards were given up; everything else is committed
"""

from collections.abc import Sequence


class KalmError(Exception):
    """Base of all errors below; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(KalmError):
    """Something that the user gave is wrong; the message names it, its value and the remedy."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint cannot be found, read or used as a KaLM reranker."""


class MismatchError(InputError):
    """A recorded property of a table differs from what the model or the job asks for.

    Attributes:
        field: Name of the property, as `kalm status` prints it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return MismatchError, (self.field, str(self))


class MissingIdsError(InputError):
    """The table does not hold these ids.

    Attributes:
        ids: All missing ids, in the order they were asked for.
        shown: The first ten of them, for a message.
        uri: Address of the table.
        remedy: What may be done instead of encoding them.
    """

    def __init__(self, ids: Sequence[str], uri: str, remedy: str = "leave them out") -> None:
        self.shown = ", ".join(repr(i) for i in ids[:10]) + (", …" if len(ids) > 10 else "")
        super().__init__(
            f"{len(ids)} of the ids asked for are not in {uri}: {self.shown}. "
            f"Encode them first, or {remedy}."
        )
        self.ids = list(ids)
        self.uri = uri
        self.remedy = remedy

    def __reduce__(self) -> tuple[type, tuple[list[str], str, str]]:
        return MissingIdsError, (self.ids, self.uri, self.remedy)


class MissingTextsError(InputError):
    """The table holds no passages with these texts.

    Attributes:
        texts: All missing texts, in the order they were asked for.
        uri: Address of the table.
    """

    def __init__(self, texts: Sequence[str], uri: str) -> None:
        shown = ", ".join(repr(text[:40]) for text in texts[:3]) + (", …" if len(texts) > 3 else "")
        super().__init__(
            f"{len(texts)} of the texts asked for are not in {uri}: {shown}. Encode them first, "
            "give an encoder, leave them out with on_missing='drop', or rank them last with "
            "on_missing='last'."
        )
        self.texts = list(texts)
        self.uri = uri

    def __reduce__(self) -> tuple[type, tuple[list[str], str]]:
        return MissingTextsError, (self.texts, self.uri)


class TableError(InputError):
    """There is no passage table at this address, or it cannot be read yet."""


class CorruptRowError(KalmError):
    """The bytes of a stored row do not match their checksum, or the row is there twice."""


class NonFiniteError(KalmError):
    """The decoder produced NaN or infinite logits."""


class FencedError(KalmError):
    """Another driver has taken over the table; this one must stop."""


class TooManyRejectsError(KalmError):
    """More input rows were rejected than the job allows."""


class IncompleteError(KalmError):
    """Some shards could not be encoded. All others are committed, and running again resumes."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, without its source location."""
    lines = str(error).strip().splitlines()
    return lines[0].split(", /home/")[0].split(", rust/")[0] if lines else type(error).__name__
