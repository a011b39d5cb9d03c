"""An S3 server on loopback (moto's, because pip installs it), behind a wire that a test can cut."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

BUCKET = "pictures"


class Wire:
    """Passes connections on to a server; its end is what clients are told."""

    def __init__(self, port: int):
        self._server, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.carried = 0  # bytes, both ways
        self.refused = 0  # connections
        self._open: set[socket.socket] = set()
        self._dead, self._cut_at = False, float("inf")
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break what is open, and every new connection, until :meth:`mend`."""
        self._dead = True
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut_after(self, carried: int) -> None:
        """Break what is open once so many more bytes have passed; later connections work."""
        self._cut_at = self.carried + carried

    def mend(self) -> None:
        self._dead = False

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._dead:
                self.refused += 1
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._server))
            for source, target in ((client, server), (server, client)):
                self._open.add(source)
                threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**14):
                self.carried += len(data)
                if self.carried >= self._cut_at:
                    self._cut_at = float("inf")
                    self.refused += 1
                    self.cut()
                    self.mend()
                    break
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()
        self._open.discard(source)


class S3:
    """A server with one empty bucket."""

    def __init__(self, wire: Wire, port: int):
        self.wire, self._port = wire, port

    def environment(self, local: Path) -> dict[str, str]:
        """What a process needs to find it, and where it keeps its copies."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.wire.port}",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "a-secret-that-no-file-may-hold",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "TINYFLUX_LOCAL_DIR": str(local),
        }


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[S3]:
    """A server that ends with the block."""
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    wire = None
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
            assert server.poll() is None, log.read_text()
        port = int(found[1])
        address = f"http://127.0.0.1:{port}/{BUCKET}"
        urllib.request.urlopen(urllib.request.Request(address, method="PUT")).close()
        wire = Wire(port)
        yield S3(wire, port)
    finally:
        if wire is not None:
            wire.close()
        server.terminate()
        server.wait()
