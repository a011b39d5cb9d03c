import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.fixtures.worlds import CAPTIONS, make_world, student_config, zoo_config
from tinyflux.errors import ConfigError, HubError, InputError
from tinyflux.model.teachers import lune_features, sol_features
from tinyflux.model.text import t5_embeddings
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


def test_long_prompts_are_cut_as_the_tokenizers_cut_them(zoo):
    prompts = ["red " * 200, "red circle"]
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokenizer, model = zoo.load_t5()
    cut = tokenizer(prompts, max_length=24, **options)
    assert cut.input_ids[0, -1] == tokenizer.eos_token_id
    wanted = t5_embeddings(model, cut.input_ids, cut.attention_mask, zoo.t5_layers, "zero")
    t5, pooled = zoo.encode_prompts_batched(prompts)
    torch.testing.assert_close(t5, wanted)
    tokenizer, model = zoo.load_clip()
    limit = model.config.max_position_embeddings
    cut = tokenizer(prompts, max_length=limit, **options)
    assert cut.input_ids[0, -1] == tokenizer.eos_token_id
    output = model(cut.input_ids)
    torch.testing.assert_close(pooled, output.pooler_output)
    torch.testing.assert_close(zoo.encode_clip_tokens(prompts), output.last_hidden_state)
    torch.testing.assert_close(zoo.encode_prompt("red circle")[0], t5[1], rtol=1e-4, atol=1e-5)


def test_what_is_cut_is_counted_and_said(world, caplog):
    zoo = zoo_config(world).build(student_config())
    (clip, t5), short = zoo.cut_tokens(["red " * 200, "red circle"])
    assert not zoo.loaded  # tokenizers are enough
    assert short == (0, 0)
    whole = [len(load()[0]("red " * 200).input_ids) for load in (zoo.load_clip, zoo.load_t5)]
    assert (clip, t5) == (whole[0] - 32, whole[1] - 24)
    caplog.clear()
    zoo.encode_prompts_batched(["red circle", "blue square"])
    zoo.encode_prompts_batched(["red " * 200], warn_cut=False)
    assert not caplog.messages
    zoo.encode_prompts_batched(["red circle", "red " * 200])
    assert caplog.messages == [
        "1 of 2 prompts have more tokens than CLIP reads (32) and 1 more than T5 reads (24): "
        "what is beyond is left out"
    ]


def test_clip_s_limit_is_read_from_a_whole_clip_s_config_as_well(world, tmp_path):
    folder = shutil.copytree(world / "clip", tmp_path / "clip")
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "clip", "text_config": text, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(whole))
    zoo = zoo_config(world).build(student_config())
    zoo.clip_repo = str(folder)
    assert zoo.clip_limit == 32 == zoo.load_clip()[1].config.max_position_embeddings


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("clip", "clip/pytorch_model.bin"),
        ("t5", "t5/pytorch_model.bin"),
        ("vae", "vae/diffusion_pytorch_model.bin"),
        ("sd_vae", "sd/vae/diffusion_pytorch_model.bin"),
        ("lune", "lune/diffusion_pytorch_model.bin"),
        ("sol", "sol/diffusion_pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_refused(world, tmp_path, name, weights):
    folder = shutil.copytree(world, tmp_path / "world")
    zoo = zoo_config(folder).build(student_config())
    loaded = zoo.load(name)
    model = loaded[1] if isinstance(loaded, tuple) else loaded
    path = folder / weights
    for safe in path.parent.glob("*.safetensors"):
        safe.unlink()
    torch.save(model.state_dict(), path)
    with pytest.raises(HubError, match=r"safetensors") as caught:
        zoo_config(folder).build(student_config()).load(name)
    assert "\n" not in str(caught.value)


def test_teachers_run_on_their_own_latents(zoo):
    latents = zoo.encode_teacher_latents_batched(pictures(2))
    assert latents.shape == (2, 2, 4, 4)
    text = zoo.encode_clip_tokens(CAPTIONS[:2])
    sigma = torch.tensor([0.2, 0.9])
    assert lune_features(zoo.load_lune(), latents, sigma, text).shape == (2, 16)
    assert sol_features(zoo.load_sol(), latents, sigma, text).spatial.shape == (2, 8, 8)


def test_the_scale_of_latents_is_read_without_weights(world, tmp_path):
    place = shutil.copytree(world, tmp_path / "world")
    for weights in place.rglob("*.safetensors"):
        weights.unlink()
    zoo = zoo_config(place).build(student_config())
    wanted = zoo_config(world).build(student_config())
    assert zoo.downscale == wanted.downscale
    wanted.load_vae()
    assert zoo.downscale == wanted.downscale
    lost = replace(zoo_config(place), vae_repo=str(tmp_path / "none")).build(student_config())
    with pytest.raises(HubError, match="there is no directory"):
        print(lost.downscale)


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
