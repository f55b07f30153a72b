"""`statsvc serve`: the app under uvicorn, with settings for production."""

from __future__ import annotations

import logging
import resource
import signal
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from api.app import create_app
from api.middleware.protocol import Protocol
from api.settings import Settings
from statsvc.errors import NotAStore, PlanError, StatsvcError
from statsvc.store.reader import open_store

STALL_MILLISECONDS = 120_000  # a client that takes no byte for so long is gone
OPEN_FILES = 65_536  # one for each connection; many systems begin with 1024
BACKLOG = 2048  # connections that came and were not looked at yet
KEEP_ALIVE_SECONDS = 75  # longer than the idle timeout of common proxies in front


def read_settings(**given: Any) -> Settings:
    """Options that were given, else variables STATSVC_<NAME>, else defaults. Raises PlanError."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors(include_input=False)
        )
        raise PlanError(f"settings of the service: {found}") from None


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; transfers then have `grace_seconds` to end. Raises PlanError, OSError."""
    if settings.token is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
        logging.getLogger("statsvc.api").warning(
            "listening on %s without a token: everyone who reaches it may read; set STATSVC_TOKEN", settings.host
        )
    _log_to_standard_error()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, OPEN_FILES)), hard))
    server: uvicorn.Server
    app = create_app(settings, stopping=lambda: server.should_exit)
    server = uvicorn.Server(configure(app, settings))
    with listening_socket(settings.host, settings.port) as listener:
        for line in introduction(settings, listener.getsockname()[1]):
            print(line, flush=True)
        # uvicorn ends gracefully on these, and then hands them on: ended is ended, not failed.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])


def introduction(settings: Settings, port: int) -> list[str]:
    """Where the service is found, and what to try first."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    secret = " -H 'Authorization: Bearer '$STATSVC_TOKEN" if settings.token else ""
    try:
        name = next(iter(open_store(settings.store).teachers()), None)
        waiting = []
    except NotAStore:
        name, waiting = None, [f"there is no store at {settings.store} yet; it is served once `statsvc run` makes it"]
    except StatsvcError as error:
        name, waiting = None, [str(error)]
    paths = ["progress", "teachers", "readyz"]
    if name is not None:
        paths = [f"teachers/{name}/phis", f"teachers/{name}/targets?rows=0' --output 'row.npy", "zarr/zarr.json"]
    return [*waiting, f"serving on {url} until Ctrl-C; try", *(f"  curl{secret} '{url}/{path}'" for path in paths)]


def configure(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """uvicorn's settings."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=Protocol,
        ws="none",
        access_log=False,  # ours has more in it, and nothing secret
        log_config=None,
        server_header=False,
        proxy_headers=True,  # from 127.0.0.1, or FORWARDED_ALLOW_IPS
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.grace_seconds,
    )


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket whose connections end when the other side no longer answers. Raises PlanError for a taken port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit these. The kernel sees what the app cannot: a reader that stopped reading.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_MILLISECONDS)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise PlanError(f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port") from error
    return listener


def _log_to_standard_error() -> None:
    """One JSON line for each request, plain lines for the rest."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access = logging.getLogger("statsvc.access")
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    # What no format here shows is not looked up for every line: the calling function, thread and process.
    logging._srcfile = None  # as the logging HOWTO has it, under "Optimization"
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
