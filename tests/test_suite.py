"""The tests' own house rules."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_slow_modules_say_why():
    marked = [path for path in TESTS.rglob("test_*.py") if "mark.slow" in path.read_text()]
    assert len(marked) > 10
    for path in marked:
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert path == Path(__file__) or "Slow: " in said, (
            f"{path.name} does not say why it is slow"
        )


def test_no_module_imports_from_another_test_module():
    for path in TESTS.rglob("*.py"):
        found = re.findall(r"^\s*from tests\S*\.(test_\w+) import", path.read_text(), re.MULTILINE)
        assert not found, f"{path.name} takes what {found} should not own"


def test_children_are_started_with_a_keeper():
    for path in TESTS.rglob("*.py"):
        kept = path.name == "keeper.py" or "subprocess.Popen(" not in path.read_text()
        assert kept or path.name in ("test_fixtures.py", "test_suite.py"), (
            f"{path.name} starts a child that may outlive the tests: use keeper.start"
        )
