"""``python -m tinyflux.demo evaluate|report --config FILE``: the demo's own two stages."""

import sys

from tinyflux.cli import report_mistakes


def main() -> None:
    from tinyflux.config import parse_run_config
    from tinyflux.demo.evaluate import evaluate
    from tinyflux.demo.report import write_report
    from tinyflux.errors import ConfigError

    stages = {"evaluate": evaluate, "report": write_report}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in stages:
        raise ConfigError(f"name a stage: {' or '.join(stages)}")
    print(stages[name](parse_run_config(sys.argv[2:], f"tinyflux.demo {name}")))


if __name__ == "__main__":
    sys.exit(report_mistakes(main))
