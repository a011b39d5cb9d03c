"""The model card of a finished run."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tinyflux.model.config import TinyFluxConfig
from tinyflux.trainer.metrics import best_record

_TEXT = """---
{front}
---

# {title}

A TinyFluxDeep student of {millions:.1f}M parameters: a rectified-flow transformer that makes
pictures from prompts. It was trained from {data}, for {steps} steps, and holds the moving average
(EMA) of its weights.

```python
from tinyflux.model.loader import load_model

model = load_model("{source}")
```

{grid}## Data

{sources}

## Held-out figures

{figures}

## Settings

{settings}
"""


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
    front = ModelCardData(
        library_name="tinyflux",
        pipeline_tag="text-to-image",
        tags=["tinyflux", "rectified-flow", "text-to-image"],
    )
    latest: dict[str, Any] = {}
    for record in records:
        held_out = {name: v for name, v in record.items() if name.startswith("val_")}
        latest = {"step": record["step"], **held_out} if held_out else latest
    figures = _table(latest) if latest else "None were taken (`trainer.validate_every`)."
    if (best := best_record(records)) is not None and best["step"] != latest["step"]:
        figures += (
            f"\nThe EMA was best at step {best['step']}, with a `val_velocity_ema` of "
            f"{best['val_velocity_ema']:.5g}; these weights are those of the last step.\n"
        )
    chosen = {
        **{f"model.{name}": value for name, value in model.to_dict().items()},
        **{f"trainer.{name}": value for name, value in trainer.items()},
    }
    learned = "captioned pictures" + "".join(f" and the teacher {name}" for name in teachers)
    text = _TEXT.format(
        front=front.to_yaml(),
        title=title,
        millions=parameters / 1e6,
        data=learned,
        steps=records[-1]["step"] if records else trainer["total_steps"],
        source=source,
        grid=f"![Pictures of fixed prompts at the end of training]({grid})\n\n" if grid else "",
        sources="\n".join(f"- {line}" for line in data),
        figures=figures,
        settings=_table(chosen),
    )
    return str(ModelCard(text))


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"| {name} | {f'{value:.5g}' if isinstance(value, float) else value} |\n"
        for name, value in values.items()
    )
    return f"| | |\n| --- | --- |\n{rows}"
