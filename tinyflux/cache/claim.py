"""Which directories are a build job's, and one job at a time in each."""

from collections.abc import Iterator
from contextlib import contextmanager

from tinyflux.cache.manifest import BUILD_MARK, MANIFEST_NAME, Manifest
from tinyflux.cache.store import Store
from tinyflux.errors import CacheError


@contextmanager
def claim(store: Store) -> Iterator[None]:
    """Make ``store`` this job's while it works, or say why it cannot be."""
    if store.size(MANIFEST_NAME) is not None and not Manifest.load(store).built:
        raise CacheError(
            f"'{store.location}' holds a dataset that no build job made: use another cache.path"
        )
    if store.size(BUILD_MARK) is None:
        if any(not name.startswith(f".{BUILD_MARK}.") for name in store.names()):
            raise CacheError(
                f"cache.path '{store.location}' holds other files and no cache: name a new or "
                f"empty directory"
            )
        # First, so that whatever else is found here later is known to be this cache's.
        store.write(BUILD_MARK, b'{"owner": "tinyflux"}\n')
    with store.held(BUILD_MARK):
        yield
