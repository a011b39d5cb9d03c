"""The model card of a finished run, read by the Hub's own library."""

from huggingface_hub import ModelCard

from tests.fixtures.students import MODEL
from tinyflux.evaluation.estimate import Estimate
from tinyflux.evaluation.record import Measured, SetFigures, SpaceFigures
from tinyflux.trainer.card import model_card, with_figures

RECORDS = [
    {"step": 5, "loss": 1.0, "val_velocity_ema": 0.25},
    {"step": 10, "loss": 0.5, "val_velocity_ema": 0.123456789},
    {"step": 12, "loss": 0.4},
]


def card(records=RECORDS, data=("runs/cache: 12 rows",), grid="samples.png", **settings):
    trainer = {"total_steps": 12, "learning_rate": 0.00012345678, **settings}
    text = model_card(
        "My run", "me/model", 2_412_345, MODEL, trainer, records, data, ["Lune", "Sol"], grid
    )
    return ModelCard(text)


def test_a_card_has_the_hubs_metadata_and_what_the_run_was():
    made = card()
    assert made.data.pipeline_tag == "text-to-image"
    assert made.data.library_name == "tinyflux"
    assert "text-to-image" in made.data.tags
    for said in (
        "\n# My run\n", "2.4M parameters", "for 12 steps", 'load_model("me/model")',
        "captioned pictures and the teacher Lune and the teacher Sol,", "(samples.png)\n\n## Data",
        "\n- runs/cache: 12 rows\n", "| step | 10 |\n| val_velocity_ema | 0.12346 |\n",
        "| trainer.learning_rate | 0.00012346 |", f"| model.hidden_size | {MODEL.hidden_size} |",
    ):  # fmt: skip
        assert said in made.text, said
    assert "best at step" not in made.text


def test_a_card_says_when_an_earlier_step_was_better():
    made = card([*RECORDS, {"step": 12, "val_velocity_ema": 0.5}])
    assert "The EMA was best at step 10, with a `val_velocity_ema` of 0.12346" in made.text


def test_a_run_without_figures_or_pictures_says_so():
    made = card(records=[], grid=None)
    assert "None were taken (`trainer.validate_every`)." in made.text
    assert "![" not in made.text
    assert "for 12 steps" in made.text


def test_what_a_run_is_called_is_text_and_no_template():
    made = card(data=["{{ title }} & <b>"], sample_prompts=["{% for %}"])
    assert "- {{ title }} & <b>\n" in made.text
    assert "| trainer.sample_prompts | ['{% for %}'] |" in made.text


def measured(kid):
    figures = {"kid": Estimate(kid, 0.1, 0.9, 60), "real_kid": Estimate(0.0)}
    sets = [SetFigures("pairs", 60, 120, [SpaceFigures("efficientnet-lite0", "", figures)])]
    return Measured("abc", 4, 2.0, 2, sets)


def test_figures_of_pictures_come_into_a_card_and_are_replaced_by_later_ones():
    first = card()
    assert "Figures of pictures" not in first.text
    text = with_figures(str(first), "My run", measured(0.5))
    made = ModelCard(text)
    assert "| KID | efficientnet-lite0 | 0.5 (0.1 to 0.9) | 0 | - | - |" in made.text
    assert "4 steps with guidance 2, 2 of each caption" in made.text
    assert "### pairs: 60 captions, 120 pictures" in made.text
    assert made.data.model_name == "My run"
    (result,) = made.data.eval_results
    assert (result.task_type, result.dataset_name) == ("text-to-image", "pairs")
    assert (result.metric_type, result.metric_value) == ("kid", 0.5)
    later = ModelCard(with_figures(text, "My run", measured(0.25)))
    assert later.data.eval_results[0].metric_value == 0.25
    assert later.text.count("Figures of pictures") == 1
    # All else is as it was.
    for said in ("\n## Settings\n", "\n## Held-out figures\n", "- runs/cache: 12 rows"):
        assert later.text.count(said) == 1
    assert later.data.tags == first.data.tags
    assert with_figures(str(later), "My run", measured(0.25)) == str(later)


def test_a_card_of_before_gets_its_figures_at_the_end():
    old = "---\nlibrary_name: tinyflux\n---\n# Old\n\nWords.\n"
    made = ModelCard(with_figures(old, "Old", measured(0.5)))
    assert made.text.startswith("# Old\n\nWords.\n\n<!--") or "# Old\n\nWords.\n\n<!--" in made.text
    assert made.text.endswith("-->\n")
