"""Installs the toy machine format for a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from machine.toy import Toy
from vmconv.io.discovery import Plugin
from vmconv.io.registry import Registry, installed_machines


@pytest.fixture
def toys() -> Iterator[Registry]:
    """The registry of machine formats with the toy format in it."""
    registry = installed_machines()
    registry.machines["toy"] = Toy()
    registry.owners["machine", "toy"] = "vmconv-toy"
    registry.plugins.append(Plugin("vmconv-toy", "1.0", "machine.toy"))
    yield registry
    registry.plugins.pop()
    del registry.machines["toy"], registry.owners["machine", "toy"]
