"""What the library logs, as the command line shows it."""

import logging

import pytest

from tinyflux.util.logging import log_to_console

logger = logging.getLogger("tinyflux.trainer.anything")


def test_lines_are_bare_and_go_where_they_belong(capsys):
    log_to_console()
    log_to_console()  # a process's second set-up doubles no line
    logger.debug("for nobody")
    logger.info("step %d", 3)
    logger.warning("this is %s", "odd")
    printed = capsys.readouterr()
    assert printed.out == "step 3\n"
    assert printed.err == "this is odd\n"


@pytest.mark.parametrize("name", ["elsewhere", "tinyfluxes"])
def test_other_libraries_are_not_spoken_for(capsys, name):
    log_to_console()
    logging.getLogger(name).info("of another")
    assert capsys.readouterr().out == ""
