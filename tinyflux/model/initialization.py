"""First weights that do not depend on which other modules a student has."""

from torch import nn

from tinyflux.util.seeding import generator


def draw_by_name(model: nn.Module, seed: int) -> None:
    """Draw the weights of every linear layer again, each by ``seed`` and its own name.

    A student draws its first weights in the order of its modules, so one module more changes all
    that come after it. Drawn by name, two students have equal weights wherever they have a layer of
    the same name and shape. The distribution stays Xavier's (Glorot & Bengio 2010), and what begins
    at zero stays there; a student draws nothing but linear layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.any():
            nn.init.xavier_uniform_(module.weight, generator=generator(seed, "weights", name))
