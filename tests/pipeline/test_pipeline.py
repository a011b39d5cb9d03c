"""The student as a diffusers pipeline, here and where this package is not."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tests.fixtures.students import adapted
from tests.fixtures.worlds import make_world, student_config, zoo_config
from tinyflux.cli.main import run_job
from tinyflux.config import RunConfig, save_run_config
from tinyflux.distributed.config import SampleConfig
from tinyflux.errors import TinyFluxError
from tinyflux.inference.sampler import Sampler, initial_noise
from tinyflux.model.adapters import BaseWeights, adapter_tensors, has_adapter, save_adapter
from tinyflux.model.loader import load_model, save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.weights import fingerprint
from tinyflux.pipeline.export import export, make_pipeline
from tinyflux.pipeline.pipeline import TinyFluxPipeline
from tinyflux.pipeline.transformer import TinyFluxTransformer

# transformers and diffusers say of themselves what they will change.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
PROMPTS = ["red circle", "blue square"]
SIZE = {"height": 16, "width": 24, "num_inference_steps": 5}
ELSEWHERE = """
import json, sys
import numpy as np, torch
sys.modules["tinyflux"] = None  # as where it is not installed
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
latents = torch.from_numpy(np.load(sys.argv[2]))
images = pipe(["red circle", "blue square"], negative_prompt="green", latents=latents,
              output_type="np", **json.loads(sys.argv[3])).images
np.save(sys.argv[4], images)
assert not [name for name in sys.modules if name.startswith("tinyflux.")]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A world of random models, and a student whose every weight matters."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_world(folder / "world")
    torch.manual_seed(0)
    model = TinyFluxDeep(student_config(timestep_shift=3.0, timestep_shift_tokens=16))
    with torch.no_grad():
        for parameter in model.get_trainable_parameters():
            parameter.normal_(std=0.1)
    save_model(model, folder / "student")
    return folder


