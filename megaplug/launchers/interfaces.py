"""The network interface through which another machine is reached, which gloo and NCCL are told to use."""

from __future__ import annotations

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface_of(address: str) -> str | None:
    """The interface that has one of this machine's addresses, such as ``eth0``; None where none has it."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return str(name)
    return None
