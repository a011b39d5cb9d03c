"""A picture over HTTP against one from the engine directly: ``python benchmarks/http_overhead.py``.

Both draw with the toy preset (random weights) and the toy world: the engine in this process, and
the server's in a Ray Serve replica behind its HTTP side. They take turns, picture by picture, with
the same requests, so a drifting machine slows both.

``alone`` is one caller at a time: the overhead is the difference of the medians, per picture.
``together`` is ``--callers`` of them at once: the ratio is HTTP's pictures per second over the
engine's, the median of ``--rounds`` turns.

Prints JSON; progress goes to stderr.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import httpx
import ray
import torch
from ray import serve
from record import add_json_option, record

from tinyflux.distributed.ray_session import ensure_ray
from tinyflux.inference.engine import ImageEngine
from tinyflux.inference.request import SampleRequest
from tinyflux.model.config import ZooConfig
from tinyflux.model.loader import save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.presets import preset
from tinyflux.serving.app import build_app
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine
from tinyflux.toy.world import SHIPPED

SIDE = 32  # pixels

Draw = Callable[[int, int], bytes]  # of a seed and a number of steps


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def directly(engine: ImageEngine) -> Draw:
    def draw(seed: int, steps: int) -> bytes:
        return engine.generate(SampleRequest("red apple", "", steps, 2.0, SIDE, SIDE, seed))

    return draw


def over_http(client: httpx.Client) -> Draw:
    def draw(seed: int, steps: int) -> bytes:
        body = {"prompt": "red apple", "num_steps": steps, "guidance_scale": 2.0, "seed": seed}
        answer = client.post("/generate", json={**body, "width": SIDE, "height": SIDE})
        answer.raise_for_status()
        return answer.content

    return draw


def seconds(draw: Draw, seed: int, steps: int) -> float:
    started = time.perf_counter()
    draw(seed, steps)
    return time.perf_counter() - started


def alone(engine: Draw, http: Draw, steps: int, pictures: int) -> dict[str, float]:
    """Medians of one caller, and what HTTP adds."""
    pairs = [(seconds(engine, i, steps), seconds(http, i, steps)) for i in range(pictures)]
    direct, through = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"alone, {steps} steps: {direct:.4f} s and {through:.4f} s")
    return {
        "steps": steps,
        "engine_seconds": round(direct, 4),
        "http_seconds": round(through, 4),
        "overhead_ms": round(1000 * (through - direct), 2),
        "ratio": round(through / direct, 3),
    }


def rate(draw: Draw, steps: int, pictures: int, callers: int) -> float:
    """Pictures per second."""
    with ThreadPoolExecutor(callers) as pool:
        started = time.perf_counter()
        list(pool.map(lambda seed: draw(seed, steps), range(pictures)))
        return pictures / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=40, help="per turn")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 28])
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of either engine")
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # the replica's

    world = str(SHIPPED)
    zoo = ZooConfig(world, f"{world}/t5", f"{world}/clip", world, world, "cpu", torch.float32)
    with tempfile.TemporaryDirectory(prefix="tinyflux-") as folder, redirect_stdout(sys.stderr):
        torch.manual_seed(0)
        save_model(TinyFluxDeep(preset("toy")), folder)
        config = ServeConfig(port=free_port(), checkpoint=folder)
        engine = open_engine(config, zoo)
        ensure_ray()
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(build_app(config, zoo))
        try:
            with httpx.Client(base_url=f"http://{config.host}:{config.port}", timeout=300) as http:
                contenders = directly(engine), over_http(http)
                if contenders[0](0, 4) != contenders[1](0, 4):  # also the warm-up
                    raise SystemExit("the contenders do not draw the same picture")
                single = [
                    alone(*contenders, steps, arguments.pictures) for steps in arguments.steps
                ]
                steps, turns = arguments.steps[-1], []
                for _ in range(arguments.rounds):
                    direct, through = (
                        rate(draw, steps, arguments.pictures, arguments.callers)
                        for draw in contenders
                    )
                    turns.append((direct, through))
                    print(f"together: {direct:.2f} and {through:.2f} pictures/s")
        finally:
            serve.shutdown()
            ray.shutdown()
            engine.close()

    result = {
        "threads": arguments.threads,
        "alone": single,
        "together": {
            "callers": arguments.callers,
            "steps": steps,
            "engine_pictures_per_s": [round(direct, 2) for direct, _ in turns],
            "http_pictures_per_s": [round(through, 2) for _, through in turns],
            "ratio": round(statistics.median(through / direct for direct, through in turns), 3),
        },
    }
    record(result, arguments.json)


if __name__ == "__main__":
    main()
