"""Mixed load on the engine for a long time: ``python benchmarks/soak.py --minutes 10``.

``--clients`` each send one request after the other: mixed steps, sizes, solvers, guidance, previews
and prompts (more than the prompt cache holds); one in ten is cancelled on its way. At the end every
request must have been answered, with a picture or, if it was cancelled, with its error, and the
process's memory must be flat: the slope of its resident size over the second half of the time, when
caches are full, is below ``--slope`` MiB a minute. Figures are of this process, threads included.

``python benchmarks/soak.py --waves 16`` asks a whole server instead, with its HTTP side, for
whether clients who go away in mid-stream leave memory behind. Each wave is 200 clients who ask for
a picture with a preview of every step. Two servers, one after the other, take so many waves each:
at the first (``leaving``) all ask for 100 steps and hang up after 1 to 8 of them, at the second
(``staying``, the control) all ask for that many and read their streams to the end. All streams must
begin, and every process of both servers must level off: over the second half of the waves it grows
by less than ``--slope`` MiB a wave.

Prints JSON, and ends with status 1 if something was wrong; progress goes to stderr.
"""

import argparse
import asyncio
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
import torch
from ray import serve
from record import add_json_option, record

from tinyflux.distributed.ray_session import ensure_ray
from tinyflux.errors import ServingError, TinyFluxError
from tinyflux.inference.engine import ImageEngine
from tinyflux.inference.events import Drawn
from tinyflux.inference.request import SampleRequest
from tinyflux.inference.solvers import SOLVERS
from tinyflux.model.config import ZooConfig
from tinyflux.model.loader import save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.presets import preset
from tinyflux.serving.app import build_app
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine
from tinyflux.serving.proxy import HOOK
from tinyflux.toy.world import SHIPPED

THINGS = ("red apple", "blue square", "green heart", "sunflower", "pizza", "purple circle")
CLIENTS = 200  # of a wave
SIDE = 32  # pixels of their pictures


def random_request(draw: random.Random) -> SampleRequest:
    return SampleRequest(
        prompt=f"{draw.choice(THINGS)} {draw.randrange(40)}",
        negative_prompt=draw.choice(["", "grey"]),
        num_steps=draw.choice([4, 8, 28]),
        guidance_scale=draw.choice([1.0, 3.0, 5.0]),
        height=draw.choice([16, 32]),
        width=draw.choice([16, 32]),
        seed=draw.randrange(2**31),
        solver=draw.choice(sorted(SOLVERS)),
        preview_every=draw.choice([0, 0, 0, 4]),
    )


def resident_mib() -> float:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line through the points by least squares."""
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope


async def client(
    engine: ImageEngine, number: int, end: float, counts: Counter[str], seconds: list[float]
) -> None:
    draw = random.Random(number)
    while time.monotonic() < end:
        request, cancels = random_request(draw), draw.random() < 0.1
        started = time.monotonic()
        counts["sent"] += 1
        try:
            handle = engine.submit(request)
            async for event in handle.events():
                if isinstance(event, Drawn):
                    image = handle.result()
                    fits = image.shape == (3, request.height, request.width)
                    counts["pictures" if fits and image.isfinite().all() else "wrong"] += 1
                elif cancels:
                    handle.cancel()
        except ServingError as error:
            given_up = cancels and "cancelled" in str(error)
            counts["cancelled" if given_up else "errors"] += 1
            if not given_up:
                print(f"error: {error}", file=sys.stderr, flush=True)
        except TinyFluxError as error:
            counts["errors"] += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            seconds.append(time.monotonic() - started)


async def soak(engine: ImageEngine, minutes: float, clients: int) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    seconds: list[float] = []
    points: list[tuple[float, float]] = []
    begun = time.monotonic()
    end = begun + 60 * minutes

    async def watch() -> None:
        every = max(60 * minutes / 200, 0.5)
        while time.monotonic() < end:
            await asyncio.sleep(every)
            points.append(((time.monotonic() - begun) / 60, resident_mib()))
            if len(points) % 20 == 0:
                print(f"{points[-1][0]:.1f} min: {points[-1][1]:.0f} MiB, {dict(counts)}",
                      file=sys.stderr, flush=True)  # fmt: skip

    work = [client(engine, number, end, counts, seconds) for number in range(clients)]
    await asyncio.gather(watch(), *work)
    later = points[len(points) // 2 :]
    answered = counts["pictures"] + counts["cancelled"]
    return {
        **counts,
        "unanswered": counts["sent"] - answered - counts["wrong"] - counts["errors"],
        "p50_s": round(statistics.median(seconds), 3),
        "longest_s": round(max(seconds), 3),
        "memory_mib": {"middle": round(later[0][1], 1), "end": round(later[-1][1], 1)},
        "slope_mib_per_minute": round(slope(later), 3),
        "ok": answered == counts["sent"],
    }


def soak_engine(
    checkpoint: str, zoo: ZooConfig, minutes: float, clients: int, flat: float
) -> dict[str, Any]:
    """What :func:`soak` found; all must have ended, and nothing may be left in the engine."""
    engine = open_engine(ServeConfig(checkpoint=checkpoint, prompt_cache=64), zoo)
    found = asyncio.run(soak(engine, minutes, clients))
    left = engine.stats()
    engine.close()
    idle = left["queue_length"] == left["batch_size"] == 0
    is_flat = found["slope_mib_per_minute"] < flat
    return {
        "minutes": minutes,
        "clients": clients,
        **found,
        "memory_flat": is_flat,
        "ok": found["ok"] and is_flat and idle,
    }


def processes_mib() -> dict[str, float]:
    """Resident memory of the server's replicas and proxy, by what Ray Serve calls them."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = (child.cmdline() or [""])[0]
            # An idle one is "ray::ServeReplica:tinyflux:api"; more is around that while it works.
            if "ServeReplica:" in title or "ProxyActor" in title:
                name = title.rpartition(":")[2].partition(".")[0]
                found[name] = child.memory_info().rss / 2**20
    return found


