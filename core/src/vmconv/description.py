"""The description of one image, with the keys that `qemu-img info --output=json` has, and more."""

from __future__ import annotations

import os
from typing import Any

from vmconv.image import Image


def describe(image: Image) -> dict[str, Any]:
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
    facts["disk"] = image.disk.model_dump(mode="json", exclude_none=True)
    facts["losses"] = list(image.losses)
    facts["warnings"] = list(image.warnings)
    return facts
