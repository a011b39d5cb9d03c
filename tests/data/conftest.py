"""Two caches of the smallest world."""

import pytest

from tests.fixtures.worlds import CAPTIONS, make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.build import build
from tinyflux.cache.config import CacheConfig, DataConfig, MixSource
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.runner import LocalRunner


@pytest.fixture(scope="package")
def caches(tmp_path_factory):
    """One with both teachers, and a smaller one without."""
    folder = tmp_path_factory.mktemp("mixture")
    zoo, model = zoo_config(make_world(folder / "world")), student_config()
    paths = []
    for name, seed, captions, teachers in (
        ("taught", 1, [*CAPTIONS] * 3, True),
        ("plain", 2, CAPTIONS, False),
    ):
        pictures = write_pictures(folder / f"{name}-pictures", captions, seed=seed)
        data = DataConfig(str(pictures), height=16, width=16)
        cache = CacheConfig(str(folder / name), extract_lune=teachers, extract_sol=teachers)
        configs = BuildConfigs(data, zoo, cache, model)
        build(configs, LocalRunner(configs))
        paths.append(cache.path)
    return [MixSource(paths[0], 1.0), MixSource(paths[1], 3.0)]
