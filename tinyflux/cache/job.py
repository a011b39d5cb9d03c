"""What every process of a build is told."""

import dataclasses
from functools import cached_property

import torch

from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.encode import ShardEncoder
from tinyflux.cache.extract import extractor_for
from tinyflux.cache.store import Store, open_store
from tinyflux.model.config import TinyFluxConfig, ZooConfig
from tinyflux.storage.hub import pinned


@dataclasses.dataclass(frozen=True)
class BuildConfigs:
    """The settings that a build follows."""

    data: DataConfig
    zoo: ZooConfig
    cache: CacheConfig
    model: TinyFluxConfig

    @classmethod
    def begin(
        cls, data: DataConfig, zoo: ZooConfig, cache: CacheConfig, model: TinyFluxConfig
    ) -> "BuildConfigs":
        """What one job follows to its end: of a source on the Hub, the commit that is there now.

        Raises:
            InputError: the Hub cannot be asked for it.
        """
        return cls(dataclasses.replace(data, folder=pinned(data.folder)), zoo, cache, model)

    @cached_property
    def store(self) -> Store:
        return open_store(self.cache.path)

    def encoder(self) -> ShardEncoder:
        """For one process, which keeps it and the models that it holds."""
        torch.set_num_threads(max(1, int(self.cache.cpus_per_actor)))
        zoo = self.zoo
        if zoo.device == "auto" and self.cache.gpus_per_actor == 0:
            zoo = dataclasses.replace(zoo, device="cpu")  # in a process that Ray did not start, too
        extractor = extractor_for(zoo.build(self.model), self.cache)
        return ShardEncoder(self.store, self.data, extractor, self.model.text_padding == "zero")
