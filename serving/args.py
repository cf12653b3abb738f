"""What the application is built from: the storage and the serve section of a recipe."""

from __future__ import annotations

import os
from typing import Any

from pydantic import ValidationError, model_validator

from cluster.config import Recipe, ServeConfig, StorageConfig
from colbert_core.config import FrozenModel
from colbert_core.errors import ConfigError


class ServiceArgs(FrozenModel):
    """The arguments of :func:`serving.app.build`, as they stand under ``args:`` of a Serve config file."""

    storage: StorageConfig
    serve: ServeConfig

    @model_validator(mode="after")
    def _names_an_index(self) -> ServiceArgs:
        if self.serve.index is None or "@" not in self.serve.index:
            raise ValueError("serve.index: name the index as NAME@VERSION-or-alias")
        return self

    @property
    def index(self) -> str:
        """``NAME@VERSION-or-alias``."""
        return str(self.serve.index)


def parse_args(args: dict[str, Any]) -> ServiceArgs:
    """Checks plain data.

    Raises:
        ConfigError: a key or value is refused; the message names the dotted key.
    """
    try:
        return ServiceArgs.model_validate(args)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, item['loc'])) or 'args'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise ConfigError("serving.app:build: " + "; ".join(lines)) from None


def recipe_args(recipe: Recipe) -> ServiceArgs:
    """The arguments that a recipe stands for.

    Raises:
        ConfigError: the recipe has no serve section, or nothing says which index to serve.
    """
    if recipe.serve is None:
        raise ConfigError("the recipe has no 'serve' section")
    serve = recipe.serve
    if serve.index is None:
        if recipe.index is None:
            raise ConfigError(
                "serve.index: name the index to serve; the recipe has no 'index' section either"
            )
        serve = serve.model_copy(update={"index": f"{recipe.index.name}@production"})
    return parse_args({"storage": recipe.storage.model_dump(), "serve": serve.model_dump()})


def api_keys(config: ServeConfig) -> list[str]:
    """The accepted keys, from this process's environment; none where the recipe asks for none.

    Raises:
        ConfigError: the variable is unset or empty. A service that should be closed must not come up open.
    """
    if config.api_keys_env is None:
        return []
    keys = [key.strip() for key in os.environ.get(config.api_keys_env, "").split(",") if key.strip()]
    if not keys:
        raise ConfigError(
            f"serve.api_keys_env: the environment variable {config.api_keys_env} is not set, or holds no key"
        )
    return keys
