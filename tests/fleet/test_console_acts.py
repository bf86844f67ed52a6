"""Acts in the console: many conversions at once, confirmations, policies and tokens; and who can use its pages."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fleet.desk import EVIL, JOB, PAGES, Desk, pages_of, post
from vmconv_fleet.config import NodeConfig, save
from vmconv_fleet.replication.records import Change

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def disks(desk: Desk, *names: str, **more: Any) -> None:
    """Gives the other node more disks."""
    owner = desk.other
    owner.write(*(Change("disk", name, {"datastore": "ds", "name": name, "format": "raw", **more}) for name in names))
    desk.here.body_when(owner.id, "disk", names[-1], lambda _one: True)


def jobs(desk: Desk) -> list[dict[str, Any]]:
    """Returns the bodies of the jobs that were asked for in the test."""
    found = desk.api.local.everything("/api/v1/jobs")
    return [one["body"] for one in found if one["id"] not in ("j1", "j2")]


# Conversions of many


def test_chosen_disks_are_converted_together_and_each_is_answered(entered: Desk) -> None:
    disks(entered, "a.raw", "b.raw", virtual_size=1 << 30, actual_size=3 << 20)
    disks(entered, "broken.raw", problem="no signature")
    entered.go("/disks")
    for name in ("a.raw", "broken.raw", "b.raw"):
        entered.page.check(f"input[aria-label='Choose {name}']")
    entered.page.click("text=Convert the chosen disks")
    entered.page.select_option("select[name=format]", "qcow2")
    entered.page.fill("input[name=max_parallel]", "2")
    entered.page.click("text=Show what will happen")
    said = entered.text()
    for text in ("3 disks of n02, 6 MiB on storage, to qcow2.", "The sources stay.", "no signature"):
        assert text in said
    assert "Each becomes a new file beside its source; nothing is converted in place." in said
    assert [one.split("\t")[-2] for one in said.splitlines() if one.startswith(("a.raw", "b.raw"))] == [
        "a.qcow2",
        "b.qcow2",
    ]
    assert not jobs(entered)
    entered.page.click("button:text-is('Convert 3 disks')")
    entered.page.wait_for_selector(".banner.warn:has-text('1 of 3 was refused.')")
    assert "Refused: disk broken.raw cannot be read: no signature" in entered.text()
    made = jobs(entered)
    assert sorted(one["source"] for one in made) == ["a.raw", "b.raw"]
    assert {one["max_parallel"] for one in made} == {2}
    entered.page.click("text=Show the jobs of these conversions")
    assert entered.page.locator("#jobs tbody tr").count() == 2


def test_the_same_form_again_converts_nothing_again(entered: Desk) -> None:
    disks(entered, "a.raw")
    entered.go(f"/convert/review?kind=disk&item={entered.other.id}/a.raw&format=qcow2")
    entered.page.click("button:text-is('Convert 1 disk')")
    entered.page.wait_for_selector("text=All of 1 requested")
    entered.page.reload()
    entered.page.wait_for_selector("text=All of 1 requested")
    assert len(jobs(entered)) == 1


def test_machines_are_converted_with_the_options_of_machines(entered: Desk) -> None:
    entered.go("/vms")
    entered.page.check(f"input[value='{entered.other.id}/v1']")
    entered.page.click("text=Convert the chosen machines")
    entered.page.fill("input[name=keep]", "tpm, nics.mac")
    entered.page.select_option("select[name=uuid]", "text")
    entered.page.click("text=Show what will happen")
    assert "A conversion that would lose tpm, nics.mac fails." in entered.text()
    entered.page.click("button:text-is('Convert 1 virtual machine')")
    entered.page.wait_for_selector("text=All of 1 requested")
    (job,) = jobs(entered)
    assert (job["vm"], job["format"], job["keep"], job["uuid"]) == ("v1", "libvirt", ["tpm", "nics.mac"], "text")


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("format=../x", "format: '../x' is not allowed: the name of a format"),
        ("format=qcow2&target=-rf.raw", "it begins with '-'"),
        ("format=qcow2&target=x&item={node}/a.raw", "a name is for one conversion"),
        ("format=qcow2&max_parallel=many", "max_parallel: 'many' is not allowed: a whole number"),
        ("format=qcow2&target_datastore=../etc", "target_datastore: '../etc' is not allowed"),
    ],
)
def test_options_that_are_not_valid_are_asked_for_again(entered: Desk, query: str, said: str) -> None:
    disks(entered, "a.raw")
    node = entered.other.id
    entered.go(f"/convert/review?kind=disk&item={node}/d1&{query.format(node=node)}")
    assert said in entered.text("[role=alert]")
    assert entered.page.locator("select[name=format]").count() == 1
    assert entered.page.locator("main form[method=post]").count() == 0


def test_boxes_stay_checked_and_the_focus_stays_while_the_page_updates(entered: Desk) -> None:
    disks(entered, "a.raw", "b.raw")
    entered.go("/disks")
    entered.page.check("input[aria-label='Choose a.raw']")
    entered.page.focus("a:text-is('b.raw')")
    disks(entered, "c.raw")
    entered.page.wait_for_selector("text=c.raw")
    assert entered.page.is_checked("input[aria-label='Choose a.raw']")
    assert not entered.page.is_checked("input[aria-label='Choose c.raw']")
    assert entered.page.evaluate("document.activeElement.textContent") == "b.raw"
    entered.page.check("input[aria-label='Choose all on this page']")
    assert entered.page.locator("td input:checked").count() == entered.page.locator("td input").count() == 4


def test_lists_are_searched_and_sorted(entered: Desk) -> None:
    disks(entered, "small.raw", virtual_size=1)
    disks(entered, "large.raw", virtual_size=1 << 40)
    entered.go("/disks")
    entered.page.fill("#search", "RAW n0")
    entered.page.click("button:text-is('Search')")
    entered.page.wait_for_selector("text=No disk is selected.")
    entered.page.fill("#search", "RAW")
    entered.page.click("button:text-is('Search')")
    entered.page.click("th a:text-is('Size')")
    # The page before has a link of the same name.
    entered.page.wait_for_selector("th[aria-sort=ascending]:has-text('Size')")
    entered.page.click("th a:text-is('Size')")
    entered.page.wait_for_selector("th[aria-sort=descending]:has-text('Size')")
    assert entered.page.locator("tbody td.name").all_inner_texts() == ["large.raw", "small.raw"]
    entered.go("/jobs?search=libvirt")
    assert entered.page.locator("#jobs tbody tr").count() == 1


# Other acts


def test_a_new_token_is_shown_once(entered: Desk) -> None:
    entered.go("/tokens")
    entered.page.click("text=New token")
    entered.page.fill("input[name=label]", "anna")
    entered.page.select_option("select[name=role]", "operator")
    entered.page.fill("input[name=days]", "30")
    entered.page.click("text=Make the token")
    before = len(entered.api.local.everything("/api/v1/tokens"))
    assert "operator" in entered.text("dl")
    entered.page.click("button:text-is('Make the token')")
    token = entered.page.locator("#secret").inner_text()
    listed = entered.api.local.everything("/api/v1/tokens")
    (made,) = [one for one in listed if one["body"]["label"] == "anna"]
    assert len(listed) == before + 1
    assert (made["body"]["role"], made["id"] in token) == ("operator", True)
    entered.page.reload()
    assert "its token was shown then" in entered.text()
    assert token not in entered.page.content()
    assert len(entered.api.local.everything("/api/v1/tokens")) == before + 1
    entered.go("/tokens")
    assert token not in entered.page.content()
    entered.page.click("a[aria-label='Revoke the token of anna']")
    entered.page.click("button:text-is('Revoke the token')")
    entered.page.wait_for_selector(".banner.said:has-text('Done')")
    assert entered.api.local.get(f"/api/v1/records/{made['owner']}/token/{made['id']}")["body"]["revoked"]


STORAGE = "5" * 32


def share(desk: Desk, *converters: str) -> str:
    """Lets both nodes have a datastore on one storage, the other one's; returns the address of its page."""
    held = {"path": "/srv/shared", "storage": STORAGE, "owner": desk.other.id}
    desk.here.write(Change("datastore", "mine", held))
    desk.other.write(Change("datastore", "shared", {**held, "converters": list(converters)}))
    desk.here.body_when(desk.other.id, "datastore", "shared", lambda _one: True)
    return f"/datastores/{desk.other.id}/shared"


