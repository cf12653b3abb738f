"""What a published artifact and an alias look like in storage: sealed JSON with a schema version."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AwareDatetime,
    BeforeValidator,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from cluster.artifacts import ArtifactRef, Kind
from cluster.storage.api import check_key
from colbert_core.config import FrozenModel
from colbert_core.errors import ArtifactNotFound, IntegrityError, SchemaVersionError, StorageError

SCHEMA_VERSION = 1
BLOCK_BYTES = 8 << 20
KINDS: tuple[Kind, ...] = get_args(Kind)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_RECORDED_LIBRARIES = (
    "raycolbert",
    "torch",
    "transformers",
    "deepspeed",
    "schedulefree",
    "ray",
    "safetensors",
    "pyarrow",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
    "numba",
)


def check_ref(ref: ArtifactRef) -> ArtifactRef:
    """Returns ``ref`` if its parts can be storage keys.

    Raises:
        ArtifactNotFound: the kind is unknown, or name or version has a shape that none can have.
    """
    if ref.kind not in KINDS:
        raise ArtifactNotFound(f"no kind of artifact {ref.kind!r}; there are: {', '.join(KINDS)}")
    for what, text in (("name", ref.name), ("version or alias", ref.version)):
        if not _NAME.fullmatch(text) or (what != "name" and text == "aliases"):
            raise ArtifactNotFound(
                f"{text!r} cannot be the {what} of an artifact: letters, digits, '.', '_' and '-', starting "
                "with a letter or digit, at most 200 characters, and not 'aliases'"
            )
    return ref


def manifest_key(ref: ArtifactRef) -> str:
    """Where a version's manifest lies; an object there makes the version exist."""
    return f"{check_ref(ref).prefix}manifest.json"


def parse_ref(text: str) -> ArtifactRef:
    """Reads ``kind/name@version``, as ``str(ref)`` writes it.

    Raises:
        ArtifactNotFound: the text has another form.
    """
    kind, slash, rest = text.partition("/")
    name, at, version = rest.partition("@")
    if not (slash and at):
        raise ArtifactNotFound(f"{text!r} is not KIND/NAME@VERSION, with KIND one of {', '.join(KINDS)}")
    return check_ref(ArtifactRef(kind, name, version))  # type: ignore[arg-type]


def _ref_from_text(value: Any) -> Any:
    return parse_ref(value) if isinstance(value, str) else value


def _library_versions() -> dict[str, str]:
    """Installed versions of the libraries that an artifact's content may depend on."""
    found = {}
    for name in _RECORDED_LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Ref = Annotated[ArtifactRef, BeforeValidator(_ref_from_text), PlainSerializer(str, return_type=str)]


@dataclass(frozen=True)
class Parent:
    """An artifact that another was made from, and its share in it (of an average; else 1)."""

    ref: Ref
    weight: float = 1.0


