import shutil

import pytest
import torch
from PIL import Image

from tests.worlds import CAPTIONS, make_world, student_config, zoo_config
from tinyflux.errors import ConfigError, HubError, InputError
from tinyflux.model.teachers import lune_features, sol_features
from tinyflux.model.zoo import ModelZoo


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def zoo(world):
    return zoo_config(world).build(student_config())


def pictures(count=3, size=(16, 16)):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, size[1], size[0], 3), generator=generator)
    return [Image.fromarray(one.to(torch.uint8).numpy()) for one in pixels]


def test_encodings_do_not_depend_on_the_batch(zoo):
    images = pictures(5)
    whole = zoo.encode_images_batched(images, batch_size=5)
    assert whole.shape == (5, 4, 4, 4)
    split = zoo.encode_images_batched(images, batch_size=2)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(zoo.encode_image(images[3]), whole[3], rtol=1e-4, atol=1e-5)
    t5, pooled = zoo.encode_prompts_batched(CAPTIONS)
    one_t5, one_pooled = zoo.encode_prompt(CAPTIONS[2])
    assert t5.shape == (4, 24, 16)
    torch.testing.assert_close(one_t5, t5[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one_pooled, pooled[2], rtol=1e-4, atol=1e-5)


def test_shift_and_scale_are_undone_by_decoding(world):
    config = zoo_config(world)
    plain, shifted = config.build(student_config()), config.build(student_config(latent_shift=0.3))
    images = pictures(1)
    one, other = plain.encode_images_batched(images), shifted.encode_images_batched(images)
    torch.testing.assert_close(one - other, torch.full_like(one, 0.3 * plain.vae_scale))
    torch.testing.assert_close(plain.decode_latents(one), shifted.decode_latents(other))


def test_zero_padding_and_encoder_padding(world):
    config = zoo_config(world)
    zero = config.build(student_config(text_padding="zero"))
    kept = config.build(student_config(text_padding="encoder"))
    tokens = int(zero.t5_token_counts(["red circle"]))
    a, b = zero.encode_prompt("red circle")[0], kept.encode_prompt("red circle")[0]
    torch.testing.assert_close(a[:tokens], b[:tokens])
    assert not a[tokens:].any()
    assert b[tokens:].any()


def test_the_last_layer_alone_is_the_last_hidden_state(world):
    zoo = zoo_config(world).build(student_config(t5_layers=(2,), text_padding="encoder"))
    tokenizer, model = zoo.load_t5()
    encoded = tokenizer("red circle", padding="max_length", max_length=24, return_tensors="pt")
    torch.testing.assert_close(
        zoo.encode_prompt("red circle")[0], model(**encoded).last_hidden_state[0]
    )


def test_pooled_clip_is_read_at_the_end_token(zoo):
    tokenizer, _ = zoo.load_clip()
    place = len(tokenizer("red circle").input_ids) - 1
    hidden = zoo.encode_clip_tokens(["red circle"])
    torch.testing.assert_close(zoo.encode_prompt("red circle")[1], hidden[0, place])


def test_teachers_run_on_their_own_latents(zoo):
    latents = zoo.encode_teacher_latents_batched(pictures(2))
    assert latents.shape == (2, 2, 4, 4)
    text = zoo.encode_clip_tokens(CAPTIONS[:2])
    sigma = torch.tensor([0.2, 0.9])
    assert lune_features(zoo.load_lune(), latents, sigma, text).shape == (2, 16)
    assert sol_features(zoo.load_sol(), latents, sigma, text).spatial.shape == (2, 8, 8)


def test_unload_offload_reload(zoo):
    vae = zoo.load_vae()
    assert zoo.load_vae() is vae
    zoo.offload()
    zoo.reload()
    zoo.encode_images_batched(pictures(1))
    zoo.unload("vae")
    assert zoo.load_vae() is not vae
    with pytest.raises(ConfigError, match=r"no model 'luna' \(did you mean 'lune'\?\)"):
        zoo.unload("luna")


def test_a_digest_names_the_weights(world, tmp_path):
    first = zoo_config(world).build(student_config())
    # A copy: the tokenizers' trainers break ties at random, and a vocabulary is part of a model.
    again = zoo_config(shutil.copytree(world, tmp_path / "same")).build(student_config())
    other = zoo_config(make_world(tmp_path / "other", seed=1)).build(student_config())
    for name in ("vae", "t5", "clip", "lune", "sol", "sd_vae"):
        assert first.digest(name) == again.digest(name) != other.digest(name)


def test_one_vae_serves_both_when_both_come_from_one_place(world):
    config = zoo_config(world)
    config.sd_repo = config.vae_repo
    zoo = config.build(student_config())
    assert zoo.load_sd_vae() is zoo.load_vae()


def test_a_teacher_from_a_single_file(world, tmp_path):
    (tmp_path / "config.json").write_bytes((world / "lune" / "config.json").read_bytes())
    weights = (world / "lune" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "mine.safetensors").write_bytes(weights)
    config = zoo_config(world)
    config.experts_repo = str(tmp_path)
    unet = config.build(student_config()).load_lune("mine.safetensors")
    wanted = zoo_config(world).build(student_config()).load_lune()
    torch.testing.assert_close(unet.state_dict(), wanted.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda zoo: zoo.encode_prompt("  "), InputError, "empty"),
        (lambda zoo: zoo.encode_prompt("red " * 200), InputError, "T5 tokens, the limit is 24"),
        (lambda zoo: zoo.encode_prompts_batched([3]), InputError, "must be text"),
        (lambda zoo: zoo.encode_images_batched(["a.png"]), InputError, "PIL image"),
        (lambda zoo: zoo.encode_images_batched([]), InputError, "no pictures"),
        (
            lambda zoo: zoo.encode_images_batched([*pictures(1), *pictures(1, (16, 32))]),
            InputError,
            "one size",
        ),
        (
            lambda zoo: zoo.encode_images_batched(pictures(1, (18, 16))),
            InputError,
            "multiples of 4",
        ),
    ],
)
def test_bad_input_is_explained(zoo, call, error, message):
    with pytest.raises(error, match=message):
        call(zoo)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae_repo": "/nowhere"}, "no directory '/nowhere'"),
        ({"vae_repo": "someone/something"}, "hub repository"),
    ],
)
def test_weights_that_cannot_be_opened_are_named(world, changes, message):
    config = zoo_config(world)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(HubError, match=message):
        config.build(student_config()).load_vae()


def test_layers_that_t5_has_not_are_refused(world):
    with pytest.raises(ConfigError, match="names a layer above 2"):
        zoo_config(world).build(student_config(t5_layers=(0, 9))).load_t5()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_explained():
    with pytest.raises(ConfigError, match="use device 'cpu'"):
        ModelZoo()
