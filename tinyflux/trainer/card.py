"""The model card of a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tinyflux.model.config import TinyFluxConfig
from tinyflux.trainer.metrics import best_record

_TEMPLATE = Path(__file__).with_name("card.md")


def model_card(
    title: str,
    source: str,
    parameters: int,
    model: TinyFluxConfig,
    trainer: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    data: Sequence[str],
    teachers: Sequence[str],
    grid: str | None,
) -> str:
    """The card as Markdown with the Hub's front matter.

    Args:
        source: what ``load_model`` opens.
        parameters: how many the model has.
        trainer: the trainer's settings, as plain data.
        records: of ``metrics.jsonl``.
        data: a line for each cache: where it was, its rows, its digest.
        teachers: names of the teachers that were learned from.
        grid: a picture file beside the card.
    """
    held_out: dict[str, Any] = {}
    for record in records:
        figures = {name: v for name, v in record.items() if name.startswith("val_")}
        held_out = {"step": record["step"], **figures} if figures else held_out
    best = best_record(records)
    card = ModelCard.from_template(
        ModelCardData(
            library_name="tinyflux",
            pipeline_tag="text-to-image",
            tags=["tinyflux", "rectified-flow", "text-to-image"],
        ),
        template_path=str(_TEMPLATE),
        title=title,
        source=source,
        parameters=parameters,
        steps=records[-1]["step"] if records else trainer["total_steps"],
        data=data,
        teachers=teachers,
        grid=grid,
        held_out=held_out,
        best=best if best is not None and best["step"] != held_out["step"] else None,
        settings={
            **{f"model.{name}": value for name, value in model.to_dict().items()},
            **{f"trainer.{name}": value for name, value in trainer.items()},
        },
    )
    return str(card)
