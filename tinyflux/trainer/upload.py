"""Uploads to the Hugging Face Hub beside training."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)


class Uploader:
    """Uploads directories one after another in a thread. A failure is logged, never raised."""

    def __init__(self, repo_id: str):
        self.repo_id = repo_id
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hub-upload")
        self._pending: list[Future[None]] = []

    def submit(self, directory: Path, name: str) -> None:
        """Upload a checkpoint's weights and config as folder ``name`` of the repository."""
        # Read now: the checkpoint may be pruned before its turn comes.
        files = {
            item: (directory / item).read_bytes()
            for item in ("model.safetensors", "config.json", "ema.safetensors")
        }
        self._pending.append(self._pool.submit(self._upload, files, name))

    def _upload(self, files: dict[str, bytes], name: str) -> None:
        try:
            from huggingface_hub import CommitOperationAdd, HfApi

            api = HfApi()
            api.create_repo(self.repo_id, exist_ok=True)
            api.create_commit(
                self.repo_id,
                [CommitOperationAdd(f"{name}/{item}", data) for item, data in files.items()],
                commit_message=f"Add {name}",
            )
        except Exception as error:
            logger.warning("upload of %s to %s failed: %s", name, self.repo_id, error)

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(wait=True)
