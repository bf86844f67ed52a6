"""PowerShell scripts as tree-sitter's grammar parses them: commands with their parameters, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from support.requirements import oracle_module

QUOTES = "'\u2018\u2019\u201a\u201b"
"""Characters that PowerShell takes for a single quote (PowerShell Language Specification 3.0, 2.3.5.2)."""


class Command(NamedTuple):
    """A command: the variable that its result is assigned to, its name, its parameters; switches are True."""

    target: str | None
    name: str
    parameters: dict[str, Any]


class Name(str):
    """A variable."""


def statements(script: bytes) -> Iterator[list[Command]]:
    """Yields the commands of each pipeline; a script with anything but commands and assignments fails."""
    text = script.removeprefix(b"\xef\xbb\xbf")
    language = oracle_module("tree_sitter").Language(oracle_module("tree_sitter_powershell").language())
    root = oracle_module("tree_sitter").Parser(language).parse(text).root_node
    assert not root.has_error, text.decode()
    for part in root.named_children:
        assert part.type in ("comment", "statement_list"), part.type
        for statement in part.named_children if part.type == "statement_list" else ():
            assert statement.type == "pipeline", statement.type
            yield list(_pipeline(statement.named_children[0], None))


def _pipeline(node: Any, target: str | None) -> Iterator[Command]:
    if node.type == "assignment_expression":
        left, _, right = node.named_children
        yield from _pipeline(right.named_children[0], left.text.decode())
    elif [each.type for each in node.named_children] == ["logical_expression"]:
        yield Command(target, "=", {"value": _value(node.named_children[0])})
    else:
        assert node.type == "pipeline_chain", node.type
        yield from (_command(each, target) for each in node.named_children)


def _command(node: Any, target: str | None) -> Command:
    assert node.type == "command", node.type
    name, *rest = node.named_children
    parameters: dict[str, Any] = {}
    last = ""
    for element in rest[0].named_children if rest else ():
        if element.type == "command_parameter":
            last = element.text.decode().removeprefix("-")
            assert last not in parameters, last
            parameters[last] = True
        elif element.type != "command_argument_sep":
            assert parameters[last] is True, element.text
            parameters[last] = _value(element)
    return Command(target, name.text.decode(), parameters)


def _value(node: Any) -> Any:
    while len(node.named_children) == 1 and node.type not in ("string_literal", "variable"):
        node = node.named_children[0]
    if node.type == "array_literal_expression":
        return [_value(each) for each in node.named_children]
    text = node.text.decode()
    if node.type == "variable":
        return {"$true": True, "$false": False}.get(text, Name(text))
    if node.type == "string_literal":
        assert node.named_children[0].type == "verbatim_string_characters", text
        return verbatim(text)
    assert node.type == "decimal_integer_literal", node.type
    return int(text)


def verbatim(text: str) -> str:
    """Returns the content of a verbatim string by the specification; fails if the string ends before the text does."""
    body = text[1:]
    content = re.match(f"(?:[^{QUOTES}]|[{QUOTES}]{{2}})*", body)
    assert text[0] == "'" and content and body[content.end() :] == "'", text
    return re.sub(f"([{QUOTES}])[{QUOTES}]", r"\1", content[0])
