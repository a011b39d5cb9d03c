"""Batching by steps against batching by requests: ``python benchmarks/serving.py``.

Contenders draw the same requests with the same toy student (random weights: they do not change
what a forward costs), on the same cores:

``steps``: :class:`~tinyflux.inference.engine.ImageEngine`.
``longest``: Ray Serve's own ``serve.batch`` around a loop that runs a batch until its longest
    request is done, with every row to the end.
``split``: ``serve.batch`` around ``Sampler.generate``, which takes one number of steps: a batch is
    split by its requests' steps and the parts run one after the other.
``single``: ``Sampler.generate``, one request at a time.

All have the engine's prompt cache and a batch of at most ``--batch``. ``mixed`` requests take 8, 28
or 50 steps, a third each; ``alike`` ones all 28 (``longest`` and ``split`` are then the same).

Saturated throughput is ``--requests`` that all come at once over the time until the last is done,
per second and per second of CPU; on a machine that others use as well the latter is the steadier.
Latency is under Poisson arrivals at ``--load`` times the throughput of the slowest contender, so
that every one sustains it (``kept_up`` says whether the last picture came soon after the last
arrival). Contenders take turns within a seed, in an order that rotates, because a shared machine's
speed drifts; a throughput's ratio is the median over seeds, a latency's is of quantiles over all
seeds. ``request_level`` is the better of ``longest`` and ``split`` in each figure.

Then guidance as one forward of two halves against two forwards, and pictures of known prompts
against pictures of new ones.

Prints JSON; progress goes to stderr.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.context import _set_internal_replica_context
from ray.serve.schema import ReplicaRank
from record import add_json_option, record
from torch import Tensor

from tinyflux.inference.engine import ImageEngine
from tinyflux.inference.events import Drawn
from tinyflux.inference.guidance import TextCondition, guided_velocity
from tinyflux.inference.prompt_cache import PromptCache
from tinyflux.inference.request import SampleRequest
from tinyflux.inference.sampler import (
    Sampler,
    initial_noise,
    sample_grid,
)
from tinyflux.inference.solvers import Trajectory
from tinyflux.model.config import ZooConfig
from tinyflux.model.loader import load_model, save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.presets import preset
from tinyflux.model.zoo import ModelZoo
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine
from tinyflux.toy.world import SHIPPED

PROMPTS = ("red apple", "blue square", "green heart", "sunflower", "pizza", "purple circle")
MIXED, ALIKE = (8, 28, 50), (28,)

Draw = Callable[[SampleRequest], Awaitable[None]]


class CachedEncoders:
    """A zoo with the engine's prompt cache before its text encoders."""

    def __init__(self, zoo: ModelZoo):
        self._prompts = PromptCache(zoo, 256, torch.device("cpu"), torch.float32)
        self.decode_latents = zoo.decode_latents
        self.downscale = zoo.downscale

    def encode_prompts_batched(self, prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        found = [self._prompts(prompt).condition for prompt in prompts]
        return torch.cat([each.t5 for each in found]), torch.cat([each.pooled for each in found])


def sampled(sampler: Sampler, requests: Sequence[SampleRequest]) -> Tensor:
    """Pictures of requests that have everything but prompt and seed in common."""
    first = requests[0]
    return sampler.generate(
        [request.prompt for request in requests],
        num_steps=first.num_steps,
        guidance_scale=first.guidance_scale,
        height=first.height // 4,
        width=first.width // 4,
        seed=[request.seed for request in requests],
        negative_prompt=first.negative_prompt,
    )


@torch.inference_mode()
def to_the_longest(sampler: Sampler, requests: Sequence[SampleRequest]) -> Tensor:
    """Pictures of requests of unlike steps, every row of the batch kept until all are done."""
    config, zoo = sampler.model.config, sampler.zoo
    cond = TextCondition(*zoo.encode_prompts_batched([request.prompt for request in requests]))
    negative = [request.negative_prompt for request in requests]
    uncond = TextCondition(*zoo.encode_prompts_batched(negative, allow_empty=True))
    guidance = torch.tensor([request.guidance_scale for request in requests])
    height, width = requests[0].height // 4, requests[0].width // 4
    seeds = [request.seed for request in requests]
    paths = [
        Trajectory(x, sample_grid(request.num_steps, config.timestep_shift).tolist())
        for x, request in zip(
            initial_noise(seeds, config.in_channels, height, width), requests, strict=True
        )
    ]
    while any(path.evaluations for path in paths):
        x = torch.stack([path.x for path in paths])
        t = torch.tensor([path.t for path in paths])
        v = guided_velocity(sampler.model, x, t, cond, uncond, guidance)
        for path, each in zip(paths, v, strict=True):
            if path.evaluations:
                path.advance(each)
    x = torch.stack([path.x for path in paths])
    return zoo.decode_latents(x, shift=config.latent_shift).float().clamp(0, 1)


def split(sampler: Sampler, requests: Sequence[SampleRequest]) -> list[Tensor]:
    """Pictures of requests of unlike steps, one call of the sampler for each number of steps."""
    pictures: dict[int, Tensor] = {}
    for steps in sorted({request.num_steps for request in requests}):
        rows = [row for row, request in enumerate(requests) if request.num_steps == steps]
        drawn = sampled(sampler, [requests[row] for row in rows])
        pictures.update(zip(rows, drawn, strict=True))
    return [pictures[row] for row in range(len(requests))]


def by_requests(
    draw: Callable[[Sampler, Sequence[SampleRequest]], Any],
    sampler: Sampler,
    batch: int,
    wait: float,
) -> Draw:
    """``serve.batch`` around ``draw``."""

    @serve.batch(max_batch_size=batch, batch_wait_timeout_s=wait)
    async def drawn(requests: list[SampleRequest]) -> list[Tensor]:
        return list(await asyncio.to_thread(draw, sampler, requests))

    async def one(request: SampleRequest) -> None:
        await drawn(request)

    return one


def by_steps(engine: ImageEngine) -> Draw:
    async def one(request: SampleRequest) -> None:
        async for event in engine.submit(request).events():
            if isinstance(event, Drawn):
                return

    return one


def one_at_a_time(sampler: Sampler) -> Draw:
    lock = asyncio.Lock()

    async def one(request: SampleRequest) -> None:
        async with lock:
            await asyncio.to_thread(sampled, sampler, [request])

    return one


def requests_of(kinds: Sequence[int], count: int, seed: int, side: int) -> list[SampleRequest]:
    """``count`` requests, as many of each kind as can be, in random order."""
    draw = random.Random(seed)
    steps = [kinds[index % len(kinds)] for index in range(count)]
    draw.shuffle(steps)
    return [
        SampleRequest(draw.choice(PROMPTS), "", number, 5.0, side, side, draw.randrange(2**31))
        for number in steps
    ]


async def flood(draw: Draw, requests: list[SampleRequest]) -> tuple[float, float]:
    """Pictures per second, and per second of CPU, when all requests come at once."""
    started, used = time.monotonic(), time.process_time()
    await asyncio.gather(*[draw(request) for request in requests])
    count = len(requests)
    return count / (time.monotonic() - started), count / (time.process_time() - used)


async def poisson(
    draw: Draw, requests: list[SampleRequest], rate: float, seed: int
) -> tuple[list[float], bool]:
    """Latencies under arrivals at ``rate`` per second, and whether the contender kept up."""
    gaps, latencies = random.Random(seed), []

    async def one(request: SampleRequest) -> None:
        started = time.monotonic()
        await draw(request)
        latencies.append(time.monotonic() - started)

    started, tasks = time.monotonic(), []
    for request in requests:
        await asyncio.sleep(gaps.expovariate(rate))
        tasks.append(asyncio.create_task(one(request)))
    arrived = time.monotonic() - started
    await asyncio.gather(*tasks)
    behind = time.monotonic() - started - arrived
    return latencies, behind < max(2 * statistics.median(latencies), arrived / 2)


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def compare(
    contenders: dict[str, Draw], kinds: Sequence[int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Throughput and latency of all contenders for requests of ``kinds`` steps."""
    names = list(contenders)
    rates: dict[str, list[float]] = defaultdict(list)
    cpu_rates: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    kept_up = dict.fromkeys(names, True)
    for name in names:
        warm = requests_of(kinds, min(arguments.batch, arguments.requests), 0, arguments.pixels)
        await asyncio.gather(*[contenders[name](request) for request in warm])
    for seed in range(arguments.seeds):
        order = names[seed % len(names) :] + names[: seed % len(names)]
        requests = requests_of(kinds, arguments.requests, seed, arguments.pixels)
        for name in order:
            rate, cpu_rate = await flood(contenders[name], requests)
            rates[name].append(rate)
            cpu_rates[name].append(cpu_rate)
            note(f"{len(kinds)} kinds, seed {seed}, {name}: {rates[name][-1]:.2f} pictures/s")
    rate = arguments.load * min(min(rates[name]) for name in names)
    count = max(int(rate * arguments.seconds), 4)
    for seed in range(arguments.seeds):
        order = names[seed % len(names) :] + names[: seed % len(names)]
        requests = requests_of(kinds, count, seed, arguments.pixels)
        for name in order:
            found, kept = await poisson(contenders[name], requests, rate, seed)
            seconds[name] += found
            kept_up[name] &= kept
            note(f"{len(kinds)} kinds, seed {seed}, {name}: p50 {statistics.median(found):.2f} s")
    rows = {
        name: {
            "pictures_per_s": round(statistics.median(rates[name]), 3),
            "pictures_per_cpu_s": round(statistics.median(cpu_rates[name]), 3),
            "p50_s": round(quantile(seconds[name], 0.5), 3),
            "p95_s": round(quantile(seconds[name], 0.95), 3),
            "kept_up": kept_up[name],
        }
        for name in names
    }

    def ratio(found: dict[str, list[float]], name: str) -> float:
        pairs = zip(found["steps"], found[name], strict=True)
        return round(statistics.median(own / other for own, other in pairs), 3)

    def against(name: str) -> dict[str, float]:
        return {
            "throughput": ratio(rates, name),
            "throughput_per_cpu_s": ratio(cpu_rates, name),
            "p50": round(float(rows[name]["p50_s"]) / float(rows["steps"]["p50_s"]), 3),
            "p95": round(float(rows[name]["p95_s"]) / float(rows["steps"]["p95_s"]), 3),
        }

    ratios = {name: against(name) for name in names if name != "steps"}
    batched = [name for name in names if name not in ("steps", "single")]
    best = {key: min(ratios[name][key] for name in batched) for key in ratios["single"]}
    return {
        "requests_per_s": round(rate, 3),
        "latencies_per_contender": len(seconds["steps"]),
        "contenders": rows,
        "steps_times_better_than": {**ratios, "request_level": best},
    }


def guidance_ratio(sampler: Sampler, pixels: int, batch: int, repeats: int) -> float:
    """Seconds of two forwards over those of one batched forward."""
    config, side = sampler.model.config, pixels // 4
    x, t = initial_noise(range(batch), config.in_channels, side, side), torch.full((batch,), 0.5)
    t5, pooled = sampler.zoo.encode_prompts_batched(["red apple"] * batch)
    cond, uncond = TextCondition(t5, pooled), TextCondition(t5 * 0, pooled * 0)
    ratios = []
    with torch.inference_mode():
        for _ in range(repeats):
            started = time.perf_counter()
            guided_velocity(sampler.model, x, t, cond, uncond, 5.0)
            between = time.perf_counter()
            v = guided_velocity(sampler.model, x, t, cond, None, 1.0)
            v_null = guided_velocity(sampler.model, x, t, uncond, None, 1.0)
            v_null + 5.0 * (v - v_null)
            ratios.append((time.perf_counter() - between) / (between - started))
    return round(statistics.median(ratios[1:]), 3)


def prompt_ratios(engine: ImageEngine, pixels: int, repeats: int) -> dict[str, float]:
    """Seconds with prompts that are new over those with prompts that are known."""
    found = {}
    for steps in (1, 8):
        ratios = []
        for index in range(repeats):
            new = SampleRequest(f"red apple {steps} {index}", "", steps, 5.0, pixels, pixels, index)
            started = time.perf_counter()
            engine.submit(new).result()
            between = time.perf_counter()
            engine.submit(new).result()
            ratios.append((between - started) / (time.perf_counter() - between))
        found[f"{steps}_steps"] = round(statistics.median(ratios[1:]), 3)
    return found


def allow_serve_batch(limit: int) -> None:
    """``serve.batch`` asks its replica for its limit of requests; here there is no replica."""
    _set_internal_replica_context(
        replica_id=ReplicaID("benchmark", DeploymentID("benchmark")),
        servable_object=lambda: None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=limit),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )


async def run(engine: ImageEngine, sampler: Sampler, arguments: argparse.Namespace) -> Any:
    batch, wait = arguments.batch, arguments.batch_wait
    contenders = {
        "steps": by_steps(engine),
        "longest": by_requests(to_the_longest, sampler, batch, wait),
        "split": by_requests(split, sampler, batch, wait),
        "single": one_at_a_time(sampler),
    }
    mixed = await compare(contenders, MIXED, arguments)
    del contenders["longest"]
    return {"mixed": mixed, "alike": await compare(contenders, ALIKE, arguments)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of arrivals, per run")
    parser.add_argument("--requests", type=int, default=24, help="of a flood")
    parser.add_argument("--load", type=float, default=0.7, help="of the slowest's throughput")
    parser.add_argument("--pixels", type=int, default=32, help="a picture's side")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batch-wait", type=float, default=0.1, help="serve.batch's, in seconds")
    parser.add_argument("--cores", type=int, default=1, help="that every contender has")
    add_json_option(parser)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: arguments.cores]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    allow_serve_batch(10 * arguments.requests)

    with tempfile.TemporaryDirectory(prefix="tinyflux-") as folder, redirect_stdout(sys.stderr):
        torch.manual_seed(0)
        checkpoint = str(save_model(TinyFluxDeep(preset("toy")), Path(folder) / "model"))
        world = str(SHIPPED)
        zoo = ZooConfig(world, f"{world}/t5", f"{world}/clip", world, world, "cpu")
        config = ServeConfig(
            checkpoint=checkpoint, max_batch=arguments.batch, max_queue=10 * arguments.requests
        )
        engine = open_engine(config, zoo)
        model = load_model(checkpoint, device="cpu", dtype=torch.float32)
        encoders = CachedEncoders(zoo.build(model.config))
        sampler = Sampler(encoders, model, device="cpu", dtype=torch.float32)
        found = asyncio.run(run(engine, sampler, arguments))
        pixels = arguments.pixels
        result = {
            "cores_used": len(cores),
            "seeds": arguments.seeds,
            "pixels": pixels,
            "batch": arguments.batch,
            **found,
            "two_forwards_over_batched_guidance": {
                f"batch_{batch}": guidance_ratio(sampler, pixels, batch, 15) for batch in (1, 4)
            },
            "new_over_known_prompts": prompt_ratios(engine, pixels, 12),
        }
        engine.close()
    record(result, arguments.json)


if __name__ == "__main__":
    main()
