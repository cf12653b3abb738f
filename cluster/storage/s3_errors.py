"""What went wrong with an S3 request: worth another try, or which typed error it is."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

_TRANSIENT_STATUS = frozenset({429, 500, 502, 503, 504})
_TRANSIENT_CODES = frozenset(
    {
        "SlowDown",
        "InternalError",
        "ServiceUnavailable",
        "RequestTimeout",
        "RequestTimeoutException",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "OperationAborted",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
    }
)
_MISSING_CODES = frozenset({"404", "NoSuchKey", "NotFound"})
_CREDENTIAL_REASONS = {
    "ExpiredToken": "the credentials have expired",
    "ExpiredTokenException": "the credentials have expired",
    "TokenRefreshRequired": "the credentials have expired",
    "InvalidToken": "the session token is not valid",
    "InvalidAccessKeyId": "the access key is not known to the server",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "RequestTimeTooSkewed": "the clock of this machine is off, so the request signature is refused",
}
_CREDENTIAL_ERRORS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
)
REQUEST_ERRORS = (ClientError, BotoCoreError, ResponseParserError, HTTPError, ConnectionError, TimeoutError)
"""All that a boto3 call, or the reading of the body it returned, raises when a request fails."""

_CONNECTION_ERRORS = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)

BROKEN_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
"""A connection that broke inside TLS, like any other that breaks; a certificate, say, stays wrong."""


@dataclass(frozen=True)
class Fault:
    """A failed request.

    Attributes:
        reason: one line for the user, not yet freed of credentials.
        code: the server's error code, '' when there was no answer.
        transient: another try may succeed.
        no_contact: the server was not reached at all.
        damaged: the content is not what its checksum says; a few tries tell whether it is so in storage.
    """

    reason: str
    code: str = ""
    transient: bool = False
    no_contact: bool = False
    damaged: bool = False

    @property
    def missing(self) -> bool:
        """The server says that there is no such object."""
        return self.code in _MISSING_CODES

    @property
    def precondition(self) -> bool:
        """The server says that a condition of the request does not hold."""
        return self.code in ("PreconditionFailed", "412")


def explain(error: Exception) -> Fault:
    """Sorts an exception that a boto3 call or the reading of its body raised."""
    if isinstance(error, ClientError):
        return _explain_answer(error)
    if isinstance(error, _CREDENTIAL_ERRORS):
        return Fault("no usable credentials found (environment, shared files, instance role)")
    if isinstance(error, _CONNECTION_ERRORS):
        return Fault("the endpoint cannot be reached", transient=True, no_contact=True)
    if isinstance(error, boto.SSLError):
        return Fault(f"TLS failed: {error}", transient=_broke_off(error))
    if isinstance(error, (boto.ReadTimeoutError, TimeoutError)):
        return Fault("the server did not answer in time", transient=True)
    if isinstance(error, (boto.IncompleteReadError, boto.ResponseStreamingError)):
        return Fault("the answer broke off", transient=True)
    if isinstance(error, boto.FlexibleChecksumError):
        return Fault("the content does not match its checksum", transient=True, damaged=True)
    if isinstance(error, (boto.HTTPClientError, HTTPError, ConnectionError)):
        return Fault("the connection broke", transient=True)
    if isinstance(error, ResponseParserError):
        return Fault("the answer is not valid S3", transient=True)
    if isinstance(error, BotoCoreError):
        return Fault(str(error))
    raise error


def _broke_off(error: boto.SSLError) -> bool:
    """Did the connection break? boto3 wraps urllib3's error, and that wraps Python's."""
    return any(isinstance(cause, BROKEN_TLS) for cause in getattr(error.kwargs.get("error"), "args", ()))


def _explain_answer(error: ClientError) -> Fault:
    answer = error.response.get("Error", {})
    code = str(answer.get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _CREDENTIAL_REASONS:
        return Fault(f"{_CREDENTIAL_REASONS[code]} ({code})", code)
    if code == "NoSuchBucket":
        return Fault("the bucket does not exist (NoSuchBucket)", code)
    if code in ("AccessDenied", "403", "AllAccessDisabled"):
        needed = "s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket"
        return Fault(f"access denied (AccessDenied); needed are {needed}", "AccessDenied")
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301", "307"):
        return Fault(f"the bucket is in another region; set storage.region ({code})", code)
    transient = code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS
    message = str(answer.get("Message", "")).strip()
    reason = f"the server answered {status} {code}" + (f": {message}" if message and message != code else "")
    return Fault(reason, code, transient=transient)
