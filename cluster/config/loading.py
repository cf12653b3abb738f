"""Recipe files and ``key=value`` overrides, with errors that name the key and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError

from cluster.config.base import assign
from cluster.config.recipe import Recipe
from colbert_core.config import FrozenModel
from colbert_core.errors import ConfigError


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Recipe:
    """Reads a recipe file and applies ``key=value`` overrides.

    Relative directories start from the current one; they are made absolute here, because the processes
    of a job do not share a current directory.

    Args:
        path: YAML file.
        overrides: ``dotted.key=value`` strings; the value is parsed as YAML, list items are
            addressed by number (``train.0.steps=20``).
        elsewhere: other machines will read the file: a relative place would be another one there.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is refused; the message names
            the file and the dotted key.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a safe one
    except FileNotFoundError:
        raise ConfigError(f"no recipe file {path}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: a date that there is not
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping, not {type(tree).__name__}")
    tree = _unshared(tree)
    for override in overrides:
        _apply_override(tree, override)
    recipe = parse_recipe(tree, origin=str(path))
    if elsewhere:
        _refuse_relative(recipe, str(path))
    return _with_absolute_paths(recipe)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def parse_recipe(tree: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Validates a recipe given as plain data; see :func:`load_recipe`."""
    refuse_credentials(tree, f"{origin}: ")
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from None


def refuse_credentials(tree: dict[str, Any], where: str = "") -> None:
    """Refuses addresses with a user or a password: a recipe is stored in manifests for all to read.

    Args:
        tree: a recipe, or options by name.
        where: put in front of the message.

    Raises:
        ConfigError: an address holds credentials; the message names its key and does not repeat it.
    """
    for key, text in _texts(tree):
        try:
            held = "://" in text and "@" in urlsplit(text).netloc
        except ValueError:
            held = "@" in text
        if held:
            raise ConfigError(f"{where}{key}: an address holds credentials; they come from the environment")


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts below a node of plain data, by dotted key."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, (dict, list)):
        for part, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _texts(value, f"{key}.{part}" if key else str(part))


def _refuse_relative(recipe: Recipe, origin: str) -> None:
    places = {"storage.root": recipe.storage.root}
    if recipe.data.sources or recipe.data.tuples:
        places["data.root"] = recipe.data.root
    for key, place in places.items():
        if "://" not in place and not Path(place).expanduser().is_absolute():
            raise ConfigError(
                f"{origin}: {key}: {place!r} is relative, in a folder of the job that Ray deletes; "
                "give an address such as s3://bucket/prefix, or an absolute path that all nodes share"
            )


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    storage = recipe.storage.model_copy(
        update={"root": absolute(recipe.storage.root), "cache_dir": absolute(recipe.storage.cache_dir)}
    )
    data = recipe.data.model_copy(update={"root": absolute(recipe.data.root)})
    return recipe.model_copy(update={"storage": storage, "data": data})


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_allowed_keys(detail['loc'])}"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] in ("missing", "value_error") else f" (given: {detail['input']!r})"
    # What is wrong between sections names its keys itself.
    return f"{key}: {message}{given}" if key else message


def _allowed_keys(location: tuple[int | str, ...]) -> str:
    """The keys that the section at ``location`` accepts."""
    section: Any = Recipe
    for part in location[:-1]:
        section = _below(section, part)
    if not _is_section(section):
        return ""
    return f"; allowed here: {', '.join(sorted(section.model_fields))}"


def _below(annotation: Any, part: int | str) -> Any:
    """The type that is one part of an error's location further down; None where that leads nowhere."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if _is_section(annotation):
        field = annotation.model_fields.get(part)
        return _plain(field.annotation) if field else None
    if origin is tuple:
        return _plain(arguments[0])
    if origin is dict:
        return _plain(arguments[1])
    if origin in (Union, UnionType):
        # The location of an error inside a union of sections told apart by their kind names the kind.
        for section in filter(_is_section, arguments):
            if get_args(section.model_fields["kind"].annotation) == (part,):
                return section
    return None


def _plain(annotation: Any) -> Any:
    """A type without its constraints, and without the None of an optional section."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        others = [item for item in get_args(annotation) if item is not type(None)]
        return others[0] if len(others) == 1 else annotation
    return annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, FrozenModel)


def _unshared(node: Any) -> Any:
    """A copy in which a YAML anchor's content is repeated: an override must change one place only."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: expected key=value, for example train.0.steps=20")
    try:
        value = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--set {key}: the value is not YAML: {error}") from None
    try:
        assign(tree, key, value)
    except KeyError:
        raise ConfigError(f"--set {key}: the recipe has no such place") from None
