"""An evaluation's figures in words."""

from tinyflux.evaluation.estimate import Estimate
from tinyflux.evaluation.record import SetFigures, SpaceFigures
from tinyflux.evaluation.table import percent, rows_of, share, value

JUDGED = {
    "kid": Estimate(0.01234, 0.01, 0.0146, 60),
    "retrieval": Estimate(0.5, 0.4, 0.6, 60),
    "real_retrieval": Estimate(1.0, 0.9, 1.0, 60),
    "thing_accuracy": Estimate(0.25, 0.2, 0.3, 60),
    "real_thing_accuracy": Estimate(0.75, 0.7, 0.8, 60),
    "chance_thing_accuracy": Estimate(0.0006),
    "thing_accuracy_among_set": Estimate(0.3),
    "thing_accuracy_among_trained": Estimate(0.5, 0.4, 0.6, 60),
    "chance_thing_accuracy_among_trained": Estimate(0.007),
    "nearest_thing_accuracy": Estimate(0.4),
    "real_nearest_thing_accuracy": Estimate(0.6),
}


def test_a_label_stands_beside_the_real_pictures_memory_and_chance():
    near = SpaceFigures("efficientnet-lite0", "", {"nearest_thing_accuracy": Estimate(0.1)})
    rows = rows_of(SetFigures("pairs", 60, 60, [SpaceFigures("classifier", "", JUDGED), near]))
    cells = [(one.metric, one.drawn, one.real, one.nearest, one.chance) for one in rows]
    assert cells == [
        ("KID", "0.0123 (0.01 to 0.0146)", "", "", ""),
        ("retrieval of its caption", "50% (40% to 60%)", "100% (90% to 100%)", "", ""),
        ("right thing", "25% (20% to 30%)", "75% (70% to 80%)", "40%", "0.1%"),
        ("right thing of those in training", "50% (40% to 60%)", "", "40%", "0.7%"),
        ("right thing", "", "", "10%", ""),
    ]
    assert [one.by for one in rows] == ["classifier"] * 4 + ["efficientnet-lite0"]
    assert all(one.name in JUDGED for one in rows)


def test_numbers_have_as_many_digits_as_they_say_something():
    assert (percent(0.0), percent(0.004), percent(0.126), percent(1.0)) == (
        "0%", "0.4%", "13%", "100%",
    )  # fmt: skip
    assert share(Estimate(0.5)) == "50%"
    assert value(Estimate(123.456, 1, 200)) == "123 (1 to 200)"
