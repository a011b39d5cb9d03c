"""Sets drawn and measured by Ray Data actors, again, and after a part was lost.

Slow: it builds a cache, then starts Ray and an actor for each evaluation.
"""

import io
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.fixtures.waiting import PATIENCE
from tests.fixtures.worlds import CAPTIONS, make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.build import build
from tinyflux.cache.config import CacheConfig, DataConfig, MixSource
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.runner import LocalRunner
from tinyflux.distributed.config import SampleConfig, WorkersConfig
from tinyflux.distributed.evaluate import measure
from tinyflux.distributed.training import Training
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.errors import InputError
from tinyflux.evaluation.classifier import Classifier, ClassifierConfig, save_classifier
from tinyflux.evaluation.config import EvaluateConfig, EvaluationSet
from tinyflux.evaluation.record import Measured
from tinyflux.model.loader import save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.best import read_best
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.metrics import read_metrics
from tinyflux.util.config import from_dict, to_dict

pytestmark = pytest.mark.slow

COUNT = 12
JOB = """
import json, sys
from tinyflux.distributed.config import SampleConfig
from tinyflux.distributed.evaluate import measure
from tinyflux.evaluation.config import EvaluateConfig
from tinyflux.model.config import ZooConfig
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.logging import log_to_console
log_to_console()
packed = [json.loads(part) for part in sys.argv[1:]]
kinds = (EvaluateConfig, SampleConfig, ZooConfig)
configs = [from_dict(kind, part, "test") for kind, part in zip(kinds, packed)]
print(json.dumps(to_dict(measure(*configs, *packed[3:]))))
"""


def png(index):
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), (index * 20, 250 - index * 20, 99)).save(picture, "PNG")
    return picture.getvalue()


