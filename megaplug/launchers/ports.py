"""The port at which the ranks meet: bound here, before anything is started, and handed over open."""

from __future__ import annotations

import errno
import socket

from megaplug.errors import UserError

_FREE = "leave launch.master_port out (null) and a free one is found"
_ANOTHER = "take another, the same on every node"


def listen(address: str, port: int | None, *, everywhere: bool = False) -> socket.socket:
    """Bind and listen, so that nobody else can take the port before rank 0 does.

    Args:
        address: An address or name of this machine.
        port: The port; None for any free one.
        everywhere: At all addresses of this machine: others may know it by another one.

    Raises:
        UserError: If the port is in use or the address is not this machine's.
    """
    if port is not None and not 0 < port < 65536:
        raise UserError(f"launch.master_port: {port} is not a port (1 to 65535)", hint=_FREE)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port or 0, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(
            f"launch.master_addr: {address!r} is not known here: {error.args[-1]}",
            hint="for ranks on this machine alone leave it at 127.0.0.1",
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        # Without it the port of a run that has just ended would be refused for a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if everywhere:
            with socket.socket(family, kind, protocol) as own:
                own.bind((place[0], 0))
            place = ("::" if family == socket.AF_INET6 else "0.0.0.0", *place[1:])
        listener.bind(place)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise _refused(address, port, error, _ANOTHER if everywhere else _FREE) from error
    return listener


def _refused(address: str, port: int | None, error: OSError, hint: str) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"launch.master_port: port {port} of {address} is in use", hint=hint)
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(
            f"launch.master_addr: {address} is not an address of this machine",
            hint="for ranks on this machine alone leave it at 127.0.0.1; of nodes it is that of node 0",
        )
    if error.errno == errno.EACCES:
        return UserError(
            f"launch.master_port: port {port} needs privileges", hint=f"take one above 1023, or {hint}"
        )
    return UserError(f"cannot listen at {address}:{port}: {error.strerror}")
