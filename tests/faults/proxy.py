"""A tracking server, and a proxy before it that fails on request."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

MODES = ("pass", "refuse", "500", "hang", "lose")
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlost"


class Proxy:
    """Forwards connections to a port of this machine.

    Attributes:
        mode: "pass"; "refuse" closes connections at once; "500" answers so; "hang" takes requests and never
            answers, of connections that are open already, too; "lose" forwards a request and closes before
            its answer.
    """

    def __init__(self, target: int) -> None:
        self.mode = "pass"
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.mode == "refuse":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                threading.Thread(target=self._forward, args=(server, client), daemon=True).start()
                while data := client.recv(2**16):
                    if self.mode == "refuse":
                        return
                    if self.mode == "500":
                        client.sendall(ERROR)
                        return
                    while self.mode == "hang":
                        time.sleep(0.05)
                    server.sendall(data)

    def _forward(self, server: socket.socket, client: socket.socket) -> None:
        """Brings answers to the client, and the end of the connection: a server closes one that is idle."""
        with contextlib.suppress(OSError):
            while data := server.recv(2**16):
                while self.mode == "hang":
                    time.sleep(0.05)
                if self.mode == "lose":
                    break
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def tracking_server(folder: Path) -> Iterator[int]:
    """Starts MLflow's server with its files in `folder`. Yields its port."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **settings}, start_new_session=True
        )
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError((folder / "server.log").read_text())
            time.sleep(0.2)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # it waits for connections that hang
        server.wait(30)
