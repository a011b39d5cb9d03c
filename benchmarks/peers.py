"""The training step against diffusers' FLUX transformer: ``python benchmarks/peers.py``.

Forward, mean squared error of the velocity, backward, clipping and ``torch.optim.AdamW`` (fused) of
models of one width and depth, in fp32, on the same pictures' latents, captions, noise and times:

- ``flux``: ``FluxTransformer2DModel``, eager; the others are measured against it;
- ``ours``: the default model in this size, its predictors of Lune and Sol included;
- ``ours_compiled``: the same with its blocks compiled, as ``trainer.compile_mode`` has it;
- ``ours_trunk``: no predictors, and what FLUX has: norms of queries and keys, a gate on the single
  blocks' MLP, text projections of each block's own;
- ``ours_patch_2``: ``ours`` with a quarter of the tokens, also measured against ``ours``.

All take turns, each round in another order, because a shared machine's speed drifts. A round's
ratio is the quotient of two models' seconds in it; the mean of its logarithm over the rounds has a
paired 95% t-interval. One thread is timed by the processor's seconds of this process, which other
work on the machine hardly changes, and several by the clock. Prints JSON; progress goes to stderr.
"""

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from record import add_json_option, record
from torch import Tensor, nn

from tinyflux.compare.analysis import subtract
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import pack_latents, token_grid
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.engine import prepare_model
from tinyflux.util.predictions import flow_velocity, flow_x_t

HEAD, AXES = 64, (16, 24, 24)
CHANNELS, TEXT_WIDTH, POOLED_WIDTH = 16, 768, 768
AGAINST = [
    ("ours", "flux"),
    ("ours_compiled", "flux"),
    ("ours_trunk", "flux"),
    ("ours_patch_2", "flux"),
    ("ours_patch_2", "ours"),
]
TRUNK: dict[str, Any] = {
    "use_lune_expert": False, "use_sol_prior": False, "use_t5_vec": False, "qk_norm": True,
    "gated_single_mlp": True, "use_cross_attention_sharing": False, "time_scale": 1000.0,
}  # fmt: skip
Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Step:
    """A model's optimizer step on the same batch again and again.

    Args:
        velocity: of noised tokens ``[B, N, C]``, text ``[B, L, D]``, pooled ``[B, P]`` and times
            ``[B]``.
        patch: side of a token in latents.
    """

    def __init__(
        self, model: nn.Module, velocity: Velocity, batch: Mapping[str, Tensor], patch: int
    ):
        self.model, self._velocity = model.train(), velocity
        noised = flow_x_t(batch["latents"], batch["noise"], batch["t"])
        self._inputs = (pack_latents(noised, patch), batch["text"], batch["pooled"], batch["t"])
        self._target = pack_latents(flow_velocity(batch["latents"], batch["noise"]), patch)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> float:
        """Take the step; its seconds."""
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        loss = nn.functional.mse_loss(self._velocity(*self._inputs), self._target)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return clock() - started