@pytest.fixture
def place(tmp_path):
    """A cache, an untrained student, a classifier of colours, and a Parquet file of pictures."""
    make_world(tmp_path / "world")
    captions = [CAPTIONS[index % 4] for index in range(COUNT)]
    write_pictures(tmp_path / "pictures", captions)
    zoo, model = zoo_config(tmp_path / "world"), student_config()
    configs = BuildConfigs(
        DataConfig(str(tmp_path / "pictures"), height=16, width=16),
        zoo,
        CacheConfig(str(tmp_path / "cache"), rows_per_shard=6),
        model,
    )
    build(configs, LocalRunner(configs))
    torch.manual_seed(0)
    save_model(TinyFluxDeep(model), tmp_path / "run" / "final")
    labels = {"colour": ["red", "blue"]}
    save_classifier(Classifier(ClassifierConfig(labels, 8, (4,))), tmp_path / "classifier")
    table = {
        "image": [{"bytes": png(index), "path": None} for index in range(COUNT)],
        "text": captions,
        "colour": ["red", "blue"] * (COUNT // 2),
    }
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
    return tmp_path


def job(place, checkpoint="run/final", val_fraction=0.0, **changes):
    evaluate = {
        "extractors": ["efficientnet-lite0", f"classifier:{place / 'classifier'}"],
        "sets": [
            EvaluationSet(
                "pairs", str(place / "pairs.parquet"), labels=["colour"], group_by=["colour"]
            )
        ],
        "cache_sets": ["train"],
        "smallest_group": 6,
        **changes,
    }
    sample = SampleConfig(num_steps=2, batch_size=5, checkpoint=str(place / checkpoint))
    places = (str(place / "cache"), val_fraction, str(place / "run"))
    return EvaluateConfig(**evaluate), sample, zoo_config(place / "world"), *places


def measured(place, head, **changes):
    """What a driver of its own gives, and what it said."""
    arguments = [json.dumps(to_dict(part)) for part in job(place, **changes)]
    driver = subprocess.run(
        [sys.executable, "-c", JOB, *arguments],
        env=head.environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert driver.returncode == 0, driver.stderr[-3000:]
    record = json.loads(driver.stdout.splitlines()[-1])
    return from_dict(Measured, record, "the record"), driver.stdout + driver.stderr


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_sets_are_measured_once_and_what_is_lost_is_made_again(head, place):
    first, said = measured(place, head)
    assert f"features of 0 of {2 * COUNT} real pictures are there" in said
    assert [chosen.name for chosen in first.sets] == ["train", "pairs"]
    pairs = first.sets[1]
    assert (pairs.count, pairs.drawn) == (COUNT, COUNT)
    network, judge = pairs.spaces
    assert "far too high" in network.figures["fid"].note
    assert network.figures["kid"].low < network.figures["kid"].value
    assert judge.figures["colour_accuracy"].count == COUNT
    assert {(group.by, group.value) for group in pairs.groups} >= {
        ("colour", "red"), ("colour", "blue"),
    }  # fmt: skip
    assert first.format_version == 1
    # Real pictures' features are kept with the cache, a file by set and extractor; drawn ones'
    # with the run, for three batches of each set.
    kept, made = files(place / "cache" / "evaluation"), files(place / "run" / "evaluation")
    assert (len(kept), len(made)) == (4, 12)
    shown = [place / "run" / name for row in pairs.pictures for name in (row.file, row.real)]
    assert len(set(shown)) == 2 * COUNT
    assert all(path.is_file() for path in shown)

    lost = next(iter(made))
    lost.unlink()
    again, said = measured(place, head)
    assert again == first
    assert f"features of {2 * COUNT} of {2 * COUNT} real pictures are there" in said
    now = files(place / "run" / "evaluation")
    assert {path for path in now if now[path] != made.get(path)} == {lost}
    assert files(place / "cache" / "evaluation") == kept


def test_an_extractor_that_is_added_computes_no_other_again(head, place):
    one, two = "efficientnet-lite0", f"classifier:{place / 'classifier'}"
    first, _ = measured(place, head, extractors=[one], sets=[])
    kept = files(place / "cache" / "evaluation")
    both, said = measured(place, head, extractors=[one, two], sets=[])
    assert f"features of 0 of {COUNT} real pictures are there" in said
    assert both.sets[0].spaces[0] == first.sets[0].spaces[0]
    now = files(place / "cache" / "evaluation")
    assert len(kept) == 1
    assert len(now) == 2
    assert now.items() >= kept.items()
    # Another student is measured against the same real pictures.
    torch.manual_seed(1)
    save_model(TinyFluxDeep(student_config()), place / "run" / "final")
    other, said = measured(place, head, extractors=[one, two], sets=[])
    assert f"features of {COUNT} of {COUNT} real pictures are there" in said
    assert f"features of 0 of {COUNT} drawn pictures are there" in said
    assert other.weights != both.weights
    # What the first drew is still there to be looked at, beside what the other drew.
    before, now = ({row.file for row in one.sets[0].pictures} for one in (both, other))
    assert not before & now
    assert all((place / "run" / name).is_file() for name in before | now)


def test_figures_beside_training_are_those_of_evaluating_its_result(head, place):
    torch.set_num_threads(1)
    extractors = ["efficientnet-lite0", f"classifier:{place / 'classifier'}"]
    trainer = TrainerConfig(
        batch_size=2, gradient_accumulation=1, total_steps=2, save_every_steps=1, val_fraction=0.75,
        evaluate_every=1, best_metric="eval_kid", keep_last_n_steps=1, text_dropout=0.0,
        learning_rate=1e-2, warmup_steps=0, dtype=torch.float32,
    )  # fmt: skip
    training = TrainingJob(
        str(place / "trained"), [MixSource(str(place / "cache"))], student_config(), trainer,
        WorkersConfig(engine="torch"), zoo_config(place / "world"), "one",
        EvaluateConfig(extractors), SampleConfig(num_steps=2, batch_size=5),
    )  # fmt: skip
    Training(training, torch.device("cpu")).run()
    records = read_metrics(place / "trained" / "metrics.jsonl")
    beside = {one["step"]: one for one in records if "eval_kid" in one}
    assert sorted(beside) == [1, 2]
    best = min(beside.values(), key=lambda one: one["eval_kid"])
    marked = read_best(place / "trained" / "best.json")
    assert (marked.step, marked.value) == (best["step"], best["eval_kid"])
    assert (place / "trained" / "checkpoints" / marked.checkpoint).is_dir()

    after, said = measured(
        place,
        head,
        checkpoint="trained/final",
        val_fraction=0.75,
        extractors=extractors,
        sets=[],
        cache_sets=["held_out"],
    )
    (chosen,) = after.sets
    count = chosen.count
    assert count >= 6
    assert f"features of {count} of {count} real pictures are there" in said
    for space, suffix in zip(chosen.spaces, ("", "_classifier"), strict=True):
        told = {name: one.value for name, one in space.figures.items() if "accuracy" not in name}
        assert len(told) == 6
        for name, value in told.items():
            assert beside[2][f"eval_{name}{suffix}"] == pytest.approx(value, rel=1e-4), name


def test_pictures_of_training_are_measured_once_and_stand_beside_what_is_drawn(head, place):
    shown = EvaluationSet("shown", str(place / "pairs.parquet"), labels=["colour"])
    first, said = measured(place, head, cache_sets=[], trained_on=shown)
    # The set is the training file itself: the same real features, made once for each.
    assert f"of {2 * COUNT} real pictures are there" in said
    network, judge = first.sets[0].spaces
    for space in (network, judge):
        # Every real picture is its own nearest.
        assert space.figures["real_nearest_colour_accuracy"].value == 1.0
        assert space.figures["nearest_colour_accuracy"].count == COUNT
    assert judge.figures["chance_colour_accuracy_among_trained"].value == 0.5
    again, said = measured(place, head, cache_sets=[], trained_on=shown)
    assert again == first
    assert f"features of {2 * COUNT} of {2 * COUNT} real pictures are there" in said


def test_a_set_that_cannot_be_read_is_one_sentence(place):
    for changes, message in (
        ({"file": str(place / "none.parquet")}, "cannot be read from"),
        ({"labels": ["thing"]}, "has no column 'thing'"),
    ):
        chosen = EvaluationSet(**{"name": "pairs", "file": str(place / "pairs.parquet"), **changes})
        with pytest.raises(InputError, match=message):
            measure(*job(place, sets=[chosen]))
