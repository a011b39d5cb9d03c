"""Tensors by name: names without what wrappers add, and whether they fit a model."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyflux.errors import CheckpointError, InputError
from tinyflux.model.model import TinyFluxDeep

# Attributes under which torch.compile, DataParallel and engines keep the module that they wrap;
# they put them in front of its tensors' names, too.
WRAPPERS = ("_orig_mod", "module")


def plain_name(name: str) -> str:
    """A tensor's name without the prefixes that wrappers add."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(f"{wrapper}.").replace(f".{wrapper}.", ".")
    return name


def as_module(model: nn.Module) -> TinyFluxDeep:
    """The bare student inside a compiled or wrapped one.

    Raises:
        InputError: there is none.
    """
    while not isinstance(model, TinyFluxDeep):
        inner = next(filter(None, (getattr(model, name, None) for name in WRAPPERS)), None)
        if inner is None:
            raise InputError(f"a TinyFluxDeep is needed, not a {type(model).__name__}")
        model = inner
    return model


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """What tells a student's tensors from others, in any precision that holds the same numbers."""
    return fingerprint_of(sorted(tensors.items()))


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """:func:`fingerprint` of tensors that come one by one, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(name.encode())
        total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


@dataclass(frozen=True)
class Misfits:
    """What keeps tensors from having the names and shapes that are expected.

    Attributes:
        missing: names that are expected and not there; unknown: those that are there in vain.
        misshaped: for each name with another shape that shape, and the expected one.
    """

    missing: list[str]
    unknown: list[str]
    misshaped: dict[str, tuple[torch.Size, torch.Size]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.misshaped)

    def phrases(self) -> list[str]:
        """A phrase for each."""
        return [
            *(f"{name} is missing" for name in self.missing),
            *(f"{name} is unknown" for name in self.unknown),
            *(
                f"{name} is {list(shape)} instead of {list(expected)}"
                for name, (shape, expected) in self.misshaped.items()
            ),
        ]

    def __str__(self) -> str:
        """How many there are of each kind, and the first names."""
        shapes = [
            f"{name} {list(shape)} for {list(expected)}"
            for name, (shape, expected) in self.misshaped.items()
        ]
        kinds = (
            ("tensors missing", self.missing),
            ("unknown tensors", self.unknown),
            ("tensors of another shape", shapes),
        )
        return "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for kind, names in kinds
            if names
        )


def misfits(expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> Misfits:
    """What keeps ``tensors`` from having the ``expected`` names and shapes."""
    return Misfits(
        missing=[name for name in expected if name not in tensors],
        unknown=[name for name in tensors if name not in expected],
        misshaped={
            name: (tensors[name].shape, shape)
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        },
    )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Each tensor's shape, by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def check_tensors(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Refuse ``tensors`` unless they have the names and shapes of ``expected``; CheckpointError."""
    problems = misfits(shapes_of(expected), tensors).phrases()
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{where} does not fit the model: {', '.join(problems[:3])}{more}; "
            "use the config that it was made with"
        )
