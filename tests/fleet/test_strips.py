"""Pictures of disks and plans in the console: what a plan has seen, as letters in the job's record."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

import vmconv
from fleet.desk import EVIL, JOB, Desk
from support.disks import MIB
from vmconv.api import Request, prepared
from vmconv_fleet.catalogue.kinds import JobPlan, Strip
from vmconv_fleet.console.rendering import LINE, looks_of, runs_of
from vmconv_fleet.jobs import strips
from vmconv_fleet.replication.records import Change

SOURCE = {"title": EVIL, "size": 1 << 30, "parts": "h" * 60 + "p" * 60 + "z" * 20 + "b" * 20}
TARGET = {"title": EVIL, "size": 1 << 29, "parts": "m" * 8 + "s" * 90 + "c" * 62}


def sparse(path: Path) -> Path:
    """Returns a raw disk of 16 MiB with payload in its second quarter."""
    with path.open("wb") as file:
        file.truncate(16 * MIB)
        file.seek(4 * MIB)
        file.write(b"\1" * (4 * MIB))
    return path


def test_a_plan_has_the_disk_and_the_files_that_it_becomes(tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk.raw")
    with prepared(Request(str(disk), str(tmp_path / "new.qcow2"))) as ready:
        found = strips.of_disk(ready.image), strips.of_plan(ready.plan)
    source = found[0]["parts"]
    quarter = strips.PARTS // 4
    assert source[quarter : 2 * quarter] == "p" * quarter
    assert set(source[:quarter] + source[2 * quarter :]) <= {"z", "h"}
    (target,) = found[1]
    assert target["title"] == "new.qcow2"
    assert set(target["parts"]) <= {"c", "s", "m", "z"}
    assert target["parts"].count("c") + target["parts"].count("s") > strips.PARTS * 0.9
    # What a node writes, all nodes accept.
    assert JobPlan(source=Strip(**found[0]), strips=[Strip(**target)]).strips[0].parts == target["parts"]


def test_payload_of_layers_below_has_its_own_letter(tmp_path: Path) -> None:
    vmconv.convert(sparse(tmp_path / "disk.raw"), tmp_path / "base.qcow2")
    vmconv.create(tmp_path / "top.qcow2", backing_file="base.qcow2")
    with prepared(Request(str(tmp_path / "top.qcow2"), str(tmp_path / "new.raw"))) as ready:
        assert set(strips.of_disk(ready.image)["parts"]) == {"h", "b"}


def test_runs_are_lines_of_equal_parts() -> None:
    found = runs_of(Strip(parts="h" * (LINE + 10) + "p" * (LINE - 10) + "x"))
    assert [(one.look, one.x, one.y, one.width) for one in found] == [
        ("hole", 0, 0, LINE),
        ("hole", 0, 1, 10),
        ("payload", 10, 1, LINE - 10),
        ("unknown", 0, 2, 1),
    ]
    assert looks_of(Strip(parts="hhhp")) == [("hole", "not allocated", 75), ("payload", "payload", 25)]


@pytest.mark.parametrize("wrong", [{"parts": "h" * 401}, {"parts": "<b>"}, {"title": "x" * 201}, {"size": -1}])
def test_a_strip_is_bounded(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Strip(**wrong)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1280])
def test_the_pages_of_disk_and_job_show_the_picture(entered: Desk, scheme: str, width: int) -> None:
    page, other = entered.page, entered.other
    plan = {**JOB["plan"], "source": SOURCE, "strips": [TARGET, {**TARGET, "parts": ""}]}  # type: ignore[dict-item]
    other.write(Change("job", "j1", {**JOB, "plan": plan}))
    entered.here.body_when(other.id, "job", "j1", lambda one: bool(one.body["plan"].get("strips")))
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    for path, pictures in ((f"/disks/{other.id}/d1", 1), (f"/jobs/{other.id}/j1", 2)):
        entered.go(path)
        found = page.locator(".strip svg")
        assert found.count() == pictures
        box = found.first.bounding_box()
        assert 200 < box["width"] <= width - box["x"]
        assert box["height"] > 60
        fills = found.first.evaluate(
            "one => [...new Set([...one.querySelectorAll('rect')].map(r => getComputedStyle(r).fill))]"
        )
        # Four looks, four colours, none of them black for want of a style.
        assert len(fills) == 4
        assert "rgb(0, 0, 0)" not in fills
        assert "payload 38 %" in found.first.get_attribute("aria-label")
        assert "not allocated 38 %" in " ".join(page.locator(".strip .legend").first.inner_text().split())
