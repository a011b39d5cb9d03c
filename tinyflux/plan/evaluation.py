"""What drawing and measuring an evaluation's pictures will take."""

import os
from dataclasses import dataclass

from tinyflux.config import RunConfig
from tinyflux.plan import encoders
from tinyflux.plan.cache import CachePlan, nodes_for
from tinyflux.plan.work import forward_flops
from tinyflux.util.config import dtype_name


@dataclass(frozen=True)
class EvaluationPlan:
    """``tinyflux evaluate`` of a run, its models' loading left out.

    The extractors' work is less than a hundredth of the student's, and is not counted.

    Attributes:
        origin: what the figures come from.
        pictures: drawn at most: sets may be smaller than ``evaluate.count``.
        decoded: real pictures of the cache that are decoded at most; their features stay there
            for later evaluations.
        forwards: of the student for a picture.
        flops_per_picture: of these and of the VAE's decoder.
        actors: how many there are; ``nodes`` that they need.
        seconds: that one actor takes for a picture; None if not known.
        hours: of all actors side by side; None if not known.
    """

    origin: str
    pictures: int
    decoded: int
    forwards: int
    flops_per_picture: float
    actors: int
    nodes: int
    seconds: float | None
    hours: float | None


def plan_evaluation(run: RunConfig, cache: CachePlan) -> EvaluationPlan | None:
    """Plan what the sections ``evaluate`` and ``sample`` ask for; None where that is nothing.

    Raises:
        ConfigError: the actors do not fit the cluster.
    """
    evaluate, sample = run.evaluate, run.sample
    sets = len(evaluate.cache_sets) + len(evaluate.sets)
    if not evaluate.extractors or not sets:
        return None
    nodes = nodes_for("sample", sample, run.cluster)
    forwards = sample.num_steps * (2 if sample.guidance_scale != 1 else 1)
    student = forwards * forward_flops(run.model, cache.grid)
    published = not os.path.isdir(run.zoo.vae_repo)
    decoding = encoders.DECODER.at(run.data.width * run.data.height) if published else None
    speed = run.cluster.speed(run.zoo.dtype, on_gpu=sample.gpus_per_actor > 0)
    pictures = evaluate.count * evaluate.seeds * sets
    decoded = evaluate.count * len(evaluate.cache_sets)
    seconds = hours = None
    if all(speed):
        share = min(1.0, sample.gpus_per_actor or 1.0)
        decode = decoding.seconds(speed) / share if decoding else 0.0
        seconds = student / speed.products / share + decode
        hours = (pictures * seconds + decoded * decode) / sample.num_actors / 3600
    return EvaluationPlan(
        origin=f"formulas, in {dtype_name(run.zoo.dtype)}"
        + ("" if published else ", without the VAE's decoder, which they do not know"),
        pictures=pictures,
        decoded=decoded,
        forwards=forwards,
        flops_per_picture=student + (sum(decoding) if decoding else 0.0),
        actors=sample.num_actors,
        nodes=nodes,
        seconds=seconds,
        hours=hours,
    )
