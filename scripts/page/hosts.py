"""Requests to the demo page: only those that a page of this address has sent.

A page of another site, open in the browser of somebody who runs the demo page, could send requests to it, and read
the answers by letting its own name point to 127.0.0.1 (DNS rebinding). Such requests have the other site's name in
`Host` or `Origin`.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class HostCheck:
    """An ASGI middleware that refuses requests for, or from pages of, other names.

    Args:
        app: what answers the other requests.
        names: accepted hosts, without ports.
        any_address: whether every address of numbers is accepted, which no other site can have as its name.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], names: Iterable[str], any_address: bool) -> None:
        self.app, self.names, self.any_address = app, frozenset(name.lower() for name in names), any_address

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it with status 421 (misdirected)."""
        if scope["type"] not in ("http", "websocket") or self._accepts(scope["headers"]):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = b"This page answers requests to its own address only; see --allowed_hosts of scripts/demo_page.py."
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 421, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _accepts(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        hosts = [f"//{value.decode('latin-1')}" for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        return len(hosts) == 1 and all(map(self._is_own, hosts + origins))

    def _is_own(self, url: str) -> bool:
        try:
            name = urlsplit(url).hostname or ""
        except ValueError:  # an address that cannot be
            return False
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_address


def list_names(host: str, allowed: Iterable[str]) -> tuple[set[str], bool]:
    """Return the names by which a page may be opened, and whether it may be by any address of numbers.

    Args:
        host: that the page listens to.
        allowed: further names.
    """
    names = {*LOOPBACK, host, *allowed}
    if host in LOOPBACK:
        return names, False
    return names | {socket.gethostname(), socket.getfqdn()}, True
