"""The service on loopback beside tuned nginx and Starlette's FileResponse, by wrk; and its Python client beside httpx.

nginx and wrk come from the system's packages; without them this benchmark says so and is left out.
"""

from __future__ import annotations

import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil

import statsvc
from tests.benchmarks.rows import Goal, Row, Table
from tests.benchmarks.timing import alternate
from tests.support.ports import free_port, wait_until_listening
from tests.support.stores import MadeTeacher, write_store

SHARDS, ROWS, TOKENS, DIM = 4, 256, 256, 1024  # 67 MB a feature shard
TEACHER = MadeTeacher(TOKENS, DIM)
SECONDS, ROUNDS = 3, 3
SLOW_READERS, SLOW_SECONDS = 256, 60

NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile off; output_buffers 2 1m; keepalive_requests 10000000;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder};
  scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""
FILE_RESPONSE = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import FileResponse
from starlette.routing import Route
app = Starlette(routes=[Route("/{path:path}", lambda request: FileResponse(sys.argv[1] + request.url.path))])
uvicorn.run(app, port=int(sys.argv[2]), access_log=False, log_level="warning", loop="uvloop", http="httptools")
"""
RANGES = """
request = function()
  local begin = math.random(0, 60 * 1024 * 1024)
  return wrk.format("GET", nil, {["Range"] = "bytes=" .. begin .. "-" .. (begin + 524287)})
end
"""


@contextmanager
def running(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on a port."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_listening(port, process)
        yield process
    finally:
        process.terminate()
        process.wait(40)


def serve(store: Path, port: int) -> list[str]:
    return [str(Path(sys.executable).parent / "statsvc"), "serve", "--store", str(store), "--port", str(port)]


def wrk(url: str, *options: str, connections: int = 4) -> tuple[float, float]:
    """Requests a second and MB a second."""
    printed = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", *options, url], capture_output=True, text=True, check=True
    ).stdout
    failed = re.search(r"Non-2xx.*|Socket errors.*(read|timeout) [1-9].*", printed)
    if failed:
        raise RuntimeError(f"{url}: {failed[0]}")
    requests, megabytes, unit = re.search(  # type: ignore[union-attr]
        r"Requests/sec:\s+([\d.]+)\s+Transfer/sec:\s+([\d.]+)([KMG])B", printed
    ).groups()
    return float(requests), float(megabytes) * {"K": 1e-3, "M": 1.0, "G": 1e3}[unit]


def median_of(measure: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Taking turns, so that what else the machine does falls on all alike."""
    found: dict[str, list[float]] = {name: [] for name in measure}
    for _ in range(ROUNDS):
        for name, case in measure.items():
            found[name].append(case())
    return {name: statistics.median(each) for name, each in found.items()}


def bytes_beside_nginx(folder: Path, store: Path, path: str, stack: ExitStack) -> tuple[str, list[Row]]:
    """Whole shards and ranges; returns the service's address too."""
    ports = {name: free_port() for name in ("nginx", "service", "FileResponse")}
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=ports["nginx"], root=store))
    (folder / "file_response.py").write_text(FILE_RESPONSE)
    (folder / "ranges.lua").write_text(RANGES)
    stack.enter_context(running(["nginx", "-c", f"{folder}/nginx.conf", "-p", str(folder)], ports["nginx"]))
    stack.enter_context(running(serve(store, ports["service"]), ports["service"]))
    script = [sys.executable, f"{folder}/file_response.py", str(store), str(ports["FileResponse"])]
    stack.enter_context(running(script, ports["FileResponse"]))
    urls = {name: f"http://127.0.0.1:{port}/{path}" for name, port in ports.items()}
    urls["service"] = f"http://127.0.0.1:{ports['service']}/zarr/{path}"
    whole = median_of({name: lambda url=url: wrk(url, connections=2)[1] for name, url in urls.items()})  # type: ignore[misc]
    script_option = f"-s{folder}/ranges.lua"
    ranges = median_of({name: lambda url=url: wrk(url, script_option)[0] for name, url in urls.items()})  # type: ignore[misc]
    shards = f"whole shards of {ROWS * TOKENS * DIM / 1e6:.0f} MB"
    rows = [
        Row(shards, whole["service"], "MB/s", whole["nginx"], "tuned nginx", goal=Goal(0.9)),
        Row(shards, whole["service"], "MB/s", whole["FileResponse"], "Starlette's FileResponse", goal=Goal(3)),
        Row("ranges of 512 KB, one process", ranges["service"], "a second", ranges["nginx"], "tuned nginx",
            goal=Goal(0.55)),
    ]  # fmt: skip
    return f"http://127.0.0.1:{ports['service']}", rows


