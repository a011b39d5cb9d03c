"""Pictures for files of prompts, by Ray Data's actors, through kills.

Slow: five drivers and their actors import torch.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.fixtures import keeper
from tests.fixtures.ray_head import ROOT
from tests.fixtures.serving_place import make_place
from tests.fixtures.waiting import PATIENCE, wait_for
from tests.fixtures.worlds import zoo_config
from tinyflux.distributed.config import SampleConfig
from tinyflux.distributed.prompt_file import read_prompts, sample_requests
from tinyflux.distributed.sample import PictureNotes
from tinyflux.errors import ConfigError, InputError
from tinyflux.inference.request import SampleRequest
from tinyflux.inference.sampler import Sampler
from tinyflux.model.loader import load_model
from tinyflux.util.config import to_dict
from tinyflux.util.images import read_picture

JOB = """
import json, sys
from tinyflux.model.config import ZooConfig
from tinyflux.distributed.config import SampleConfig
from tinyflux.distributed.sample import sample_prompts
from tinyflux.util.config import from_dict
from tinyflux.util.logging import log_to_console
log_to_console()
sample_prompts(from_dict(SampleConfig, json.loads(sys.argv[1]), "test"),
               from_dict(ZooConfig, json.loads(sys.argv[2]), "test"))
"""


def write(path, text):
    path.write_text(text)
    return str(path)


def wanted_pictures(config, downscale=8):
    lines = read_prompts(config.prompts, config.prompts_file)
    return sample_requests(lines, config, downscale)


def test_every_line_is_a_picture_with_its_own_settings(tmp_path):
    lines = [{"prompt": "a"}, {"prompt": "b", "seed": 9, "size": "512x64", "num_steps": 3}]
    file = write(tmp_path / "p.jsonl", "\n\n".join(json.dumps(line) for line in lines))
    config = SampleConfig(prompts=["first"], prompts_file=file, seed=5, num_steps=2)
    first = SampleRequest("first", "", 2, 5.0, 512, 512, 5)
    wanted = [first, replace(first, prompt="a", seed=6),
              replace(first, prompt="b", seed=9, height=64, num_steps=3)]  # fmt: skip
    assert wanted_pictures(config) == wanted
    config.prompts_file = write(tmp_path / "p.txt", "a \n\nb\n")
    assert [request.prompt for request in wanted_pictures(config)] == ["first", "a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 must be an object"),
        ('{"seed": 1}', "line 2 must be an object"),
        ('{"prompt": " "}', "line 2: the prompt is empty"),
        ('{"prompt": 3}', "line 2: prompt must be text, not 3"),
        ('{"prompt": "a", "sede": 1}', r"line 2: 'sede' is not a setting \(did you mean 'seed'"),
        ('{"prompt": "a", "seed": 1.5}', "line 2: seed must be a whole number"),
        ('{"prompt": "a", "height": 0}', "line 2: height must be"),
        ('{"prompt": "a", "height": "8"}', "line 2: height must be a whole number from 1 to 1024"),
        ('{"prompt": "a", "size": "wide"}', "line 2: size must be pixels, as a whole number"),
        ('{"prompt": "a", "size": true}', "line 2: size must be pixels, as a whole number"),
        (
            '{"prompt": "a", "size": "64x60"}',
            "line 2: the size's height must be a multiple of 8 from 8 to 8192 pixels, not 60",
        ),
        ('{"prompt": "a", "size": 64, "width": 8}', "line 2: size and width are both given"),
        ('{"prompt": "a", "guidance_scale": "much"}', "line 2: guidance_scale must be a number"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = write(tmp_path / "p.jsonl", f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        wanted_pictures(SampleConfig(prompts_file=file))


def test_former_sides_in_latents_draw_what_they_drew(tmp_path, caplog):
    lines = [{"prompt": "a", "height": 6}, {"prompt": "b"}, {"prompt": "c", "width": 2}]
    file = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
    requests = wanted_pictures(SampleConfig(prompts_file=file, width=4), downscale=4)
    # What a line does not say was the config's, and what that does not say 64 latents.
    assert [(one.height, one.width) for one in requests] == [(24, 16), (256, 16), (256, 8)]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{file}, line 1: height and width are in latents")
    assert 'write "size", in pixels' in said


def test_a_size_that_latents_cannot_fill_is_said():
    config = SampleConfig(prompts=["a"], size="64x50")
    with pytest.raises(ConfigError, match=r"sample\.size: the height must be a multiple of 4 from"):
        wanted_pictures(config, downscale=4)


@pytest.mark.parametrize("scale", [2, 2.0])
def test_a_pictures_note_is_what_it_was(tmp_path, scale):
    """Another note would draw a directory of earlier pictures again."""
    line = {"prompt": "a", "guidance_scale": scale, "size": "640x512"}
    (request,) = wanted_pictures(
        SampleConfig(prompts_file=write(tmp_path / "p.jsonl", json.dumps(line)), num_steps=2)
    )
    assert PictureNotes("0123", 8).of(request) == (
        '{"guidance_scale": 2.0, "height": 64, "negative_prompt": "", "num_steps": 2, '
        '"prompt": "a", "seed": 0, "weights": "0123", "width": 80}'
    )


def test_no_prompts_and_no_file_are_said(tmp_path):
    with pytest.raises(InputError, match="there are no prompts"):
        wanted_pictures(SampleConfig())
    with pytest.raises(InputError, match="cannot be read"):
        wanted_pictures(SampleConfig(prompts_file=str(tmp_path / "none.txt")))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = make_place(tmp_path_factory.mktemp("batch"))
    colours, things = ["red", "blue", "green"], ["circle", "square"]
    lines = [
        {"prompt": f"{colours[i % 3]} {things[i % 2]}", "num_steps": 30 + i % 2} for i in range(40)
    ]
    write(place / "prompts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return place


def start(config, place, environment):
    words = [json.dumps(to_dict(config)), json.dumps(to_dict(zoo_config(place / "world")))]
    with Path(f"{config.output_dir}.log").open("a") as log:
        return keeper.start(
            [sys.executable, "-c", JOB, *words],
            env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def run(config, place, environment):
    driver = start(config, place, environment)
    assert driver.wait(PATIENCE) == 0, Path(f"{config.output_dir}.log").read_text()[-3000:]


def pictures(config):
    """By their names; a process that was killed may leave a temporary file beside them."""
    return {path.name: path.read_bytes() for path in Path(config.output_dir).glob("[!.]*")}


@pytest.mark.slow
@pytest.mark.fault
def test_kills_leave_the_pictures_of_a_run_without_them(place, head, tmp_path):
    config = SampleConfig(
        prompts_file=str(place / "prompts.jsonl"), checkpoint=str(place / "model"),
        size=16, batch_size=3, output_dir=str(tmp_path / "whole"), num_actors=2,
        cpus_per_actor=0.5,
    )  # fmt: skip
    run(config, place, head.environment)
    whole = pictures(config)
    assert len(whole) == 40 + 2  # metadata and a grid
    records = [json.loads(line) for line in whole["metadata.jsonl"].decode().splitlines()]
    assert [record["file_name"] for record in records] == [f"{i:05d}.png" for i in range(40)]
    assert records[7]["seed"] == 7

    killed = replace(config, output_dir=str(tmp_path / "killed"))
    chance, output = random.Random(3), Path(killed.output_dir)

    def more(driver):
        """Wait for another picture; the job goes on."""
        before = len(list(output.glob("0*.png")))
        wait_for(lambda: len(list(output.glob("0*.png"))) > before or driver.poll() is not None)
        assert driver.poll() is None

    driver = start(killed, place, head.environment)
    for victim in ("actor", "driver", "actor"):
        more(driver)
        time.sleep(chance.uniform(0, 0.2))
        if victim == "driver":
            driver.kill()
            driver.wait()
            driver = start(killed, place, head.environment)
        elif pids := head.processes(b"SampleActor"):
            os.kill(chance.choice(pids), signal.SIGKILL)
    assert driver.wait(PATIENCE) == 0, Path(f"{output}.log").read_text()[-3000:]
    assert pictures(killed) == whole

    # One that is lost is drawn again, and nothing else is.
    times = {path.name: path.stat().st_mtime_ns for path in output.glob("0*.png")}
    (output / "00011.png").unlink()
    run(killed, place, head.environment)
    assert pictures(killed) == whole
    assert {n for n, t in times.items() if (output / n).stat().st_mtime_ns != t} == {"00011.png"}

    # Another batch size draws the same pictures, which are the sampler's.
    alone = replace(
        config, output_dir=str(tmp_path / "alone"), batch_size=7, num_actors=1,
        prompts=["red circle", "red " * 100], prompts_file=None, seed=6,
    )  # fmt: skip
    run(alone, place, head.environment)
    model = load_model(place / "model", device="cpu", dtype=torch.float32)
    zoo = zoo_config(place / "world").build(model.config)
    (wanted,) = Sampler(zoo, model, None, "cpu", torch.float32).generate(
        ["red circle"], 28, 5.0, 4, 4, seed=6, negative_prompt=""
    )
    lines = (Path(alone.output_dir) / "metadata.jsonl").read_text().splitlines()
    told = [json.loads(line).get("prompt_truncated") for line in lines]
    assert told == [None, {"clip": 70, "t5": 277}]
    log = Path(f"{alone.output_dir}.log").read_text()
    assert "sample: 1 of 2 prompts are longer than the text encoders read" in log
    found = read_picture((Path(alone.output_dir) / "00000.png").read_bytes())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1.01 / 255)
    with Image.open(output / "00000.png") as picture:
        assert json.loads(picture.info["tinyflux"])["prompt"] == "red circle"
