"""Which network addresses a reference may be fetched from: public unicast ones, and no others.

The URL of a reference comes from outside, and a worker often stands where it can reach
what the outside cannot: metadata services, databases, its own ports. Nothing here knows
HTTP; :mod:`ourvidz_core.delivery.references` asks it about every connection it opens.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from attrs import frozen

from ourvidz_core.errors import ReferenceRefused

#: Turns a host and port into every address they stand for, as text. ``OSError`` where there is none.
Resolver = Callable[[str, int], Sequence[str]]

#: ``ipaddress`` calls some of these global, or did in a release that we support.
_CLOSED_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's wire server
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",  # 192.0.0.192 is Oracle Cloud's metadata service
        "192.0.2.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
#: All global unicast IPv6 there is so far; whatever lies outside is closed.
_OPEN_IPV6 = IPv6Network("2000::/3")
_CLOSED_IPV6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",
    )
)
_MAPPED_IPV4 = IPv6Network("::ffff:0:0/96")
#: What a network without IPv4 of its own reaches every IPv4 host by. The neighbouring
#: 64:ff9b:1::/48 is for a network's private use and stays closed.
_NAT64 = IPv6Network("64:ff9b::/96")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether ``address`` is a public unicast address, looking through those that embed an IPv4 one."""
    if isinstance(address, IPv4Address):
        return address.is_global and not any(address in network for network in _CLOSED_IPV4)
    if address.scope_id is not None:
        return False
    if address in _MAPPED_IPV4 or address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    if address not in _OPEN_IPV6 or any(address in network for network in _CLOSED_IPV6):
        return False
    return address.is_global


def resolve(host: str, port: int) -> Sequence[str]:
    """Ask the system. Decimal, octal and hexadecimal spellings end as the address that they mean."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A scope id in the last place of an IPv6 answer is part of the text as well ("fe80::1%eth0").
    return list(dict.fromkeys(str(answer[4][0]) for answer in found))


@frozen
class AddressPolicy:
    """Who may be connected to. ``allowed_hosts`` holds names and ``name:port`` pairs, in lower case."""

    allowed_hosts: frozenset[str] = frozenset()

    @classmethod
    def allowing(cls, hosts: Sequence[str]) -> AddressPolicy:
        """A policy that lets ``hosts``, each ``host`` or ``host:port``, have any address."""
        return cls(frozenset(_normal(host) for host in hosts))

    def allows_host(self, host: str, port: int) -> bool:
        """Whether the operator vouches for this host, whatever its address."""
        name = _normal(host)
        spelled = f"[{name}]" if ":" in name else name
        return name in self.allowed_hosts or f"{spelled}:{port}" in self.allowed_hosts

    def vetted(self, host: str, port: int, addresses: Sequence[str]) -> list[str]:
        """``addresses``, if a connection may go to every one of them.

        One closed address among open ones closes them all: which one a connection gets is
        the answering name server's choice, and that may be the attacker's.

        :raises ReferenceRefused: at least one is not public.
        """
        if self.allows_host(host, port):
            return list(addresses)
        for address in addresses:
            if not _is_public_text(address):
                raise ReferenceRefused(
                    f"the reference's host {host[:100]} is not on the public internet; put the image on a public "
                    f"address, or add the host to OURVIDZ_REFERENCE_ALLOWED_HOSTS"
                )
        return list(addresses)


def _is_public_text(address: str) -> bool:
    try:
        return is_public(ip_address(address))
    except ValueError:
        return False


def _normal(host: str) -> str:
    name = host.strip().lower().rstrip(".")
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name
