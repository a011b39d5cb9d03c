"""Real DeepSpeed on real process groups, without Ray: every ZeRO stage trains like plain torch.

Slow: seven processes import torch and DeepSpeed, and train some 190 times four steps.
"""

import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.fixtures.students import MODEL, make_batch
from tinyflux.data.batches import StepData
from tinyflux.errors import ConfigError
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.align_config import AlignConfig
from tinyflux.trainer.checkpoint import (
    CheckpointData,
    load_checkpoint,
    save_checkpoint,
)
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.loop import TrainLoop
from tinyflux.trainer.power_ema import PowerEMA
from tinyflux.trainer.projectors import load_projectors, with_projectors
from tinyflux.util.buckets import default_buckets

pytest.importorskip("deepspeed")

from tinyflux.data.order import cut
from tinyflux.distributed.deepspeed import DeepSpeedEngine, check_zero

pytestmark = pytest.mark.slow
STEPS, BATCH = 4, 6
ULPS = 2.5e-7  # two roundings of a weight just above 1, as the norms' are
CONFIG = TrainerConfig(
    learning_rate=1e-3,
    warmup_steps=2,
    total_steps=2 * STEPS,
    ema_decay=0.9,
    dtype=torch.float32,
    gradient_accumulation=1,
    save_every_steps=None,
    sample_every=None,
)

# Two groups of parameters, which ZeRO shards each for itself.
DECAY = {"decay_matrices_only": True, "weight_decay": 0.5}
# One of which ends in the middle of the first steps, the other in the middle of those after them.
# Their gradients are large enough to be clipped, by norms that are added up in other orders.
ALIGN = {
    "grad_clip": 0.0,
    "align": [
        AlignConfig("latents", 1, stop=0.25),
        AlignConfig("latents", 2, projector="conv", loss="smooth_l1", stop=0.75),
    ],
}
# A hundredth of a step, where gradients are added up in another order: AdamW makes much of the
# roundings of those that are near its epsilon, as with blocks that begin as identities.
ALIGN_CLOSE = 1e-5


def settings(arm):
    return replace(CONFIG, **arm.get("settings", {}))


def batch_at(step):
    batch = make_batch(BATCH, seed=step)
    batch.positions += step * BATCH
    return batch


def build(arm, checkpoint):
    torch.manual_seed(0)
    model = TinyFluxDeep(replace(MODEL, sol_standardize=True))  # has buffers, too
    known = make_batch(32, seed=99)
    model.sol_units.measure(known.sol_stats, known.sol_spatial, default_buckets())
    if arm.get("frozen"):
        for parameter in model.double_blocks[0].parameters():
            parameter.requires_grad_(False)
    if checkpoint is not None:
        checkpoint.check(model)
        checkpoint.load_model(model)
    config = settings(arm)
    module = with_projectors(model, config)
    if checkpoint is not None:
        load_projectors(module, checkpoint.projectors, str(checkpoint.path))
    if "stage" not in arm:
        return TorchEngine(module, config)
    return DeepSpeedEngine(module, config, arm["stage"], arm.get("offload", False))


def worker(rank, world, port, arms, folder):
    """Train every arm; each continues from the checkpoint that it names."""
    os.environ.update(
        DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
        WORLD_SIZE=str(world), LOCAL_RANK=str(rank), TORCH_EXTENSIONS_DIR=str(folder / "compiled"),
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for name, arm in arms.items():
        start = arm.get("from")
        checkpoint = None if start is None else load_checkpoint(folder / start)
        engine = build(arm, checkpoint)
        ema, state = EMA(engine.shard(), CONFIG.ema_decay), TrainerState()
        power_ema = PowerEMA(engine.shard(), [0.1])
        if checkpoint is not None:
            state = checkpoint.state
            shadow = dict(engine.split(checkpoint.shadow))
            ema.load_state_dict({"decay": CONFIG.ema_decay, "shadow": shadow})
            tracks = checkpoint.tracks.items()
            power_ema.load({length: dict(engine.split(track)) for length, track in tracks}, start)
            engine.load_optimizer_state(checkpoint.optimizer)
        loop = TrainLoop(
            engine, settings(arm), state, ema, None, default_buckets(), power_ema=power_ema
        )
        for step in range(state.step, state.step + STEPS):
            whole = batch_at(step)
            mine = cut(range(BATCH), world)[rank]
            parts = [
                whole[p.start : p.stop] for p in cut(mine, arm.get("accumulate", 1))
            ]  # fmt: skip
            seen = (step + 1) * BATCH
            item = StepData([part for part in parts if len(part)], seen, 0, 0, BATCH)
            loop.step(item)
            state.step += 1
        weights, shadow = loop.whole_weights()
        tracks = loop.whole_tracks(weights)
        optimizer, projectors = engine.optimizer_state(), engine.projectors()
        if rank == 0:
            contents = CheckpointData(
                engine.model, weights, shadow, ema.decay, optimizer, state, tracks, projectors
            )
            save_checkpoint(folder / name, contents)
    dist.destroy_process_group()


def run(folder, world, arms):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (world, port, arms, folder), nprocs=world)


def assert_same(folder, names, close):
    first = load_checkpoint(folder / names[0])
    for name in names[1:]:
        other = load_checkpoint(folder / name)
        for kind in ("model", "shadow", "optimizer", "tracks", "projectors"):
            torch.testing.assert_close(
                getattr(other, kind), getattr(first, kind), rtol=0, atol=close, msg=f"{name} {kind}"
            )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of every arm, trained by one and by two processes."""
    folder = tmp_path_factory.mktemp("zero")
    arms = {"torch": {}}
    arms |= {f"zero{stage}": {"stage": stage} for stage in range(4)}
    arms |= {f"offload{stage}": {"stage": stage, "offload": True} for stage in (1, 2, 3)}
    arms |= {f"frozen{stage}": {"stage": stage, "frozen": True} for stage in (2, 3)}
    arms["frozen-torch"] = {"frozen": True}
    arms["accumulated3"] = {"stage": 3, "accumulate": 2}
    arms["decayed-torch"] = {"settings": DECAY}
    arms |= {f"decayed{stage}": {"stage": stage, "settings": DECAY} for stage in range(4)}
    arms["decayed-offload2"] = {"stage": 2, "offload": True, "settings": DECAY}
    arms["aligned-torch"] = {"settings": ALIGN}
    arms |= {f"aligned{stage}": {"stage": stage, "settings": ALIGN} for stage in range(4)}
    arms["aligned-accumulated3"] = {"stage": 3, "accumulate": 2, "settings": ALIGN}
    run(folder, 1, {f"one-{name}": arm for name, arm in arms.items()})
    run(folder, 2, {f"two-{name}": arm for name, arm in arms.items()})
    return folder


@pytest.mark.parametrize("world", ["one", "two"])
def test_every_stage_trains_like_plain_torch(trained, world):
    names = ["torch", *(f"zero{stage}" for stage in range(4))]
    names += [f"offload{stage}" for stage in (1, 2, 3)]
    assert_same(trained, [f"{world}-{name}" for name in names], ULPS)
    assert_same(trained, [f"{world}-frozen-torch", f"{world}-frozen2", f"{world}-frozen3"], ULPS)
    assert_same(trained, [f"{world}-torch", f"{world}-accumulated3"], 1e-6)
    decayed = ["decayed-torch", "decayed-offload2", *(f"decayed{stage}" for stage in range(4))]
    assert_same(trained, [f"{world}-{name}" for name in decayed], ULPS)
    spared, everything = (
        load_checkpoint(trained / f"{world}-{name}").model for name in ("decayed2", "torch")
    )
    assert not torch.equal(spared["img_in.weight"], everything["img_in.weight"])
    aligned = ["aligned-torch", *(f"aligned{stage}" for stage in range(3))]
    assert_same(trained, [f"{world}-{name}" for name in aligned], ULPS)
    # Stage 3 adds up the gradients of a block's tokens, which two modules read, in another order.
    for name in ("aligned3", "aligned-accumulated3"):
        assert_same(trained, [f"{world}-aligned-torch", f"{world}-{name}"], ALIGN_CLOSE)
    beside = load_checkpoint(trained / f"{world}-aligned3")
    assert len(beside.projectors) == 8
    assert beside.model.keys() == everything.keys() == beside.shadow.keys()
    assert not torch.equal(beside.model["img_in.weight"], everything["img_in.weight"])


def test_nothing_is_compiled_at_the_start(trained):
    # Torch compiles under a lock file: a worker killed there would leave it, and block the others.
    assert not (trained / "compiled").exists()


def test_two_workers_train_like_one(trained):
    for name in ("torch", "zero1", "zero2", "zero3", "frozen3"):
        assert_same(trained, [f"one-{name}", f"two-{name}"], 1e-6)
    for name in ("aligned-torch", "aligned3"):
        assert_same(trained, [f"one-{name}", f"two-{name}"], ALIGN_CLOSE)


def test_a_checkpoint_of_any_stage_continues_at_any_stage_and_size(trained):
    ways = [("torch", {})]
    ways += [(f"zero{stage}", {"stage": stage}) for stage in range(4)]
    starts = ["two-zero1", "two-zero2", "two-zero3", "one-zero3"]
    arms = {f"{start}-as-{name}": {**arm, "from": start} for start in starts for name, arm in ways}
    decayed = {
        f"decayed-as-{name}": {**arm, "from": "two-decayed3", "settings": DECAY}
        for name, arm in ways
    }
    aligned = {
        f"aligned-as-{name}": {**arm, "from": "two-aligned3", "settings": ALIGN}
        for name, arm in ways
    }
    arms |= decayed | aligned
    run(trained, 1, {f"{name}-on-one": arm for name, arm in arms.items()})
    run(trained, 3, {f"{name}-on-three": arm for name, arm in arms.items()})
    names = [f"{name}-on-{size}" for name in arms for size in ("one", "three")]
    assert load_checkpoint(trained / names[0]).state.step == 2 * STEPS
    kinds = {"decayed": 2e-6, "aligned": ALIGN_CLOSE}
    assert_same(trained, [name for name in names if not name.startswith(tuple(kinds))], 2e-6)
    for kind, close in kinds.items():
        assert_same(trained, [name for name in names if name.startswith(kind)], close)


def test_what_cannot_be_sharded_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match="0, 1, 2 or 3, not 4"):
        check_zero(CONFIG, 4)
    with pytest.raises(ConfigError, match=r"offload needs workers\.zero_stage 1, 2 or 3"):
        check_zero(CONFIG, 0, offload=True)
    with pytest.raises(ConfigError, match="adafactor"):
        check_zero(replace(CONFIG, optimizer="adafactor"), 2)
