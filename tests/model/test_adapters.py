"""LoRA and DoRA on the student's layers: what they change, and what is kept of them."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.students import MODEL, adapted, inputs, student
from tinyflux.errors import CheckpointError, ConfigError
from tinyflux.model.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BaseWeights,
    adapter_tensors,
    is_adapter,
    merge_adapters,
    read_adapter,
    save_adapter,
)
from tinyflux.model.loader import load_config_of, load_model, save_config, save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.weights import fingerprint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A student's directory."""
    return save_model(student(), tmp_path_factory.mktemp("base"))


def opened(source, **options):
    return load_model(source, device="cpu", dtype=torch.float32, **options)


def trained(base, kind="lora", spread=0.1, **changes):
    """The student of ``base`` with an adapter whose every matrix says something."""
    model = opened(base)
    known = BaseWeights(str(base), fingerprint(model.state_dict()))
    adapted(model, kind, base=known, **changes)
    with torch.no_grad():
        for tensor in adapter_tensors(model.state_dict()).values():
            tensor += spread * torch.randn_like(tensor)
    return model


def saved(model, directory):
    save_config(model, save_adapter(model, directory))
    return directory


@torch.no_grad()
def forward(model, **changes):
    return model.eval()(**{**inputs(), **changes})


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_new_adapter_changes_nothing_and_alone_is_trained(kind):
    model = student().eval()
    before = forward(model)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted(model, kind)
    assert torch.equal(forward(model), before)
    names = {name for name, one in model.named_parameters() if one.requires_grad}
    assert names == set(adapter_tensors(model.state_dict()))
    single = ("attn.qkv", "attn.out_proj", "mlp.fc1", "mlp.fc2")
    double = ("attn.img_qkv", "attn.img_out", "attn.txt_out",
              "img_mlp.fc1", "img_mlp.fc2", "txt_mlp.fc1", "txt_mlp.fc2")  # fmt: skip
    assert {name.split(".lora_")[0] for name in names} == {
        "txt_qkv",
        *(f"double_blocks.0.{name}" for name in double),
        *(f"single_blocks.0.{name}" for name in single),
    }
    kept = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in whole.items())


def test_the_first_weights_follow_the_seed_alone():
    one, same, other = (adapted(student(), seed=seed).state_dict() for seed in (3, 3, 4))
    name = "single_blocks.0.mlp.fc1.lora_A.default.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_saved_opens_with_the_same_forward(base, tmp_path, kind):
    model = trained(base, kind)
    place = saved(model, tmp_path / "adapter")
    expected = forward(model)
    assert not torch.allclose(expected, forward(opened(base)))
    assert torch.equal(forward(opened(base, adapter=place)), expected)
    assert is_adapter(place)
    assert torch.equal(forward(opened(place)), expected)
    assert load_config_of(place) == MODEL
    size = sum(path.stat().st_size for path in place.iterdir())
    assert size < (base / "model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_reads_what_is_saved_and_what_peft_writes_is_read(base, tmp_path, kind):
    model = trained(base, kind, dropout=0.1)
    place = saved(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(opened(base), place)
    expected = forward(model)
    assert torch.equal(forward(theirs.base_model.model), expected)
    theirs.peft_config["default"].base_model_name_or_path = str(base)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = opened(tmp_path / "theirs")
    assert torch.equal(forward(again), expected)


def test_a_merged_adapter_is_a_plain_student(base):
    model = trained(base)
    expected = forward(model)
    merge_adapters(model)
    assert model.state_dict().keys() == TinyFluxDeep(MODEL).state_dict().keys()
    torch.testing.assert_close(forward(model), expected)


def test_a_wrong_base_is_refused_in_a_sentence(base, tmp_path, caplog):
    place = saved(trained(base), tmp_path / "adapter")
    other = student()
    with torch.no_grad():
        other.img_in.bias += 1
    wrong = save_model(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match=rf"other weights than those of '{wrong}'.*'{base}'"):
        opened(wrong, adapter=place)
    opened(wrong, adapter=place, strict=False)
    assert "other weights than those" in caplog.text
    wider = save_model(TinyFluxDeep(replace(MODEL, mlp_ratio=2.0)), tmp_path / "wider")
    with pytest.raises(CheckpointError, match=r"does not fit the model.*mlp\.fc"):
        opened(wider, adapter=place, strict=False)
    with pytest.raises(CheckpointError, match="holds an adapter alone"):
        opened(place, adapter=place)
    # The same numbers in another file, and in another precision, are the same base.
    half = opened(base).bfloat16()
    halves = save_model(half, tmp_path / "half")
    save_model(half.float(), tmp_path / "float")
    on_half = saved(trained(halves), tmp_path / "on_half")
    opened(tmp_path / "float", adapter=on_half)


def test_an_absent_base_is_told(base, tmp_path):
    gone = shutil.copytree(base, tmp_path / "gone")
    place = saved(trained(gone), tmp_path / "adapter")
    shutil.rmtree(gone)
    with pytest.raises(CheckpointError, match=rf"trained on '{gone}', which is not there"):
        opened(place)
    opened(base, adapter=place)


def broken_file(place):
    data = (place / ADAPTER_WEIGHTS).read_bytes()
    (place / ADAPTER_WEIGHTS).write_bytes(data[:-100])


def one_tensor_less(place):
    tensors = load_file(place / ADAPTER_WEIGHTS)
    del tensors["base_model.model.txt_qkv.lora_B.weight"]
    save_file(tensors, place / ADAPTER_WEIGHTS)


def settings(**changes):
    def change(place):
        config = json.loads((place / ADAPTER_CONFIG).read_text())
        (place / ADAPTER_CONFIG).write_text(json.dumps({**config, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_file, "is not an adapter that can be read"),
        (one_tensor_less, r"txt_qkv\.lora_B\.default\.weight is missing"),
        (lambda place: (place / ADAPTER_CONFIG).write_text("{"), "is not an adapter's config"),
        (lambda place: (place / ADAPTER_CONFIG).write_text("[]"), "is not an adapter's config"),
        (lambda place: (place / ADAPTER_WEIGHTS).unlink(), f"holds no {ADAPTER_WEIGHTS}"),
        (settings(peft_type="LOHA"), "of peft's kind 'LOHA'"),
        (settings(r=10**9), "says rank 1000000000, and its matrices have 4"),
        (settings(r="many"), "is not an adapter's config"),
        (settings(modules_to_save=["img_in"]), "uses peft's modules_to_save"),
        (settings(target_modules=["nowhere"]), "does not fit the model: Target modules"),
    ],
)
def test_damaged_adapters_are_one_sentence(base, tmp_path, damage, message):
    place = saved(trained(base), tmp_path / "adapter")
    damage(place)
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(base, adapter=place)
    assert "\n" not in str(caught.value)
    assert str(place) in str(caught.value)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"target_modules \['nowhere'\] cannot have an adapter"):
        adapted(student(), target_modules=["nowhere"])


def test_an_adapter_that_names_no_base_needs_one(base, tmp_path, caplog):
    model = opened(base)
    adapted(model)
    place = saved(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="on weights that it does not name"):
        opened(place)
    opened(base, adapter=place)
    assert "does not say which weights it fits" in caplog.text
    assert read_adapter(place).base == BaseWeights()
