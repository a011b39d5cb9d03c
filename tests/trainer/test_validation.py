"""Held-out losses told apart by time, and with and without captions."""

from dataclasses import replace

import pytest
import torch

from tests.fixtures.students import make_batch, student
from tinyflux.data.batches import HeldOut
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.validation import AT_TIMES, TIMES, validate
from tinyflux.util.buckets import default_buckets

CONFIG = TrainerConfig(dtype=torch.float32, validate_times=True)
HEADS = ("velocity", "lune", "sol")


def held_out(null=True, **changes):
    batch = replace(make_batch(7), **changes)
    keys = [[f"key{row}" for row in range(4)], ["a", "b", "c"]]
    text = (torch.full((5, 24), 0.3), torch.full((12,), 0.7)) if null else None
    return HeldOut([batch[:4], batch[4:]], keys, text)


def losses(data, config=CONFIG, ema=None):
    return validate(student(), data, config, default_buckets(), ema)


def test_the_losses_at_the_times_are_parts_of_their_mean():
    found = losses(held_out())
    assert AT_TIMES[0] == "at_01_"
    assert AT_TIMES[-1] == "at_15_"
    for head in HEADS:
        for caption in ("", "_null"):
            parts = [found[f"{prefix}{head}{caption}"] for prefix in AT_TIMES]
            assert len(set(parts)) == len(TIMES)
            assert sum(parts) / len(TIMES) == pytest.approx(found[f"val_{head}{caption}"], rel=1e-5)


def test_what_no_caption_leaves_is_what_the_empty_one_gives():
    data = held_out()
    t5, pooled = data.null_text
    empty = held_out(t5_embeds=t5.expand(7, -1, -1), clip_pooled=pooled.expand(7, -1))
    found, without = losses(data), losses(empty)
    for name in ("val_velocity", "val_lune", "at_07_velocity"):
        assert found[f"{name}_null"] == pytest.approx(without[name], rel=1e-6)
        assert found[f"{name}_null"] != pytest.approx(found[name], rel=1e-4)


def test_nothing_is_told_that_is_not_asked_for_or_known():
    plain = losses(held_out(), replace(CONFIG, validate_times=False))
    assert plain.keys() == {f"val_{head}" for head in HEADS}
    asked = losses(held_out())
    assert {name: asked[name] for name in plain} == plain
    unknown = losses(held_out(null=False))
    assert len(unknown) == len(HEADS) * (1 + len(TIMES))
    assert not any("null" in name for name in unknown)
    bare = losses(held_out(lune=None, lune_mask=None, sol_stats=None, sol_spatial=None))
    assert {name.split("_")[-1] for name in bare} == {"velocity", "null"}


def test_the_averages_losses_are_told_apart_as_well():
    model = student()
    ema = EMA(model)
    with torch.no_grad():
        for tensor in ema.shadow.values():
            tensor *= 0.5
    found = validate(model, held_out(), CONFIG, default_buckets(), ema)
    once = [name for name in found if not name.endswith("_ema")]
    assert len(found) == 2 * len(once) == 4 * len(HEADS) * (1 + len(TIMES))
    assert found["at_09_velocity_null_ema"] != found["at_09_velocity_null"]
