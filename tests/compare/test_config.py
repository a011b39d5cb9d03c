"""Comparison files: what they say, and how they are refused."""

from pathlib import Path

import pytest
import torch

from tinyflux.cli.main import run_job
from tinyflux.compare.config import load_compare_config, make_trials
from tinyflux.distributed.resume import first_weights
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "compare").glob("*.yaml"))
GOOD = """
settings:
  preset: toy
  trainer: {validate_every: 5, total_steps: 10}
arms:
  lune-off: {trainer.enable_lune: false}
  again:
  shuffled: {trainer.learning_rate: 1e-3}
control_of: {shuffled: lune-off}
seed_offset: {again: 100}
seeds: 2
"""


def load(folder, text, *overrides):
    file = folder / "mine.yaml"
    file.write_text(text)
    return load_compare_config(str(file), overrides)


def test_a_file_gives_every_arm_with_every_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load(tmp_path, GOOD, "--trainer.batch_size", "4", "--trainer.shift=1.0")
    assert config.output == str(tmp_path / "runs" / "compare" / "mine")
    assert config.pairs == [
        ("lune-off", "base"), ("again", "base"), ("shuffled", "base"), ("lune-off", "shuffled"),
    ]  # fmt: skip
    trials = make_trials(config)
    assert [trial.name for trial in trials[:5]] == [
        "base/seed-0", "lune-off/seed-0", "again/seed-0", "shuffled/seed-0", "base/seed-1",
    ]  # fmt: skip
    runs = {trial.name: trial.run for trial in trials}
    assert all(run.trainer.init_by_name for run in runs.values())
    assert all(run.trainer.batch_size == 4 for run in runs.values())
    assert runs["base/seed-1"].trainer.seed == 1
    assert runs["again/seed-1"].trainer.seed == 101
    assert runs["shuffled/seed-0"].trainer.learning_rate == 1e-3
    assert not runs["lune-off/seed-0"].trainer.enable_lune
    place = f"{config.output}/runs/lune-off/seed-0"
    assert runs["lune-off/seed-0"].run_dir == place
    assert runs["lune-off/seed-0"].sample.checkpoint == f"{place}/final"


def test_arms_of_a_seed_begin_with_the_same_weights_where_they_have_the_same_layers(tmp_path):
    arms = "arms: {lean: {model.use_lune_expert: false, trainer.enable_lune: false}, other: }"
    text = f"{GOOD[: GOOD.index('arms:')]}{arms}\nseed_offset: {{other: 1}}\nseeds: 1"
    base, lean, other = (
        first_weights(TrainingJob.of(trial.run), torch.device("cpu")).state_dict()
        for trial in make_trials(load(tmp_path, text))
    )
    assert lean.keys() < base.keys()
    assert all(torch.equal(base[name], weight) for name, weight in lean.items())
    assert any(not torch.equal(base[name], weight) for name, weight in other.items())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_files_of_the_project_are_comparisons(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_compare_config(str(file))
    assert len(make_trials(config)) == len(config.names) * len(config.seeds)


def test_the_place_of_a_comparison_may_be_a_url(tmp_path):
    config = load(tmp_path, GOOD + "output: s3://here/there\n")
    assert config.output == "s3://here/there"
    assert make_trials(config)[0].run.run_dir == "s3://here/there/runs/base/seed-0"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("arms:", "armz:"), "'armz' is no part of a comparison (did you mean 'arms'?)"),
        (
            ("enable_lune", "enable_lunes"),
            "arms: lune-off: trainer.enable_lunes is not a setting (did you mean "
            "'trainer.enable_lune'?)",
        ),
        (("validate_every: 5", "validat_every: 5"), "did you mean 'trainer.validate_every'?"),
        (
            ("shuffled: lune-off", "shufled: lune-off"),
            "no arm 'shufled' (did you mean 'shuffled'?)",
        ),
        (("shuffled: lune-off", "shuffled: lune"), "no arm 'lune' (did you mean 'lune-off'?)"),
        (("shuffled: lune-off", "shuffled: shuffled"), "cannot be its own control"),
        (("again: 100", "agian: 100"), "no arm 'agian' (did you mean 'again'?)"),
        (("  again:\n", "  base:\n"), "'base' cannot be an arm's name"),
        (("seeds: 2", "seeds: [1, 1]"), "seeds must be a number from 1"),
        (("seeds: 2", "seeds: 0"), "seeds must be a number from 1"),
        (("seeds: 2", "seeds: [a]"), "seeds must be int, not 'a'"),
        (("seeds: 2", "concurrent: 0"), "concurrent must be at least 1"),
        (("seeds: 2", "output: s3://me:secret@here/there"), "password"),
        (("enable_lune: false", "seed: 3"), "trainer.seed is not for an arm to set: say `seeds`"),
        (("preset: toy", "run_dir: runs/x"), "run_dir is not for an arm to set"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_place(tmp_path, change, sentence):
    assert change[0] in GOOD
    with pytest.raises(ConfigError) as met:
        load(tmp_path, GOOD.replace(*change))
    assert sentence in str(met.value)
    assert str(met.value).startswith(str(tmp_path))
    assert "\n" not in str(met.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("validate_every: 5", "validate_every: null"), "records no val_velocity_ema"),
        (("seeds: 2", "seeds: 2\nmetric: eval_kid"), "records no eval_kid: it needs"),
        (("learning_rate: 1e-3", "learning_rate: -1"), "the arm 'shuffled': "),
        (("trainer.learning_rate: 1e-3", "cache.num_actors: 7"), "a cache.path of its own"),
        (("seeds: 2", "base: nowhere.yaml"), "nowhere.yaml' cannot be read"),
    ],
)
def test_values_that_cannot_work_are_refused_before_any_trial(tmp_path, change, sentence):
    with pytest.raises(ConfigError) as met:
        make_trials(load(tmp_path, GOOD.replace(*change)))
    assert sentence in str(met.value)


def test_a_figure_of_pictures_decides_in_its_own_direction(tmp_path):
    text = GOOD.replace("validate_every: 5", "evaluate_every: 5")
    text += "metric: eval_coverage\nmetrics: [eval_kid]\n"
    config = load(tmp_path, text)
    assert len(make_trials(config)) == len(config.names) * 2
    assert not config.lower_is_better_of("eval_coverage")
    assert config.lower_is_better_of("eval_kid")
    turned = load(tmp_path, f"{text}lower_is_better: true")
    assert turned.lower_is_better_of("eval_coverage")


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert run_job("compare", []) == 2
    assert "say which comparison" in capsys.readouterr().err
    assert run_job("compare", [str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text(GOOD)
    assert run_job("compare", [str(tmp_path / "mine.yaml"), "--trainer.sed", "3"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "did you mean 'trainer.seed'?" in said
