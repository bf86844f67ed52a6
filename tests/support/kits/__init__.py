"""The conformance kit of each format that ships, for its own tests and for tests that are made of its samples."""

from __future__ import annotations

from importlib import import_module

from vmconv.testing import FormatTests


def kit(name: str) -> FormatTests:
    """Returns the kit of a format, whose plugin is imported only now."""
    found: FormatTests = getattr(import_module(f"support.kits.{name}"), f"{name.capitalize()}Kit")()
    return found
