"""Planning a run: what is said beforehand against what is really there afterwards."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.fixtures.worlds import make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.build import build, estimate
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.runner import LocalRunner
from tinyflux.config import RunConfig
from tinyflux.distributed.config import GB, ClusterConfig, WorkersConfig
from tinyflux.distributed.memory import sent_bytes
from tinyflux.errors import ConfigError
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.presets import preset
from tinyflux.model.pretrained import SD15_UNET
from tinyflux.model.teachers import lune_features, sol_features
from tinyflux.plan import encoders
from tinyflux.plan.memory import plan_memory
from tinyflux.plan.plan import make_plan
from tinyflux.plan.work import StepWork, count_step, flop_counter, forward_flops, step_work
from tinyflux.trainer.checkpoint import CheckpointData, save_checkpoint
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.optimizers import build_optimizer, flatten_state

CAPTIONS = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in
            ("circle", "square", "heart", "star")]  # fmt: skip


def a_run(**sections) -> RunConfig:
    """A shallow student of the default width on 8 nodes of 8 H100s, with changes by section."""
    run = RunConfig(
        model=TinyFluxConfig(num_double_layers=1, num_single_layers=1),
        cache=CacheConfig(num_actors=64, gpus_per_actor=1.0),
        trainer=TrainerConfig(batch_size=1024, gradient_accumulation=2),
        workers=WorkersConfig(num_workers=64, use_gpu=True),
        cluster=ClusterConfig(
            nodes=8, gpus_per_node=8, gpu="H100", samples=1_000_000, network_gbit=400
        ),
    )
    for name, values in sections.items():
        setattr(run, name, replace(getattr(run, name), **values))
    return run


@pytest.fixture
def toy(tmp_path):
    """A run on twelve pictures, and its build's configs."""
    torch.set_num_threads(1)
    world = make_world(tmp_path / "world")
    write_pictures(tmp_path / "pictures", CAPTIONS)
    run = RunConfig(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(str(tmp_path / "pictures"), height=16, width=16),
        zoo=zoo_config(world),
        cache=CacheConfig(str(tmp_path / "cache"), rows_per_shard=4, batch_size=3),
        model=student_config(),
        trainer=TrainerConfig(batch_size=4, gradient_accumulation=1, dtype=torch.float32),
        cluster=ClusterConfig(tflops=0.01),
    )
    return run, BuildConfigs(run.data, run.zoo, run.cache, run.model)


def bytes_on_disk(manifest) -> dict[str, int]:
    found: dict[str, int] = {}
    for shard in manifest.shards:
        for group, file in shard.files.items():
            found[group] = found.get(group, 0) + file.bytes
    return found


def test_a_measured_cache_is_as_large_as_planned(toy):
    run, configs = toy
    runner = LocalRunner(configs)
    estimate(configs, runner)
    planned = make_plan(run).cache
    actual = bytes_on_disk(build(configs, runner))
    assert planned.origin == "measured on a few batches"
    assert planned.hours > 0
    for group, size in actual.items():
        assert planned.bytes[group] == pytest.approx(size, rel=0.04), group
    there = make_plan(run).cache
    assert there.origin == "the finished cache"
    assert there.bytes == actual
    assert there.hours == 0


def test_formulas_know_the_bytes_of_each_column(toy):
    run, configs = toy
    run.cluster.samples, run.cluster.caption_tokens = len(CAPTIONS), 5
    planned = make_plan(run).cache
    assert planned.hours is None  # nobody knows how fast these models are
    actual = bytes_on_disk(build(configs, LocalRunner(configs)))
    # So small a cache is mostly what surrounds each file's rows; it is counted by the file.
    for group in ("latents", "lune", "sol"):
        assert planned.bytes[group] == pytest.approx(actual[group], rel=0.1), group


def test_the_files_of_a_cache_are_counted(toy):
    run, configs = toy
    manifest = build(configs, LocalRunner(configs))
    folders = [configs.store.directory / name for name in ("shards", "receipts")]
    files = sum(len(list(folder.iterdir())) for folder in folders)
    assert len(manifest.shards) > 1
    assert make_plan(run).cache.bookkeeping["files"] == files


