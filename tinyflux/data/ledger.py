"""The file in a run's folder that keeps its passes, from before their first sample is read.

A checkpoint knows the passes until it was written. What was decided after it stands here, so that a
run that was killed meanwhile repeats that, whatever the caches have grown by.
"""

import json
import time

from tinyflux.data.passes import NO_PASSES, Passes
from tinyflux.errors import CacheError, ConfigError
from tinyflux.run_dir import PASSES
from tinyflux.storage.folder import Folder
from tinyflux.util.config import from_dict, to_dict

PATIENCE = 1800.0  # seconds, as a collective has
FIRST_LOOK, LAST_LOOK = 0.05, 2.0  # seconds between two looks at the file


class Ledger:
    """Keeps a run's passes: the main worker writes, the others read.

    Args:
        folder: the run's, which all workers share.
    """

    def __init__(self, folder: Folder):
        self._folder = folder

    def load(self) -> Passes:
        """What is decided; nothing if there is no file.

        Raises:
            CacheError: the file is damaged.
        """
        path = f"{self._folder.location}/{PASSES}"
        try:
            passes = from_dict(Passes, json.loads(self._folder.read(PASSES)), path)
        except FileNotFoundError:
            return NO_PASSES
        except (ValueError, ConfigError) as error:
            raise CacheError(
                f"'{path}' is damaged ({error}): remove it, and the run goes on by what its last "
                "checkpoint says"
            ) from error
        if not passes.is_sound():
            raise CacheError(
                f"'{path}' is damaged (its passes do not fit its shards): remove it, and the run "
                "goes on by what its last checkpoint says"
            )
        return passes

    def save(self, passes: Passes) -> None:
        """Keep ``passes``; whole when this returns."""
        self._folder.write(PASSES, json.dumps(to_dict(passes)).encode())

    def wait(self, number: int) -> Passes:
        """What is decided as soon as pass ``number`` is.

        Raises:
            CacheError: the main worker has not decided it for half an hour.
        """
        deadline, pause = time.monotonic() + PATIENCE, FIRST_LOOK
        while not (passes := self.load()).has(number):
            if time.monotonic() > deadline:
                raise CacheError(
                    f"the first worker has not written to '{self._folder.location}/{PASSES}' what "
                    f"pass {number} reads: is run_dir shared by all nodes?"
                )
            time.sleep(pause)
            pause = min(2 * pause, LAST_LOOK)
        return passes
