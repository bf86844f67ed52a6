"""The sign-in at a provider that we did not write, and in a real browser."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleet.in_memory import nodes
from fleet.openid import Browser, OpenIdProvider
from fleet.serving import served, tls_files
from support.requirements import missing, oracle_program
from vmconv_fleet.oidc.settings import OidcSettings
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.testing import free_port

PACKAGE = "oidc-provider@9.13.3"
SERVER = """
import fs from "node:fs";
import https from "node:https";
import Provider from "oidc-provider";

const {port, key, cert, client, secret, redirect} = JSON.parse(process.argv[2]);
const claims = () => ({sub: "248289", name: "Anna Example", groups: ["ops"]});
const provider = new Provider(`https://127.0.0.1:${port}`, {
  clients: [{client_id: client, client_secret: secret, redirect_uris: [redirect]}],
  claims: {openid: ["sub"], profile: ["name", "groups"]},
  conformIdTokenClaims: false,
  pkce: {required: () => true},
  cookies: {keys: ["k"]},
  features: {devInteractions: {enabled: false}},
  interactions: {url: (_ctx, interaction) => `/interaction/${interaction.uid}`},
  findAccount: () => ({accountId: "248289", claims}),
  loadExistingGrant: async ctx => {
    const grant = new provider.Grant({clientId: client, accountId: "248289"});
    grant.addOIDCScope("openid profile");
    await grant.save();
    return grant;
  },
});
provider.use(async (ctx, next) => {
  if (!ctx.path.startsWith("/interaction/")) return next();
  ctx.respond = false;
  await provider.interactionFinished(ctx.req, ctx.res, {login: {accountId: "248289"}});
});
https.createServer({key: fs.readFileSync(key), cert: fs.readFileSync(cert)}, provider.callback())
  .listen(port, "127.0.0.1", () => console.log("listens"));
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the provider of npm."""
    directory = tmp_path_factory.mktemp("npm")
    command = [oracle_program("npm"), "install", "--no-audit", "--no-fund", "--ignore-scripts", PACKAGE]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        missing("oracle", f"npm: {done.stderr.strip()[-200:]}")
    (directory / "server.mjs").write_text(SERVER)
    return directory


@contextmanager
def provider(package: Path, directory: Path, url: str, port: int) -> Iterator[None]:
    """Runs the provider for a console at the address."""
    files = {"key": str(directory / "tls.key"), "cert": str(directory / "tls.pem")}
    settings = {"port": port, **files, "client": "vmconv", "secret": "s3cret"}
    asked = json.dumps({**settings, "redirect": f"{url}/login/callback"})
    command = [oracle_program("node"), "server.mjs", asked]
    with subprocess.Popen(command, cwd=package, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert any(line.strip() == "listens" for line in process.stdout)
            yield
        finally:
            process.kill()


def test_a_person_signs_in_at_a_provider_of_others(package: Path, tmp_path: Path) -> None:
    port, directory = free_port(), tmp_path / "provider"
    directory.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("s3cret")

    def settings(url: str) -> OidcSettings:
        return OidcSettings(
            f"https://127.0.0.1:{port}", "vmconv", url, ca=str(directory / "tls.pem"), secret_file=str(secret)
        )

    with nodes(1, tmp_path) as (node,):
        _, certificate = tls_files(directory)
        with served(node, sign_in=settings) as api, provider(package, directory, api.url, port):
            api.local.call("POST", "/api/v1/groups", {"group": "ops", "role": "operator"})
            browser = Browser(api.ca, certificate)
            page = browser.follow(f"{api.url}/login/oidc?next=/jobs")
            assert page.status == 200, page.text
            (session,) = node.service.view().find("token", node.id)
            assert session.body["label"] == f"Anna Example [248289 at 127.0.0.1:{port}]"
            assert browser.go(f"{api.url}/jobs").status == 200


def test_a_browser_is_signed_in_after_the_redirect_of_another_site(tmp_path: Path, browser: Any) -> None:
    """Cookies that are SameSite=Strict are sent to the page after the sign-in, and not with the provider's redirect."""
    with nodes(1, tmp_path) as (node,), OpenIdProvider(tmp_path / "provider").running() as openid:
        openid.now = lambda: wall_ms() / 1000
        with served(node, sign_in=openid.settings) as api:
            api.local.call("POST", "/api/v1/groups", {"group": "ops", "role": "operator"})
            context = browser.new_context(ignore_https_errors=True)
            page = context.new_page()
            page.goto(f"{api.url}/jobs")
            page.click("text=Sign in at")
            page.wait_for_url(f"{api.url}/jobs")
            assert "Anna Example" in page.inner_text("header")
            assert [(one["name"], one["sameSite"]) for one in context.cookies()] == [("__Host-vmconv", "Strict")]
            context.close()