def client_beside_httpx(url: str, path: str) -> Row:
    """Whole shards: ours checked against their checksums, httpx's not."""
    targets = statsvc.open(url).teacher("big").targets("patches")
    rows = np.arange(ROWS, 2 * ROWS)
    with httpx.Client() as client:
        seconds = alternate(
            {
                "statsvc": lambda: targets.read_stored(rows),
                "httpx": lambda: client.get(f"{url}/zarr/{path}").content,
            },
            repeats=5,
        )
    rate = {name: ROWS * TOKENS * DIM / each / 1e6 for name, each in seconds.items()}
    return Row("whole shards by our client, verified", rate["statsvc"], "MB/s", rate["httpx"], "httpx", goal=Goal(3))


def not_modified(demo: Path) -> Row:
    """GET /phis by a client that has it, of a real store."""
    what = "GET /phis answered 304"
    if not demo.exists():
        return Row(what, None, note="not measured: make run draws the store that it asks for")
    port = free_port()
    with running(serve(demo, port), port):
        url = f"http://127.0.0.1:{port}"
        name = httpx.get(f"{url}/teachers").json()["teachers"][0]["name"]
        phis = f"{url}/teachers/{name}/phis"
        etag = httpx.get(phis).headers["etag"]
        assert httpx.get(phis, headers={"if-none-match": etag}).status_code == 304
        rate = statistics.median(wrk(phis, "-H", f"If-None-Match: {etag}", connections=8)[0] for _ in range(ROUNDS))
    return Row(what, rate, "a second", goal=Goal(2000, of="ours"))


def slow_readers(store: Path, path: str) -> list[Row]:
    """Many readers that take a little at a time: does the rest of the service notice, does memory grow?"""
    port = free_port()
    with running(serve(store, port), port) as process:
        server, ending = psutil.Process(process.pid), threading.Event()
        readers = []
        for _ in range(SLOW_READERS):
            reader = socket.create_connection(("127.0.0.1", port))
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            reader.sendall(f"GET /zarr/{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            readers.append(reader)
        for reader in readers:
            reader.recv(1)  # every transfer is under way

        def read_slowly() -> None:
            while not ending.wait(0.1):
                for reader in readers:
                    reader.recv(8 << 10)

        thread = threading.Thread(target=read_slowly)
        thread.start()
        # What is mapped counts as resident once it was read, and is shared: only memory of the process' own can leak.
        worst, used = 0.0, []
        with httpx.Client() as client:
            end = time.monotonic() + SLOW_SECONDS
            while time.monotonic() < end:
                begun = time.perf_counter()
                assert client.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
                worst = max(worst, time.perf_counter() - begun)
                used.append(server.memory_full_info().uss / 1e6)
                time.sleep(0.2)
        ending.set()
        thread.join()
        for reader in readers:
            reader.close()
    quarter = len(used) // 4
    growth = statistics.median(used[-quarter:]) - statistics.median(used[quarter : 2 * quarter])
    readers_doing = f"{SLOW_READERS} slow readers for {SLOW_SECONDS} s"
    return [
        Row(f"{readers_doing}: slowest /healthz", worst * 1000, "ms", goal=Goal(100, at_most=True, of="ours")),
        Row("the same: memory at the end over that after a quarter", growth, "MB",
            goal=Goal(5, at_most=True, of="ours")),
    ]  # fmt: skip


def tables() -> list[Table]:
    title = "The service on loopback"
    if not shutil.which("nginx") or not shutil.which("wrk"):
        reason = "not measured: it needs nginx and wrk, as the system's packages have them"
        return [Table(title, (Row("everything", None, note=reason),))]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, store = Path(name), Path(name, "store")
        folder.chmod(0o755)  # nginx reads as another user
        write_store(store, [ROWS] * SHARDS, {"big": TEACHER})
        path = f"teachers/big/cache/{TEACHER.cache_set}/patches/codes/c/1/0/0"
        url, rows = bytes_beside_nginx(folder, store, path, stack)
        rows += [client_beside_httpx(url, path), not_modified(Path("demo/store")), *slow_readers(store, path)]
    return [Table(title, tuple(rows))]