def flux(options: argparse.Namespace, batch: Mapping[str, Tensor]) -> Step:
    """FLUX's transformer as diffusers has it, with a token a latent."""
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=options.double,
        num_single_layers=options.single,
        attention_head_dim=HEAD,
        num_attention_heads=options.width // HEAD,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        axes_dims_rope=AXES,
    )
    places = TinyFluxDeep.create_img_ids(1, options.side, options.side)[0]
    no_place = torch.zeros(options.text_tokens, 3)

    def velocity(tokens: Tensor, text: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
        found: Tensor = model(
            tokens, text, pooled, t, img_ids=places, txt_ids=no_place, return_dict=False
        )[0]
        return found

    return Step(model, velocity, batch, patch=1)


def ours(
    options: argparse.Namespace,
    batch: Mapping[str, Tensor],
    compile_mode: str | None = None,
    **settings: Any,
) -> Step:
    """The student with ``settings`` of its config, compiled as a run would."""
    config = TinyFluxConfig(
        hidden_size=options.width,
        num_attention_heads=options.width // HEAD,
        attention_head_dim=HEAD,
        num_double_layers=options.double,
        num_single_layers=options.single,
        axes_dims_rope=AXES,
        in_channels=CHANNELS,
        t5_hidden_size=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        **settings,
    )
    trainer = TrainerConfig(dtype=torch.float32, compile_mode=compile_mode)
    model = prepare_model(TinyFluxDeep(config), trainer)
    grid = token_grid(options.side, options.side, config.patch_size)
    places = TinyFluxDeep.create_img_ids(options.batch_size, *grid)

    def velocity(tokens: Tensor, text: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
        found: Tensor = model(tokens, text, pooled, t, places, grid=grid)
        return found

    return Step(model, velocity, batch, config.patch_size)


def batch_of(options: argparse.Namespace) -> dict[str, Tensor]:
    """What all models are trained on."""
    size, side = options.batch_size, options.side
    return {
        "latents": torch.randn(size, CHANNELS, side, side),
        "noise": torch.randn(size, CHANNELS, side, side),
        "t": torch.rand(size),
        "text": torch.randn(size, options.text_tokens, TEXT_WIDTH),
        "pooled": torch.randn(size, POOLED_WIDTH),
    }


def ratio(faster: Sequence[float], than: Sequence[float]) -> dict[str, Any]:
    """How many samples the first makes for one of the other's, with the paired interval."""
    difference = subtract([math.log(one) for one in than], [math.log(one) for one in faster])
    mean, half = difference.mean, difference.half_width
    assert mean is not None
    assert half is not None  # two rounds and more have an interval
    return {
        "ratio": round(math.exp(mean), 3),
        "interval": [round(math.exp(mean - half), 3), round(math.exp(mean + half), 3)],
    }


def measure(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each model's step in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    shuffler = random.Random(0)
    for number in range(rounds):
        for name in shuffler.sample(list(steps), len(steps)):
            seconds[name].append(steps[name]())
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256, help=f"a multiple of {HEAD}")
    parser.add_argument("--double", type=int, default=4, help="blocks with text and image apart")
    parser.add_argument("--single", type=int, default=8, help="blocks over one sequence")
    parser.add_argument("--side", type=int, default=16, help="of a picture, in latents; even")
    parser.add_argument("--text-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help="two or more")
    parser.add_argument("--no-compile", action="store_true", help="leave ours_compiled out")
    add_json_option(parser)
    options = parser.parse_args()
    if options.rounds < 2 or options.width % HEAD or options.side % 2:
        parser.error(f"--rounds is at least 2, --width a multiple of {HEAD}, --side even")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    batch = batch_of(options)
    steps = {
        "flux": flux(options, batch),
        "ours": ours(options, batch),
        "ours_trunk": ours(options, batch, **TRUNK),
        "ours_patch_2": ours(options, batch, patch_size=2),
    }
    if not options.no_compile:
        steps["ours_compiled"] = ours(options, batch, compile_mode="default")
    for name, step in steps.items():  # compilations, and memory that is asked for once
        print(f"{name}: {step():.2f} s for the first step", file=sys.stderr, flush=True)
        step()
    seconds = measure(steps, options.rounds)
    result = {
        "width": options.width,
        "blocks": [options.double, options.single],
        "image_tokens_at_patch_1": options.side**2,
        "text_tokens": options.text_tokens,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "rounds": options.rounds,
        "parameters": {
            name: sum(parameter.numel() for parameter in step.model.parameters())
            for name, step in steps.items()
        },
        "samples_per_s": {
            name: round(options.batch_size / statistics.median(each), 3)
            for name, each in seconds.items()
        },
        "ratios": {
            f"{name} to {other}": ratio(seconds[name], seconds[other])
            for name, other in AGAINST
            if name in steps
        },
    }
    record(result, options.json)


if __name__ == "__main__":
    main()
