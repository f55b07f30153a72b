"""The README's nginx in front of the service: TLS, and the bytes sent by nginx itself after the service allowed it.

Needs nginx and openssl, as the system's packages have them; left out where they are missing.
"""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

import statsvc
from tests import ROOT
from tests.support.finished import Finished
from tests.support.ports import free_port, wait_until_listening
from tests.support.service import Running, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("nginx") or not shutil.which("openssl"), reason="nginx or openssl is not installed"
    ),
]
README = ROOT / "README.md"


@pytest.fixture
def behind(damageable: Finished) -> Iterator[Running]:
    with serving(damageable.path, accel_prefix="/store-files") as running:
        yield running


@pytest.fixture
def front(behind: Running, tmp_path: Path) -> Iterator[tuple[str, ssl.SSLContext]]:
    """The README's server block with this test's ports and files: its address, and whom to trust."""
    (block,) = re.findall(r"^(server \{.*?^\})$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    port = free_port()
    certificate, key = tmp_path / "statsvc.pem", tmp_path / "statsvc.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    for theirs, ours in {
        "443": f"127.0.0.1:{port}",
        "127.0.0.1:8000": f"127.0.0.1:{behind.port}",
        "/etc/ssl/statsvc.pem": str(certificate),
        "/etc/ssl/statsvc.key": str(key),
        "/path/of/the/store/": f"{behind.store_path}/",
    }.items():
        assert theirs in block
        block = block.replace(theirs, ours)
    temporary = " ".join(
        f"{kind}_temp_path {tmp_path};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # As the user of the test, who alone may enter its folders.
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; user root; pid {tmp_path}/pid; error_log {tmp_path}/log; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{block}\n}}"
    )
    process = subprocess.Popen(["nginx", "-c", f"{tmp_path}/nginx.conf", "-p", str(tmp_path)], stderr=subprocess.PIPE)
    try:
        wait_until_listening(port, process)
        yield f"https://localhost:{port}", ssl.create_default_context(cafile=str(certificate))
    finally:
        process.terminate()
        process.communicate(timeout=10)


def test_nginx_sends_the_bytes_that_the_service_allows_and_nothing_else(
    front: tuple[str, ssl.SSLContext], behind: Running
) -> None:
    url, trust = front
    store = statsvc.open(str(behind.store_path))
    cache_set = store.teacher("dino").cache_sets()[0]
    commit = store.ledger.read("cache", 0, "dino", cache_set)
    assert commit is not None
    with httpx.Client(base_url=url, verify=trust) as client:
        for record in commit.objects:
            content = (behind.store_path / record.path).read_bytes()
            answer = client.get(f"/zarr/{record.path}")
            assert (answer.status_code, answer.content) == (200, content)
            assert answer.headers["etag"] == f'"{record.content_crc32c}"'
            part = client.get(f"/zarr/{record.path}", headers={"range": "bytes=3-9"})
            assert (part.status_code, part.content) == (206, content[3:10])
            assert part.headers["content-range"] == f"bytes 3-9/{record.bytes}"
            known = client.get(f"/zarr/{record.path}", headers={"if-none-match": answer.headers["etag"]})
            assert known.status_code == 304
        for path in (".statsvc/run.json", "zarr.json", f"{commit.path}"):
            assert client.get(f"/store-files/{path}").status_code == 404
        assert client.get("/zarr/.statsvc/run.json").status_code == 404
        assert client.get("/teachers/dino/phis").json()["digest"]


def test_without_nginx_the_answer_only_names_the_file(behind: Running) -> None:
    answer = httpx.get(f"{behind.url}/zarr/zarr.json")
    assert answer.content == b""
    assert answer.headers["x-accel-redirect"] == "/store-files/zarr.json"


def test_our_client_reads_through_nginx(
    front: tuple[str, ssl.SSLContext], behind: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "statsvc.pem"))
    url, _ = front
    theirs, ours = (statsvc.open(where).teacher("dino").targets() for where in (url, str(behind.store_path)))
    rows = ours.rows()
    assert np.array_equal(theirs.rows(), rows)
    assert np.array_equal(theirs.read(rows), ours.read(rows))
