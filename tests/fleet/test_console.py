"""The console in headless Chromium, over TLS, as an administrator sees it."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from fleet.desk import EVIL, JOB, PAGES, Desk, enter, pages_of, post
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.replication.records import Change


def test_each_page_shows_what_strangers_wrote_as_text(entered: Desk) -> None:
    other = entered.other.id
    entered.api.local.call("POST", "/api/v1/nodes/n02/scan", {}, query={"wait": 30})
    for path in [*PAGES, *pages_of(other)]:
        entered.go(path)
        assert entered.page.title().endswith("· test")
        assert entered.page.locator("img, main script, main b:text-is('odd')").count() == 0, path
        if path.startswith(("/disks", "/vms", "/jobs", "/convert", "/datastores/")) and "/scan" not in path:
            assert EVIL in entered.page.inner_text("main") + entered.page.title(), path


def test_a_name_cannot_hide_behind_directions(entered: Desk) -> None:
    entered.other.write(Change("disk", "d2", {"datastore": "ds", "name": "harmless\u202egpj.exe.raw"}))
    entered.here.body_when(entered.other.id, "disk", "d2", lambda _one: True)
    entered.go("/disks")
    assert "harmless\\u202egpj.exe.raw" in entered.text()


def test_a_wrong_token_does_not_enter(desk: Desk) -> None:
    desk.go("/login")
    desk.page.route("**/login", lambda route: route.continue_())
    desk.page.fill("#token", "vmf_" + "a" * 32 + "_" + "0" * 12 + "_" + "x" * 43)
    with desk.page.expect_response("**/login") as answer:
        desk.page.click("text=Enter")
    assert answer.value.status == 401
    assert "not known here" in desk.text()
    desk.go("/disks")
    assert "/login" in desk.page.url


def test_a_revoked_token_leaves_at_once(entered: Desk) -> None:
    (token,) = entered.api.local.everything("/api/v1/tokens")
    entered.api.local.call("DELETE", f"/api/v1/tokens/{token['owner']}/{token['id']}")
    entered.go("/disks")
    assert "/login" in entered.page.url


def test_leaving_ends_the_session(entered: Desk) -> None:
    cookies = entered.page.context.cookies()
    assert [(one["httpOnly"], one["secure"], one["sameSite"]) for one in cookies] == [(True, True, "Strict")]
    entered.page.click("text=Leave")
    entered.page.context.add_cookies(cookies)
    entered.go("/")
    assert "/login" in entered.page.url


def test_progress_is_shown_as_it_arrives(entered: Desk) -> None:
    entered.go(f"/jobs/{entered.other.id}/j1")
    assert "25 %" in entered.text()
    entered.other.write(Change("job", "j1", {**JOB, "progress": {"done": 75, "total": 100}}))
    entered.page.wait_for_selector("text=75 %")
    entered.other.write(Change("job", "j1", {**JOB, "state": "done"}))
    entered.page.wait_for_selector(".state.done")
    shared, copied = (entered.page.locator(f"svg.bar rect.{name}").first for name in ("shared", "copied"))
    assert (shared.get_attribute("width"), copied.get_attribute("width")) == ("75.0", "25.0")


def test_changes_before_the_page_subscribes_are_shown(entered: Desk) -> None:
    def late(route: Any) -> None:
        progress(entered, 75)
        route.continue_()

    entered.page.route("**/api/v1/events*", late)
    entered.go(f"/jobs/{entered.other.id}/j1")
    entered.page.wait_for_selector("text=75 %")


def test_changes_while_the_page_is_fetched_are_shown(entered: Desk) -> None:
    def late(route: Any) -> None:
        if route.request.resource_type != "fetch" or answers:
            route.continue_()
            return
        answers.append(route.fetch())
        progress(entered, 75)
        # The event of the change arrives during the fetch: it may do so later on a busy machine, which is no harm.
        time.sleep(1)
        route.fulfill(response=answers[0])

    answers: list[Any] = []
    entered.page.route(f"**/jobs/{entered.other.id}/j1", late)
    entered.go(f"/jobs/{entered.other.id}/j1")
    entered.page.wait_for_selector("text=75 %")
    assert "25 %" in answers[0].text()


def progress(desk: Desk, done: int) -> None:
    """Changes the progress of the job, and waits until the node that is looked at has it."""
    body = {**JOB, "progress": {"done": done, "total": 100}}
    desk.other.write(Change("job", "j1", body))
    desk.here.body_when(desk.other.id, "job", "j1", lambda one: one.body["progress"]["done"] == done)


def test_a_banner_says_how_old_the_view_of_a_lost_node_is(entered: Desk) -> None:
    entered.go("/disks")
    assert entered.page.locator(".banner").count() == 0
    beat = {"at_ms": wall_ms() - 252_000, "interval_s": 5}
    entered.other.write(Change("heartbeat", entered.other.id, beat))
    entered.here.body_when(
        entered.other.id, "heartbeat", entered.other.id, lambda one: one.body["at_ms"] == beat["at_ms"]
    )
    entered.here.wire.disconnect()
    entered.here.write(Change("vm", "v2", {"datastore": "ds", "file": "y.vmx", "name": "y"}))
    entered.page.wait_for_selector(".banner:has-text('n02 is unreachable')")
    assert "What you see of n02 is 4 min" in entered.text("#banners")
    assert "n01 is disconnected from the others" in entered.text("#banners")


def test_a_disk_is_converted_from_its_page(entered: Desk) -> None:
    entered.go(f"/disks/{entered.other.id}/d1")
    entered.page.select_option("select[name=format]", "qcow2")
    entered.page.click("button:text-is('Convert…')")
    entered.page.wait_for_selector("h1:has-text('Convert 1 disk?')")
    assert entered.api.local.get("/api/v1/jobs")["total"] == 2
    entered.page.click("button:text-is('Convert 1 disk')")
    entered.page.wait_for_selector("td:has-text('Done, transaction 1')")
    jobs = [one for one in entered.api.local.everything("/api/v1/jobs") if one["id"] not in ("j1", "j2")]
    assert [(one["body"]["disk"], one["body"]["format"], one["body"]["by"]["user"]) for one in jobs] == [
        ("d1", "qcow2", "a admin")
    ]


def test_the_page_of_a_machine_shows_what_its_configuration_says(entered: Desk) -> None:
    entered.go("/vms")
    entered.page.click("#vms td.name a")
    for text in ("debian12", "2 GiB", "uefi", "00:50:56:00:00:01", "1 GiB", "x.vmx"):
        assert text in entered.text("main"), text
    assert entered.page.locator(f"#disks a[href='/disks/{entered.other.id}/d1']").count() == 1
    assert entered.page.locator("select[name=format] option").all_inner_texts() == ["libvirt"]


def test_a_machine_is_converted_from_its_page(entered: Desk) -> None:
    entered.go(f"/vms/{entered.other.id}/v1")
    entered.page.check("input[name=strict]")
    entered.page.click("button:text-is('Only plan…')")
    entered.page.wait_for_selector("li:has-text('plans only, nothing is made or changed')")
    entered.page.click("button:text-is('Plan 1 virtual machine')")
    entered.page.wait_for_selector("td:has-text('Done, transaction 1')")
    (job,) = [one["body"] for one in entered.api.local.everything("/api/v1/jobs") if one["id"] not in ("j1", "j2")]
    assert (job["vm"], job["format"], job["strict"], job["dry_run"]) == ("v1", "libvirt", True, True)


def test_a_machine_that_cannot_be_read_is_not_converted(entered: Desk) -> None:
    broken = {"datastore": "ds", "file": "b.vmx", "name": "b", "problem": EVIL}
    entered.other.write(Change("vm", "v3", broken))
    entered.here.body_when(entered.other.id, "vm", "v3", lambda _one: True)
    entered.go(f"/vms/{entered.other.id}/v3")
    assert EVIL in entered.text("#facts")
    assert entered.page.locator("main form").count() == 0


def test_a_job_is_cancelled_from_its_page(entered: Desk) -> None:
    entered.go(f"/jobs/{entered.other.id}/j1")
    entered.page.click("text=Cancel this conversion")
    entered.page.wait_for_selector("h1:has-text('Cancel this conversion?')")
    entered.page.click("button:text-is('Cancel the conversion')")
    entered.page.wait_for_selector(".banner.said:has-text('Done')")
    assert "is being cancelled" in entered.text()


def test_disks_are_selected(entered: Desk) -> None:
    entered.go("/disks")
    entered.page.fill("#select", "format=raw")
    entered.page.click("button:text-is('Search')")
    entered.page.wait_for_selector("text=No disk is selected.")
    entered.page.fill("#select", "colour=<b>red</b>")
    entered.page.click("button:text-is('Search')")
    entered.page.wait_for_selector("[role=alert]")
    assert "where a field was expected" in entered.text("[role=alert]")


def test_history_shows_differences(entered: Desk) -> None:
    for number in (3, 4):
        entered.api.local.call("PATCH", "/api/v1/nodes/n01/policy", {"max_parallel": number})
    entered.go("/history")
    assert "policy: max_parallel 3 -> 4" in entered.text()
    entered.page.locator("summary").first.click()
    assert entered.text(".diff del") == "3"
    assert entered.text(".diff ins") == "4"


def test_viewers_see_no_buttons(desk: Desk) -> None:
    enter(desk, "viewer")
    other = desk.other.id
    lists = ["/disks", "/vms", "/tokens", "/policies", "/datastores"]
    for path in [*lists, *(f"/{one}" for one in (f"disks/{other}/d1", f"vms/{other}/v1", f"jobs/{other}/j1"))]:
        desk.go(path)
        buttons = desk.page.locator("main button:not(:text-is('Search')), main a.button, main [type=checkbox]")
        assert buttons.count() == 0, path
    for path in (f"/nodes/{other}", f"/datastores/{other}/ds", f"/policies/{other}"):
        desk.go(path)
        assert desk.page.locator("main button, main a.button").count() == 0, path


def test_viewers_are_refused_at_the_pages_that_ask(desk: Desk) -> None:
    enter(desk, "viewer")
    other = desk.other.id
    asking = [path for path in pages_of(other) if "cancel" in path or "scan" in path or "convert" in path]
    for path in [*asking, "/tokens/new/review?label=x&role=viewer"]:
        desk.go(path)
        assert "needs the role" in desk.text(), path
        assert desk.page.locator("form[method=post]:not([action='/logout'])").count() == 0, path


def test_no_page_is_wider_than_the_window(entered: Desk) -> None:
    other = entered.other.id
    for path in [*PAGES, *pages_of(other)]:
        entered.go(path)
        for width in (360, 800, 1400):
            entered.page.set_viewport_size({"width": width, "height": 800})
            beyond = entered.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert beyond <= 0, (path, width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(entered: Desk, scheme: str) -> None:
    entered.page.emulate_media(color_scheme=scheme)
    entered.go("/")
    ground, text = (
        [int(part) for part in re.findall(r"\d+", entered.page.evaluate(f"getComputedStyle(document.body).{name}"))]
        for name in ("backgroundColor", "color")
    )
    assert abs(sum(ground[:3]) - sum(text[:3])) > 450
    assert (sum(ground[:3]) > sum(text[:3])) is (scheme == "light")


# Forms from elsewhere, without a browser


def test_forms_from_elsewhere_are_refused(entered: Desk) -> None:
    (cookie,) = entered.page.context.cookies()
    session = f"{cookie['name']}={cookie['value']}"
    entered.go(f"/disks/{entered.other.id}/d1")
    key = entered.page.locator("input[name=form_key]").first.get_attribute("value")
    own, other = entered.api.url, entered.other.id
    disk = {"kind": "disk", "item": f"{other}/d1", "format": "qcow2", "batch": "batch-1234"}
    forms: list[tuple[str, dict[str, str]]] = [
        ("/convert", disk),
        ("/convert", {**disk, "kind": "vm", "item": f"{other}/v1", "format": "libvirt"}),
        (f"/jobs/{other}/j1/cancel", {}),
        (f"/nodes/{other}/scan", {}),
        (f"/datastores/{other}/ds/scan", {}),
        (f"/datastores/{other}/ds/remove", {}),
        (f"/datastores/{other}/ds/appoint", {"nodes": ""}),
        (f"/policies/{other}", {"max_parallel": "7"}),
        ("/tokens", {"label": "x", "role": "admin", "once": "0" * 16}),
    ]
    for path, wish in forms:
        # Without a cookie, a browser is sent to the page where it enters.
        assert post(entered.api, path, {**wish, "form_key": key}) == 303
        assert post(entered.api, path, wish, Cookie=session, Origin=own) == 403
        assert post(entered.api, path, {**wish, "form_key": "x" * 43}, Cookie=session, Origin=own) == 403
        for origin in ("https://evil.example", "null"):
            assert post(entered.api, path, {**wish, "form_key": key}, Cookie=session, Origin=origin) == 403
        assert post(entered.api, path, {**wish, "form_key": key}, Cookie=session, Sec_Fetch_Site="cross-site") == 403
    assert not [one for one in entered.here.service.view().find("request") if one.body["verb"] != "token-create"]
    assert post(entered.api, "/convert", {**disk, "form_key": key}, Cookie=session, Origin=own) == 200
    assert len(entered.api.local.everything("/api/v1/jobs")) == 3


def test_a_cookie_opens_no_door_of_the_api(entered: Desk) -> None:
    (cookie,) = entered.page.context.cookies()
    session = f"{cookie['name']}={cookie['value']}"
    assert post(entered.api, "/api/v1/nodes/n01/scan", {}, Cookie=session) == 401
