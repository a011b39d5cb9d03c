"""The frozen models in memory: loaded once, moved between devices, told apart by their content.

A local directory goes wherever a hub repository's name goes.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tinyflux.errors import ConfigError
from tinyflux.model.pretrained import open_pretrained, open_teacher, open_vae
from tinyflux.util.config import nearest
from tinyflux.util.device import resolve_device

if TYPE_CHECKING:  # each takes seconds to import: only who opens a model waits for it
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

LUNE_FILENAME = "sd15-flow-lune-unet.safetensors"
SOL_FILENAME = "sd15-flow-sol-unet.safetensors"


class FrozenModels:
    """The VAEs, text encoders and teachers, each loaded when it is first asked for.

    Args:
        device: where models run; ``"auto"`` is CUDA if there is one.
        dtype: of weights and encodings.
        vae_repo: holds the student's VAE, in ``vae/`` or at its root.
        t5_repo, clip_repo: text encoders with their tokenizers.
        experts_repo: holds ``lune/`` and ``sol/``, or single files of SD1.5's architecture.
        sd_repo: holds the teachers' VAE.
    """

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        vae_repo: str,
        t5_repo: str,
        clip_repo: str,
        experts_repo: str,
        sd_repo: str,
    ):
        self.device, self.dtype = resolve_device(device), dtype
        self.vae_repo, self.t5_repo, self.clip_repo = vae_repo, t5_repo, clip_repo
        self.experts_repo, self.sd_repo = experts_repo, sd_repo
        self._models: dict[str, Any] = {}
        self._tokenizers: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        self._loaders: dict[str, Callable[[], Any]] = {
            "vae": self.load_vae,
            "sd_vae": self.load_sd_vae,
            "t5": self.load_t5,
            "clip": self.load_clip,
            "lune": self.load_lune,
            "sol": self.load_sol,
        }

    def load_vae(self) -> "AutoencoderKL":
        """The student's VAE."""
        return self._load("vae", lambda: open_vae(self.vae_repo, self.dtype))

    def load_sd_vae(self) -> "AutoencoderKL":
        """The teachers' VAE; the student's own module if both come from one place."""
        if self.sd_repo == self.vae_repo:
            return self.load_vae()
        return self._load("sd_vae", lambda: open_vae(self.sd_repo, self.dtype))

    def load_t5(self) -> tuple["T5Tokenizer", "T5EncoderModel"]:
        """T5's tokenizer and encoder."""
        from transformers import T5EncoderModel

        model = self._load(
            "t5", lambda: open_pretrained(T5EncoderModel, self.t5_repo, dtype=self.dtype)
        )
        return self.t5_tokenizer(), model

    def load_clip(self) -> tuple["CLIPTokenizer", "CLIPTextModel"]:
        """CLIP's tokenizer and text model."""
        from transformers import CLIPTextModel

        model = self._load(
            "clip", lambda: open_pretrained(CLIPTextModel, self.clip_repo, dtype=self.dtype)
        )
        return self.clip_tokenizer(), model

    def load_lune(self, filename: str = LUNE_FILENAME) -> "UNet2DConditionModel":
        """The Lune teacher: folder ``lune/``, or else the file ``filename``."""
        return self._load("lune", lambda: self._open_teacher("lune", filename))

    def load_sol(self, filename: str = SOL_FILENAME) -> "UNet2DConditionModel":
        """The Sol teacher: folder ``sol/``, or else the file ``filename``."""
        return self._load("sol", lambda: self._open_teacher("sol", filename))

    def load(self, name: str) -> Any:
        """A model by its name, as its own method gives it.

        Raises:
            ConfigError: there is none of that name.
        """
        self._check_name(name)
        return self._loaders[name]()

    @property
    def loaded(self) -> dict[str, Any]:
        """The models in memory, by name."""
        return dict(self._models)

    def _open_teacher(self, name: str, filename: str) -> "UNet2DConditionModel":
        return open_teacher(self.experts_repo, name, filename, self.dtype)

    def _load(self, name: str, opener: Callable[[], Any]) -> Any:
        if name not in self._models:
            self._models[name] = opener().eval().requires_grad_(False).to(self.device)
        return self._models[name]

    def t5_tokenizer(self) -> Any:
        """T5's tokenizer, which needs no model."""
        from transformers import T5Tokenizer

        return self._tokenizer("t5", T5Tokenizer, self.t5_repo)

    def clip_tokenizer(self) -> Any:
        """CLIP's tokenizer, which needs no model."""
        from transformers import CLIPTokenizer

        return self._tokenizer("clip", CLIPTokenizer, self.clip_repo)

    def _tokenizer(self, name: str, cls: Any, repo: str) -> Any:
        if name not in self._tokenizers:
            self._tokenizers[name] = open_pretrained(cls, repo)
        return self._tokenizers[name]

    def unload(self, name: str) -> None:
        """Forget a model (``vae``, ``sd_vae``, ``t5``, ``clip``, ``lune`` or ``sol``)."""
        self._check_name(name)
        self._models.pop(name, None)
        self._tokenizers.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def offload(self) -> None:
        """Move every loaded model to the CPU."""
        for model in self._models.values():
            model.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Move every loaded model back to ``device``."""
        for model in self._models.values():
            model.to(self.device)

    def _check_name(self, name: str) -> None:
        if name not in self._loaders:
            raise ConfigError(
                f"the zoo has no model '{name}'{nearest(name, self._loaders)}: it has "
                f"{', '.join(self._loaders)}"
            )

    def digest(self, name: str) -> str:
        """SHA-256 over a model's vocabulary and its tensors' sorted names, shapes, fp32 values."""
        if name not in self._digests:
            loaded = self.load(name)
            tokenizer, model = loaded if isinstance(loaded, tuple) else (None, loaded)
            total = hashlib.sha256()
            if tokenizer is not None:
                total.update(repr(sorted(tokenizer.get_vocab().items())).encode())
            for key, tensor in sorted(model.state_dict().items()):
                total.update(f"{key}{tuple(tensor.shape)}".encode())
                total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            self._digests[name] = total.hexdigest()
        return self._digests[name]
