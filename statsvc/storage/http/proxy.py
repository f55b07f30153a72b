"""Which proxy leads to a host: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in capitals or not."""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from statsvc.errors import PlanError

PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy.

    variable  the environment variable that names it
    headers   its user and password, where it has them
    """

    variable: str
    host: str
    port: int
    headers: dict[str, str] = field(repr=False)


def proxy_for(scheme: str, host: str, port: int) -> Proxy | None:
    """The proxy for a host; None where it is reached directly.

    Raises PlanError for a proxy of a kind that is not supported. Its URL may hold a password, so it is not repeated.
    """
    proxies = getproxies()
    kind = scheme if scheme in proxies else "all"
    url = proxies.get(kind)
    if not url or _is_bypassed(host, port):
        return None
    key = f"{kind}_proxy"
    variable = max((name for name in os.environ if name.lower() == key), default=key)  # the lower case one counts
    url = url if "://" in url else f"http://{url.removeprefix('//')}"
    typed = url.partition("://")[0].lower()
    if typed != "http" and re.fullmatch("[a-z0-9+.-]{1,20}", typed):
        raise PlanError(
            f"the environment variable {variable} names a {typed}:// proxy; only http:// proxies are supported: "
            f"change it, or add {host} to NO_PROXY"
        )
    try:
        parts = urlsplit(url)
        return Proxy(variable, ascii_host(parts), parts.port or PORTS["http"], basic("Proxy-Authorization", parts))
    except ValueError as error:
        raise PlanError(
            f"the environment variable {variable} is not the URL of a proxy; it looks like http://host:3128"
        ) from error


def origin(parts: SplitResult) -> tuple[str, str, int]:
    """Scheme, host and port of a URL. Raises ValueError where it has none."""
    return parts.scheme, ascii_host(parts), parts.port or PORTS[parts.scheme]


def ascii_host(parts: SplitResult) -> str:
    """The host of a URL as DNS knows it. Raises ValueError."""
    host = parts.hostname or ""
    host = host if ":" in host else host.encode("idna").decode()
    if not re.fullmatch("[!-~]+", host):
        raise ValueError("no host")
    return host


def basic(header: str, parts: SplitResult) -> dict[str, str]:
    """The header that carries user and password of a URL; none without them."""
    if parts.username is None and parts.password is None:
        return {}
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return {header: f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _is_bypassed(host: str, port: int) -> bool:
    """Whether NO_PROXY names the host: by name, domain, host:port, address or network."""
    if proxy_bypass(f"[{host}]:{port}" if ":" in host else f"{host}:{port}"):
        return True
    with suppress(ValueError):  # a name, not an address
        address = ipaddress.ip_address(host)
        for entry in getproxies().get("no", "").split(","):
            with suppress(ValueError):
                if address in ipaddress.ip_network(entry.strip().strip("[]"), strict=False):
                    return True
    return False
