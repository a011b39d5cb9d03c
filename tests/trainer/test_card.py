"""The model card of a finished run, read by the Hub's own library."""

from huggingface_hub import ModelCard

from tests.fixtures.students import MODEL
from tinyflux.trainer.card import model_card

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
