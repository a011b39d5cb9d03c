import ast
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import docstring_parser
import pytest
import torch
import yaml

from tinyflux.cache.config import MixSource
from tinyflux.cli.cache import COMMANDS as CACHE_COMMANDS
from tinyflux.cli.main import COMMANDS, run_job
from tinyflux.config import (
    RunConfig,
    load_run_config,
    parse_run_config,
    save_run_config,
    stage_names,
)
from tinyflux.distributed.config import SampleConfig
from tinyflux.errors import ConfigError
from tinyflux.model.presets import PRESETS, preset
from tinyflux.serving.config import ServeConfig
from tinyflux.trainer.config import TrainerConfig

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def test_the_demo_file_with_overrides():
    run = parse_run_config(
        ["--config", str(DEMO), "--trainer.learning_rate", "3e-4", "--trainer.dtype=bfloat16"]
    )
    assert run.trainer.learning_rate == 3e-4
    assert run.trainer.dtype == torch.bfloat16
    assert run.model == replace(
        preset("toy"),
        patch_size=2,
        max_text_length=20,
        qk_norm=True,
        gated_single_mlp=True,
        mask_text_padding=True,
        time_scale=1000.0,
    )
    assert Path(run.cache.path).is_absolute()
    assert Path(run.zoo.t5_repo).is_absolute()


def test_a_preset_gives_defaults_that_single_settings_change():
    run = parse_run_config(["--preset", "tiny-flux-deep", "--model.freeze_sol", "true"])
    assert run.model.hidden_size == 512
    assert run.model.freeze_sol
    assert run.zoo.t5_repo == "google/flan-t5-base"


def test_a_resolved_config_is_read_back_equal(tmp_path):
    run = load_run_config(DEMO, ["--workers.num_workers", "1"])
    save_run_config(run, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml") == run


def test_a_section_that_may_be_left_out_is_read_checked_and_its_path_resolved():
    run = load_run_config(DEMO, ["--evaluate.trained_on.file", "other.parquet"])
    assert run.evaluate.trained_on.labels == ["thing", "style"]
    assert run.evaluate.trained_on.file == str(Path("other.parquet").absolute())
    with pytest.raises(ConfigError, match=r"fil is not a setting .did you mean 'evaluate.trained"):
        load_run_config(DEMO, ["--evaluate.trained_on.fil", "other.parquet"])


STAGED = """
run_dir: {root}/run
preset: toy
trainer: {{total_steps: 10, betas: [0.9, 0.99], init_from: someone/flux}}
stages:
  - name: 256
    data: {{height: 256, width: 256}}
    cache: {{path: {root}/small}}
  - name: fine
    data: {{height: 512, width: 512}}
    trainer: {{learning_rate: 1.0e-5}}
  - name: mixed
    mix: [{{path: {root}/a, weight: 2}}]
    trainer: {{init_from: {root}/elsewhere}}
"""


def test_each_stage_is_a_run_from_the_one_before(tmp_path):
    (tmp_path / "run.yaml").write_text(STAGED.format(root=tmp_path))
    given = ["--config", str(tmp_path / "run.yaml"), "--trainer.seed", "3"]
    whole = parse_run_config(given, whole=True)
    assert stage_names(whole) == ["256", "fine", "mixed"]
    assert whole.sample.checkpoint == str(tmp_path / "run" / "stages" / "mixed" / "final")
    small, fine, mixed = (
        parse_run_config([*given, "--stage", name], whole=True) for name in stage_names(whole)
    )
    for run in (small, fine, mixed):
        assert run.trainer.seed == 3
        assert run.trainer.betas == (0.9, 0.99)
        assert run.model == preset("toy")
        assert run.stages == []
        assert run.sample.checkpoint == f"{run.run_dir}/final"
    assert [run.data.height for run in (small, fine, mixed)] == [256, 512, RunConfig().data.height]
    assert small.trainer.init_from == "someone/flux"
    assert fine.trainer.init_from == small.run_dir == str(tmp_path / "run" / "stages" / "256")
    assert fine.trainer.learning_rate == 1e-5
    assert (fine.cache.path, mixed.mix[0].weight) == ("", 2.0)
    assert mixed.trainer.init_from == str(tmp_path / "elsewhere")
    assert parse_run_config(given) == mixed
    save_run_config(fine, tmp_path / "fine.yaml")
    assert load_run_config(tmp_path / "fine.yaml") == fine


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"data": {"height": 8}}], "each of stages needs a name of its own"),
        ([{"name": "a/b"}], "not 'a/b'"),
        ([{"name": "a"}, {"name": "a"}], "not 'a'"),
        ([{"name": "a", "trainer": {"lerning_rate": 1}}], "stage 'a': trainer.lerning_rate"),
        ([{"name": "a", "run_dir": "x"}], "stage 'a': run_dir is the same for all stages"),
        (
            [{"name": "a", "trainer": {"total_steps": 0}}],
            r"trainer\.total_steps must be at least 1",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_one_sentence(tmp_path, stages, message):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"stages": stages}))
    with pytest.raises(ConfigError, match=message):
        load_run_config(tmp_path / "run.yaml")


