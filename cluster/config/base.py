"""What every section is made of."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import Field

from colbert_core.config import FrozenModel

# Names end up as storage keys and file names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


def fingerprint(*parts: Any) -> str:
    """A 16-hex-digit digest of plain data or config models: equal content, equal digest."""

    def plain(part: Any) -> Any:
        return part.model_dump(mode="json") if isinstance(part, FrozenModel) else part

    text = json.dumps([plain(part) for part in parts], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
