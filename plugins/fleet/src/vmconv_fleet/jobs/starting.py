"""Whether a job may still begin: its caller is judged again, because it may have waited for days since its request.

A revoked token, a lowered role and a stricter policy count. A token that has expired since does not: it was valid when
the job was requested. Nor does the end of a person's session: then the roles of their groups are what counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv_fleet.errors import Refusal
from vmconv_fleet.jobs.policy import refuse_ruled_out
from vmconv_fleet.trust.groups import rights_of_person
from vmconv_fleet.trust.rights import Records, Rights
from vmconv_fleet.trust.roles import VERBS, refuse_unless_allowed, rights_of

if TYPE_CHECKING:
    from vmconv_fleet.catalogue.conversion import ConversionPolicy
    from vmconv_fleet.catalogue.kinds import JobBody, Principal


def openable(node: str, job: JobBody, records: Records, policy: ConversionPolicy) -> list[str] | None:
    """Returns the datastores whose files a job may open now; None: all.

    Raises AccessError or Refusal if its caller or the policy of the node do not allow the conversion any more.
    """
    refuse_ruled_out(policy, job.disk_format if job.vm else job.format, keep_source=job.keep_source)
    if job.by is None:
        return job.within
    verb = "convert-machine" if job.vm else "convert"
    rights = _rights(job, job.by, records)
    arguments = {"disk": job.disk, "of": job.of, "vm": job.vm, "target_datastore": job.target_datastore}
    refuse_unless_allowed(verb, node, job.by, records, job.created_ms, arguments=arguments, rights=rights)
    return job.within if job.of else _both(job.within, rights.only_in(node, VERBS[verb]))


def _rights(job: JobBody, by: Principal, records: Records) -> Rights:
    owner, _, identifier = (by.token or "").partition("/")
    if job.groups is None or records.get(owner, "token", identifier):
        return rights_of(by, records, job.created_ms)
    if owner in records.forked():
        raise Refusal(f"the node where {by.user} had signed in has two histories")
    return rights_of_person(owner, job.groups, records)


def _both(one: Sequence[str] | None, other: Sequence[str] | None) -> list[str] | None:
    """Returns the names in both lists; None is the list of all names."""
    if one is None or other is None:
        found = other if one is None else one
        return None if found is None else list(found)
    return [name for name in one if name in other]
