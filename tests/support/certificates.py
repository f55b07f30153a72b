"""Self-signed certificates for servers of the tests."""

from __future__ import annotations

import ssl
import subprocess
from http.server import ThreadingHTTPServer
from pathlib import Path


def self_signed(folder: Path, *names: str) -> Path:
    """A key and a certificate for such names, as in DNS:localhost or IP:127.0.0.1, in one file.

    The certificate alone, for those who are to trust it, is beside it with the ending .crt.
    """
    path = folder / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", f"subjectAltName={','.join(names)}", "-keyout", path, "-out", f"{path}.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def make_secure(server: ThreadingHTTPServer, certificate: Path) -> None:
    """Have a server speak TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