def converters_of(desk: Desk) -> list[str]:
    record = desk.other.service.view().get(desk.other.id, "datastore", "shared")
    assert record
    found: list[str] = record.body["converters"]
    return found


def test_a_node_is_appointed_and_withdrawn(entered: Desk) -> None:
    gone = "3" * 32
    entered.go(share(entered, gone))
    assert f"{gone[:8]}, which does not see it" in entered.text("#facts")
    entered.page.check("#appoint label:has-text('n01') input")
    entered.page.click("text=Change who converts")
    assert f"n02, {gone[:8]} and n01 convert the disks of shared." in entered.text()
    assert converters_of(entered) == [gone]
    entered.page.click("button:text-is('Change who converts')")
    entered.page.wait_for_selector(".banner.said:has-text('Done')")
    assert converters_of(entered) == [entered.here.id, gone]
    assert "n01" in entered.text("#facts")
    for box in entered.page.locator("#appoint input").all():
        box.uncheck()
    entered.page.click("text=Change who converts")
    assert "Only n02 converts the disks of shared." in entered.text()
    assert "will begin no conversion there; what runs is finished." in entered.text()
    entered.page.click("button:text-is('Change who converts')")
    entered.page.wait_for_selector(".banner.said:has-text('Done')")
    assert converters_of(entered) == []
    entered.page.click("text=Change who converts")
    assert "Nothing is changed" in entered.text("body")


