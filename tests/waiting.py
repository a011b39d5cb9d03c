"""Waiting for events, with deadlines that only something broken reaches."""

import os
import random
import socket
import time
from collections.abc import Callable

import httpx

# Seconds: many times what anything takes on a machine that does nothing else.
PATIENCE = 300.0 * float(os.environ.get("TINYFLUX_TEST_PATIENCE", "1"))


def wait_for(condition: Callable[[], object], seconds: float = 0, every: float = 0.1) -> None:
    """Return once ``condition`` holds, looked at ``every`` so many seconds.

    It fails after :data:`PATIENCE`, or ``seconds`` where that is more.
    """
    seconds = max(seconds, PATIENCE)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(every)


def answers(url: str) -> bool:
    """Whether a GET of ``url`` is answered with 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on.

    They are below those that the kernel gives to outgoing connections and above those that Ray
    gives to its workers, and drawn at random, so that nobody takes one before it is used.
    """
    ports: list[int] = []
    chance = random.Random()  # not the seeded one: tests run side by side
    while len(ports) < count:
        port = chance.randrange(20_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports
