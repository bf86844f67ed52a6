"""The web console of a node: pages rendered on the node, for browsers with or without JavaScript."""

from __future__ import annotations

from vmconv_fleet.console.pages import install

__all__ = ["install"]
