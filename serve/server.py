"""Run a uvicorn server that answers all accepted requests before it stops.

Main entry: `Server(app, service)`.

- `service`: the `Service` of `serve/api.py` that counts the accepted requests of `app`.
- `app`: the ASGI application, `Guard(make_app(service), service, key)`, with `make_app()` of
  `serve/api.py` and `Guard` of `serve/guard.py`; `key` is the API key, "" for none.

Its `run(sockets=[...])` (of uvicorn) takes the sockets to listen on. After SIGTERM or Ctrl-C it
refuses new images (status 503), sends the answers to all accepted requests, and returns nothing.
The caller then calls `service.close()`. A second signal stops the server at once and sets its
`force_exit` to True.

`bound_socket(host, port)` takes a host name or IP address and a port (0: any free one) and returns
a socket for `run()`. It raises ValueError for a port outside 0 to 65535, and OSError if the host is
unknown, or the address is in use or not of this machine. `handle_exit()` is called by uvicorn at a
signal.
"""

import errno
import signal
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

import console
from serve.api import Service


class Server(uvicorn.Server):
    """uvicorn server that stops on SIGTERM or Ctrl-C after all accepted requests were answered.

    Until then it still listens, and `/readyz` answers 503. A second signal stops it at once.
    """

    def __init__(self, app: ASGIApp, service: Service):
        config = uvicorn.Config(
            app, http="h11", ws="none", loop="asyncio", lifespan="off", log_config=None,
            log_level="error", access_log=False, server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=5,
        )  # fmt: skip
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen and log the address."""
        await super().startup(sockets)
        for sock in sockets or []:
            host, port = sock.getsockname()[:2]
            console.log.info("listening on %s", console.address(host, port))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Start stopping on the first signal; stop at once on the second."""
        if self.service.stopping:
            self.should_exit = self.force_exit = True
            return
        self.service.stopping = True
        console.log.info("%s: answering accepted requests, then stop", signal.Signals(sig).name)

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server must stop; uvicorn calls this every 0.1 s."""
        if self.service.stopping and not self.service.in_flight:
            self.should_exit = True
        return await super().on_tick(counter)


def bound_socket(host: str, port: int) -> socket.socket:
    """Bind a socket to the address; clients cannot connect before the server listens.

    Raises:
        ValueError: the port is outside 0 to 65535.
        OSError: the address does not belong to this machine, or is in use.
    """
    if not 0 <= port <= 65535:  # the resolver would use port % 65536
        raise ValueError(f"there is no port {port}; use 0 to 65535, where 0 takes any free one")
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise OSError(
            f"port {port} of {host} is in use; name another with --port (0 takes any free one)"
        ) from error
    return sock
