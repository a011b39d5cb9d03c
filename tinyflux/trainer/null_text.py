"""The empty caption, which dropped captions are trained on and inference is given."""

from torch import Tensor

from tinyflux.data.batches import StepSource
from tinyflux.errors import InputError
from tinyflux.inference.sampler import Sampler


def find_null_text(source: StepSource, sampler: Sampler | None) -> tuple[Tensor, Tensor]:
    """T5 ``[L, D]`` and pooled ``[P]`` embeddings of the empty caption, from whoever has them.

    Raises:
        InputError: nobody has.
    """
    null_text = source.null_text
    if null_text is None and sampler is not None:
        t5, pooled = sampler.zoo.encode_prompts_batched([""], allow_empty=True)
        null_text = (t5[0], pooled[0])
    if null_text is None:
        raise InputError(
            "neither the dataset nor the cache knows the empty caption's embeddings, which dropped "
            "captions are trained on and inference is given: pass Trainer.setup a sampler or "
            "null_text=(t5, pooled) of '', or set trainer.text_dropout to 0"
        )
    return null_text
