"""Errors of the service, each with the HTTP status that it is answered with."""

from __future__ import annotations

from colbert_core.errors import (
    ArtifactNotFound,
    ConfigError,
    DataError,
    DimensionError,
    NonFiniteError,
    RaycolbertError,
    SearchError,
)

# What a client can put right: it sends texts, so that vectors which do not fit are the model's doing.
CLIENT_ERRORS = (SearchError, DataError, ConfigError)
# What an index refuses, whichever of its replicas is asked.
REFUSED = (*CLIENT_ERRORS, DimensionError, NonFiniteError)


class ServiceError(RaycolbertError):
    """Base of the errors that only the service has.

    Attributes:
        status: HTTP status of the answer.
    """

    status = 500


class Unauthorized(ServiceError):
    """No API key, or not an accepted one."""

    status = 401


class UnknownDocument(ServiceError):
    """A document id that the index does not have."""

    status = 404


class VersionNotServed(ServiceError):
    """The index version that the request names is not loaded."""

    status = 404


class BodyTooLarge(ServiceError):
    """The request body exceeds the limit."""

    status = 413


class Overloaded(ServiceError):
    """This front works on as many requests as it may; ask again later."""

    status = 429


class NotReady(ServiceError):
    """No index version is ready yet."""

    status = 503


class ShardsUnavailable(ServiceError):
    """Part of the index failed to answer."""

    status = 503


class DeadlineExceeded(ServiceError):
    """Part of the index did not answer in time."""

    status = 504


def http_status(error: RaycolbertError) -> int:
    """The status for an error: what the client can put right is 400, what only the operator can is 503."""
    if isinstance(error, ServiceError):
        return error.status
    if isinstance(error, ArtifactNotFound):
        return 404
    return 400 if isinstance(error, CLIENT_ERRORS) else 503
