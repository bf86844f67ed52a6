"""The description of one image, with the keys that `qemu-img info --output=json` has, and more."""

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
    """Returns what is known of the image without opening its parent; sizes are bytes."""
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
    # What the image says of itself may be damaged where no reading needs it: that is found by now.
    facts["disk"] = image.disk.model_dump(mode="json", exclude_none=True)
    facts["losses"] = list(image.losses)
    facts["warnings"] = [*image.warnings, *remarks(image, opener)]
    return facts


def _disk_size(image: Image, opener: Opener) -> int:
    """Returns the bytes that all files of the image take on storage, those of its parents left out."""
    files = {(image.file.stamp.device, image.file.stamp.inode): os.fstat(image.file.descriptor).st_blocks}
    for dependency in image.dependencies:
        if dependency.role not in OWN_ROLES:
            continue
        # What cannot be opened is in the warnings.
        with suppress(VmconvError):
            file = opener.related(image.file, dependency.name, dependency.role)
            files[file.stamp.device, file.stamp.inode] = os.fstat(file.descriptor).st_blocks
            opener.release(file)
    return sum(files.values()) * 512