def test_only_nodes_that_see_a_storage_are_appointed(entered: Desk) -> None:
    path = share(entered)
    entered.go(f"{path}/appoint?node={'4' * 32}")
    assert "does not see this storage" in entered.text("body")
    for name in ("ds", "mine"):
        entered.go(f"/datastores/{(entered.here if name == 'mine' else entered.other).id}/{name}")
        assert entered.page.locator("#appoint").count() == 0
    entered.go(f"/datastores/{entered.other.id}/ds/appoint")
    assert "no other node sees the storage of ds" in entered.text("body")


@pytest.mark.parametrize("datastore", ["n02:ds", "n02:shared"])
def test_who_may_not_appoint_sees_no_form(desk: Desk, datastore: str) -> None:
    path = share(desk)
    desk.go("/login")
    desk.page.fill("#token", desk.api.token("admin", datastores=[datastore])["token"])
    desk.page.click("text=Enter")
    desk.page.wait_for_selector("h1:has-text('Nodes')")
    may = datastore == "n02:shared"
    desk.go(path)
    assert desk.page.locator("#appoint").count() == may
    desk.go(f"{path}/appoint?node={desk.here.id}")
    assert ("needs the role admin" in desk.text("body")) is not may
    assert desk.page.locator("form.confirm").count() == may


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("label=-rf&role=viewer", "label: '-rf' begins with '-'"),
        ("label=x&role=god", "role: 'god' is not allowed: 'viewer', 'operator' or 'admin'"),
        ("label=x&role=viewer&days=0", "ttl_s: 0 is not allowed: more than 0"),
        ("label=x&role=viewer&days=soon", "days: 'soon' is not allowed: a whole number"),
        ("label=x&role=operator&datastores=n02:none", "datastore none"),
    ],
)
def test_a_token_that_cannot_be_is_not_made(entered: Desk, query: str, said: str) -> None:
    entered.go(f"/tokens/new/review?{query}")
    assert said in entered.text("[role=alert]")
    assert entered.page.locator("main form[method=post]").count() == 0


