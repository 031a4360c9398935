"""Who asks: the token's subject, else the address it asks from."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import falcon

from jobsys.settings import Settings

Address = IPv4Address | IPv6Address


def client(req: falcon.Request, settings: Settings) -> str:
    """`user <name>` of whoever came through the door, else `address <address>`: no name can be taken for an address."""
    user = req.context.user
    if user is None:
        return f"address {address(req, settings)}"
    if len(user) > 200 or not user.isprintable():
        return f"user {hashlib.sha256(user.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return f"user {user}"


def address(req: falcon.Request, settings: Settings) -> str:
    """The address of the client, IPv6 as its network of 64 bits: whoever has one address of these has them all.

    It is the peer's; where the peer is one of TRUSTED_PROXIES, the last one in X-Forwarded-For that is not. Whatever stands before that,
    or comes from anybody else, may have been made up.
    """
    peer = req.remote_addr
    trusted = settings.trusted_proxies
    if not trusted or not (forwarded := req.get_header("X-Forwarded-For")):
        return _shown(peer, _parsed(peer))
    nearest = _parsed(peer)
    while nearest is not None and any(nearest in network for network in trusted):
        forwarded, _, last = forwarded.rpartition(",")
        before = _parsed(last)
        # What a proxy doesn't know ("unknown") or doesn't say is counted as its own.
        if before is None:
            break
        nearest = before
    return _shown(peer, nearest)


@lru_cache(maxsize=1024)
def _shown(peer: str, known: Address | None) -> str:
    if known is None:
        return peer or "unknown"
    return str(IPv6Network((int(known) >> 64 << 64, 64))) if isinstance(known, IPv6Address) else str(known)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Address | None:
    """The address in `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]` or `[2001:db8::1]:80`; IPv4 mapped into IPv6 is IPv4."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        known = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return known.ipv4_mapped or known if isinstance(known, IPv6Address) else known
