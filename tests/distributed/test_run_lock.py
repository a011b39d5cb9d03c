"""One training at a time in a directory, and waiting for the one that ends."""

from threading import Thread

import pytest

from tests.fixtures.waiting import PATIENCE
from tinyflux.distributed.run_lock import claimed, wait_until_free
from tinyflux.errors import TrainingError


def test_a_directory_is_waited_for_until_it_is_free_and_no_longer_than_told(tmp_path):
    place = str(tmp_path)
    wait_until_free(place, PATIENCE)  # nobody has ever been there
    waiting = Thread(target=wait_until_free, args=(place, PATIENCE), daemon=True)
    with claimed(place):
        wait_until_free(place, 0.0)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        with pytest.raises(TrainingError, match="is being trained by process"), claimed(place):
            pass
    waiting.join(PATIENCE)
    assert not waiting.is_alive()
    with claimed(place):
        pass
