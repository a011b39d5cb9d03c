"""A run's stages as child processes."""

import os
import signal
import sys

import pytest

from tests.fixtures import keeper
from tests.fixtures.waiting import wait_for

CHILD = r"""
import os, signal, sys, time
from pathlib import Path

def end(*_):
    time.sleep(0.5)  # a Ray is stopped meanwhile
    Path("ended").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
Path("begun").write_text(f"{os.getpid()}\n")
time.sleep(600)
"""
PARENT = """
import sys
from pathlib import Path
from tinyflux.config import RunConfig
from tinyflux.report.stages import Stage, run_stages
from tinyflux.util.processes import exit_on_sigterm

exit_on_sigterm()
here = Path.cwd()
run_stages([Stage("slow", "sleeps", ["-c", sys.argv[1]])], RunConfig(run_dir=str(here)), here)
"""


def test_a_run_that_is_terminated_ends_its_stage_and_waits_for_it(tmp_path):
    parent = keeper.start([sys.executable, "-c", PARENT, CHILD], cwd=tmp_path)
    begun = tmp_path / "begun"
    wait_for(lambda: begun.exists() and begun.read_text().endswith("\n"))
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) == 128 + signal.SIGTERM
    assert (tmp_path / "ended").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)
    assert not (tmp_path / "stages.json").exists()
