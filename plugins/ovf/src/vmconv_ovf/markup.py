"""XML of descriptors, with every text escaped."""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape, quoteattr


def tag(name: str, attributes: Mapping[str, object], *content: str) -> str:
    """Returns an element; attributes that are None are left out, content is XML."""
    shown = "".join(f" {key}={quoteattr(str(value))}" for key, value in attributes.items() if value is not None)
    if not content:
        return f"<{name}{shown}/>"
    between = "\n" if content[0].startswith("<") else ""
    return f"<{name}{shown}>{between}{between.join(content)}{between}</{name}>"


def text(name: str, value: object, **attributes: object) -> str:
    """Returns an element with text."""
    return tag(name, {f"ovf:{key}": each for key, each in attributes.items()}, escape(str(value)))


def setting(key: str, value: object, kind: str = "Config") -> str:
    """Returns one of VMware's settings, which other readers may ignore."""
    words = str(value).lower() if isinstance(value, bool) else value
    return tag(f"vmw:{kind}", {"ovf:required": "false", "vmw:key": key, "vmw:value": words})