async def stream(http: httpx.AsyncClient, seed: int, leaves: bool) -> int:
    """Read some events of a stream, which goes on or not; the answer's status."""
    events = 1 + seed % 8
    body = {
        "prompt": THINGS[seed % len(THINGS)], "num_steps": 100 if leaves else events,
        "preview_every": 1, "width": SIDE, "height": SIDE, "seed": seed,
    }  # fmt: skip
    accept = {"Accept": "text/event-stream"}
    async with http.stream("POST", "/generate", json=body, headers=accept) as answer:
        async for line in answer.aiter_lines():
            events -= line.startswith("event: step")
            if leaves and events == 0:
                break
        return answer.status_code


async def wave(url: str, clients: int, leaves: bool) -> Counter[int]:
    """So many clients, those at once that the server has room for; their answers' statuses."""
    limits = httpx.Limits(max_connections=40, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        streams = [stream(http, seed, leaves) for seed in range(clients)]
        counts = Counter(await asyncio.gather(*streams))
        while True:  # until nobody's picture is drawn any more
            await asyncio.sleep(2)  # replicas tell of themselves once a second
            (replica,) = (await http.get("/admin/replicas")).json()["replicas"]
            if replica["batch_size"] == replica["queue_length"] == 0:
                return counts


def soak_server(checkpoint: str, zoo: ZooConfig, waves: int, leaves: bool) -> dict[str, Any]:
    """A server's memory after each wave, and how many MiB a wave it grows at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ServeConfig(port=port, checkpoint=checkpoint, default_size=SIDE)
    counts: Counter[int] = Counter()
    os.environ.update(HOOK)  # as `tinyflux serve` has it
    ensure_ray()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build_app(config, zoo), name="tinyflux", route_prefix="/")
        memory = [processes_mib()]
        for number in range(waves):
            counts += asyncio.run(wave(f"http://127.0.0.1:{port}", CLIENTS, leaves))
            memory.append(processes_mib())
            print(number + 1, dict(counts), memory[-1], file=sys.stderr, flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
    later = list(enumerate(memory))[len(memory) // 2 :]
    slopes = {name: slope([(i, each[name]) for i, each in later]) for name in memory[0]}
    return {
        "statuses": counts,
        "memory_mib": {name: [round(each[name]) for each in memory] for name in slopes},
        "slope_mib_per_wave": {name: round(value, 2) for name, value in slopes.items()},
        "all_began": counts == {200: waves * CLIENTS},
    }


def soak_waves(checkpoint: str, zoo: ZooConfig, waves: int, flat: float) -> dict[str, Any]:
    """What :func:`soak_server` found with clients who stay and with those who leave."""
    found = {
        name: soak_server(checkpoint, zoo, waves, leaves)
        for name, leaves in (("leaving", True), ("staying", False))
    }
    slopes = [each["slope_mib_per_wave"] for each in found.values()]
    began = all(each["all_began"] for each in found.values())
    return {
        **found,
        "ok": began and all(value < flat for each in slopes for value in each.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--slope", type=float, default=2.0, help="MiB a minute (or a wave) that is flat"
    )
    parser.add_argument("--waves", type=int, default=0, help="of clients of a whole server")
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory(prefix="tinyflux-") as folder, redirect_stdout(sys.stderr):
        torch.manual_seed(0)
        checkpoint = str(save_model(TinyFluxDeep(preset("toy")), Path(folder) / "model"))
        world = str(SHIPPED)
        zoo = ZooConfig(world, f"{world}/t5", f"{world}/clip", world, world, "cpu")
        if arguments.waves:
            found = soak_waves(checkpoint, zoo, arguments.waves, arguments.slope)
        else:
            found = soak_engine(
                checkpoint, zoo, arguments.minutes, arguments.clients, arguments.slope
            )
    result = {
        **found,
    }
    record(result, arguments.json)
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
