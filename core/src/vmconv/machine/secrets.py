"""Secrets in a configuration, such as the password of a console: a new machine gets none of them without being asked.

A configuration is often read by more people than its source was, and passwords of a platform mean nothing on another.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vmconv.machine.request import Loss

if TYPE_CHECKING:
    from vmconv.machine.model import Machine, Property

_SECRET = re.compile(
    # Names of Kubernetes' secrets are no secrets.
    r"passw(?:or)?d|passphrase|secret(?!name|ref)|private.?key|ssh.?key|api.?key|auth.?token|credential"
    # VMware: the encrypted password of the console, the keys of encrypted disks. VirtualBox: hashes of passwords.
    # What cloud-init gets: often passwords, and in base64.
    r"|user.?data"
    r"|vnc\.key|keysafe|datafilekey|vboxauthsimple"
    # Parts of the owner's session key with AMD SEV.
    r"|launchsecurity",
    re.IGNORECASE,
)

_REASON = "it is a secret, or lets somebody log in: set it again on the new machine"


def without_secrets(machine: Machine) -> tuple[Machine, tuple[Loss, ...]]:
    """Returns the machine without secrets, and the name of each. No loss shows the secret itself."""
    losses: list[Loss] = []
    extra = {}
    for name, settings in machine.extra.items():
        hidden = _hidden(settings)
        losses += [Loss(f"extra.{name}", key, _REASON) for key in settings if key in hidden]
        extra[name] = {key: text for key, text in settings.items() if key not in hidden}
    properties = list(machine.properties)
    for number, one in enumerate(machine.properties):
        if one.value is not None and _is_secret(one, machine):
            losses.append(Loss(f"properties[{number}].value", one.key, _REASON))
            properties[number] = one.model_copy(update={"value": None})
    if not losses:
        return machine, ()
    kept = {name: settings for name, settings in extra.items() if settings}
    return machine.model_copy(update={"extra": kept, "properties": tuple(properties)}), tuple(losses)


def _hidden(settings: dict[str, str]) -> set[str]:
    """Returns the keys of secrets: by their key or their text, and all attributes of such an element."""
    # What an OVF says of a property, such as that it is a password, is no secret.
    named = {key: text for key, text in settings.items() if not key.startswith("property.")}
    found = {key for key, text in named.items() if _SECRET.search(key) or _SECRET.search(text)}
    elements = {key.partition("@")[0] for key in found if "@" in key}
    return found | {key for key in settings if "@" in key and key.partition("@")[0] in elements}


def _is_secret(one: Property, machine: Machine) -> bool:
    marked = machine.extra.get("ovf", {}).get(f"property.{one.key}.password", "")
    return marked.lower() in ("true", "1") or _SECRET.search(one.key) is not None
