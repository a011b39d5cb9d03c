"""The student as a diffusers model."""

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep


class TinyFluxTransformer(ModelMixin, ConfigMixin):
    """:class:`~tinyflux.model.model.TinyFluxDeep` with ``from_pretrained`` and ``save_pretrained``.

    Args:
        settings: a ``TinyFluxConfig`` as plain data.
    """

    @register_to_config
    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.student = TinyFluxDeep(TinyFluxConfig.from_dict(settings, "the transformer's config"))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`tinyflux.model.model.TinyFluxDeep.forward`."""
        out: Tensor | tuple[Tensor, dict[str, Tensor]] = self.student(*args, **kwargs)
        return out
