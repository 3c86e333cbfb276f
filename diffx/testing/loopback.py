"""A process that reaches this machine and no other: tests are told where a call wanted to go instead of hanging or passing by luck.

This file stands alone: ``LocalHub.run`` hands its text to Python as sitecustomize, which runs before anything else is imported.
"""

import sys

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def only_loopback() -> None:
    """From now on, and until the process ends, an AssertionError where it connects, sends or asks a name server beyond this machine."""
    if not getattr(sys, "_only_loopback", False):
        sys._only_loopback = True  # type: ignore[attr-defined]  # audit hooks stay, and one is enough
        sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]  # (host, port, ...) on the internet, a path on this machine, None where connect gave it
        host = address[0] if isinstance(address, tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", *LOOPBACK):
        raise AssertionError(f"a test tried to reach {host!r}; tests know only this machine")
