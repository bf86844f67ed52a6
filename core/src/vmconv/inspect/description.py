"""The description of one image, with the keys of `qemu-img info --output=json` and more."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from vmconv.errors import VmconvError
from vmconv.inspect.checking import remarks
from vmconv.io.opener import Opener
from vmconv.model.image import Image
from vmconv.model.references import OWN_ROLES


def describe(image: Image, opener: Opener) -> dict[str, Any]:
    """Returns the description of an image without opening its parent; sizes are bytes."""
    facts: dict[str, Any] = {
        "filename": image.file.path,
        "format": image.format_name,
        "virtual-size": image.size,
        "actual-size": _disk_size(image, opener),
        "dirty-flag": False,
    }
    if image.parent_reference is not None:
        facts["backing-filename"] = image.parent_reference
        facts["full-backing-filename"] = os.path.join(os.path.dirname(image.file.path), image.parent_reference)
        if image.parent_format:
            facts["backing-filename-format"] = image.parent_format
    facts.update(image.details)
    if image.dependencies:
        facts["references"] = [
            {
                "filename": dependency.name,
                "role": dependency.role,
                "length": dependency.length,
                "recorded": dependency.fingerprint is not None,
            }
            for dependency in image.dependencies
        ]
    # Last: damage in fields that reading does not need is found only by now.
    facts["disk"] = image.disk.model_dump(mode="json", exclude_none=True)
    facts["losses"] = list(image.losses)
    facts["warnings"] = [*image.warnings, *remarks(image, opener)]
    return facts


def _disk_size(image: Image, opener: Opener) -> int:
    """Returns the allocated bytes of the image's own files, without its parents."""
    files = {(image.file.stamp.device, image.file.stamp.inode): image.file.stored()}
    for dependency in image.dependencies:
        if dependency.role not in OWN_ROLES:
            continue
        # `remarks` reports files that cannot be opened.
        with suppress(VmconvError):
            file = opener.related(image.file, dependency.name, dependency.role)
            files[file.stamp.device, file.stamp.inode] = file.stored()
            opener.release(file)
    return sum(files.values())
