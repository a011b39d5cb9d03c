"""What the fields of both APIs may hold."""

from typing import Literal

MAX_SEED = 2**53 - 1  # what JSON numbers hold exactly

Solver = Literal["euler", "heun", "multistep"]
