"""Manual pages from the parsers: `vmconv.1`, and one for each command, in the language man of groff.

Each distribution has the pages of its commands in its folder `man`, and installs them in `share/man/man1`.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path


def pages(
    parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser], version: str, date: str
) -> dict[str, str]:
    """Returns the text of each page by its file name."""
    source = f'{date} "vmconv {version}"'
    found = {"vmconv.1": _page("vmconv", _first(parser, commands), source, _summary(parser))}
    for name, one in commands.items():
        blocks = [*_command(f"vmconv {name}", one), *_see_also(["vmconv"])]
        found[f"vmconv-{name}.1"] = _page(f"vmconv-{name}", blocks, source, _help(parser)[name])
    return found


def front_end(chapter: str, version: str, date: str) -> str:
    """Returns the page of `vmconv-qemu-img`, from its chapter of the page on qemu-img."""
    found: dict[str, list[str]] = {"DESCRIPTION": []}
    heading = "DESCRIPTION"
    for part in re.split(r"\n\s*\n", chapter.strip()):
        first, *lines = part.splitlines()
        if first.startswith("### "):
            found[heading := first.removeprefix("### ").upper()] = []
        elif first.startswith("| "):
            title = "ENVIRONMENT" if _cells(first)[0] == "variable" else "COMMANDS"
            found[title] = [block for line in lines[1:] for block in _row(_cells(first), line)]
        elif first.startswith("```"):
            found[heading] += [".PP", ".nf", *map(_verbatim, lines[:-1]), ".fi"]
        elif first.startswith("- "):
            for item in re.split(r"\n- ", part.removeprefix("- ")):
                found[heading] += [".IP \\(bu 2", *_paragraphs(_plain(item))]
        else:
            found[heading] += [*([".PP"] if found[heading] else []), *_paragraphs(_plain(part))]
    blocks = [".SH SYNOPSIS", "\\fBvmconv\\-qemu\\-img\\fR \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]"]
    for title, texts in found.items():
        blocks += [f".SH {_text(title)}", *texts]
    blocks += _see_also(["qemu-img", "vmconv"])
    return _page("vmconv-qemu-img", blocks, f'{date} "vmconv {version}"', "answers as qemu-img, sharing payload")


def _row(titles: list[str], line: str) -> Iterator[str]:
    """Yields the blocks of a row of a table: the first cell, and what the others say about it."""
    name, *texts = _cells(line)
    yield from (".TP", f"\\fB{_text(name)}\\fR")
    if len(texts) == 1:
        yield _line(texts[0])
        return
    said = [f"{title[0].upper()}{title[1:]}: {text}." for title, text in zip(titles[1:], texts, strict=True)]
    yield "\n".join(map(_line, said))


def _cells(line: str) -> list[str]:
    return [_plain(cell.strip()) for cell in line.strip("| ").split(" | ")]


def _plain(text: str) -> str:
    """Returns text without the marks of Markdown."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("**", "")


def _page(name: str, blocks: list[str], source: str, summary: str) -> str:
    head = [
        '.\\" Written by docs/generate.py from the parsers. Do not edit.',
        f'.TH {name.upper()} 1 {source} "User Commands"',
        ".SH NAME",
        _line(f"{name} - {summary}"),
    ]
    return "\n".join([*head, *blocks]) + "\n"


