"""The model card of a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tinyflux.evaluation.record import Measured, SetFigures
from tinyflux.evaluation.table import rows_of, rows_of_space
from tinyflux.model.config import TinyFluxConfig
from tinyflux.trainer.metrics import best_record

_TEMPLATE = Path(__file__).with_name("card.md")
# Around the figures of pictures, which come after the card, and may come again.
_BEGIN, _END = "<!-- figures of pictures -->", "<!-- end of the figures of pictures -->"


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
    base: str | None = None,
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
        base: what the student is opened from, where the run trained an adapter on it.
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
            tags=["tinyflux", "rectified-flow", "text-to-image", *(["lora"] if base else [])],
        ),
        template_path=str(_TEMPLATE),
        title=title,
        source=source,
        base=base,
        kind=(trainer.get("adapter") or {}).get("kind"),
        parameters=parameters,
        steps=records[-1]["step"] if records else trainer["total_steps"],
        data=data,
        teachers=teachers,
        grid=grid,
        figures=f"{_BEGIN}\n{_END}",
        held_out=held_out,
        best=best if best is not None and best["step"] != held_out["step"] else None,
        settings={
            **{f"model.{name}": value for name, value in model.to_dict().items()},
            **{f"trainer.{name}": value for name, value in trainer.items()},
        },
    )
    return str(card)


def with_figures(card: str, title: str, measured: Measured) -> str:
    """The card with an evaluation's figures, in place of those that it had.

    They stand in tables for people, and in ``model-index`` for the Hub.

    Args:
        card: what :func:`model_card` gave.
        title: the model's name.
    """
    made = ModelCard(card)
    data = made.data
    assert isinstance(data, ModelCardData)  # of a ModelCard it is
    data.model_name = title
    data.eval_results = [one for chosen in measured.sets for one in _results(chosen)]
    before, _, rest = made.text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    tables = "\n\n".join(_table(chosen) for chosen in measured.sets)
    how = (
        f"Pictures of {measured.num_steps} steps with guidance {measured.guidance_scale:g}, "
        f"{measured.seeds} of each caption; 95% intervals over pictures, for this one training."
    )
    section = f"{_BEGIN}\n## Figures of pictures\n\n{how}\n\n{tables}\n{_END}"
    made.text = before.rstrip() + "\n\n" + section + (after or "\n")
    return str(made)


def _results(chosen: SetFigures) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=chosen.name,
            dataset_name=chosen.name,
            metric_type=row.name,
            metric_name=f"{row.metric}, by {row.by}",
            metric_value=space.figures[row.name].value,
        )
        for space in chosen.spaces
        for row in rows_of_space(space)
        if row.drawn
    ]


def _table(chosen: SetFigures) -> str:
    lines = [
        f"### {chosen.name}: {chosen.count} captions, {chosen.drawn} pictures",
        "",
        "| | by | drawn | real pictures | nearest in training | chance |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows_of(chosen):
        cells = (row.metric, row.by, row.drawn, row.real, row.nearest, row.chance)
        lines.append("| " + " | ".join(cell or "-" for cell in cells) + " |")
    return "\n".join(lines)
