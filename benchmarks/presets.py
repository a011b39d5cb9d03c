"""What the presets for new students take, by plan: ``python benchmarks/presets.py``.

No model is run: FLOPs and activations are counted on tensors without values (``tinyflux plan``),
the rest follows from formulas. Students without experts, in bfloat16, 8 samples at once, on one
worker at ZeRO 1. Prints JSON.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch
from record import add_json_option, record

from tinyflux.config import RunConfig
from tinyflux.distributed.config import ClusterConfig, WorkersConfig
from tinyflux.model.config import preset
from tinyflux.plan.plan import make_plan

PRESETS, SIZES, SAMPLES = ("s", "b", "l"), (256, 512, 1024), 8
WEIGHTS_AND_MORE = ("weights", "gradients", "master", "moments", "ema", "buffers")


def run_of(name: str, size: int) -> RunConfig:
    """A run of the preset on the published encoders' features."""
    run = RunConfig(model=replace(preset(name), use_lune_expert=False, use_sol_prior=False))
    run.data.height = run.data.width = size
    run.trainer = replace(
        run.trainer, dtype=torch.bfloat16, batch_size=SAMPLES, gradient_accumulation=1,
        enable_lune=False, enable_sol=False, total_steps=1000,
    )  # fmt: skip
    run.workers = WorkersConfig(zero_stage=1)
    run.cluster = ClusterConfig(gpu="H100")
    return run


def figures(name: str) -> dict[str, Any]:
    """A preset's, at each size."""
    flops, activations = {}, {}
    for size in SIZES:
        training = make_plan(run_of(name, size)).training
        memory = training.memory[1]
        flops[size] = training.flops_per_sample
        activations[size] = memory["activations"] / SAMPLES
        print(name, size, f"{flops[size]:.4g}", file=sys.stderr, flush=True)
    return {
        "parameters": training.parameters,
        "flops": flops,
        "activation_bytes": activations,
        "state_bytes": sum(memory.get(kind, 0) for kind in WEIGHTS_AND_MORE),
        "checkpoint_bytes": training.checkpoint_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_json_option(parser)
    arguments = parser.parse_args()
    record({"presets": {name: figures(name) for name in PRESETS}}, arguments.json)


if __name__ == "__main__":
    main()