def test_a_policy_is_changed_after_its_differences_were_shown(entered: Desk) -> None:
    entered.go(f"/policies/{entered.here.id}")
    entered.page.fill("input[name=max_parallel]", "7")
    entered.page.fill("input[name=formats]", "raw, qcow2")
    entered.page.fill("input[name=between]", "22:00-05:00")
    entered.page.click("text=Change the policy")
    assert "max_parallel\n2 -> 7" in entered.text("dl")
    assert "naming" not in entered.text("dl")
    entered.page.click("button:text-is('Change the policy')")
    entered.page.wait_for_selector(".banner.said:has-text('Done')")
    policy = entered.here.service.view().get(entered.here.id, "policy", "conversion")
    assert policy
    assert policy.body == {"max_parallel": 7, "formats": ["raw", "qcow2"], "between": "22:00-05:00"}
    entered.page.fill("input[name=between]", "25:00")
    entered.page.click("text=Change the policy")
    assert "between: '25:00' is not allowed" in entered.text("[role=alert]")
    entered.go(f"/policies/{entered.here.id}/review?naming=fixed")
    assert "naming: 'fixed' is not allowed" in entered.text("[role=alert]")


def test_limits_of_datastores_are_changed_and_taken_back(entered: Desk) -> None:
    place = f"/policies/{entered.here.id}"
    for limits in ({"datastore_parallel": {"ds": 1, "more": 2}, "bandwidth": {"ds": 100 << 20, "more": 65537}}, None):
        entered.go(place)
        if limits is None:
            shown = {
                name: entered.page.input_value(f"input[name={name}]") for name in ("datastore_parallel", "bandwidth")
            }
            assert shown == {"datastore_parallel": "ds=1, more=2", "bandwidth": "ds=100M, more=65537"}
        entered.page.fill("input[name=datastore_parallel]", "ds=1, more=2" if limits else "")
        entered.page.fill("input[name=bandwidth]", "ds=100M,more=65537" if limits else "")
        entered.page.click("text=Change the policy")
        entered.page.click("button:text-is('Change the policy')")
        entered.page.wait_for_selector(".banner.said:has-text('Done')")
        policy = entered.here.service.view().get(entered.here.id, "policy", "conversion")
        assert policy
        assert policy.body == (limits or {"datastore_parallel": {}, "bandwidth": {}})
    for query, said in (
        ("bandwidth=ds", "bandwidth: 'ds'"),
        ("bandwidth=ds%3Dmuch", "bandwidth: 'ds=much': 'much' is not a number"),
        ("datastore_parallel=ds%3D0", "datastore_parallel"),
        ("datastore_parallel=%3D1", "'=1' is not NAME=NUMBER"),
    ):
        entered.go(f"{place}/review?{query}")
        assert said in entered.text("[role=alert]")


