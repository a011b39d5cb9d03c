import pytest
import torch
from torch import nn

from tinyflux.errors import CheckpointError, TrainingError
from tinyflux.trainer.ema import EMA


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def change(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        model.count += 1


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_update_follows_the_formula():
    model = Net()
    ema, start = EMA(model, 0.9), snapshot(model)
    change(model)
    ema.update(model)
    now = snapshot(model)
    torch.testing.assert_close(
        ema.shadow["body.weight"], 0.9 * start["body.weight"] + 0.1 * now["body.weight"]
    )
    assert torch.equal(ema.shadow["frozen.weight"], now["frozen.weight"])
    assert ema.shadow["count"] == 1


def test_an_update_may_have_a_decay_of_its_own():
    model = Net()
    ema, start = EMA(model, 0.9), snapshot(model)
    change(model)
    ema.update(model, decay=0.25)
    torch.testing.assert_close(
        ema.shadow["body.weight"],
        0.25 * start["body.weight"] + 0.75 * model.body.weight.detach(),
    )
    assert ema.decay == 0.9  # that of the next update, and what is saved


def test_a_constant_model_is_its_own_average():
    model = Net()
    ema = EMA(model, 0.5)
    for _ in range(5):
        ema.update(model)
    assert equal(ema.shadow, snapshot(model))


def test_apply_then_restore_changes_nothing_and_neither_twice():
    model = Net()
    ema = EMA(model, 0.5)
    change(model)
    before = snapshot(model)
    ema.apply_shadow(model)
    assert not equal(snapshot(model), before)
    with pytest.raises(TrainingError, match="already applied"):
        ema.apply_shadow(model)
    ema.restore(model)
    assert equal(snapshot(model), before)
    with pytest.raises(TrainingError, match="nothing to restore"):
        ema.restore(model)


def test_low_precision_weights_have_an_exact_shadow():
    model = nn.Linear(4, 4).bfloat16()
    ema = EMA(model, 0.999)
    with torch.no_grad():
        model.weight += 1
    for _ in range(10):
        ema.update(model)
    assert ema.shadow["weight"].dtype == torch.float32
    moved = (ema.shadow["weight"] - model.weight.detach()).abs().mean()
    assert float(moved) == pytest.approx(0.999**10, abs=0.02)


def test_wrappers_do_not_change_names():
    model = Net()
    ema = EMA(model, 0.9)
    compiled = torch.compile(model, backend="eager")
    ema.update(compiled)
    assert ema.shadow.keys() == model.state_dict().keys()
    assert EMA(compiled).shadow.keys() == model.state_dict().keys()


def test_save_and_load_round_trip(tmp_path):
    model = Net()
    ema = EMA(model, 0.75)
    change(model)
    ema.update(model)
    ema.save(tmp_path / "ema.safetensors", dtype=torch.float32)
    loaded = EMA.load(tmp_path / "ema.safetensors", model)
    assert loaded.decay == 0.75
    assert equal(loaded.shadow, ema.shadow)
    ema.save(tmp_path / "small.safetensors")
    small = EMA.load(tmp_path / "small.safetensors", model)
    torch.testing.assert_close(
        small.shadow["body.weight"], ema.shadow["body.weight"], rtol=1e-2, atol=1e-2
    )


def test_state_dict_round_trips_and_is_checked():
    model = Net()
    ema = EMA(model, 0.75)
    other = EMA(Net(), 0.5)
    other.load_state_dict(ema.state_dict())
    assert other.decay == 0.75
    assert equal(other.shadow, ema.shadow)
    shadow = dict(ema.shadow)
    shadow["body.weight"] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r"body.weight is \[5\] instead of \[3, 3\]"):
        other.load_state_dict({"decay": 0.5, "shadow": shadow})
    with pytest.raises(CheckpointError, match="must hold 'decay' and 'shadow'"):
        other.load_state_dict({})


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read the EMA file"):
        EMA.load(tmp_path / "none.safetensors", Net())
    (tmp_path / "bad.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match="cannot read the EMA file"):
        EMA.load(tmp_path / "bad.safetensors", Net())
