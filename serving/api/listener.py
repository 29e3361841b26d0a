"""The socket that a server will answer at. Apart, so that it is taken before torch comes in."""

import socket

from registry.errors import WardrobeError
from serving.api.settings import ServerSettings


class PortUnavailable(WardrobeError):
    code = "port_unavailable"


def listen(settings: ServerSettings) -> socket.socket:
    """Return a bound socket, before anything that takes long or leaves a trace.

    Raises PortUnavailable.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off; else every answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise PortUnavailable(
            f"Port {settings.port} of {settings.host} cannot be listened on: {error.strerror}. "
            "Use another --port, or --port 0 for a free one."
        ) from error
    return listener