def test_a_webhook_is_made_tested_and_removed(entered: Desk) -> None:
    """Its URL is in no address and on no page: the path may be a secret."""
    save(NodeConfig(directory=str(entered.here.directory), fleet="test", node=entered.here.id, name="n01"))
    entered.go("/webhooks")
    entered.page.click("text=New webhook")
    entered.page.fill("input[name=url]", "https://127.0.0.1:1/key-of-anna")
    entered.page.fill("input[name=events]", "job.*, *.problem")
    entered.page.click("button:text-is('Make the webhook')")
    secret = entered.page.locator("#secret").inner_text()
    (made,) = entered.api.local.everything("/api/v1/webhooks")
    assert (made["body"]["place"], made["body"]["events"]) == ("https://127.0.0.1:1", ["job.*", "*.problem"])
    assert secret.startswith("whsec_")
    assert "key-of-anna" not in entered.page.url + entered.page.content()
    entered.page.reload()
    assert "its secret was shown then" in entered.text()
    assert len(entered.api.local.everything("/api/v1/webhooks")) == 1
    entered.go("/webhooks")
    assert secret not in entered.page.content()
    entered.page.click("button[aria-label='Test the webhook to https://127.0.0.1:1']")
    entered.page.wait_for_selector(".banner.warn:has-text('loopback addresses are refused')")
    entered.page.click("a[aria-label='Remove the webhook to https://127.0.0.1:1']")
    assert "sends no more events to https://127.0.0.1:1" in entered.text()
    entered.page.click("button:text-is('Remove the webhook')")
    entered.page.wait_for_selector(".banner.said:has-text('Done')")
    assert not entered.api.local.everything("/api/v1/webhooks")


@pytest.mark.parametrize(
    ("url", "events", "said"),
    [
        ("https://user@hooks.example/x", "", "has a user, a password or a fragment"),
        ("http://hooks.example/x", "", "http is not encrypted"),
        ("https://hooks.example/x", "nosuch.event", "no event is called 'nosuch.event'"),
        ("https://hooks.example/x", "a" * 90, "events"),
    ],
)
def test_a_webhook_that_cannot_be_is_not_made(entered: Desk, url: str, events: str, said: str) -> None:
    entered.go("/webhooks/new")
    entered.page.fill("input[name=url]", url)
    entered.page.fill("input[name=events]", events)
    entered.page.click("button:text-is('Make the webhook')")
    assert said in entered.text("[role=alert]")
    assert not entered.api.local.everything("/api/v1/webhooks")


def test_a_webhook_of_another_node_is_not_tested_here(entered: Desk) -> None:
    entered.other.write(Change("webhook", "0" * 12, {"place": EVIL}))
    entered.here.body_when(entered.other.id, "webhook", "0" * 12, lambda _one: True)
    entered.go("/webhooks")
    assert EVIL in entered.text()
    assert entered.page.locator("#webhooks form").count() == 0
    assert entered.page.locator("#webhooks a.danger").count() == 1


def test_a_datastore_has_a_page_with_its_acts(entered: Desk) -> None:
    entered.go("/datastores")
    entered.page.click("#datastores td.name a")
    for text in ("/srv/images", "xfs", EVIL):
        assert text in entered.text()
    entered.page.click("a:text-is('Scan…')")
    entered.page.click("button:text-is('Scan')")
    entered.page.wait_for_selector(".banner.said:has-text('Done')")
    assert "a scan is due" in entered.text()
    entered.page.click("text=Remove from the catalogue")
    assert "The files stay." in entered.text()
    entered.page.click("button:text-is('Remove the datastore from the catalogue')")
    entered.page.wait_for_selector(".banner.warn:has-text('Refused: 1 jobs are running in datastore ds')")
    entered.other.write(Change("job", "j1", {**JOB, "state": "done"}))
    entered.here.body_when(entered.other.id, "job", "j1", lambda one: one.body["state"] == "done")
    entered.go(f"/datastores/{entered.other.id}/ds/remove")
    entered.page.click("button:text-is('Remove the datastore from the catalogue')")
    entered.page.wait_for_selector(".banner.said:has-text('Done')")
    assert "No datastore is declared" in entered.text()


def test_a_refusal_is_shown_as_one(entered: Desk) -> None:
    entered.go(f"/jobs/{entered.other.id}/j2/cancel")
    entered.page.click("button:text-is('Cancel the conversion')")
    entered.page.wait_for_selector("[role=alert].banner.warn:has-text('Refused: job j2 is already failed')")


