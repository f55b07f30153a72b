"""The page of /docs: complete without internet, and nothing beside it can be reached."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from api.routes.docs import MEDIA_TYPES
from tests import ROOT
from tests.support.service import Running, serving
from tests.support.transfers import Client, connected

TOKEN = "open-sesame-5up3r"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VENDORED = ROOT / "api" / "static" / "swagger-ui"
TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "png": "image/png"}


class Page(HTMLParser):
    """The addresses that a page loads by itself, and the text of its inline scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inline = ""
        self.feed(text)

    def handle_starttag(self, _tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.inline += data.strip()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service whose store is not there yet: the page needs none."""
    with serving(tmp_path_factory.mktemp("docs") / "store") as service:
        yield service


def test_page_names_only_files_of_this_service(client: Client) -> None:
    answer = client("/docs")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    page = Page(answer.body.decode())
    assert b"//" not in answer.body  # so neither https:// nor //host
    assert not page.inline
    names = [re.fullmatch(r"docs/static/([\w.-]+)\?[0-9a-f]{16}", address) for address in page.addresses]
    assert {name and name[1] for name in names} == set(MEDIA_TYPES)
    for address in page.addresses:
        answer = client(f"/{address}")
        suffix = address.partition("?")[0].rpartition(".")[2]
        assert (answer.status, answer.headers["content-type"]) == (200, TYPES[suffix])
        assert len(answer.body) > 100


def test_page_may_only_reach_its_own_service(client: Client) -> None:
    policy = dict(rule.strip().split(" ", 1) for rule in client("/docs").headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert set(" ".join(policy.values()).split()) == {"'self'", "data:"}


def test_a_file_is_kept_by_browsers_and_confirmed_by_its_etag(client: Client) -> None:
    for name in MEDIA_TYPES:
        answer = client(f"/docs/static/{name}")
        assert answer.headers["cache-control"] == "max-age=31536000, immutable"
        again = client(f"/docs/static/{name}", [("If-None-Match", answer.headers["etag"])])
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", answer.headers["etag"])
        head = client(f"/docs/static/{name}", method="HEAD")
        assert (head.status, head.headers["content-length"]) == (200, str(len(answer.body)))


def test_no_other_file_can_be_reached(client: Client) -> None:
    for path in (
        "", "README.md", "LICENSE", "docs.html", "swagger-ui/swagger-ui.css", "../docs.html", "..%2fdocs.html",
        "../swagger-ui/LICENSE", "%2e%2e/%2e%2e/app.py", "swagger-ui.css/", "swagger-ui.css%00", "SWAGGER-UI.CSS",
        "swagger-ui-bundle.js.map", "/etc/passwd", "%2fetc%2fpasswd",
    ):  # fmt: skip
        answer = client(f"/docs/static/{path}")
        assert (answer.status, answer.headers["content-type"]) == (404, "application/problem+json"), path
    for path in ("/redoc", "/docs/oauth2-redirect", "/docs/"):
        assert client(path).status == 404


def test_files_add_one_route_to_the_metrics_and_none_to_the_schema(client: Client) -> None:
    for name in (*MEDIA_TYPES, *map(str, range(20))):
        client(f"/docs/static/{name}")
    routes = set(re.findall(r'route="(/docs[^"]*)"', client("/metrics").body.decode()))
    assert routes <= {"/docs", "/docs/static/{name}"}
    assert "/docs/static/{name}" in routes
    assert not [path for path in json.loads(client("/openapi.json").body)["paths"] if path.startswith("/docs")]


def test_page_and_files_need_the_token(tmp_path: Path) -> None:
    with serving(tmp_path / "store", token=TOKEN) as running, connected(running) as client:
        for path in ("/docs", *(f"/docs/static/{name}" for name in MEDIA_TYPES)):
            assert client(path).status == 401
            assert client(path, [("Authorization", f"Bearer {TOKEN}")]).status == 200


def test_vendored_files_are_of_the_version_that_their_readme_names() -> None:
    readme = (VENDORED / "README.md").read_text()
    (version,) = set(re.findall(r"swagger-ui-dist[ @]([\d.]+\d)", readme))
    assert f'"{version}"' in (VENDORED / "swagger-ui-bundle.js").read_text()
    named = re.search(r"package/{(.*)}", readme)
    assert named is not None
    assert {path.name for path in VENDORED.iterdir()} == {"README.md", *named[1].split(",")}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed here")
def test_a_browser_without_internet_shows_every_operation(running: Running, tmp_path: Path) -> None:
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom", f"{running.url}/docs",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    with connected(running) as client:
        paths = json.loads(client("/openapi.json").body)["paths"]
    assert len(paths) > 15
    assert set(re.findall(r'data-path="([^"]*)"', shown.stdout)) == set(paths)
    problems = [line for line in shown.stderr.splitlines() if "CONSOLE" in line and "Deprecated" not in line]
    assert not problems
