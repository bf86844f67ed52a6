"""Which names `--keep` takes."""

from __future__ import annotations

import pytest

from vmconv.errors import UsageError
from vmconv.machine.losses import refuse


@pytest.mark.parametrize(
    "field", ["tpm", "tpm.state", "nics.mac", "nics[1].mac", "firmware.nvram.kind", "extra.vmx", "extra.vmx.a.b"]
)
def test_fields_of_machines_can_be_kept(field: str) -> None:
    refuse((), strict=False, keep=[field])


@pytest.mark.parametrize("field", ["tmp", "nics.address", "name.x", "nics..mac", "", "disks.extra"])
def test_a_mistyped_field_to_keep_is_refused(field: str) -> None:
    with pytest.raises(UsageError, match="machines have no such field"):
        refuse((), strict=False, keep=[field])
