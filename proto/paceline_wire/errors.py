"""The one family of errors: what went wrong, whose fault it is, and whether trying again can help.

Each class maps to exactly one gRPC status code, named by `grpc_code`. On the wire an error travels as that code, its
message as the details, and its class name in the trailing metadata `paceline-error`, so that the caller raises the
class that the peer raised.
"""

from typing import ClassVar

ERROR_METADATA_KEY = "paceline-error"
NEWEST_INCARNATION_KEY = "paceline-newest-incarnation"
"""Trailing metadata beside SupersededError: the incarnation that superseded the caller's, in decimal."""


class PacelineError(Exception):
    """Base of every error that Paceline raises on purpose.

    Also raised as itself when a peer fails in a way that it did not name.
    """

    grpc_code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False


class InvalidInputError(PacelineError):
    """The caller gave something that can never be accepted: a malformed message, a wrong size, an unknown name."""

    grpc_code = "INVALID_ARGUMENT"


class ConfigurationError(PacelineError):
    """A configuration file, flag or variable is wrong. Raised at start only."""

    grpc_code = "INVALID_ARGUMENT"


class CodecError(InvalidInputError):
    """A payload is not a valid encoding: wrong size, damaged, or not finite. Decoders raise nothing else."""


class DamagedPayloadError(PacelineError):
    """A payload's checksum does not fit: bytes changed on the way. Sending it again helps."""

    grpc_code = "DATA_LOSS"
    retryable = True


class ManifestMismatchError(PacelineError):
    """Two models differ; the message names the first tensor that does."""

    grpc_code = "FAILED_PRECONDITION"


class NotInitializedError(PacelineError):
    """The shard has no parameters yet; some worker must initialize the run first."""

    grpc_code = "FAILED_PRECONDITION"


class NotAMemberError(PacelineError):
    """The caller has not joined, or its lease ran out; joining again helps."""

    grpc_code = "FAILED_PRECONDITION"
    retryable = True


class SupersededError(PacelineError):
    """A newer incarnation of the same worker has joined, or opened a newer stream; this one must stop.

    Attributes:
        newest_incarnation: That incarnation, if the raiser knew it.
    """

    grpc_code = "ABORTED"

    def __init__(self, message: str, newest_incarnation: int | None = None) -> None:
        super().__init__(message)
        self.newest_incarnation = newest_incarnation


class ProtocolVersionError(PacelineError):
    """The peers speak different versions of the protocol; one of them must be upgraded."""

    grpc_code = "FAILED_PRECONDITION"


class UnauthenticatedError(PacelineError):
    """The token or certificate is missing or wrong."""

    grpc_code = "UNAUTHENTICATED"


class PermissionDeniedError(PacelineError):
    """The caller's credential is good, but not for this: its role may not, or the worker's name is another's."""

    grpc_code = "PERMISSION_DENIED"


class LimitExceededError(PacelineError):
    """The caller has taken all that one identity may at once; the same succeeds later."""

    grpc_code = "RESOURCE_EXHAUSTED"
    retryable = True


class UnavailableError(PacelineError):
    """The peer cannot be reached, or is stopping or starting. Nothing was decided; try again."""

    grpc_code = "UNAVAILABLE"
    retryable = True


class QuarantinedError(PacelineError):
    """The worker sent unusable pushes round after round; the shard takes nothing more from it for a while."""

    grpc_code = "PERMISSION_DENIED"


class EvictedError(PacelineError):
    """The run's operator keeps the worker out, for a time or until it is admitted again."""

    grpc_code = "PERMISSION_DENIED"


class StorageError(PacelineError):
    """A data directory is damaged, in use, of another run, or cannot be read or written; the text says what helps."""

    grpc_code = "INTERNAL"


class StorageFullError(StorageError):
    """The shard's disk has no room for more. Nothing was decided; the same push is taken when there is room again."""

    grpc_code = "RESOURCE_EXHAUSTED"
    retryable = True


class PushRefusedError(PacelineError):
    """A push was refused for what it contains. The run goes on; the same push will never be accepted."""

    grpc_code = "INVALID_ARGUMENT"


def _family(cls: type[PacelineError]) -> list[type[PacelineError]]:
    return [cls, *(member for child in cls.__subclasses__() for member in _family(child))]


ERRORS_BY_NAME: dict[str, type[PacelineError]] = {cls.__name__: cls for cls in _family(PacelineError)}
