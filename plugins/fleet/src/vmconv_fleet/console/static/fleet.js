// Keeps a page up to date: when a record of a kind that it shows has changed, the page is fetched again and its live
// parts are replaced. Without this script the page stays as it was loaded.
"use strict";

(() => {
  chooseAll();
  const LEAST = 700; // milliseconds between two fetches
  const kinds = document.body.dataset.events;
  if (!kinds || !window.EventSource) return;
  let waiting = null;
  let busy = false;
  let missed = false; // a change arrived during a fetch, whose answer may not have it
  let last = 0;

  function soon() {
    if (busy) missed = true;
    if (busy || waiting !== null) return;
    waiting = setTimeout(look, Math.max(0, last + LEAST - Date.now()));
  }

  async function look() {
    waiting = null;
    if (document.hidden) return;
    busy = true;
    last = Date.now();
    try {
      const answer = await fetch(location.href, { credentials: "same-origin", redirect: "error" });
      if (answer.ok) replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
    } catch {
      // The node has gone, or the session has ended: the page stays, and what it says of its age is true.
    } finally {
      busy = false;
      if (missed) soon();
      missed = false;
    }
  }

  function replace(fresh) {
    for (const old of document.querySelectorAll("[data-live]")) {
      const now = fresh.getElementById(old.id);
      if (!now || now.isEqualNode(old)) continue;
      const open = [...old.querySelectorAll("details")].map((one) => one.open);
      const made = document.importNode(now, true);
      made.querySelectorAll("details").forEach((one, index) => {
        if (index < open.length && open.length === made.querySelectorAll("details").length) one.open = open[index];
      });
      const focused = old.contains(document.activeElement) ? keyOf(document.activeElement) : null;
      const chosen = new Set([...old.querySelectorAll("input:checked")].map((one) => one.value));
      for (const one of made.querySelectorAll("input[type=checkbox]")) one.checked = chosen.has(one.value);
      old.replaceWith(made);
      // Somebody who uses the keyboard stays at the same link or box.
      const again = focused && [...made.querySelectorAll("a, input, summary, [tabindex]")].find((one) => keyOf(one) === focused);
      if (again) again.focus({ preventScroll: true });
    }
    chooseAll();
    document.documentElement.dataset.looked = String(Number(document.documentElement.dataset.looked || 0) + 1);
  }

  function keyOf(element) {
    return `${element.tagName} ${element.getAttribute("href") || element.value || element.textContent}`;
  }

  // A box that chooses all rows: without this script each row has its own.
  function chooseAll() {
    for (const head of document.querySelectorAll("th[data-all]")) {
      if (head.querySelector("input")) continue;
      const all = document.createElement("input");
      all.type = "checkbox";
      all.setAttribute("aria-label", "Choose all on this page");
      const boxes = () => head.closest("table").querySelectorAll(`td input[name=${head.dataset.all}]`);
      all.addEventListener("change", () => boxes().forEach((one) => (one.checked = all.checked)));
      head.append(all);
    }
  }

  const events = new EventSource(`/api/v1/events?kinds=${encodeURIComponent(kinds)}`);
  // "here" is the first event of a connection: what changed between loading the page and listening is shown, too.
  for (const kind of [...kinds.split(","), "here", "lost"]) events.addEventListener(kind, soon);
  document.addEventListener("visibilitychange", () => document.hidden || soon());
})();
