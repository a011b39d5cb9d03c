import asyncio
import contextlib
import io
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.fixtures import waiting
from tests.fixtures.requests import request
from tests.fixtures.worlds import CAPTIONS, make_world, student_config, zoo_config
from tinyflux.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    OverloadedError,
    ServingError,
)
from tinyflux.inference.events import Drawn, Step
from tinyflux.inference.request import SampleRequest
from tinyflux.inference.sampler import Sampler
from tinyflux.model.loader import load_model, save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.text import READ_WHOLE
from tinyflux.serving.app import run_server
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine

STEP = 4  # the toy VAE's downscale
TIMEOUT = waiting.PATIENCE


def save_student(folder, seed, **changes):
    """A student with open gates, so that prompt, time and seed show."""
    torch.manual_seed(seed)
    model = TinyFluxDeep(student_config(timestep_shift=2.0, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return str(save_model(model, folder))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    make_world(folder / "world")
    save_student(folder / "model", 0)
    save_student(folder / "newer", 1)
    return folder


@contextlib.contextmanager
def opened(place, **changes):
    values = {
        "max_batch": 3, "max_steps": 60, "max_size": 32, "default_size": 16,
        **changes,
    }  # fmt: skip
    config = ServeConfig(**{"checkpoint": str(place / "model"), **values})
    engine = open_engine(config, zoo_config(place / "world"))
    try:
        yield engine
    finally:
        engine.close(drain=False)


@pytest.fixture(scope="module")
def engine(place):
    with opened(place) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(place):
    """What the sampler draws for a request, by itself."""
    zoo, samplers = zoo_config(place / "world"), {}

    def draw(request, checkpoint="model"):
        if checkpoint not in samplers:
            model = load_model(place / checkpoint, device="cpu", dtype=torch.float32)
            samplers[checkpoint] = Sampler(zoo.build(model.config), model, None, "cpu", zoo.dtype)
        return samplers[checkpoint].generate(
            [request.prompt],
            num_steps=request.num_steps,
            guidance_scale=request.guidance_scale,
            height=request.height // STEP,
            width=request.width // STEP,
            seed=request.seed,
            negative_prompt=request.negative_prompt,
            solver=request.solver,
        )[0]

    return draw


def long(**changes) -> SampleRequest:
    return request(**{"num_steps": 50, **changes})


def read_png(png):
    """``[3, H, W]`` in [0, 1]."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return torch.tensor(pixels).permute(2, 0, 1) / 255


def same(picture, other):
    torch.testing.assert_close(picture, other, rtol=1e-3, atol=1e-4)


async def collect(handle):
    return [event async for event in handle.events()]


def wait_for(condition):
    waiting.wait_for(condition, every=0.002)


class Gate:
    """Lets a call of a real function pass only when told to."""

    def __init__(self, monkeypatch, owner, name):
        self.open, self.calls = threading.Event(), 0
        real = getattr(owner, name)

        def gated(*args, **kwargs):
            self.calls += 1
            assert self.open.wait(TIMEOUT)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, gated)


requests = st.builds(
    request,
    prompt=st.sampled_from(CAPTIONS),
    negative_prompt=st.sampled_from(["", "blue square"]),
    num_steps=st.integers(1, 9),
    guidance_scale=st.sampled_from([1.0, 2.0, 4.5, 0.0]),
    height=st.sampled_from([8, 16]),
    width=st.sampled_from([8, 24]),
    seed=st.integers(0, 5),
    solver=st.sampled_from(["euler", "heun", "multistep"]),
    preview_every=st.sampled_from([0, 0, 1, 2]),
)
# A request, the pause before it in milliseconds, and whether it is cancelled after it.
arrivals = st.tuples(
    requests, st.sampled_from([0, 0, 2, 10]), st.sampled_from([False] * 3 + [True])
)


@settings(max_examples=20)
@given(st.lists(arrivals, min_size=1, max_size=10))
def test_a_picture_does_not_depend_on_who_shares_its_batch(engine, alone, arrivals):
    handles = []
    for wanted, pause, given_up in arrivals:
        time.sleep(pause / 1000)
        handles.append((wanted, engine.submit(wanted), given_up))
        if given_up:
            handles[-1][1].cancel()
    for wanted, handle, given_up in handles:
        if given_up:
            with contextlib.suppress(ServingError):
                same(handle.result(TIMEOUT), alone(wanted))
        else:
            same(handle.result(TIMEOUT), alone(wanted))


def test_a_student_of_patches_is_drawn_as_by_the_sampler(place, alone):
    """All changes of the trunk at once; a token is 2 x 2 latents and a picture 8 pixels a token."""
    trunk = {"patch_size": 2, "qk_norm": True, "gated_single_mlp": True, "mask_text_padding": True}
    save_student(place / "patches", 2, **trunk, time_scale=1000.0)
    with opened(place, checkpoint=str(place / "patches")) as engine:
        asked = [request(), request(seed=4, guidance_scale=1.0, prompt="a yellow star on black")]
        handles = [engine.submit(each) for each in asked]
        for each, handle in zip(asked, handles, strict=True):
            same(handle.result(TIMEOUT), alone(each, "patches"))
        with pytest.raises(InputError, match="width must be a multiple of 8"):
            engine.submit(request(width=20))


def test_the_comparison_would_see_another_picture(alone):
    for changes in ({"seed": 4}, {"solver": "heun"}, {"guidance_scale": 2.5}, {"num_steps": 4}):
        with pytest.raises(AssertionError):
            same(alone(request(**changes)), alone(request()))


def test_a_picture_comes_as_png_too(engine):
    assert Image.open(io.BytesIO(engine.generate(request()))).size == (24, 16)


def test_steps_and_previews_are_told_in_order(engine):
    handle = engine.submit(request(num_steps=7, preview_every=3, solver="heun"))
    *steps, last = asyncio.run(collect(handle))
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert all(event.total == 7 for event in steps)
    previews = {event.step: event.preview for event in steps if event.preview is not None}
    assert list(previews) == [3, 6]
    image = handle.result(0)
    assert image.shape == (3, 16, 24)
    assert 0 <= image.min() <= image.max() <= 1
    torch.testing.assert_close(read_png(last.png), image, rtol=0, atol=0.5 / 255 + 1e-6)
    # The nearer the end, the more it looks like the picture.
    far = [(read_png(preview) - image).abs().mean() for preview in previews.values()]
    assert far[1] < far[0]


@pytest.mark.parametrize("max_batch", [1, 2])
def test_a_short_request_of_any_size_passes_long_ones(place, max_batch):
    with opened(place, max_batch=max_batch) as engine:
        others = [engine.submit(long(seed=seed)) for seed in range(4)]
        wait_for(lambda: engine.stats()["steps"] > 3)
        for width in (24, 16):
            engine.submit(request(num_steps=2, width=width)).result(TIMEOUT)
            assert not any(other.ended for other in others)
        for other in others:
            other.result(TIMEOUT)


def test_long_requests_of_two_sizes_go_on_side_by_side(place):
    async def both(engine):
        handles, seen, first = [engine.submit(long(width=width)) for width in (8, 24)], [0, 0], []

        async def watch(index):
            async for event in handles[index].events():
                if isinstance(event, Step):
                    seen[index] = event.step
            first.append(min(seen))

        await asyncio.gather(watch(0), watch(1))
        return first[0]

    with opened(place, max_batch=1) as engine:
        engine.generate(request())
        assert asyncio.run(both(engine)) > 5  # steps of the slower when the faster was done


def test_requests_share_forwards(place):
    with opened(place, max_batch=8) as engine:
        engine.generate(request())
        before = engine.stats()["steps"]
        handles = [engine.submit(long(seed=seed)) for seed in range(8)]
        for handle in handles:
            handle.result(TIMEOUT)
        assert engine.stats()["steps"] - before < 2 * 50


def test_guidance_is_one_forward_and_one_row_without_it(place, monkeypatch):
    rows = []
    forward = TinyFluxDeep.forward

    def watched(self, hidden_states, *args, **kwargs):
        rows.append(hidden_states.shape[0])
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(TinyFluxDeep, "forward", watched)
    with opened(place) as engine:
        engine.generate(request(num_steps=2))
        assert rows == [2, 2]
        engine.generate(request(num_steps=2, guidance_scale=1.0))
        assert rows == [2, 2, 1, 1]


def test_what_is_not_read_of_a_prompt_is_told_with_its_picture(place):
    with opened(place) as engine:
        short = engine.submit(request())
        long = engine.submit(request(prompt="red " * 100, negative_prompt="blue " * 9))
        again = engine.submit(request(prompt="red " * 100, negative_prompt="blue " * 99,
                                      guidance_scale=1.0))  # fmt: skip
        for handle in (short, long, again):
            handle.result(TIMEOUT)
        assert (short.cut, short.negative_cut) == (READ_WHOLE, READ_WHOLE)
        cut = engine.zoo.cut_tokens(["red " * 100, "blue " * 9])
        assert cut[0] == (70, 277)
        assert cut[1].clip == 0 < cut[1].t5
        assert [long.cut, long.negative_cut] == cut
        assert (again.cut, again.negative_cut) == (cut[0], READ_WHOLE)  # not used, so not cut


def test_prompts_are_encoded_once_and_the_oldest_forgotten(place):
    with opened(place, prompt_cache=2) as engine:
        encoded = []
        real = engine.zoo.encode_prompts_batched

        def watched(prompts, **options):
            encoded.extend(prompts)
            return real(prompts, **options)

        engine.zoo.encode_prompts_batched = watched
        for prompt in ("red circle", "red circle", "blue square", "blue square", "red circle"):
            engine.generate(request(prompt=prompt, num_steps=1))
        # The negative prompt "" is used by all, so it stays; of the others one fits beside it.
        assert encoded == ["red circle", "", "blue square", "red circle"]
        assert engine.stats()["cached_prompts"] == 2


def test_a_cancelled_request_frees_its_place_at_the_next_step(place):
    with opened(place, max_batch=1, max_queue=0) as engine:
        handle = engine.submit(long(num_steps=60))
        with pytest.raises(OverloadedError):
            engine.submit(request())
        wait_for(lambda: engine.stats()["steps"] > 2)
        handle.cancel()
        handle.cancel()
        steps = engine.stats()["steps"]
        engine.submit(request(num_steps=1)).result(TIMEOUT)
        assert engine.stats()["steps"] <= steps + 2
        with pytest.raises(ServingError, match="cancelled"):
            handle.result(TIMEOUT)
        with pytest.raises(ServingError, match="cancelled"):
            asyncio.run(collect(handle))


def test_cancelling_what_is_drawn_changes_nothing(engine):
    handle = engine.submit(request())
    picture = handle.result(TIMEOUT)
    handle.cancel()
    assert handle.result(0) is picture


def test_a_full_queue_refuses_and_what_was_accepted_is_drawn(place, alone):
    with opened(place, max_batch=2, max_queue=3) as engine:
        handles = [engine.submit(long(seed=seed)) for seed in range(5)]
        with pytest.raises(OverloadedError, match="5 pictures") as refused:
            engine.submit(request())
        assert refused.value.retry_after > 0
        assert engine.stats()["queue_length"] >= 3
        for seed, handle in enumerate(handles):
            same(handle.result(TIMEOUT), alone(long(seed=seed)))
        engine.submit(request()).result(TIMEOUT)


def test_encoding_and_decoding_do_not_stall_the_loop(place, monkeypatch):
    with opened(place, max_batch=4) as engine:
        engine.generate(request())
        encode = Gate(monkeypatch, engine.zoo, "encode_prompts_batched")
        first = engine.submit(long())  # its prompts are known
        waits = engine.submit(request(prompt="green heart"))
        wait_for(lambda: encode.calls)
        first.result(TIMEOUT)
        encode.open.set()
        waits.result(TIMEOUT)

        decode = Gate(monkeypatch, engine.zoo, "decode_latents")
        before = engine.stats()["steps"]
        handles = [engine.submit(request(seed=seed, num_steps=seed)) for seed in (1, 9)]
        wait_for(lambda: decode.calls and engine.stats()["steps"] - before >= 9)
        assert not any(handle.ended for handle in handles)
        decode.open.set()
        for handle in handles:
            handle.result(TIMEOUT)


def test_a_request_waits_for_its_own_previews_and_for_no_other(place, monkeypatch):
    with opened(place, max_batch=4) as engine:
        engine.generate(request())
        decode = Gate(monkeypatch, engine.zoo, "decode_latents")
        wait_for(lambda: engine.stats()["batch_size"] == 0)  # its last step is counted
        before = engine.stats()["steps"]
        eager = engine.submit(request(num_steps=40, preview_every=1, width=8))
        wait_for(lambda: engine.stats()["steps"] == before + 2)
        patient = engine.submit(request(num_steps=30))
        wait_for(lambda: engine.stats()["steps"] == before + 32)
        time.sleep(0.05)
        assert engine.stats()["steps"] == before + 32
        decode.open.set()
        events = asyncio.run(collect(eager))
        previews = [event for event in events[:-2] if event.preview is not None]
        assert len(previews) == 39
        patient.result(TIMEOUT)


def test_an_error_of_one_request_is_its_own(place, alone, monkeypatch):
    with opened(place, max_batch=4) as engine:
        beside = engine.submit(long())
        encode = engine.zoo.encode_prompts_batched

        def choosy(prompts, *args, **kwargs):
            if prompts == ["blue"]:
                raise InputError("not blue")
            return encode(prompts, *args, **kwargs)

        monkeypatch.setattr(engine.zoo, "encode_prompts_batched", choosy)
        with pytest.raises(InputError, match="not blue"):
            engine.submit(request(prompt="blue")).result(TIMEOUT)
        real = engine.zoo.decode_latents

        def broken(latents, shift=None):
            if latents.shape[-1] == 2:
                raise RuntimeError("no such width")
            return real(latents, shift=shift)

        monkeypatch.setattr(engine.zoo, "decode_latents", broken)
        with pytest.raises(ServingError, match=r"it was decoded.*no such width"):
            engine.submit(request(width=8)).result(TIMEOUT)
        with pytest.raises(ServingError, match=r"a preview was decoded.*no such width"):
            engine.submit(request(width=8, preview_every=1)).result(TIMEOUT)
        same(beside.result(TIMEOUT), alone(long()))
        engine.check_health()


def test_a_batch_that_finds_no_memory_fails_alone(place, monkeypatch):
    with opened(place) as engine:
        forward = TinyFluxDeep.forward

        def narrow(self, hidden_states, *args, **kwargs):
            if hidden_states.shape[1] > 16:
                raise torch.OutOfMemoryError("too wide")
            return forward(self, hidden_states, *args, **kwargs)

        monkeypatch.setattr(TinyFluxDeep, "forward", narrow)
        beside = engine.submit(long(width=8))
        with pytest.raises(ServingError, match="too wide"):
            engine.submit(request()).result(TIMEOUT)
        beside.result(TIMEOUT)
        engine.check_health()


def test_a_dead_loop_fails_every_handle(place, monkeypatch):
    with opened(place, max_batch=2) as engine:
        engine.generate(request())

        def broken(*args, **kwargs):
            raise RuntimeError("device lost")

        handles = [engine.submit(long(seed=seed)) for seed in range(5)]
        monkeypatch.setattr(TinyFluxDeep, "forward", broken)
        for handle in handles:
            with pytest.raises(ServingError, match="device lost"):
                handle.result(TIMEOUT)
        with pytest.raises(ServingError, match="device lost"):
            engine.submit(request())
        with pytest.raises(ServingError, match="device lost"):
            engine.check_health()
        engine.close()


def test_a_swap_draws_new_requests_with_new_weights_and_drops_none(place, alone):
    with opened(place) as engine:
        before = engine.submit(long())
        wait_for(lambda: engine.stats()["steps"] > 2)
        engine.swap(load_model(place / "newer", device="cpu", dtype=torch.float32))
        after = engine.submit(long())
        same(before.result(TIMEOUT), alone(long()))
        same(after.result(TIMEOUT), alone(long(), "newer"))
        with pytest.raises(AssertionError):
            same(alone(long()), alone(long(), "newer"))


def test_a_swap_to_what_does_not_fit_changes_nothing(place, tmp_path, alone):
    other = save_student(tmp_path / "other", 2, sol_hidden_dim=8)
    with opened(place) as engine:
        with pytest.raises(CheckpointError, match="differs in sol_hidden_dim"):
            engine.swap(load_model(other, device="cpu", dtype=torch.float32))
        same(engine.submit(request()).result(TIMEOUT), alone(request()))


def test_closing_finishes_what_was_accepted_unless_told_otherwise(place):
    with opened(place) as engine:
        handles = [engine.submit(request(seed=seed)) for seed in range(6)]
        engine.close()
        assert all(handle.result(0).shape == (3, 16, 24) for handle in handles)
        with pytest.raises(ServingError, match="closed"):
            engine.submit(request())
        with pytest.raises(ServingError, match="closed"):
            engine.check_health()
    with opened(place) as engine:
        handles = [engine.submit(long(seed=seed)) for seed in range(6)]
        engine.close(drain=False)
        for handle in handles:
            with pytest.raises(ServingError, match="closed before"):
                handle.result(0)


def test_a_result_that_is_late_still_comes(engine):
    handle = engine.submit(long())
    with pytest.raises(TimeoutError):
        handle.result(0.0)
    handle.result(TIMEOUT)


def test_a_reader_that_goes_away_disturbs_nothing(engine):
    async def peek(handle):
        events = handle.events()
        first = await anext(events)
        await events.aclose()
        return first

    handle = engine.submit(long())
    assert isinstance(asyncio.run(peek(handle)), Step)
    *steps, last = asyncio.run(collect(handle))
    assert isinstance(last, Drawn)
    assert steps[-1].step == 50


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"negative_prompt": "a" * 1001}, "negative_prompt has 1001 characters"),
        ({"num_steps": 61}, "num_steps must be from 1 to 60"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seed": -1}, "a seed must be"),
        ({"solver": "ddim"}, "solver must be one of"),
        ({"preview_every": -1}, "preview_every must be 0 or more"),
        ({"width": 0}, "width must be a multiple of 4"),
    ],
)
def test_absurd_requests_are_refused_at_once(engine, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        engine.submit(request(**changes))


@pytest.mark.parametrize("changes", [{"max_batch": 0}, {"max_queue": -1}, {"prompt_cache": -1}])
def test_absurd_limits_are_refused(place, changes):
    with (
        pytest.raises(ConfigError, match=f"serve.{next(iter(changes))} must be"),
        opened(place, **changes),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"default_size": 512}, r"serve\.default_size 512 is over serve\.max_size 32"),
        ({"default_size": 18}, "not 18"),
        (
            {"max_size": None, "max_height": 8, "max_width": 8, "default_size": 512},
            "multiple of 4 from 4 to 32 pixels, not 512",
        ),
        (
            {"max_size": 30, "default_size": 28},
            r"serve\.max_size: the width must be a multiple of 4 from 4 to 4096 pixels, not 30",
        ),
        (
            {"max_size": "40x16", "default_size": 32},
            r"serve\.default_size 32 is over serve\.max_size 40x16",
        ),
        ({"default_steps": 61}, r"serve\.default_steps 61 is over serve\.max_steps 60"),
    ],
)
def test_a_server_whose_defaults_it_would_refuse_does_not_start(place, settings, message):
    config = ServeConfig(
        checkpoint=str(place / "model"),
        **{"max_steps": 60, "max_size": 32, "default_size": 16, **settings},
    )
    with pytest.raises(ConfigError, match=message):
        run_server(config, zoo_config(place / "world"))
