"""Reads YAML within limits: safe types only, no aliases, no tags, no repeated keys."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from vmconv.machine import config_text, quoted
from vmconv.plugin import ImageError

if TYPE_CHECKING:
    from vmconv.plugin import File

MAX_BYTES = 2 << 20
"""Bytes of a file; Kubernetes stores at most 1.5 MB of an object."""

MAX_NODES = 100_000
MAX_DEPTH = 60

_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Safe):  # type: ignore[misc]  # yaml has no types
    """Builds plain values: dates stay text, and a repeated key is an error, as in Kubernetes."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                problem = f"key {quoted(key.value)} is repeated, or no text"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":merge", ":value"))]
    for first, found in _Safe.yaml_implicit_resolvers.items()
}


def documents(file: File) -> list[dict[str, Any]]:
    """Returns the objects of a file. Raises `ImageError` with the line for anything that these limits do not allow."""
    if file.size > MAX_BYTES:
        raise ImageError(f"{file.name}: has {file.size} bytes, and Kubernetes takes at most {MAX_BYTES}")
    text = config_text(file)
    try:
        _refuse_more(file, text)
        found = [each for each in yaml.load_all(text, Loader=_Loader) if each is not None]
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 0
        raise ImageError(f"{file.name}: line {line}: {_one_line(exc.problem or exc)}") from exc
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as exc:
        raise ImageError(f"{file.name}: is not YAML: {_one_line(exc)}") from exc
    for each in found:
        if not isinstance(each, dict):
            raise ImageError(f"{file.name}: a document is {quoted(each)}, not an object")
    return found


def _one_line(text: object) -> str:
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(text))[:200]


def _refuse_more(file: File, text: str) -> None:
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Safe)):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ImageError(f"{file.name}: line {line}: has an anchor or an alias, which no object needs")
        tag = getattr(event, "tag", None)
        if tag and not tag.startswith("tag:yaml.org,2002:"):
            raise ImageError(f"{file.name}: line {line}: has the tag {quoted(tag)}, which no object needs")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ImageError(f"{file.name}: line {line}: is nested deeper than {MAX_DEPTH}")
        if count > MAX_NODES:
            raise ImageError(f"{file.name}: line {line}: has more than {MAX_NODES} values")
