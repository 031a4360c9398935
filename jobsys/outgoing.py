"""GET requests to wherever a setting or a redirect says: bounded in time and in size, and to public addresses only unless told otherwise.

Whether an address is public is decided on the very address that is connected to: a name is resolved once, and can't lead elsewhere
in between. Each redirect is a new request, judged anew. Proxies of the environment are not used: they would resolve the name themselves.
"""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import re
import socket
import ssl
import string
import time
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit

MOST_REDIRECTS = 5
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_UNICAST = ipaddress.IPv6Network("2000::/3")
_6TO4 = ipaddress.IPv6Network("2002::/16")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_OTHERS = tuple(map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24")))
"""What not every Python knows to be special: protocol assignments, and the relays of 6to4."""


class Refused(OSError):
    """A request that is not made: its address is not public, or its scheme is not allowed here."""


class Answer(NamedTuple):
    """What came back, always with a status of 2xx: the whole body, and what its header Content-Type says of it."""

    body: bytes
    content_type: str
    charset: str


def get(url: str, *, most_bytes: int, timeout: float, total: float, allow_private: bool = False) -> Answer:
    """The answer to a GET of `url`, http or https, after at most `MOST_REDIRECTS` redirects, which don't lead from https to http.

    A connection and each next part of an answer may take `timeout` seconds, all of it `total` (looking up a name counts, and takes as long
    as the system's resolver lets it). Raises OSError or http.client.HTTPException for whatever goes wrong, any other status and a body
    over `most_bytes` included. No text of these holds the path or the query.
    """
    deadline = _Deadline(timeout, total)
    for _ in range(MOST_REDIRECTS + 1):
        answer = _exchange(_checked(url), deadline, most_bytes, allow_private)
        if isinstance(answer, Answer):
            return answer
        if url[:8].lower() == "https://" and urlsplit(urljoin(url, answer)).scheme == "http":
            raise Refused("a redirect leads from https to http, and is not followed")
        url = urljoin(url, answer)
    raise OSError(f"more than {MOST_REDIRECTS} redirects")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to somebody on the public internet: not private, loopback, link-local, shared (CGNAT), multicast or
    reserved, nor IPv6 for such an IPv4 address. Raises ValueError when it is none."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _UNICAST or ip in _6TO4:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _OTHERS)


def names_private_address(url: str) -> bool:
    """Whether the host of `url` is an address that is not public, however it is written, or localhost; False for any other name."""
    host = urlsplit(url).hostname or ""
    try:
        return not is_public(host)
    except ValueError:
        pass
    if host.rstrip(".") == "localhost":
        return True
    if not re.fullmatch(r"[0-9a-fx.]+", host):
        return False
    try:
        return not is_public(socket.inet_ntoa(socket.inet_aton(host)))  # as resolvers read 2130706433, 0x7f.1 and 0177.0.0.1
    except OSError:
        return False


class _Deadline:
    def __init__(self, each: float, total: float) -> None:
        self._each, self._total = each, total
        self._end = time.monotonic() + total

    def left(self) -> float:
        """The seconds that the next step may take."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"timed out: not done after {self._total:g} s")
        return min(self._each, left)


class _Wire:
    """A connected socket as http.client uses one, every step bounded. Who opened it closes it."""

    def __init__(self, connected: socket.socket, deadline: _Deadline) -> None:
        self._socket, self._deadline = connected, deadline

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(self._deadline.left())
        self._socket.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        self.received = _Received(self._socket, self._deadline)
        return io.BufferedReader(self.received)

    def close(self) -> None:
        pass


class _Received(io.RawIOBase):
    ended = False

    def __init__(self, connected: socket.socket, deadline: _Deadline) -> None:
        self._socket, self._deadline = connected, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(self._deadline.left())
        received = self._socket.recv_into(buffer)
        self.ended = received == 0
        return received


def _checked(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in _PORTS:
        raise Refused(f'"{parts.scheme}" is not http or https')
    if not parts.hostname or "@" in parts.netloc:
        raise Refused("an address needs a host, and must not hold a user or password")
    return parts


def _exchange(url: SplitResult, deadline: _Deadline, most_bytes: int, allow_private: bool) -> Answer | str:
    """One request: its answer, or where it redirects to."""
    host, port = str(url.hostname), url.port or _PORTS[url.scheme]
    with _connected(host, port, deadline, allow_private) as plain:
        plain.settimeout(deadline.left())
        with _context().wrap_socket(plain, server_hostname=host) if url.scheme == "https" else plain as connected:
            connection = http.client.HTTPConnection(host, port)
            connection.default_port = _PORTS[url.scheme]  # which the header Host leaves out
            wire = connection.sock = _Wire(connected, deadline)
            path = quote(url.path or "/", safe=string.punctuation) + ("?" + quote(url.query, safe=string.punctuation) if url.query else "")
            headers = {"Accept": "application/json, */*;q=0.5", "User-Agent": "jobsys", "Connection": "close"}
            connection.request("GET", path, headers=headers)
            with connection.getresponse() as response:
                if wire.received.ended:  # which http.client takes for the end of the header
                    raise OSError("the answer broke off in its header")
                location = response.headers.get("Location")
                if response.status in _REDIRECTS and location is not None:
                    return location
                if not 200 <= response.status < 300:
                    raise OSError(f"HTTP {response.status} {response.reason}")
                return _read(response, most_bytes)


def _read(response: http.client.HTTPResponse, most_bytes: int) -> Answer:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":  # nothing else was asked for, and a few bytes of it may be gigabytes
        raise OSError(f'the answer has the content encoding "{encoding[:50]}", which was not asked for')
    body = response.read(most_bytes + 1)
    if len(body) > most_bytes:
        raise OSError(f"the answer is longer than {most_bytes:,} bytes")
    if response.length:  # what the announced length still lacks; read(n) says nothing of it
        raise http.client.IncompleteRead(body, response.length)
    return Answer(body, response.headers.get_content_type(), response.headers.get_content_charset("utf-8"))


def _connected(host: str, port: int, deadline: _Deadline, allow_private: bool) -> socket.socket:
    """A connection to the first address of `host` that takes one, of those that are allowed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError(f'"{host[:100]}" is not the name of a host') from None
    allowed = [each for each in found if allow_private or is_public(str(each[4][0]))]
    failure: OSError = Refused(f"{host} is {found[0][4][0]}, which is not a public address" if found else f"{host} has no address")
    for family, kind, protocol, _, address in allowed:
        connecting = socket.socket(family, kind, protocol)
        try:
            connecting.settimeout(deadline.left())
            connecting.connect(address)
            return connecting
        except OSError as error:
            failure = error
            connecting.close()
        except BaseException:
            connecting.close()
            raise
    raise failure


@functools.lru_cache(maxsize=1)
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()