def test_a_stage_that_is_not_there_suggests_one(tmp_path):
    with pytest.raises(ConfigError, match="this run has no stages"):
        parse_run_config(["--stage", "256"])
    (tmp_path / "run.yaml").write_text("stages: [{name: small}, {name: large}]")
    with pytest.raises(ConfigError, match=r"smal is not a stage \(did you mean 'small'\?\)"):
        load_run_config(tmp_path / "run.yaml", ["--stage", "smal"])


@pytest.mark.parametrize(
    ("section", "former", "new"),
    [
        ("sample", ["height", "width"], "size"),
        ("trainer", ["sample_height", "sample_width"], "sample_size"),
        ("serve", ["max_height", "max_width"], "max_size"),
    ],
)
def test_former_sides_are_taken_with_one_line_and_not_beside_the_new(
    tmp_path, caplog, section, former, new
):
    given = [f"{section}.{name}" for name in former]
    file = tmp_path / "run.yaml"
    file.write_text(f"{section}: {{{former[0]}: 8, {former[1]}: 16}}\n")
    run = load_run_config(file)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{given[0]} and {given[1]} are in latents")
    assert f"set {section}.{new}, in pixels, instead" in said
    save_run_config(run, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml") == run

    caplog.clear()
    file.write_text(f"{section}: {{{new}: 640x480}}\n")
    assert getattr(getattr(load_run_config(file), section), new) == "640x480"
    assert not caplog.records
    with pytest.raises(ConfigError, match=rf"{section}\.{new} and {given[1]} are both set: keep"):
        # A command that does not serve need not mind what a server would refuse.
        load_run_config(file, [f"--{given[1]}", "16"]).serve.check_limits()


def test_former_sides_mean_latents_and_the_new_ones_pixels():
    assert SampleConfig(height=8).picture_size(4) == (256, 32)
    assert SampleConfig(size="64x32").picture_size(4) == (64, 32)
    assert SampleConfig().picture_size(4) == SampleConfig().picture_size(8) == (512, 512)
    assert ServeConfig(max_width=8).largest_picture(8) == (64, 1024)
    assert ServeConfig(max_size=64).largest_picture(8) == (64, 64)
    for section in ({"sample_height": 0}, {"sample_size": "0x8"}):
        with pytest.raises(ConfigError, match=rf"trainer\.{next(iter(section))} must be"):
            TrainerConfig(**section)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.learning_rat", "3"], r"did you mean 'trainer\.learning_rate'\?"),
        (["--trainer.learning_rate", "abc"], r"trainer\.learning_rate.*abc"),
        (["--trainer.lr_scheduler", "cosin"], r"did you mean 'cosine'\?"),
        (["--model.num_attention_heads", "5"], "does not divide"),
        (["--model.axes_dims_rope", "[4, 4, 4]"], "add up to"),
        (["--preset", "toi"], r"did you mean 'toy'\?"),
        (["--config", "/nowhere.yaml"], "cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_run_config(arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_the_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("trainer:\n  total_step: 3\n")
    with pytest.raises(ConfigError, match=r"trainer\.total_step is not a setting \(did you mean"):
        load_run_config(path)
    path.write_text("trainer: [\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_run_config(path)


def test_a_mistake_ends_a_job_with_status_2_and_no_traceback(capsys, tmp_path):
    assert run_job("cache", ["build", "--data.folder", str(tmp_path), "--cache.path", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "holds no pictures" in error
    assert run_job("train", ["--cache.path", str(tmp_path), "--run_dir", str(tmp_path)]) == 2
    assert "there is no cache at" in capsys.readouterr().err
    assert run_job("sample", ["--run_dir", str(tmp_path), "--sample.prompts", "[red]"]) == 2
    assert "error: there is no checkpoint" in capsys.readouterr().err


def test_the_command_line_answers_quickly_and_without_torch():
    code = "import tinyflux.cli.main, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tinyflux", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0.1.0"


@pytest.mark.parametrize("name", [*COMMANDS, *(f"cache {name}" for name in CACHE_COMMANDS)])
def test_every_command_has_a_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        run_job(name.split()[0], [*name.split()[1:], "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: tinyflux {name}")


def test_a_settings_help_is_grouped_and_ends_with_an_example(capsys):
    with pytest.raises(SystemExit):
        parse_run_config(["--help"], "tinyflux train")
    text = capsys.readouterr().out
    assert "\nTraining:\n" in text
    assert "\nThe server and its limits:\n" in text
    for name in PRESETS:
        assert name in text.split("--preset PRESET")[1].split("\n  --")[0]
    assert "``" not in text
    assert "  tinyflux train --config configs/demo.yaml --run_dir runs/mine" in text
    words = text.split("\nexample:\n")[1].splitlines()[0].split()
    run = parse_run_config(["--config", str(DEMO), *words[4:]])  # the example is one that works
    assert run.trainer.learning_rate == 3e-4


def test_every_setting_has_its_sentence():
    sections = [RunConfig, MixSource]
    sections += [type(value) for value in vars(RunConfig()).values() if is_dataclass(value)]
    assert len(sections) > 9
    for section in sections:
        said = {
            item.arg_name: item.description
            for item in docstring_parser.parse(section.__doc__).params
        }
        names = [item.name for item in fields(section)]
        assert sorted(said) == sorted(names), section
        for name, sentence in said.items():
            # In a sentence's form: a capital, or something quoted, and a full stop.
            assert re.match(r"[A-Z`]|torch\.", sentence), f"{section}: {name}"
            assert sentence.endswith("."), f"{section}: {name}"


MACHINERY = {"ray", "transformers", "diffusers", "pyarrow", "deepspeed", "fastapi"}


@pytest.mark.parametrize(
    "code",
    [
        "import tinyflux.config",
        "from tinyflux.cli.main import run_job; run_job('train', ['--help'])",
        "from tinyflux.cli.main import run_job; run_job('serve', ['--serve.prot', '1'])",
    ],
)
def test_settings_are_read_without_the_machinery(code):
    """Not by the clock, which a busy machine slows: by what is loaded."""
    report = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('loaded:', *sorted({MACHINERY} & sys.modules.keys())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", report + code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


@pytest.mark.parametrize("package", ["cache", "distributed", "model", "serving"])
def test_a_sections_module_needs_errors_and_util_alone(package):
    path = Path(__file__).parents[1] / "tinyflux" / package / "config.py"
    needed = {node.module for node in ast.parse(path.read_text()).body
              if isinstance(node, ast.ImportFrom)}  # fmt: skip
    ours = {name for name in needed if name and name.startswith("tinyflux")}
    assert ours <= {
        "tinyflux.errors",
        "tinyflux.util.config",
        "tinyflux.util.urls",
        "tinyflux.util.limits",
        "tinyflux.util.picture_size",
    }
