"""The typed errors of raycolbert.

Every error a user can cause or meet derives from :class:`RaycolbertError`; the CLI prints its
message without a traceback and exits with :attr:`RaycolbertError.exit_code`. A message says what
is wrong, where (file, row, key or id), and what is allowed.
"""

from __future__ import annotations


class RaycolbertError(Exception):
    """Base of all errors that the CLI reports in one line.

    Attributes:
        exit_code: the process exit status that the CLI uses for this error.
    """

    exit_code = 2


class ConfigError(RaycolbertError):
    """A recipe holds an unknown key, a wrong type, or an impossible combination."""


class DataError(RaycolbertError):
    """Input data is malformed: a missing column, an empty list, a duplicate or unknown id, a NaN."""


class ModelError(RaycolbertError):
    """A model directory is missing a file, or its weights and its config disagree."""


class DimensionError(RaycolbertError):
    """A tensor's shape does not fit what the model or index expects."""


class NonFiniteError(RaycolbertError):
    """A NaN or an infinity where a finite number is required."""


class IndexFormatError(RaycolbertError):
    """An index on disk is damaged, incomplete, or written by a newer schema."""


class SearchError(RaycolbertError):
    """A search request cannot be answered as asked (bad k, bad filter, unknown field)."""


class StorageError(RaycolbertError):
    """Object storage is unreachable or refused an operation."""


class ObjectNotFound(StorageError):
    """No object under this key."""


class PreconditionFailed(StorageError):
    """A conditional write lost: the object exists, or is no longer what the caller read."""


class IntegrityError(StorageError):
    """Bytes read back are not the bytes that the manifest records."""


class SchemaVersionError(RaycolbertError):
    """A manifest was written by a newer version of raycolbert."""


class VersionExists(RaycolbertError):
    """The version is already published; a version is never rewritten."""


class ArtifactNotFound(RaycolbertError):
    """No such model, dataset or index version, or alias."""


class TrainingError(RaycolbertError):
    """Training cannot go on (non-finite loss, a run name in use, an impossible resume)."""