@pytest.fixture(scope="module")
def pipe(place):
    pipe = make_pipeline(str(place / "student"), zoo_config(place / "world"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sampler(place):
    model = load_model(place / "student", device="cpu", dtype=torch.float32)
    return Sampler(
        zoo_config(place / "world").build(model.config), model, None, "cpu", torch.float32
    )


def noise(*seeds):
    return initial_noise(seeds, 4, SIZE["height"] // 4, SIZE["width"] // 4)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_it_draws_what_the_sampler_draws(pipe, sampler, guidance):
    wanted = sampler.generate(
        PROMPTS, 5, guidance, SIZE["height"] // 4, SIZE["width"] // 4, seed=3,
        negative_prompt="green",
    )  # fmt: skip
    found = pipe(
        PROMPTS, "green", guidance_scale=guidance, latents=noise(3, 4), output_type="pt", **SIZE
    ).images
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert wanted.std() > 0.01


def test_it_draws_the_same_where_this_package_is_not(place, pipe, tmp_path):
    target = export(str(place / "student"), zoo_config(place / "world"), tmp_path / "out")
    assert not [path for path in target.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    latents = noise(0, 1)
    np.save(tmp_path / "noise.npy", latents.numpy())
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, target, tmp_path / "noise.npy", json.dumps(SIZE),
         tmp_path / "images.npy"],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Expected types" not in done.stderr
    wanted = pipe(PROMPTS, "green", latents=latents, output_type="np", **SIZE).images
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), wanted, atol=2e-5)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(target)


def test_it_is_saved_and_opened_as_diffusers_does(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = TinyFluxPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    first, second = (
        one(PROMPTS, latents=noise(0, 1), output_type="latent", **SIZE).images
        for one in (pipe, again)
    )
    assert torch.equal(first, second)


def test_generators_repeat_and_pictures_come_as_asked(pipe):
    def seeds():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    both = pipe(PROMPTS, generator=seeds(), output_type="np", **SIZE).images
    again = pipe(PROMPTS, generator=seeds(), output_type="np", **SIZE).images
    alone = pipe(PROMPTS[1], generator=seeds()[1], output_type="np", **SIZE).images
    np.testing.assert_array_equal(both, again)
    np.testing.assert_allclose(both[1:], alone, atol=2e-5)
    many = pipe(PROMPTS, num_images_per_prompt=2, return_dict=False, **SIZE)[0]
    assert [image.size for image in many] == [(24, 16)] * 4


def test_a_callback_sees_every_step_and_can_change_it(pipe):
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append((step, timestep, set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 4 else {}

    found = pipe(
        PROMPTS, callback_on_step_end=look, output_type="latent",
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **SIZE,
    ).images  # fmt: skip
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert seen[0][1:] == (0, {"latents", "prompt_embeds"})
    assert not found.any()


def test_long_prompts_are_cut_as_the_sampler_cuts_them(pipe, sampler, caplog):
    wanted = sampler.generate(["red circle " * 30], 5, 2.0, 4, 6, seed=3, negative_prompt="green")
    assert [text for text in caplog.messages if "have more tokens than CLIP reads (32)" in text]
    caplog.clear()
    found = pipe(
        "red circle " * 30, "green", guidance_scale=2.0, latents=noise(3), output_type="pt", **SIZE
    ).images
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    cut = [text for text in caplog.messages if "what is beyond is left out" in text]
    assert [text.split(" tokens that ")[0] for text in cut] == [
        "1 of 1 prompts have more than the 24", "1 of 1 prompts have more than the 32"
    ]  # fmt: skip


def test_mistakes_are_one_sentence(pipe, place, tmp_path, capsys):
    with pytest.raises(ValueError, match="multiples of 4"):
        pipe("red circle", height=15)
    with pytest.raises(ValueError, match="choose from"):
        pipe("red", callback_on_step_end_tensor_inputs=["noise"], **SIZE)
    with pytest.raises(ValueError, match=r"latents must be \[1, 4, 4, 6\]"):
        pipe("red", latents=noise(0, 1), **SIZE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(TinyFluxError, match="not empty"):
        export(str(place / "student"), zoo_config(place / "world"), tmp_path / "full")
    with pytest.raises(TinyFluxError, match="there is no checkpoint"):
        export(str(place / "nothing.pt"), zoo_config(place / "world"), tmp_path / "out")
    assert not (tmp_path / "out").exists()

    run = RunConfig(
        zoo=zoo_config(place / "world"), sample=SampleConfig(checkpoint=str(place / "student"))
    )
    save_run_config(run, tmp_path / "run.yaml")
    assert run_job("export", ["--config", str(tmp_path / "run.yaml")]) == 2
    assert "say where to" in capsys.readouterr().err
    arguments = [str(tmp_path / "made"), "--config", str(tmp_path / "run.yaml")]
    assert run_job("export", arguments) == 0
    assert (tmp_path / "made" / "model_index.json").exists()


def test_an_adapter_draws_unmerged_here_and_is_exported_merged(place, sampler, tmp_path):
    student, zoo = str(place / "student"), zoo_config(place / "world")
    model = load_model(student, device="cpu", dtype=torch.float32)
    adapted(model, base=BaseWeights(student, fingerprint(model.state_dict())))
    with torch.no_grad():
        for tensor in adapter_tensors(model.state_dict()).values():
            tensor += 0.1 * torch.randn_like(tensor)
    adapter = save_adapter(model, tmp_path / "adapter")
    pipe = make_pipeline(student, zoo, adapter)
    assert has_adapter(pipe.transformer.student)
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.0, "latents": noise(3, 4), "output_type": "pt", **SIZE}
    found = pipe(PROMPTS, "green", **options).images
    plain, wanted = (
        one.generate(PROMPTS, 5, 2.0, 4, 6, seed=3, negative_prompt="green")
        for one in (sampler, Sampler(sampler.zoo, model, None, "cpu", torch.float32))
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert (wanted - plain).abs().max() > 1e-3

    target = export(str(adapter), zoo, tmp_path / "out")
    merged = TinyFluxTransformer.from_pretrained(target / "transformer").student
    assert not has_adapter(merged)
    assert merged.state_dict().keys() == sampler.model.state_dict().keys()
    again = Sampler(sampler.zoo, merged.eval(), None, "cpu", torch.float32).generate(
        PROMPTS, 5, 2.0, 4, 6, seed=3, negative_prompt="green"
    )
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-4)
