"""The ``data``, ``cache`` and ``mix`` sections of a run file."""

from dataclasses import dataclass, field

from tinyflux.errors import ConfigError
from tinyflux.util.config import nearest

FORMATS = ("auto", "folder", "webdataset", "parquet")
RESIZES = ("error", "crop", "bucket")
LONG_CAPTIONS = ("cut", "reject")
# A page holds at most 2**31 bytes, and pyarrow starts a new one after 20,000 rows.
MAX_ROWS_PER_SHARD = 16384


@dataclass
class VariantsConfig:
    """Other views of each picture, encoded once each; a training position takes one of them all.

    Attributes:
        flips: Keep the mirror image, too, of the picture and of each crop; not for pictures with
            writing, nor for captions that tell left from right.
        crops: Number of random crops of each picture that are kept beside the whole one.
        min_crop: The smallest crop's sides, as a share of the whole's; each crop draws its share
            from here to 1.
    """

    flips: bool = False
    crops: int = 0
    min_crop: float = 0.8

    def __post_init__(self) -> None:
        if self.crops < 0 or not 0 < self.min_crop <= 1:
            raise ConfigError(
                f"data.variants.crops must not be negative and data.variants.min_crop above 0 and "
                f"at most 1, not {self.crops} and {self.min_crop:g}"
            )


@dataclass
class DataConfig:
    """Captioned pictures, and at which sizes they are encoded.

    Attributes:
        folder: A path or a URL that pyarrow or fsspec opens. It holds pictures (subfolders count)
            with a ``.txt`` caption of the same name beside each or a ``metadata.jsonl`` or
            ``metadata.csv`` as Hugging Face's ImageFolder has it; or WebDataset ``.tar`` files; or
            Parquet files with the pictures' bytes, as the Hub stores them. One such file will do,
            and so will a pattern such as ``shards/train-*.tar``. ``hf://datasets/OWNER/NAME``, with
            ``@REVISION`` if wanted, is a data set on the Hugging Face Hub.
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
        variants: Mirror images and random crops that are kept beside each picture, to train on.
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
    variants: VariantsConfig = field(default_factory=VariantsConfig)

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


@dataclass
class CacheConfig:
    """How a dataset is built.

    Attributes:
        path: The dataset's directory or URL.
        extract_lune: Run the teacher Lune and keep its features.
        extract_sol: Run the teacher Sol and keep its statistics and maps.
        num_actors: Number of Ray actors that encode, each with all models.
        cpus_per_actor: CPUs that Ray reserves for an actor, and its threads.
        gpus_per_actor: GPUs that Ray reserves for an actor; 0 encodes on CPUs.
        batch_size: Pictures of one forward.
        rows_per_shard: The most samples that are committed together; shards are cut where their
            content says, so most are somewhat smaller.
        seed: Seed of the noise that teachers see, and of random crops.
    """

    path: str = ""
    extract_lune: bool = True
    extract_sol: bool = True
    num_actors: int = 1
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    batch_size: int = 32
    rows_per_shard: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_actors", "batch_size", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cache.{name} must be at least 1, not {getattr(self, name)}")
        if self.rows_per_shard > MAX_ROWS_PER_SHARD:
            raise ConfigError(
                f"cache.rows_per_shard must be at most {MAX_ROWS_PER_SHARD}, not "
                f"{self.rows_per_shard}"
            )
        if self.cpus_per_actor < 0 or self.gpus_per_actor < 0:
            raise ConfigError("cache.cpus_per_actor and cache.gpus_per_actor must not be negative")


@dataclass
class MixSource:
    """A cache in a mixture.

    Attributes:
        path: The cache's directory or URL.
        weight: The cache's samples in training, relative to the other caches' weights, however many
            rows it has.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"the weight of cache '{self.path}' must be above 0")
