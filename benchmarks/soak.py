"""Mixed load on the engine for a long time: ``python benchmarks/soak.py --minutes 10``.

``--clients`` each send one request after the other: mixed steps, sizes, solvers, guidance, previews
and prompts (more than the prompt cache holds); one in ten is cancelled on its way. At the end every
request must have been answered, with a picture or, if it was cancelled, with its error, and the
process's memory must be flat: the slope of its resident size over the second half of the time, when
caches are full, is below ``--slope`` MiB a minute. Figures are of this process, threads included.

Prints JSON, and ends with status 1 if something was wrong; progress goes to stderr.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import torch

from tinyflux.errors import ServingError, TinyFluxError
from tinyflux.inference.engine import ImageEngine
from tinyflux.inference.events import Drawn
from tinyflux.inference.request import SampleRequest
from tinyflux.inference.solvers import SOLVERS
from tinyflux.model.config import ZooConfig, preset
from tinyflux.model.loader import save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine
from tinyflux.toy.world import SHIPPED

THINGS = ("red apple", "blue square", "green heart", "sunflower", "pizza", "purple circle")


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


async def soak(engine: ImageEngine, minutes: float, clients: int) -> dict[str, object]:
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slope", type=float, default=2.0, help="MiB a minute that is flat")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory(prefix="tinyflux-") as folder, redirect_stdout(sys.stderr):
        torch.manual_seed(0)
        checkpoint = str(save_model(TinyFluxDeep(preset("toy")), Path(folder) / "model"))
        world = str(SHIPPED)
        zoo = ZooConfig(world, f"{world}/t5", f"{world}/clip", world, world, "cpu")
        engine = open_engine(ServeConfig(checkpoint=checkpoint, prompt_cache=64), zoo)
        found = asyncio.run(soak(engine, arguments.minutes, arguments.clients))
        left = engine.stats()
        engine.close()
    flat = float(str(found["slope_mib_per_minute"])) < arguments.slope
    idle = left["queue_length"] == left["batch_size"] == 0
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        **found,
        "memory_flat": flat,
        "ok": bool(found["ok"]) and flat and idle,
    }
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
