"""The conformance kit of each format that ships, for its own tests and for tests that are made of its samples."""

from __future__ import annotations

from importlib import import_module

from vmconv.testing import ReaderTests


def kit(name: str) -> ReaderTests:
    """Returns the kit of a format, whose plugin is imported only now."""
    found: ReaderTests = getattr(import_module(f"support.kits.{name}"), f"{name.capitalize()}Kit")()
    return found
