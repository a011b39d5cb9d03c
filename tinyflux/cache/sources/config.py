"""The ``data`` section of a run file."""

from dataclasses import dataclass

from tinyflux.errors import ConfigError
from tinyflux.util.config import nearest

FORMATS = ("auto", "folder", "webdataset", "parquet")
RESIZES = ("error", "crop", "bucket")
LONG_CAPTIONS = ("cut", "reject")


@dataclass
class DataConfig:
    """Captioned pictures, and at which sizes they are encoded.

    Attributes:
        folder: A path or a URL that pyarrow or fsspec opens. It holds pictures (subfolders count)
            with a ``.txt`` caption of the same name beside each or a ``metadata.jsonl`` or
            ``metadata.csv`` as Hugging Face's ImageFolder has it; or WebDataset ``.tar`` files; or
            Parquet files with the pictures' bytes, as the Hub stores them. One such file will do,
            and so will a pattern such as ``shards/train-*.tar``.
        format: ``"folder"``, ``"webdataset"`` or ``"parquet"``; ``"auto"`` looks what is there.
        image_key: The pictures' column in Parquet files.
        caption_key: Where captions are in metadata files, in a tar's ``.json`` members and in
            Parquet files. A list of texts is as many captions of the picture.
        caption_lines: Take each line of a ``.txt`` as a caption of its own.
        mask_key: Where foreground masks are: the column (metadata, Parquet) or the suffix (``mask``
            stands for ``a.mask.png`` beside ``a.png``, in folders and tars); empty: there are none.
        resize: What to do with a picture of another size than ``width`` x ``height``: ``"error"``;
            ``"crop"``: scale until it covers the size, then cut the middle; ``"bucket"``: the same,
            to the nearest of many sizes, of ``areas`` and ``step``.
        height: Height in pixels.
        width: Width in pixels.
        areas: For buckets, sides of squares of the wanted numbers of pixels. A picture goes to the
            largest that it fills.
        step: Sides of buckets are multiples of it.
        max_aspect: The most that a bucket's longer side may be of its shorter.
        max_rejected: Share of the pictures that may be unusable; past it, the job fails.
        max_pixels: A larger picture is not decoded.
        long_captions: What to do with a caption of more tokens than CLIP (77) or T5
            (``model.max_text_length``) reads: ``"cut"`` it there, for the encoder that it is too
            long for, or ``"reject"`` the sample.
        follow_links: Read what symbolic links in ``folder`` lead to even where that is elsewhere;
            otherwise such a link is refused. ``folder`` itself may be a link.
    """

    folder: str = ""
    format: str = "auto"
    image_key: str = "image"
    caption_key: str = "text"
    caption_lines: bool = False
    mask_key: str = ""
    resize: str = "error"
    height: int = 512
    width: int = 512
    areas: tuple[int, ...] = (512,)
    step: int = 64
    max_aspect: float = 2.0
    max_rejected: float = 0.0
    max_pixels: int = 100_000_000
    long_captions: str = "cut"
    follow_links: bool = False

    def __post_init__(self) -> None:
        choices = {"format": FORMATS, "resize": RESIZES, "long_captions": LONG_CAPTIONS}
        for name, valid in choices.items():
            value = getattr(self, name)
            if value not in valid:
                raise ConfigError(
                    f"data.{name} '{value}' is unknown{nearest(value, valid)}: choose one of "
                    f"{', '.join(valid)}"
                )
        if self.height < 1 or self.width < 1:
            raise ConfigError(
                f"data.height and data.width must be positive, not {self.height} x {self.width}"
            )
        if self.step < 1 or not self.areas or min(self.areas) < self.step:
            raise ConfigError(
                f"data.areas must each be at least data.step = {self.step}, not {self.areas}"
            )
        if self.max_aspect < 1 or not 0 <= self.max_rejected < 1 or self.max_pixels < 1:
            raise ConfigError(
                "data.max_aspect must be at least 1, data.max_rejected from 0 to below 1 and "
                "data.max_pixels positive"
            )