def test_more_samples_of_the_same_kind_take_as_much_more(toy):
    run, configs = toy
    estimate(configs, LocalRunner(configs))
    one = make_plan(run).cache
    run.cluster.samples = 1000 * len(CAPTIONS)
    many = make_plan(run).cache
    assert many.shards == 1000 * one.shards
    assert many.total_bytes == pytest.approx(1000 * one.total_bytes, rel=1e-6)


def test_a_checkpoint_is_as_large_as_planned(toy, tmp_path):
    run, configs = toy
    build(configs, LocalRunner(configs))
    planned = make_plan(run).training.checkpoint_bytes
    model = TinyFluxDeep(run.model)
    engine = TorchEngine(model, run.trainer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine.step(1e-4)
    contents = CheckpointData(
        model,
        model.state_dict(),
        EMA(model, 0.99).state_dict()["shadow"],
        0.99,
        engine.optimizer_state(),
        TrainerState(),
    )
    save_checkpoint(tmp_path / "checkpoint", contents)
    actual = sum(
        path.stat().st_size for path in (tmp_path / "checkpoint").iterdir() if path.is_file()
    )
    assert actual == pytest.approx(planned, rel=0.2)  # names of many small tensors


def test_activations_are_what_the_backward_pass_really_keeps():
    config, trainer = student_config(), TrainerConfig(dtype=torch.float32)
    batch, grid = 3, (4, 4)
    work = step_work(config, trainer, batch, grid)
    model = TinyFluxDeep(config).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity, experts = model(
            torch.randn(batch, 16, config.in_channels),
            torch.randn(batch, config.max_text_length, config.t5_hidden_size),
            torch.randn(batch, config.pooled_projection_dim),
            torch.rand(batch),
            TinyFluxDeep.create_img_ids(batch, *grid),
            return_expert_pred=True,
            grid=grid,
        )
        sum(part.square().mean() for part in (velocity, *experts.values()))
    actual = sum(storage.nbytes() for storage in kept.values())
    assert work.activation_bytes == pytest.approx(actual, rel=0.02)
    assert work.parameters == sum(parameter.numel() for parameter in model.parameters())


def forward_flops_by_hand(config: TinyFluxConfig, image: int) -> tuple[int, int]:
    """FLOPs of one sample's forward by hand: its linear maps', and attention's.

    A map of n tokens from a to b channels takes 2 n a b; attention of s tokens and width d takes
    2 s s d for the logits and as many for the values.
    """
    width, text = config.hidden_size, config.max_text_length
    inner, tokens = int(width * config.mlp_ratio), image + text
    vectors = 256 * width + width**2 + config.pooled_projection_dim * width
    vectors += config.t5_hidden_size * width + width**2
    streams = image * config.in_channels * width + text * config.t5_hidden_size * width
    block = tokens * (3 * width**2 + width**2 + 2 * width * inner)
    double = config.num_double_layers * (2 * 6 * width**2 + block)
    single = config.num_single_layers * (3 * width**2 + block)
    maps = 2 * (vectors + streams + double + single + image * width * config.in_channels)
    layers = config.num_double_layers + config.num_single_layers
    return maps, layers * 4 * tokens**2 * width


@pytest.mark.parametrize("pixels", [256, 512, 1024])
def test_a_step_has_the_flops_of_the_closed_formula(pixels):
    """Backward does each map's work twice, and attention's 2.5 times: its logits are made again."""
    config = preset("tiny-flux-deep")
    side = pixels // 8
    work = step_work(config, TrainerConfig(), 1, (side, side))
    maps, attention = forward_flops_by_hand(config, side * side)
    assert work.flops == pytest.approx(3 * maps + 3.5 * attention, rel=0.01)
    if pixels == 512:
        again = step_work(config, TrainerConfig(gradient_checkpointing=True), 1, (side, side))
        # Nothing reads what a single block's last map gives, so it is not made again.
        inner = int(config.hidden_size * config.mlp_ratio)
        tokens = side * side + config.max_text_length
        spared = config.num_single_layers * 2 * tokens * inner * config.hidden_size
        assert again.flops == pytest.approx(4 * maps + 4.5 * attention - spared, rel=0.01)


@pytest.mark.parametrize("pixels", [256, 512])
def test_a_forward_has_the_flops_of_the_closed_formula(pixels):
    config, side = preset("tiny-flux-deep"), pixels // 8
    maps, attention = forward_flops_by_hand(config, side * side)
    assert forward_flops(config, (side, side)) == pytest.approx(maps + attention, rel=0.01)


@pytest.mark.parametrize(("blocks", "checkpointing"), [((0, 3), True), ((3, 1), False)])
def test_blocks_that_are_alike_are_counted_by_one(blocks, checkpointing):
    """Against a count of every block."""
    config = student_config(num_double_layers=blocks[0], num_single_layers=blocks[1])
    trainer = TrainerConfig(gradient_checkpointing=checkpointing)
    assert step_work(config, trainer, 2, (4, 4)) == count_step(config, trainer, 2, (4, 4))


def counted(work) -> encoders.Flops:
    """FLOPs of what ``work`` does, by kind; self-attention is the products of Sol's rows, too."""
    with flop_counter() as counter, torch.no_grad():
        work()
    total = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    convolutions = total.pop("aten.convolution")
    products = total.pop("aten.mm") + total.pop("aten.addmm")
    return encoders.Flops(convolutions, products, sum(total.values()))


@pytest.mark.parametrize("pixels", [512, 1024])
def test_the_encoders_have_the_flops_that_hours_are_planned_from(pixels):
    """The published architectures, run on tensors without values."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def expect(planned: encoders.Flops, found: encoders.Flops):
        scaled = planned.at(pixels**2)
        assert scaled.convolutions == pytest.approx(found.convolutions, rel=0.01)
        # Attention to text grows with the pixels and not their square, and is counted on one side
        # here and on the other there.
        assert sum(scaled) == pytest.approx(sum(found), rel=0.02)

    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
        )
        unet = UNet2DConditionModel(**SD15_UNET)
        side = pixels // 8
        inputs = (torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, 77, 768))
        expect(encoders.VAE, counted(lambda: vae.encode(torch.zeros(1, 3, pixels, pixels))))
        latents = torch.zeros(1, 16, side, side)
        expect(encoders.DECODER, counted(lambda: vae.decode(latents)))
        expect(encoders.LUNE, counted(lambda: lune_features(unet, *inputs)))
        sol = counted(lambda: sol_features(unet, *inputs, query_chunk=side**2))
        # A CPU's rows serve both ends; a GPU makes them once more: three products for two.
        expect(encoders.SOL, sol._replace(attention=1.5 * sol.attention))


def test_checkpointing_keeps_less_and_computes_more():
    config = student_config(num_double_layers=3, num_single_layers=3)
    plain = step_work(config, TrainerConfig(), 2, (4, 4))
    again = step_work(config, TrainerConfig(gradient_checkpointing=True), 2, (4, 4))
    assert again.activation_bytes < plain.activation_bytes / 2
    assert plain.flops < again.flops < 1.5 * plain.flops


def test_muon_keeps_one_number_of_a_matrix_in_a_block():
    def planned(optimizer):
        run = a_run(trainer={"optimizer": optimizer}, workers={"engine": "torch"})
        return make_plan(run).training

    work = step_work(a_run().model, TrainerConfig(), 1, (8, 8))
    muon, adamw = planned("muon"), planned("adamw")
    less = 4 * work.matrices
    assert 0.5 < work.matrices / work.parameters < 1
    assert muon.memory[0]["moments"] == pytest.approx(adamw.memory[0]["moments"] - less)
    assert muon.checkpoint_bytes == adamw.checkpoint_bytes - less
    with pytest.raises(ConfigError, match="'muon' does not run under DeepSpeed"):
        make_plan(a_run(trainer={"optimizer": "muon"}))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_an_optimizers_memory_is_what_it_keeps(optimizer):
    config = student_config()
    student, settings = TinyFluxDeep(config), TrainerConfig(optimizer=optimizer)
    names = [name for name, _ in student.named_parameters()]
    made = build_optimizer(list(student.parameters()), settings, names)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    state = flatten_state(made, names, list(student.parameters()))
    kept = sum(tensor.nbytes for name, tensor in state.items() if not name.endswith("/step"))
    assert step_work(config, settings, 1, (4, 4)).moment_bytes(optimizer) == kept


@pytest.mark.parametrize(
    ("optimizer", "gigabytes"), [("adamw", 20.0), ("muon", 16.8), ("adafactor", 12.0)]
)
def test_a_nodes_memory_holds_a_checkpoint_as_the_optimizer_keeps_it(optimizer, gigabytes):
    """Weights and two averages of 1e9 numbers, and their moments, until they are written."""
    count = 10**9
    work = StepWork(
        parameters=count, trainable=count, matrices=8 * 10**8, factors=10**6, largest=10**6,
        flops=1, activation_bytes=0,
    )  # fmt: skip

    def needed(**settings):
        trainer = {"optimizer": optimizer, "ema_lengths": [0.1], **settings}
        run = a_run(
            trainer=trainer, workers={"engine": "torch"}, cluster={"memory_gb_per_node": 0.1}
        )
        with pytest.raises(ConfigError, match="beside its GPUs") as caught:
            plan_memory(run, work, (0,), 0, 1, workers_per_node=8)
        return float(re.search(r"needs ([\d.]+) GB", str(caught.value))[1])

    copied = needed(async_checkpoints=True) - needed(async_checkpoints=False)
    assert copied == pytest.approx(gigabytes, abs=0.11)  # both are rounded


def test_each_zero_stage_needs_no_more_memory_than_the_one_before():
    memory = make_plan(a_run()).training.memory
    # DeepSpeed's buffers are all that a stage adds.
    totals = [sum(kinds.values()) - kinds["buffers"] for kinds in memory.values()]
    assert totals == sorted(totals, reverse=True)


def test_a_lone_worker_sends_nothing_and_stage_3_sends_most():
    assert [sent_bytes(100, 100, 1, stage, 2) for stage in range(4)] == [0] * 4
    sent = [sent_bytes(800, 800, 8, stage, 2) for stage in range(4)]
    assert sent[0] == sent[1] == 2 * 4 * 700
    assert sent[0] < sent[2] < sent[3]


def test_a_run_costs_its_hours_on_every_node():
    plan = make_plan(a_run(cluster={"price_per_node_hour": 50.0}))
    assert plan.price == pytest.approx(plan.hours * 8 * 50)
    assert plan.hours == pytest.approx(plan.cache.hours + plan.training.hours)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cluster": {"network_gbit": 0.5}}, "faster network"),
        ({"cluster": {"storage_gb_per_s_in_all": 0.05}}, "faster storage"),
        ({"trainer": {"total_steps": 10_000_000}}, "more or faster workers"),
        ({"trainer": {"total_steps": 10}}, "its sol column"),
    ],
)
def test_the_bottleneck_is_named(changes, said):
    assert said in make_plan(a_run(**changes)).bottleneck


def test_float32_is_not_planned_at_the_speed_of_bfloat16():
    half = make_plan(a_run(zoo={"dtype": torch.bfloat16}))
    full = make_plan(a_run(zoo={"dtype": torch.float32}))
    # Convolutions at half of bf16's peak, products at the fifteenth part of it.
    assert 5 < full.cache.hours / half.cache.hours < 10
    assert "float32" in str(full)
    slow = make_plan(a_run(trainer={"dtype": torch.float32})).training
    assert slow.compute / half.training.compute == pytest.approx(989 / 67)
    tf32 = make_plan(a_run(trainer={"dtype": torch.float32, "tf32": True})).training
    assert tf32.compute / half.training.compute == pytest.approx(2)


def test_processes_on_cpus_are_not_as_fast_as_the_gpus_beside_them():
    assert make_plan(a_run(cache={"gpus_per_actor": 0.0})).cache.hours is None
    with pytest.raises(ConfigError, match=r"set workers\.use_gpu"):
        make_plan(a_run(workers={"use_gpu": False}))


def evaluated(**sections):
    """The plan of drawing 10,000 held-out captions on eight GPUs, with changes by section."""
    sections.setdefault("evaluate", {"count": 10_000})
    sections.setdefault("sample", {"num_actors": 8, "gpus_per_actor": 1.0})
    sections.setdefault("zoo", {"dtype": torch.bfloat16})
    return make_plan(a_run(**sections)).evaluation


def test_an_evaluation_takes_the_students_forwards_and_the_decoder():
    plan = evaluated()
    run = a_run()
    student = 2 * 28 * forward_flops(run.model, (64, 64))
    assert plan.flops_per_picture == student + sum(encoders.DECODER)
    speed = run.cluster.speed(torch.bfloat16, on_gpu=True)
    decoding = encoders.DECODER.seconds(speed)
    assert plan.seconds == pytest.approx(student / speed.products + decoding)
    # Ten thousand drawn, and as many of the cache decoded.
    assert plan.hours * 3600 * 8 == pytest.approx(10_000 * (plan.seconds + decoding))
    assert (plan.pictures, plan.decoded, plan.nodes) == (10_000, 10_000, 1)


def test_an_evaluations_hours_follow_its_pictures_actors_and_guidance():
    plan = evaluated()
    more = evaluated(evaluate={"count": 10_000, "seeds": 3})
    assert (more.pictures, more.decoded) == (30_000, 10_000)
    assert plan.hours < more.hours < 3 * plan.hours
    twice = evaluated(sample={"num_actors": 16, "gpus_per_actor": 1.0})
    assert (twice.hours, twice.nodes) == (pytest.approx(plan.hours / 2), 2)
    shared = evaluated(sample={"num_actors": 16, "gpus_per_actor": 0.5})
    assert (shared.hours, shared.nodes) == (pytest.approx(plan.hours), 1)
    plain = evaluated(sample={"num_actors": 8, "gpus_per_actor": 1.0, "guidance_scale": 1.0})
    assert plain.forwards == plan.forwards / 2


def test_an_evaluation_on_unknown_machines_has_no_hours_and_none_has_no_plan():
    assert evaluated(sample={"num_actors": 8}).hours is None
    run = a_run(sample={"num_actors": 8})
    assert "time: not known" in str(make_plan(run))
    run.evaluate.extractors = []
    plan = make_plan(run)
    assert plan.evaluation is None
    assert "evaluation" not in str(plan)
    with pytest.raises(ConfigError, match=r"sample.num_actors = 99 do not fit"):
        evaluated(sample={"num_actors": 99, "gpus_per_actor": 1.0})


def test_a_column_takes_longer_for_more_pixels():
    small = make_plan(a_run(data={"height": 256, "width": 256})).cache
    large = make_plan(a_run()).cache
    for group in ("latents", "lune", "sol"):
        ratio = large.seconds_per_sample[group] / small.seconds_per_sample[group]
        assert 4 < ratio < 16  # between pixels and their square
    assert large.seconds_per_sample["text"] == small.seconds_per_sample["text"]
    assert 4 < large.seconds_together / small.seconds_together < 16


def test_other_samples_than_are_there_are_said(toy):
    run, configs = toy
    run.cluster.samples = 10_000_000
    assert "pictures' holds 12 pictures; planned are cluster.samples = 10,000,000" in str(
        make_plan(run)
    )
    estimate(configs, LocalRunner(configs))
    assert "the estimate is of 12 samples; planned are" in str(make_plan(run))
    build(configs, LocalRunner(configs))
    assert "cache' holds 12 samples; planned are" in str(make_plan(run))
    run.cluster.samples = 0
    assert "planned are" not in str(make_plan(run))


def test_the_cheapest_zero_stage_is_named():
    slow = a_run(workers={"zero_stage": 3}, cluster={"network_gbit": 10.0})
    plan = make_plan(slow)
    steps = plan.training.seconds_by_stage
    assert plan.training.cheapest_stage == 1  # sends as little as 0, and needs less memory
    assert steps[0] == steps[1] < steps[2] < steps[3] == plan.training.step_seconds
    assert "cheapest is workers.zero_stage: 1" in str(plan)
    slow.workers.zero_stage = 1
    assert "the run's stage 1 is as fast as any" in str(make_plan(slow))
    # Where only the last fits, it is the cheapest.
    slow.workers.zero_stage = 3
    by_stage = plan.training.memory
    between = (sum(by_stage[2].values()) + sum(by_stage[3].values())) / 2 / GB
    slow.cluster.gpu_memory_gb = between
    assert make_plan(slow).training.cheapest_stage == 3


def test_a_plan_says_no_more_digits_than_it_knows():
    text = str(make_plan(a_run(cluster={"price_per_node_hour": 55.0})))
    said = re.findall(r"([\d,.]+) (?:s|minutes|hours|days|at the stated price)\b", text)
    assert len(said) > 5
    assert all(len(number.replace(",", "").replace(".", "").strip("0")) <= 2 for number in said)
    assert "together is less than the sum" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": {"num_workers": 65}}, "workers.num_workers = 65 do not fit 8 nodes"),
        ({"cache": {"num_actors": 65}}, "cache.num_actors = 65 do not fit"),
        ({"cache": {"gpus_per_actor": 3.0}}, "which hold 2 each"),
        ({"cluster": {"gpu_memory_gb": 8.0}}, "its activations take most of it"),
        ({"cluster": {"gpu_memory_gb": 10.0}, "workers": {"zero_stage": 0}}, "zero_stage to 1"),
        ({"cluster": {"storage_gb": 10.0}}, "do not fit cluster.storage_gb"),
        ({"cluster": {"memory_gb_per_node": 5.0}}, "beside its GPUs"),
        ({"cluster": {"samples": 0}}, "cluster.samples"),
        ({"cluster": {"gpu": "", "gpu_memory_gb": 80.0}}, "--calibrate"),
        ({"trainer": {"batch_size": 64}}, "must be at least"),
    ],
)
def test_what_cannot_fit_is_refused_in_one_sentence(changes, said):
    with pytest.raises(ConfigError) as caught:
        make_plan(a_run(**changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offloaded_state_is_not_on_the_gpu():
    here = make_plan(a_run()).training.memory[2]
    away = make_plan(a_run(workers={"offload": True})).training.memory[2]
    assert set(here) - set(away) == {"master", "moments"}


def test_workers_on_cpus_share_their_node():
    run = a_run(
        workers={"use_gpu": False, "num_workers": 4},
        cache={"gpus_per_actor": 0.0, "num_actors": 4},
        cluster={
            "nodes": 2, "gpus_per_node": 0, "gpu": "", "tflops": 1.0, "cpus_per_node": 2,
            "memory_gb_per_node": 900.0,
        },
        trainer={"batch_size": 16},
    )  # fmt: skip
    training = make_plan(run).training
    assert training.nodes == 2
    assert training.limit == 450 * GB


def test_the_command_prints_a_table_or_json_and_refuses(tmp_path):
    path = tmp_path / "run.yaml"
    settings = {
        "preset": "toy",
        "workers": {"num_workers": 2},
        "cluster": {"nodes": 1, "samples": 1000, "tflops": 0.05, "price_per_node_hour": 1.5},
    }
    path.write_text(yaml.safe_dump(settings))

    def plan(*arguments):
        command = [sys.executable, "-m", "tinyflux", "plan", str(path), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    table = plan()
    assert table.returncode == 0, table.stderr
    assert "ZeRO 3" in table.stdout
    assert "bottleneck: training" in table.stdout
    found = json.loads(plan("--json", "--cluster.price_per_node_hour", "3").stdout)
    assert found["price"] == pytest.approx(3 * found["hours"])
    refused = plan("--cluster.memory_gb_per_node", "1")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: a worker needs")
    assert refused.stdout == ""
