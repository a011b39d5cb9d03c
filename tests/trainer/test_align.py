"""Targets of image tokens: what their losses mean, whom they reach, and that a run keeps them."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.host_reads import host_reads
from tests.fixtures.students import MODEL, make_batch, student
from tests.fixtures.trainers import NULL_TEXT, make_trainer, settings, shadow, weights
from tinyflux.config import load_run_config, save_run_config
from tinyflux.distributed.data import check_batch_size
from tinyflux.errors import CheckpointError, ConfigError, DamagedCheckpointError, InputError
from tinyflux.model.loader import load_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import pack_latents, token_grid
from tinyflux.plan.projectors import add_projectors
from tinyflux.plan.work import step_work
from tinyflux.trainer.align import Alignment, align_loss, similarities
from tinyflux.trainer.align_config import ALIGN_LOSSES, AlignConfig
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.draws import Conditions, others_of
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.metrics import read_metrics
from tinyflux.trainer.projectors import load_projectors, with_projectors
from tinyflux.trainer.step import training_loss
from tinyflux.util.buckets import default_buckets

LATENTS = AlignConfig("latents", 1)
GRID = (4, 6)
BASE = TrainerConfig(dtype=torch.float32, total_steps=10, text_dropout=0.0, lune_warmup_steps=0)


def a_config(*targets, **changes):
    return replace(BASE, align=list(targets), **changes)


def loss_of(config, model=None, batch=None, step=0):
    """The losses of a micro-batch, and the module whose gradients follow from them."""
    module = with_projectors(model or student(), config)
    engine = TorchEngine(module, config)
    batch = make_batch() if batch is None else batch
    loss = training_loss(
        engine.model, batch, config, step, NULL_TEXT, default_buckets(), engine.forward
    )
    return loss, module


def gradients(module):
    return {name: one.grad for name, one in module.named_parameters() if one.grad is not None}


def random(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The losses


@pytest.mark.parametrize("kind", ALIGN_LOSSES)
def test_a_loss_is_0_where_nothing_is_missing_and_grows_from_there(kind):
    features = random(3, 24, 5)
    assert align_loss(features, features, kind, GRID) < 1e-6
    near, far = features + 0.1 * random(3, 24, 5, seed=4), random(3, 24, 5, seed=5)
    losses = [float(align_loss(one, features, kind, GRID)) for one in (near, far)]
    assert 1e-6 < losses[0] < losses[1]


def test_cosines_see_no_length_and_relations_no_rotation():
    features, other = random(3, 24, 5), random(3, 24, 5, seed=4)
    lengths = random(3, 24, 1, seed=6).exp()
    for kind in ("cosine", "relations"):
        torch.testing.assert_close(
            align_loss(other * lengths, features, kind, GRID),
            align_loss(other, features, kind, GRID),
        )
    turned = features @ torch.linalg.qr(random(5, 5, seed=7)).Q
    assert align_loss(turned, features, "relations", GRID) < 1e-6
    assert align_loss(turned, features, "cosine", GRID) > 0.1
    # Channels need not be as many.
    wide = torch.cat([features, torch.zeros_like(features)], dim=-1)
    assert align_loss(wide, features, "relations", GRID) < 1e-6


def test_relations_of_a_fine_grid_are_those_of_its_means():
    coarse = random(2, 16 * 16, 5)
    fine = coarse.unflatten(1, (16, 16)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(
        similarities(fine.flatten(1, 2), (32, 32)), similarities(coarse, (16, 16))
    )
    assert similarities(random(2, 4 * 40, 5), (4, 40)).shape == (2, 64, 64)


@pytest.mark.parametrize("kind", ALIGN_LOSSES)
def test_samples_without_features_count_as_0_and_their_features_are_not_read(kind):
    projected = random(4, 24, 5, seed=4).requires_grad_()
    features, mask = random(4, 24, 5), torch.tensor([True, False, True, False])
    expected = align_loss(projected[::2], features[::2], kind, GRID) / 2
    features[1] = float("nan")
    loss = align_loss(projected, features, kind, GRID, mask)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert projected.grad.isfinite().all()
    assert not projected.grad[1::2].any()
    assert projected.grad[::2].any()


# Whom they reach


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("projector", ["mlp", "conv", "none"])
@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_the_gradient_reaches_the_blocks_up_to_its_own_and_none_beyond(
    block, projector, checkpointing
):
    target = AlignConfig("latents", block, projector=projector, loss="relations")
    config = a_config(target, gradient_checkpointing=checkpointing)
    model = student(num_double_layers=2, num_single_layers=2)
    module = with_projectors(model, config)
    engine = TorchEngine(module, config)
    batch = make_batch()
    alignment = Alignment.of(batch, config, 0, Conditions.of(batch, config), GRID)
    _, outputs = engine.forward(
        pack_latents(batch.latents), batch.t5_embeds, batch.clip_pooled, torch.rand(len(batch)),
        TinyFluxDeep.create_img_ids(len(batch), *GRID), grid=GRID, return_expert_pred=True,
        **alignment.arguments(),
    )  # fmt: skip
    sum(alignment.losses(outputs)).backward()
    found = {name.removeprefix("module.") for name, grad in gradients(module).items() if grad.any()}
    queries = [f"double_blocks.{at}.attn.img_qkv.weight" for at in range(2)]
    queries += [f"single_blocks.{at}.attn.qkv.weight" for at in range(2)]
    assert [name in found for name in queries] == [at < block for at in range(4)]
    beyond = {name.rpartition("blocks.")[0] + "blocks." + name.split(".")[1] for name in found
              if "blocks." in name}  # fmt: skip
    assert beyond == {name.partition(".attn")[0] for name in queries[:block]}
    assert "img_in.weight" in found
    assert not any(name.startswith("final_") for name in found)
    trained = {name for name, _ in module.named_parameters() if name.startswith("projectors.")}
    assert trained <= found
    assert bool(trained) == (projector != "none")


def test_what_is_minimised_is_the_velocitys_loss_and_the_weighted_others():
    targets = [AlignConfig("latents", 1, weight=2.0), AlignConfig("latents", 2, loss="smooth_l1")]
    plain, _ = loss_of(BASE)
    both, _ = loss_of(a_config(*targets))
    assert torch.equal(both.main, plain.main)
    more = 2.0 * both.aligned[0] + 0.5 * both.aligned[1]
    torch.testing.assert_close(both.total.detach(), plain.total.detach() + more)
    assert torch.equal(both.stack(), torch.stack([both.total.detach(), *both.stack()[1:4],
                                                  *both.aligned]))  # fmt: skip


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_every_kind_of_student_and_grid_has_its_targets(patch_size, projector):
    config = a_config(AlignConfig("latents", 2, projector=projector))
    model = student(patch_size=patch_size)
    for height, width in ((4, 6), (6, 4), (8, 2)):
        batch = make_batch(height=height, width=width)
        loss, module = loss_of(config, model, batch)
        loss.total.backward()
        assert loss.aligned[0] > 0.1
        assert all(grad.isfinite().all() for grad in gradients(module).values())
        model.zero_grad()
        tokens = pack_latents(batch.latents, patch_size)
        grid = token_grid(height, width, patch_size)
        made = Alignment.of(batch, config, 0, Conditions.of(batch, config), grid)
        assert torch.equal(made.targets[0].features, tokens)


@pytest.mark.parametrize("cuts", [[6], [1, 5, 11]])
def test_micro_batches_give_the_loss_and_gradient_of_the_batch(cuts):
    config = a_config(AlignConfig("latents", 1, t_range=(0.3, 0.8)), AlignConfig("latents", 2))
    batch = make_batch()

    def trained(parts):
        module = with_projectors(student(), config)
        engine, sums = TorchEngine(module, config), 0
        for part in parts:
            share = len(part) / len(batch)
            loss = training_loss(
                engine.model, part, config, 0, NULL_TEXT, default_buckets(), engine.forward
            )
            (loss.total * share).backward()
            sums = sums + loss.stack() * share
        return sums, torch.cat([grad.flatten() for grad in gradients(module).values()])

    edges = itertools.pairwise([0, *cuts, len(batch)])
    cut, cut_gradient = trained([batch[a:b] for a, b in edges])
    whole, gradient = trained([batch])
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_a_range_of_times_spares_the_samples_outside_of_it():
    batch = make_batch()
    conditions = Conditions.of(batch, BASE)
    times = conditions.t.sort().values
    low, high = float(times[3]), float(times[8])
    config = a_config(AlignConfig("latents", 1, t_range=(low, high)))
    made = Alignment.of(batch, config, 0, conditions, GRID).targets[0]
    assert torch.equal(made.mask, (conditions.t >= low) & (conditions.t <= high))
    assert int(made.mask.sum()) == 6
    nothing, module = loss_of(a_config(AlignConfig("latents", 1, t_range=(0.0, 1e-6))))
    assert nothing.aligned[0] == 0
    nothing.total.backward()
    grads = gradients(module)
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("projectors."))


def test_a_target_that_has_stopped_leaves_the_students_gradient_to_the_bit():
    config = a_config(AlignConfig("latents", 1, stop=0.5), AlignConfig("latents", 2, stop=0.5))
    found = []
    for one, step in ((config, 4), (config, 5), (BASE, 5)):
        loss, module = loss_of(one, step=step)
        loss.total.backward()
        found.append((loss, gradients(module)))
    (on, _), (off, off_grads), (_, plain_grads) = found
    assert all(loss > 0 for loss in on.aligned)
    assert all(loss == 0 for loss in off.aligned)
    for name, grad in plain_grads.items():
        assert torch.equal(grad, off_grads[f"module.{name}"])
    beside = [grad for name, grad in off_grads.items() if name.startswith("projectors.")]
    # Zeros, and not nothing: an optimizer does with them what it does under every engine.
    assert len(beside) == 12
    assert not any(grad.any() for grad in beside)


# The control


def test_each_sample_has_another_one_by_its_position_and_not_by_the_batchs_order():
    positions = torch.tensor([3, 8, 1, 40, 7])
    others = others_of(0, positions)
    assert sorted(others.tolist()) == list(range(5))
    assert not (others == torch.arange(5)).any()
    order = torch.tensor([4, 2, 0, 1, 3])
    again = others_of(0, positions[order])
    partners = dict(zip(positions.tolist(), positions[others].tolist(), strict=True))
    moved = positions[order]
    assert partners == dict(zip(moved.tolist(), moved[again].tolist(), strict=True))
    more = [others_of(seed, positions).tolist() for seed in range(9)]
    assert len({tuple(one) for one in more}) > 3
    assert others_of(0, positions[:1]).tolist() == [0]


def test_the_control_has_the_features_of_another_picture():
    batch = make_batch()
    config = a_config(AlignConfig("latents", 1, shuffle=True), AlignConfig("latents", 2))
    conditions = Conditions.of(batch, config)
    control, real = Alignment.of(batch, config, 0, conditions, GRID).targets
    assert torch.equal(control.features, real.features[conditions.others])
    assert control.mask.all()
    alone = batch[:1]
    made = Alignment.of(alone, config, 0, Conditions.of(alone, config), GRID).targets
    assert [bool(target.mask) for target in made] == [False, True]
    # What no target asks for is not drawn.
    assert Conditions.of(batch, a_config(LATENTS)).others is None


def test_a_control_needs_two_samples_at_a_time(tmp_path):
    config = a_config(AlignConfig("latents", 1, shuffle=True), batch_size=8,
                      gradient_accumulation=2)  # fmt: skip
    check_batch_size(config, 2)
    with pytest.raises(ConfigError, match="some are of 1 sample: raise it to 12"):
        check_batch_size(config, 3)
    with pytest.raises(InputError, match="the DataLoader's are of 1 sample"):
        make_trainer(tmp_path, batch_size=1, align=config.align)


# A run


TARGETS = [
    AlignConfig("latents", 1, stop=0.5),
    AlignConfig("latents", 2, projector="conv", loss="smooth_l1", shuffle=True),
]


def test_the_students_first_weights_and_draws_do_not_know_of_targets(tmp_path):
    plain, aligned = make_trainer(tmp_path), make_trainer(tmp_path, align=TARGETS)
    assert torch.equal(weights(plain), weights(aligned))
    state = torch.get_rng_state()
    first = with_projectors(student(), a_config(*TARGETS)).projectors
    torch.set_rng_state(state)
    later = with_projectors(student(), a_config(TARGETS[1])).projectors
    for name, tensor in later.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])
    other = with_projectors(student(), a_config(*TARGETS, seed=1)).projectors
    assert not torch.equal(other.latents_1.layers[0].weight, first.latents_1.layers[0].weight)
    assert first.latents_1.layers[0].weight.std() > 0.05


def test_projectors_are_in_checkpoints_and_no_part_of_the_student(tmp_path):
    changes = {"total_steps": 4, "save_every_steps": 4, "ema_lengths": [0.1]}
    for name, align in (("plain", []), ("aligned", TARGETS)):
        make_trainer(tmp_path / name, align=align, **changes).train(epochs=9)
    plain, aligned = (
        tmp_path / name / "checkpoints" / "step_00000004" for name in ("plain", "aligned")
    )
    beside = {"projectors.safetensors"}
    names = {path.name for path in plain.iterdir()}
    assert {path.name for path in aligned.iterdir()} == names | beside
    for name in ("model.safetensors", "ema.safetensors", "ema_0.1.safetensors"):
        assert load_file(aligned / name).keys() == load_file(plain / name).keys()
    kept = load_file(aligned / "projectors.safetensors")
    trained = load_file(aligned / "optimizer.safetensors").keys()
    assert {name.rpartition("/")[0] for name in trained} == {
        *kept, *load_file(plain / "model.safetensors")
    }  # fmt: skip
    first = with_projectors(student(), a_config(*TARGETS)).state_dict()
    assert all(not torch.equal(tensor, first[name]) for name, tensor in kept.items())
    digests = json.loads((aligned / "trainer_state.json").read_text())["files"]
    assert beside <= digests.keys()
    load_model(aligned, device="cpu")


def test_losses_are_recorded_by_name_and_fall(tmp_path):
    make_trainer(
        tmp_path, total_steps=60, learning_rate=1e-2, log_every=5, align=TARGETS[:1],
        lr_scheduler="constant", gradient_accumulation=1,
    ).train(epochs=99)  # fmt: skip
    found = [record["align_latents_1"] for record in read_metrics(tmp_path / "logs/metrics.jsonl")]
    assert len(found) == 12
    assert found[5] < 0.8 * found[0]
    assert found[6:] == [0.0] * 6
    make_trainer(tmp_path / "plain", total_steps=2).train()
    (record,) = read_metrics(tmp_path / "plain" / "logs" / "metrics.jsonl")
    assert not any(name.startswith("align") for name in record)


@pytest.mark.parametrize("until", [2, 5])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "optimizer": "muon"}])
def test_a_run_that_goes_on_equals_one_that_was_not_stopped(tmp_path, until, changes):
    def make(name, steps, **others):
        return make_trainer(tmp_path / name, align=TARGETS, total_steps=steps,
                            lr_scheduler="constant", **{**changes, **others})  # fmt: skip

    whole = make("whole", 8)
    whole.train(epochs=9)
    # Of as many steps, by whose share targets end.
    kept = make("kept", 8, save_every_steps=until, keep_last_n_steps=9)
    kept.train(epochs=9)
    again = make("again", 8)
    again.load_checkpoint(str(tmp_path / "kept" / "checkpoints" / f"step_{until:08}"))
    assert again.current_step == until
    again.train(epochs=9)
    for trainer in (whole, again):
        trainer.save_checkpoint(str(tmp_path / f"{trainer.config.checkpoint_dir}-kept"))
    assert torch.equal(weights(again), weights(whole))
    assert torch.equal(shadow(again), shadow(whole))
    first, second = (
        load_file(tmp_path / f"{one.config.checkpoint_dir}-kept" / "projectors.safetensors")
        for one in (whole, again)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_goes_on_with_its_own_projectors_or_not_at_all(tmp_path):
    trainer = make_trainer(tmp_path, align=TARGETS[:1], total_steps=1)
    trainer.train()
    kept = tmp_path / "kept"
    trainer.save_checkpoint(str(kept))
    make_trainer(
        tmp_path, align=[replace(TARGETS[0], weight=1.0, loss="smooth_l1", stop=0.1)]
    ).load_checkpoint(str(kept))
    for align, message in (
        ([], r"kept began with \{'group': 'latents', 'block': 1, 'projector': 'mlp'\}"),
        ([replace(TARGETS[0], block=2)], r"kept began with .*'block': 1"),
        (TARGETS, r"kept began without .*'block': 2.*keep its targets"),
    ):
        other = make_trainer(tmp_path, align=align)
        before = weights(other)
        with pytest.raises(ConfigError, match=message):
            other.load_checkpoint(str(kept))
        assert torch.equal(weights(other), before)
    plain = make_trainer(tmp_path)
    plain.save_checkpoint(str(tmp_path / "plain"))
    with pytest.raises(ConfigError, match="plain began without"):
        make_trainer(tmp_path, align=TARGETS).load_checkpoint(str(tmp_path / "plain"))
    with pytest.raises(CheckpointError, match=r"latents_1\.layers\.0\.weight is missing"):
        load_projectors(with_projectors(student(), a_config(LATENTS)), {}, "there")
    damaged = kept / "projectors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\x7f")
    with pytest.raises(DamagedCheckpointError, match=r"projectors\.safetensors is not as it was"):
        make_trainer(tmp_path, align=TARGETS[:1]).load_checkpoint(str(kept))


def test_a_step_reads_nothing_from_the_device(tmp_path):
    """The meta device stands for another one: no tensor on it can be read at all."""
    config = settings(tmp_path, align=[LATENTS, TARGETS[1]])
    module = with_projectors(student().to("meta"), config)
    batch, null = make_batch(), tuple(tensor.to("meta") for tensor in NULL_TEXT)
    conditions = Conditions.of(batch, config).map(lambda tensor: tensor.to("meta"))
    there, buckets = batch.to("meta"), default_buckets(torch.device("meta"))
    with host_reads() as found:
        loss = training_loss(module.module, there, config, 0, null, buckets, module, conditions)
        loss.total.backward()
    assert found == {}


# What a plan says, and what is refused


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_plan_counts_the_projectors(patch_size):
    config = replace(MODEL, patch_size=patch_size)
    trainer = a_config(*TARGETS)
    alone = step_work(config, trainer, 3, (8, 8))
    work = add_projectors(alone, config, trainer, 3, (8, 8))
    module = with_projectors(TinyFluxDeep(config), trainer)
    count = sum(parameter.numel() for parameter in module.projectors.parameters())
    assert work.projectors == work.parameters - alone.parameters == count
    assert work.trainable - alone.trainable == count
    places, width, channels = 3 * (8 // patch_size) ** 2, 48, 4 * patch_size**2
    products = places * (2 * width * width + (1 + 9) * width * channels)
    # A forward, and two products of the same size backward.
    assert work.flops - alone.flops == pytest.approx(3 * 2 * products, rel=0.01)
    assert work.activation_bytes - alone.activation_bytes > 4 * places * 4 * width
    with pytest.raises(ConfigError, match="the student has 2, double and single"):
        add_projectors(alone, config, a_config(AlignConfig("latents", 3)), 3, (8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": "latent"}, r"group 'latent' is unknown \(did you mean 'latents'\?\)"),
        ({"block": 0}, "block must be at least 1"),
        ({"weight": 0.0}, "weight must be above 0"),
        ({"projector": "mpl"}, r"did you mean 'mlp'\?"),
        ({"loss": "l2"}, "loss 'l2' is unknown.*: choose one of cosine, smooth_l1, relations"),
        ({"t_range": (0.6, 0.4)}, r"t_range must be two times in \[0, 1\], the smaller first"),
        ({"stop": 0.0}, "stop must be above 0"),
        ({"projector": "none"}, "loss 'cosine' cannot compare"),
    ],
)
def test_targets_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        replace(LATENTS, **changes)
    assert "\n" not in str(caught.value)


def test_runs_that_cannot_have_their_targets_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="names group 'latents' twice after block 1"):
        a_config(LATENTS, replace(LATENTS, loss="relations"))
    with pytest.raises(ConfigError, match=r"after block 3, and the student has 2.* from 1 to 2"):
        make_trainer(tmp_path, align=[AlignConfig("latents", 3)])
    with pytest.raises(ConfigError, match=r"trainer\.align trains projectors beside a whole"):
        settings(tmp_path, align=[LATENTS], adapter={"rank": 4}, init_from="x")


def test_a_run_file_names_targets(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "trainer:\n  align:\n  - {group: latents, block: 8, t_range: [0.1, 0.9], stop: 0.4}\n"
    )
    run = load_run_config(file)
    assert run.trainer.align == [AlignConfig("latents", 8, t_range=(0.1, 0.9), stop=0.4)]
    save_run_config(run, tmp_path / "again.yaml")
    assert load_run_config(tmp_path / "again.yaml") == run
    file.write_text("trainer:\n  align:\n  - {group: latents}\n")
    with pytest.raises(ConfigError, match="block"):
        load_run_config(file)
