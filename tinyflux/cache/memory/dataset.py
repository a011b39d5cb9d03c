"""All that is cached of one dataset's samples."""

from PIL import Image
from torch import Tensor

from tinyflux.cache.manifest import Manifest, Recipe
from tinyflux.cache.memory.columns import save_columns
from tinyflux.cache.memory.encodings import EncodingCache
from tinyflux.cache.memory.teachers import LuneFeatureCache, SolFeatureCache
from tinyflux.cache.store import open_store
from tinyflux.errors import InputError
from tinyflux.model.zoo import ModelZoo


class DatasetCache:
    """Encodings and, where they were extracted, teacher features of one dataset."""

    def __init__(
        self,
        encodings: EncodingCache,
        lune: LuneFeatureCache | None = None,
        sol: SolFeatureCache | None = None,
        name: str = "dataset",
    ):
        for teacher in (lune, sol):
            if teacher is not None and len(teacher) != len(encodings):
                raise InputError(
                    f"dataset '{name}' has {len(encodings)} encodings, but teacher features of "
                    f"{len(teacher)} samples"
                )
        self.encodings, self.lune, self.sol, self.name = encodings, lune, sol, name

    def __len__(self) -> int:
        return len(self.encodings)

    @classmethod
    def build(
        cls,
        zoo: ModelZoo,
        images: list[Image.Image],
        prompts: list[str],
        name: str = "dataset",
        extract_lune: bool = True,
        extract_sol: bool = True,
    ) -> "DatasetCache":
        """Encode pictures and captions, and run the chosen teachers on the noised pictures."""
        lune = LuneFeatureCache.build(zoo, prompts, images=images) if extract_lune else None
        sol = SolFeatureCache.build(zoo, prompts, images=images) if extract_sol else None
        return cls(EncodingCache.build(zoo, images, prompts), lune, sol, name)

    def save(self, path: str) -> None:
        """Write one dataset directory."""
        parts = [part for part in (self.encodings, self.lune, self.sol) if part is not None]
        columns: dict[str, Tensor] = {}
        recipe = Recipe()
        for part in parts:
            columns.update(part.columns())
            recipe = recipe.merged(part.recipe)
        save_columns(path, columns, recipe, self.encodings.null_text, self.name)

    @classmethod
    def load(cls, path: str) -> "DatasetCache":
        """Read a dataset directory, of this class or of a build job."""
        manifest = Manifest.load(open_store(path))
        lune = LuneFeatureCache.load(path) if manifest.layout("lune") else None
        sol = SolFeatureCache.load(path) if manifest.layout("sol_stats") else None
        return cls(EncodingCache.load(path), lune, sol, manifest.name)
