"""The description of one image, with the keys that `qemu-img info --output=json` has, and more."""

from __future__ import annotations

import os
from typing import Any

from vmconv.checking import remarks
from vmconv.image import Image
from vmconv.opener import Opener


def describe(image: Image, opener: Opener) -> dict[str, Any]:
    """Returns what is known of the image without opening its parent; sizes are bytes."""
    status = os.fstat(image.file.descriptor)
    facts: dict[str, Any] = {
        "filename": image.file.path,
        "format": image.format_name,
        "virtual-size": image.size,
        "actual-size": status.st_blocks * 512,
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
    facts["disk"] = image.disk.model_dump(mode="json", exclude_none=True)
    facts["losses"] = list(image.losses)
    facts["warnings"] = [*image.warnings, *remarks(image, opener)]
    return facts