def test_a_job_has_its_log(entered: Desk) -> None:
    log = [{"at_ms": 1_000, "text": "started, attempt 1"}, {"at_ms": 2_000, "text": f"failed: {EVIL}"}]
    entered.other.write(Change("job", "j1", {**JOB, "log": log, "by": {"node": entered.other.id, "user": "anna"}}))
    entered.here.body_when(entered.other.id, "job", "j1", lambda one: "log" in one.body)
    entered.go(f"/jobs/{entered.other.id}/j1")
    lines = [line.split("\t")[1] for line in entered.text("#log tbody").splitlines()]
    assert lines == ["requested by anna", "started, attempt 1", f"failed: {EVIL}"]


def test_scans_do_not_fill_the_history(entered: Desk) -> None:
    entered.api.local.call("POST", "/api/v1/nodes/n02/scan", {}, query={"wait": 30})
    disks(entered, "a.raw")
    entered.api.local.call("POST", "/api/v1/disks/n02/a.raw/convert", {"format": "qcow2"}, query={"wait": 30})
    for path in ("/history", "/requests"):
        entered.go(path)
        assert "scan of" not in entered.text(f"#{path[1:]}")
        assert " scan " not in entered.text(f"#{path[1:]}")
        entered.page.click("text=with scans")
        entered.page.wait_for_selector("[aria-current]:text-is('with scans')")
        assert "scan" in entered.text(f"#{path[1:]}")
    entered.go("/history")
    said = [entered.text(f".history header {part}") for part in (".did", "span")]
    assert re.fullmatch(r"a\.raw -> a qcow2 by \S+ at n01", " ".join(said))


# Every page, for everybody


def test_every_page_can_be_used_without_eyes_or_mouse(entered: Desk) -> None:
    for path in [*PAGES, *pages_of(entered.other.id)]:
        entered.go(path)
        assert entered.page.evaluate(_UNNAMED) == [], path


_UNNAMED = """() => {
  const wrong = [];
  for (const one of document.querySelectorAll("table"))
    if (!one.caption || !one.caption.textContent.trim()) wrong.push("table without caption");
  for (const one of document.querySelectorAll("thead th"))
    if (one.scope !== "col" || !one.textContent.trim()) wrong.push("head " + one.outerHTML);
  for (const one of document.querySelectorAll("input:not([type=hidden]), select"))
    if (!one.labels?.length && !one.getAttribute("aria-label")) wrong.push("field " + one.outerHTML);
  for (const one of document.querySelectorAll("a, button"))
    if (!(one.textContent.trim() || one.getAttribute("aria-label"))) wrong.push("no name " + one.outerHTML);
  for (const one of document.querySelectorAll(".scroll"))
    if (one.scrollWidth > one.clientWidth && one.tabIndex < 0) wrong.push("cannot be scrolled " + one.id);
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  if (new Set(ids).size !== ids.length) wrong.push("an id twice: " + ids);
  if (document.querySelectorAll("h1").length !== 1 || document.querySelectorAll("main").length !== 1)
    wrong.push("not one heading and one main part");
  return wrong;
}"""


def test_the_first_key_leads_to_the_content(entered: Desk) -> None:
    entered.page.keyboard.press("Tab")
    assert entered.page.evaluate("document.activeElement.textContent") == "Skip to content"
    entered.page.keyboard.press("Enter")
    assert entered.page.evaluate("document.activeElement.id") == "main"


