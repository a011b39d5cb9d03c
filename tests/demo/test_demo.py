"""What the demo's file and stages say of the pictures, against the pictures."""

from pathlib import Path

import pytest
from transformers import T5Tokenizer

from tinyflux.config import load_run_config
from tinyflux.demo.run import CONFIG, ROOT, SERVE_PROMPT, stages
from tinyflux.toy.icons import STYLES, caption_of, in_demo, shipped_icons, split_of
from tinyflux.toy.world import SHIPPED


@pytest.fixture(scope="module")
def run():
    return load_run_config(ROOT / CONFIG)


def split_of_prompt(prompt):
    thing, style = prompt.removesuffix(" style").split(", ")
    assert prompt in {icon.caption for icon in shipped_icons() if in_demo(icon)}
    return split_of(thing, style)


def test_the_grid_is_of_things_by_styles_whose_diagonal_was_never_shown(run):
    things = ("carrot", "strawberry", "watermelon", "cactus")
    styles = [style.name for style in STYLES[:4]]
    prompts = [caption_of(thing, style) for thing in things for style in styles]
    assert list(run.trainer.sample_prompts) == list(run.sample.prompts) == prompts
    unseen = [at for at, prompt in enumerate(prompts) if split_of_prompt(prompt) == "pairs"]
    assert unseen == [0, 5, 10, 15]
    assert all(split_of_prompt(prompts[at]) == "train" for at in range(16) if at not in unseen)


def test_the_server_is_asked_for_what_was_never_shown():
    assert split_of_prompt(SERVE_PROMPT) == "pairs"


def test_it_trains_on_one_split_and_is_judged_by_the_others_that_its_first_stage_writes(run):
    written = Path(stages(run)[0].command[4])
    assert Path(run.data.folder) == written / "train-00000-of-00001.parquet"
    for chosen in [*run.evaluate.sets, run.evaluate.trained_on]:
        split = {"seen": "train", "trained": "train"}.get(chosen.name, chosen.name)
        assert Path(chosen.file) == written / f"{split}-00000-of-00001.parquet"


def test_no_caption_loses_its_style(run):
    tokenizer = T5Tokenizer.from_pretrained(SHIPPED / "t5")
    captions = [icon.caption for icon in shipped_icons() if in_demo(icon)]
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= (
        run.model.max_text_length
    )
