"""Bodies of records: what is checked, what is kept."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError

from vmconv_fleet.catalogue import kinds
from vmconv_fleet.catalogue.conversion import ConversionSpec, MachineSpec
from vmconv_fleet.catalogue.fields import ALLOWED
from vmconv_fleet.catalogue.kinds import KINDS, DiskBody, JobBody
from vmconv_fleet.catalogue.terms import ENDED
from vmconv_fleet.cli.fleet import COMMAND
from vmconv_fleet.console.converting import FLAGS, TEXTS
from vmconv_fleet.jobs.arguments import ARGUMENTS, Convert, ConvertMachine, JobRequest, MachineJobRequest
from vmconv_fleet.jobs.task import Task
from vmconv_fleet.trust.roles import VERBS

NODE = "a" * 32


def test_fields_of_a_newer_schema_are_kept() -> None:
    body = {"datastore": "ds", "name": "a.raw", "colour": {"red": 1}}
    assert DiskBody.model_validate(body).plain()["colour"] == {"red": 1}


def test_a_body_passes_its_model_unchanged() -> None:
    body = {
        "state": "done",
        "disk": "d1",
        "datastore": "ds",
        "format": "qcow2",
        "plan": {"shared": 5, "copies": [{"reason": "because", "bytes": 1, "ranges": 2}]},
        "by": {"node": NODE, "user": "eve"},
    }
    assert JobBody.model_validate(JobBody.model_validate(body).plain()) == JobBody.model_validate(body)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("disk", {"datastore": "ds", "name": "a", "virtual_size": -1}),
        ("disk", {"datastore": "ds", "name": "a", "virtual_size": "large"}),
        ("disk", {"datastore": "ds"}),
        ("job", {"disk": "d", "datastore": "ds", "format": "raw", "state": "perhaps"}),
        ("job", {"disk": "../d", "datastore": "ds", "format": "raw"}),
        ("job", {"disk": "d", "vm": "v", "datastore": "ds", "format": "raw"}),
        ("job", {"datastore": "ds", "format": "raw"}),
        ("vm", {"datastore": "ds", "file": "a.vmx", "name": "a", "disks": [{"name": "a", "capacity": -1}]}),
        ("token", {"label": "x", "role": "god", "hash": "0" * 64}),
        ("token", {"label": "x", "role": "admin", "hash": "0" * 64 + "\n"}),
        ("request", {"target": "0" + "a" * 31, "verb": "scan", "by": {"node": NODE}}),
        ("heartbeat", {"at_ms": 1, "interval_s": 0}),
        ("heartbeat", {"at_ms": 1 << 60, "interval_s": 1}),
    ],
)
def test_an_invalid_body_is_refused(kind: str, body: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        KINDS[kind].model_validate(body)


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        *((model, ConversionSpec) for model in (JobRequest, Convert, MachineJobRequest, ConvertMachine, JobBody)),
        *((model, MachineSpec) for model in (MachineJobRequest, ConvertMachine, JobBody)),
    ],
    ids=lambda model: model.__name__,
)
def test_a_conversion_is_defined_once(model: type[BaseModel], spec: type[BaseModel]) -> None:
    for name, field in spec.model_fields.items():
        assert model.model_fields[name].default == field.default
        assert model.model_fields[name].annotation == field.annotation
        assert name not in vars(model).get("__annotations__", {})


def test_every_part_of_a_conversion_is_a_field_of_its_definition() -> None:
    parser = argparse.ArgumentParser()
    COMMAND.configure(parser)
    options = parser.parse_args(["convert", "n01:a.raw", "--to", "qcow2"])
    assert set(options.spec) <= ConversionSpec.model_fields.keys()
    assert {name: getattr(options, name) for name in options.spec if getattr(options, name)} == {"format": "qcow2"}
    assert set(options.machine_spec) == MachineSpec.model_fields.keys() <= set(Task._fields)
    assert {*TEXTS, *FLAGS} <= ConversionSpec.model_fields.keys() | MachineSpec.model_fields.keys()
    assert {"format", "options", "target", "zero_copy", "dry_run"} == set(
        Task._fields
    ) & ConversionSpec.model_fields.keys()


def test_an_unset_field_is_not_sent() -> None:
    assert Convert(disk="d1", format="raw", zero_copy="auto").given() == {
        "disk": "d1",
        "format": "raw",
        "zero_copy": "auto",
    }


def test_each_verb_says_what_it_takes_and_which_role() -> None:
    assert ARGUMENTS.keys() == VERBS.keys()


def test_bodies_cannot_be_changed() -> None:
    job = JobBody(disk="d", datastore="ds", format="raw")
    with pytest.raises(ValidationError, match="frozen"):
        job.state = "done"  # type: ignore[misc]


def test_states_in_which_a_job_stays_are_states() -> None:
    assert set(kinds.JobState.__args__) > ENDED  # type: ignore[attr-defined]


def patterns(schema: object) -> Iterator[str]:
    """Yields the patterns in a JSON schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        for part in schema.values():
            yield from patterns(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from patterns(part)


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_what_a_pattern_allows_can_be_said_in_words(verb: str) -> None:
    assert set(patterns(ARGUMENTS[verb].model_json_schema())) <= ALLOWED.keys()
