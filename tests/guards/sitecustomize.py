"""Python imports this module when a process starts, because the tests put this folder on PYTHONPATH.

An audit hook writes every network address that the process uses into the file $GRAFT_TEST_SOCKETS, one line each:
`loopback EVENT ADDRESS` or `outside EVENT ADDRESS`. It refuses the second kind. `tests/guards.py` reads the file.

Two kinds of sockets are not seen: those of a process that is started with `python -I`, which ignores PYTHONPATH (the
processes that render templates and rows), and those that a C++ library opens by itself. `strace -f -e trace=connect`
shows both. Of the second kind are torch.distributed's: ranks meet on loopback, but its store asks the machine's DNS
server for the name of 127.0.0.1.
"""

import os
import sys
from typing import Any

FILE = "GRAFT_TEST_SOCKETS"
EVENTS = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.getaddrinfo": 0,
          "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}  # fmt: skip
"""Audit event -> which of its arguments holds the address (https://docs.python.org/3/library/audit_events.html)."""


class OutsideError(OSError):
    """The tests may not use the network."""


def is_loopback(host: str | bytes | None) -> bool:
    """Whether a host name or an address stays on this machine. No name is looked up."""
    from ipaddress import ip_address

    name = host.decode() if isinstance(host, bytes) else host
    if not name or name == "localhost":  # getaddrinfo of nothing: an address to listen on
        return True
    try:
        return ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in EVENTS or FILE not in os.environ:
        return
    address = arguments[EVENTS[event]]
    if EVENTS[event] == 1:
        if address is None or not isinstance(address, tuple) or not isinstance(address[0], str):
            return  # sendmsg on a connected socket, or a socket that is no internet socket (AF_UNIX, AF_NETLINK)
        address = address[0]
    kind = "loopback" if is_loopback(address) else "outside"
    file = os.open(os.environ[FILE], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, f"{kind} {event} {address!r} in process {os.getpid()}\n".encode())
    finally:
        os.close(file)
    if kind == "outside":
        raise OutsideError(f"tests: {event} of {address!r} leaves this machine")


if not hasattr(sys, "_graft_sockets_watched"):  # a hook cannot be removed, and one is enough
    sys._graft_sockets_watched = True  # type: ignore[attr-defined]
    sys.addaudithook(watch)
