"""Typed errors of jaxzip; every message names the tensor or file, what was expected, what was found and what to do."""


class JaxzipError(Exception):
    """Base of the errors that are about data or files rather than a call's arguments."""


class CorruptDataError(JaxzipError, ValueError):
    """Encoded bytes contradict their own format: an offset outside, a wrong count, a failed checksum."""


class UnsupportedVersionError(JaxzipError):
    """The data was written by a newer layout version than this library reads."""


class CheckpointError(JaxzipError):
    """A checkpoint cannot be read or written: missing, incomplete, unknown format, existing destination, full disk."""


class TensorNotFoundError(CheckpointError, KeyError):
    """A tensor that was asked for is not in the checkpoint."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class UnsupportedDtypeError(JaxzipError, TypeError):
    """A format was asked for that does not take a tensor's dtype."""


class CacheDirectoryError(JaxzipError, OSError):
    """There is no directory for the table of measurements, or it cannot be written."""


class PromptError(JaxzipError, ValueError):
    """A prompt cannot be run: empty, or longer than the model's context."""


def with_name(name: str, error: TypeError | ValueError) -> TypeError | ValueError:
    """``error`` again with its tensor's name before the message: a subclass may not be made from a message alone."""
    kind = TypeError if isinstance(error, TypeError) else ValueError
    return (type(error) if isinstance(error, JaxzipError) else kind)(f"{name}: {error}")
