"""What the presets for new students take, by plan: ``python benchmarks/presets.py``.

No model is run: FLOPs and activations are counted on tensors without values (``tinyflux plan``),
the rest follows from formulas. Students of ``configs/one_gpu.yaml``, which have no experts, with 8
samples at once. Prints JSON.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from record import add_json_option, record

from tinyflux.config import RunConfig, parse_run_config
from tinyflux.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[1]
PRESETS, SIZES, SAMPLES = ("s", "b", "l"), (256, 512, 1024), 8
WEIGHTS_AND_MORE = ("weights", "gradients", "master", "moments", "ema", "buffers")


def run_of(name: str, size: int) -> RunConfig:
    """The run of docs/scale.md's command, with a preset and a size."""
    return parse_run_config(
        [
            f"--config={ROOT / 'configs' / 'one_gpu.yaml'}", "--stages=[]", f"--preset={name}",
            f"--data.height={size}", f"--data.width={size}", "--cluster.gpu=H100",
            f"--trainer.batch_size={SAMPLES}", "--trainer.gradient_accumulation=1",
        ]
    )  # fmt: skip


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
