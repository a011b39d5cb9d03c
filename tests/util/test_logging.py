"""What the library logs, as the command line shows it."""

import ast
import logging
from pathlib import Path

import pytest

import tinyflux
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


def test_the_library_logs_and_its_command_line_prints():
    library = Path(tinyflux.__file__).parent
    for path in library.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Call)]  # fmt: skip
        prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
        speaks = path.parent.name == "cli" or path == library / "util" / "logging.py"
        assert speaks or not prints, f"{path} prints: let it log"