class FileEntry(FrozenModel):
    """One file of an artifact.

    Attributes:
        size: bytes.
        sha256: hex digest of the content.
        key: where the content lies, relative to the version's prefix, when it is not ``files/<path>``.
        blocks: digests of its blocks of 8 MiB, if there is more than one, so that a part can be read and
            checked without the rest.
    """

    size: int = Field(ge=0)
    sha256: Sha256
    key: str | None = None
    blocks: tuple[Sha256, ...] = ()

    @field_validator("key")
    @classmethod
    def _key_stays_inside(cls, value: str | None) -> str | None:
        return value if value is None else check_key(value)

    @model_validator(mode="after")
    def _blocks_cover_the_file(self) -> FileEntry:
        if self.blocks and len(self.blocks) != -(-self.size // BLOCK_BYTES):
            raise ValueError(f"{len(self.blocks)} block digests do not cover {self.size} bytes")
        return self

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """The record of a local file, read once.

        Raises:
            OSError: it cannot be read.
        """
        whole, blocks, size = hashlib.sha256(), [], 0
        with path.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                whole.update(block)
                blocks.append(hashlib.sha256(block).hexdigest())
                size += len(block)
        return cls(size=size, sha256=whole.hexdigest(), blocks=tuple(blocks) if len(blocks) > 1 else ())


class Manifest(FrozenModel):
    """The record that makes a version visible; written last, never rewritten.

    Attributes:
        publication: identifies this act of publishing, so that two manifests never are equal bytes.
        files: by path relative to the artifact's directory.
        parents: lineage.
        recipe: the recipe that made it, as plain data.
        data_fingerprint: digest of the data that went in.
        metrics: figures measured before publishing.
        libraries: installed versions.
        extra: further plain data of the job that made it.
    """

    schema_version: Literal[1] = 1
    kind: Kind
    name: str
    version: str
    created_at: AwareDatetime = Field(default_factory=lambda: datetime.now(timezone.utc))
    publication: str = Field(default_factory=lambda: uuid.uuid4().hex)
    files: dict[str, FileEntry]
    parents: tuple[Parent, ...] = ()
    recipe: dict[str, JsonValue] | None = None
    data_fingerprint: str | None = None
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    libraries: dict[str, str] = Field(default_factory=_library_versions)
    extra: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("files")
    @classmethod
    def _paths_stay_inside(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in value:
            check_key(path)
        return value

    @property
    def ref(self) -> ArtifactRef:
        """The version that this manifest describes."""
        return ArtifactRef(self.kind, self.name, self.version)

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.size for entry in self.files.values())

    def key_of(self, path: str) -> str:
        """The storage key of a file.

        Raises:
            ArtifactNotFound: the artifact has no such file; the message names some it has.
        """
        entry = self.files.get(path)
        if entry is None:
            some = ", ".join(sorted(self.files)[:8])
            raise ArtifactNotFound(f"{self.ref} has no file {path!r}; it has {len(self.files)}: {some}")
        return self.ref.prefix + (entry.key or f"files/{path}")

    def to_bytes(self) -> bytes:
        """The sealed JSON that is stored."""
        return seal(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes, key: str) -> Manifest:
        """Reads sealed JSON.

        Raises:
            SchemaVersionError: a newer raycolbert wrote it.
            IntegrityError: it is damaged, or does not describe a version.
        """
        try:
            return cls.model_validate(unseal(data, key))
        except (ValidationError, StorageError, ArtifactNotFound) as error:
            if isinstance(error, IntegrityError):
                raise
            raise IntegrityError(f"{key}: not a valid manifest: {error}") from None


class Part(FrozenModel):
    """A file that is uploaded but not yet published.

    Attributes:
        path: relative path in the artifact.
        entry: size, digest and place.
        at: when the upload was finished.
    """

    schema_version: Literal[1] = 1
    path: str
    entry: FileEntry
    at: AwareDatetime = Field(default_factory=lambda: datetime.now(timezone.utc))


class Movement(FrozenModel):
    """One change of an alias."""

    action: Literal["promote", "rollback"]
    version: str
    previous: str | None
    at: AwareDatetime
    by: str
    id: str = Field(default_factory=lambda: uuid.uuid4().hex)


class Alias(FrozenModel):
    """A name that points to a version, with everything it ever pointed to."""

    schema_version: Literal[1] = 1
    kind: Kind
    name: str
    alias: str
    version: str
    history: tuple[Movement, ...] = ()

    @property
    def ref(self) -> ArtifactRef:
        """The version that the alias points to now."""
        return ArtifactRef(self.kind, self.name, self.version)

    def earlier(self) -> str | None:
        """The version before the present one, rollbacks taken off; None when there is none.

        Promoting the present version again is no step: a rollback leads to another version.
        """
        stack: list[str] = []
        for movement in self.history:
            if movement.action == "rollback":
                while stack and stack[-1] != movement.version:
                    stack.pop()
            elif stack[-1:] != [movement.version]:
                stack.append(movement.version)
        return stack[-2] if len(stack) > 1 else None

    def to_bytes(self) -> bytes:
        """The sealed JSON that is stored."""
        return seal(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes, key: str) -> Alias:
        """Reads sealed JSON; raises as :meth:`Manifest.from_bytes`."""
        try:
            return cls.model_validate(unseal(data, key))
        except ValidationError as error:
            raise IntegrityError(f"{key}: not a valid alias: {error}") from None


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON with a digest of itself, so that a damaged record is found when it is read."""
    digest = _digest(content)
    return json.dumps(
        {**content, "digest": digest}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False
    ).encode()


def unseal(data: bytes, key: str) -> dict[str, Any]:
    """The content of sealed JSON.

    Args:
        data: the bytes read.
        key: where they were read, for messages.

    Raises:
        SchemaVersionError: a newer raycolbert wrote it.
        IntegrityError: it is not JSON, or not what was sealed.
    """
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
    except ValueError as error:
        raise IntegrityError(f"{key}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{key}: expected a JSON object")
    version = content.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise IntegrityError(f"{key}: no valid schema_version ({version!r})")
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{key}: schema version {version} is a newer raycolbert's; this one reads up to {SCHEMA_VERSION}"
        )
    recorded = content.pop("digest", None)
    if recorded != _digest(content):
        raise IntegrityError(f"{key}: the content does not match its digest")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
