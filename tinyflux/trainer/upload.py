"""Uploads to the Hugging Face Hub beside training."""

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from queue import SimpleQueue

from tinyflux.util.text import first_line

logger = logging.getLogger(__name__)

# Of a checkpoint: what makes it a model, or an adapter. The optimizer's state is the run's own.
MODEL_FILES = (
    "model.safetensors", "config.json", "ema.safetensors",
    "adapter_model.safetensors", "adapter_config.json",
)  # fmt: skip
TRIES, LONGEST_PAUSE = 6, 60.0
CLOSE_SECONDS = 600.0  # for what is under way when a run ends
# The Hub's answers that another try can change: too many requests, and its own troubles.
_PASSING = (408, 425, 429)


class Uploader:
    """Uploads directories one after another in a thread. A failure is logged, never raised.

    The token is the Hub's own (``hf auth login`` or ``HF_TOKEN``) and is kept nowhere.

    Args:
        staging: where files wait for their turn, on the file system of what is uploaded.
        pause: seconds before the second try; each further one waits twice as long.
    """

    def __init__(self, repo_id: str, staging: Path, pause: float = 1.0):
        self.repo_id, self._staging, self._pause = repo_id, staging, pause
        self._queue: SimpleQueue[tuple[Path, str] | None] = SimpleQueue()
        self._left = 0
        self._ended = threading.Event()
        # A daemon, so that an upload which hangs cannot hold the process for ever.
        self._thread = threading.Thread(target=self._work, name="hub-upload", daemon=True)
        self._thread.start()
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed

    def submit(self, directory: Path, name: str, files: tuple[str, ...] = MODEL_FILES) -> None:
        """Upload ``files`` of ``directory`` as the folder ``name`` ("" is the root)."""
        place = self._staging / str(time.monotonic_ns())
        try:
            place.mkdir(parents=True)
            for item in files:
                # A link, because the checkpoint may be pruned before its turn comes.
                _link(directory / item, place / item)
        except OSError as error:
            logger.warning("%s cannot be uploaded: %s", name or "the model", error)
            return
        self._left += 1
        self._queue.put((place, name))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait for what is under way, but not for ever."""
        self._queue.put(None)
        self._thread.join(seconds)
        self._ended.set()
        if self._thread.is_alive():
            logger.warning(
                "%d uploads to %s were not done within %g s and are given up",
                self._left, self.repo_id, seconds,
            )  # fmt: skip
        else:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None and not self._ended.is_set():
            self._upload(*item)
            self._left -= 1

    def _upload(self, place: Path, name: str) -> None:
        what = name or "the model"
        for attempt in range(1, TRIES + 1):
            try:
                self._commit(place, name)
                logger.info("uploaded %s to %s", what, self.repo_id)
                break
            except Exception as error:  # the hub's, the network's and files' have no common base
                status = getattr(getattr(error, "response", None), "status_code", None)
                refused = status is not None and status < 500 and status not in _PASSING
                if refused or attempt == TRIES or self._ended.is_set():
                    logger.warning(
                        "upload of %s to %s failed (try %d): %s",
                        what, self.repo_id, attempt, first_line(error),
                    )  # fmt: skip
                    break
                self._ended.wait(min(self._pause * 2 ** (attempt - 1), LONGEST_PAUSE))
        shutil.rmtree(place, ignore_errors=True)

    def _commit(self, place: Path, name: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # they would be drawn over the run's own lines
        api = HfApi()
        api.create_repo(self.repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=self.repo_id,
            folder_path=place,
            path_in_repo=name or None,
            commit_message=f"Add {name or 'the model'}",
        )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