def test_each_time_has_its_zone(entered: Desk) -> None:
    for path in [*PAGES, *pages_of(entered.other.id)]:
        entered.go(path)
        said = entered.page.inner_text("body")
        assert re.search(TIME, said), path
        assert not re.search(rf"{TIME}(?! [A-Z+-])", said), path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_all_pages_and_failures_can_be_reached(entered: Desk, scheme: str) -> None:
    entered.page.emulate_media(color_scheme=scheme)
    entered.page.set_viewport_size({"width": 420, "height": 800})
    # No update replaces what is measured.
    entered.page.route("**/api/v1/events*", lambda route: route.abort())
    disks(entered, "broken.raw", problem="no signature at 0x0")
    entered.go("/")
    for name in (
        "Nodes",
        "Datastores",
        "Disks",
        "VMs",
        "Jobs",
        "Requests",
        "History",
        "Policies",
        "Tokens",
        "Webhooks",
    ):
        _is_within(entered, f"nav a:text-is('{name}')")
    entered.go(share(entered, "3" * 32))
    for selector in ("#appoint button", "#appoint label", "#appoint label:last-of-type"):
        _is_within(entered, selector)
    for path, failure in (("/disks", "no signature at 0x0"), ("/jobs", EVIL), ("/", EVIL)):
        entered.go(path)
        _is_within(entered, f".bad:has-text({failure!r})" if failure != EVIL else ".bad:has-text('owned')")


def _is_within(desk: Desk, selector: str) -> None:
    """The element can be seen without scrolling to the side."""
    box = desk.page.locator(selector).first.evaluate("one => one.getBoundingClientRect().toJSON()")
    assert box["width"] > 0, selector
    assert box["left"] >= 0, selector
    assert box["right"] <= 420, selector


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(entered: Desk, scheme: str) -> None:
    entered.page.emulate_media(color_scheme=scheme)
    for path in ("/", "/disks", "/jobs", "/history", f"/disks/{entered.other.id}/d1", "/tokens/new"):
        entered.go(path)
        assert entered.page.evaluate(_PALE) == [], path


_PALE = """() => {
  const parts = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).slice(0, 3).map((one) => {
      const part = one / 255;
      return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const pale = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !one.getClientRects().length || one.closest(".sr, .skip, option")) continue;
    const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort().reverse();
    if ((a + 0.05) / (b + 0.05) < 4.5) pale.push(`${one.className} ${one.textContent.trim().slice(0, 30)}`);
  }
  return pale;
}"""


def test_an_operator_of_one_datastore_acts_in_it_alone(desk: Desk) -> None:
    desk.other.write(
        Change("datastore", "more", {"path": "/srv/more"}),
        Change("disk", "m1", {"datastore": "more", "name": "m.raw", "format": "raw"}),
    )
    desk.here.body_when(desk.other.id, "disk", "m1", lambda _one: True)
    token = desk.api.token("operator", datastores=["n02:more"])["token"]
    desk.go("/login")
    desk.page.fill("#token", token)
    desk.page.click("text=Enter")
    desk.page.wait_for_selector("h1:has-text('Nodes')")
    items = "&".join(f"item={desk.other.id}/{one}" for one in ("d1", "m1"))
    desk.go(f"/convert/review?kind=disk&{items}&format=qcow2")
    desk.page.click("button:text-is('Convert 2 disks')")
    desk.page.wait_for_selector("text=1 of 2 was refused.")
    assert "needs the role operator" in desk.text()
    assert [one["source"] for one in jobs(desk)] == ["m.raw"]
    desk.go(f"/datastores/{desk.other.id}/ds/scan")
    assert "needs the role operator" in desk.text()


def test_a_form_has_a_limit(entered: Desk) -> None:
    (cookie,) = entered.page.context.cookies()
    session = {"Cookie": f"{cookie['name']}={cookie['value']}", "Origin": entered.api.url}
    entered.go("/disks")
    key = entered.page.locator("input[name=form_key]").first.get_attribute("value")
    many = {f"x{number}": "1" for number in range(500)}
    assert post(entered.api, "/convert", {"form_key": key, **many}, **session) == 403
    item = {"kind": "disk", "item": f"{entered.other.id}/d1", "format": "qcow2", "form_key": key}
    assert post(entered.api, "/convert", {**item, "batch": "x"}, **session) == 422
    assert post(entered.api, "/convert", {**item, "item": "nowhere/d1", "batch": "batch-1"}, **session) == 404
    assert post(entered.api, "/convert", {**item, "kind": "token", "batch": "batch-1"}, **session) == 422
    assert not jobs(entered)