def _first(parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """Returns the blocks of the page on the program itself."""
    helps = _help(parser)
    blocks = [".SH SYNOPSIS", "\\fBvmconv\\fR [\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]", ".SH DESCRIPTION"]
    blocks += [*_paragraphs(parser.description or ""), *_arguments(parser, ".SH OPTIONS")]
    blocks.append(".SH COMMANDS")
    for name in sorted(commands):
        blocks += [".TP", f"\\fBvmconv {_text(name)}\\fR", _line(helps[name])]
    return [*blocks, *_see_also([f"vmconv-{name}" for name in sorted(commands)])]


def _see_also(names: list[str]) -> list[str]:
    ends = [","] * (len(names) - 1) + [""]
    return [".SH SEE ALSO", *(f".BR {_text(name)} (1){end}" for name, end in zip(names, ends, strict=True))]


def _summary(parser: argparse.ArgumentParser) -> str:
    text = (parser.description or "").strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _help(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Returns the help of each command."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {choice.dest: choice.help or "" for action in actions for choice in action._choices_actions}


def _command(title: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the blocks of a command, and those of its verbs below it."""
    yield ".SH SYNOPSIS"
    for one, verb in _verbs(title, parser):
        yield from (".nf", _text(_usage(one, verb)), ".fi")
    yield ".SH DESCRIPTION"
    yield from _paragraphs(parser.description or "")
    yield from _arguments(parser, ".SH OPTIONS")
    yield from _epilog(parser)
    verbs = [(one, verb) for one, verb in _verbs(title, parser) if verb is not parser]
    if verbs:
        yield ".SH VERBS"
    for one, verb in verbs:
        yield f'.SS "{_text(one)}"'
        yield from _paragraphs(verb.description or "")
        yield from _arguments(verb, "")
        yield from _epilog(verb, heading=False)


def _verbs(title: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yields the parsers without verbs below a command, with their names; the command itself if it has none."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not found:
        yield title, parser
    for name, verb in found[0].choices.items() if found else ():
        yield from _verbs(f"{title} {name}", verb)


def stated_usage(parser: argparse.ArgumentParser) -> str:
    """Returns the lines of a usage that the command words itself; empty without one."""
    lines = (parser.usage or "").splitlines()
    return "\n".join(line.strip().replace("[option ...]", "[OPTIONS]") for line in lines)


def _usage(title: str, parser: argparse.ArgumentParser) -> str:
    if parser.usage:
        return stated_usage(parser)
    words = [title]
    if any(action.option_strings and not action.required for action in parser._actions):
        words.append("[OPTIONS]")
    needed = [action for action in parser._actions if action.required or not action.option_strings]
    for action in sorted(needed, key=lambda action: not action.option_strings):
        shown = " ".join(filter(None, [*action.option_strings[-1:], _value(action)]))
        words.append(f"[{shown}]" if action.nargs in ("?", "*") else shown)
    return " ".join(words)


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices:
        return f"{{{','.join(map(str, action.choices))}}}"
    return action.dest.upper() if action.option_strings else action.dest


def _arguments(parser: argparse.ArgumentParser, heading: str) -> Iterator[str]:
    left_out = (argparse._SubParsersAction, argparse._HelpAction)
    actions = [action for action in parser._actions if not isinstance(action, left_out)]
    if actions and heading:
        yield heading
    for action in sorted(actions, key=lambda action: bool(action.option_strings)):
        value = f"\\fI{_text(_value(action))}\\fR" if _value(action) else ""
        names = [f"\\fB{_text(name)}\\fR{' ' if value else ''}{value}" for name in action.option_strings] or [value]
        text = (action.help or "") % {**vars(action), "prog": parser.prog} if action.help else ""
        yield from (".TP", ", ".join(names), _line(" ".join(text.split())))


def _epilog(parser: argparse.ArgumentParser, *, heading: bool = True) -> Iterator[str]:
    """Yields what is below the arguments: exit status, examples, notes."""
    for part in re.split(r"\n\s*\n", (parser.epilog or "").strip()):
        first, _, rest = part.partition("\n")
        title = first.rstrip(":")
        if first.endswith(":") and rest:
            yield from [f".SH {_text(title.upper())}"] if heading else [".PP", _line(first)]
            yield from (".nf", *(_verbatim(line.strip()) for line in rest.splitlines()), ".fi")
        elif part:
            yield from (".PP", *_paragraphs(part))


def _paragraphs(text: str) -> Iterator[str]:
    for index, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if index:
            yield ".PP"
        if paragraph:
            # A sentence per line: groff sets the space between them.
            yield from (_line(one) for one in re.split(r"(?<=[a-z\d)]\.) (?=[A-Z`])", " ".join(paragraph.split())))


def _line(text: str) -> str:
    """Returns text in lines of moderate length."""
    return "\n".join(map(_verbatim, textwrap.wrap(text, 66, break_long_words=False, break_on_hyphens=False)))


def _verbatim(text: str) -> str:
    """Returns text at the beginning of a line, where dots and quotes would begin a request."""
    safe = _text(text)
    return f"\\&{safe}" if safe.startswith((".", "'")) else safe


def _text(text: str) -> str:
    """Returns text with groff's escapes; a hyphen stays one that can be pasted into a shell."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("^", "\\(ha")
    return escaped.replace("~", "\\(ti").replace('"', "\\(dq")


def write(folders: Mapping[Path, Mapping[str, str]]) -> None:
    """Writes the pages of each folder and removes others of it."""
    for folder, texts in folders.items():
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.name not in texts:
                path.unlink()
        for name, text in texts.items():
            (folder / name).write_text(text)
