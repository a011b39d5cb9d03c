"""A directory that ``DiffusionPipeline.from_pretrained`` opens where this package is not."""

import ast
import hashlib
import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from tinyflux.errors import TinyFluxError
from tinyflux.model.adapters import has_adapter, merge_adapters
from tinyflux.model.config import ZooConfig
from tinyflux.model.loader import load_model
from tinyflux.pipeline.pipeline import TinyFluxPipeline, make_scheduler
from tinyflux.pipeline.transformer import TinyFluxTransformer
from tinyflux.util.files import atomic_write

PACKAGE = "tinyflux"
# By model_index.json's keys: the folder, and the module that holds the class.
CODE = {
    "_class_name": (".", "tinyflux.pipeline.pipeline"),
    "transformer": ("transformer", "tinyflux.pipeline.transformer"),
}


def make_pipeline(
    checkpoint: str, zoo: ZooConfig, adapter: str | os.PathLike[str] | None = None
) -> TinyFluxPipeline:
    """A pipeline of a student, as :func:`~tinyflux.model.loader.load_model` opens it, on the CPU.

    Args:
        adapter: a directory or hub repository with a LoRA or DoRA adapter to put on it.

    Raises:
        TinyFluxError: the checkpoint or a frozen model cannot be opened.
    """
    student = load_model(checkpoint, device="cpu", dtype=zoo.dtype, adapter=adapter)
    models = zoo.build(student.config)
    models.offload()
    (t5_tokenizer, t5), (clip_tokenizer, clip) = models.load_t5(), models.load_clip()
    transformer = TinyFluxTransformer(student.config.to_dict())
    transformer.student = student
    pipeline = TinyFluxPipeline(
        transformer=transformer.eval(),
        vae=models.load_vae(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        scheduler=make_scheduler(student.config.timestep_shift),
    )
    pipeline.to("cpu")
    return pipeline


def export(checkpoint: str, zoo: ZooConfig, directory: str | os.PathLike[str]) -> Path:
    """Write the pipeline, its weights in safetensors and its code.

    The code is this package's own, of the modules that drawing needs and no others. diffusers runs
    it with ``trust_remote_code=True``. An adapter is added to the weights, since it needs peft.

    Raises:
        TinyFluxError: the directory is not empty, or something cannot be opened.
    """
    target = Path(directory).absolute()
    if target.exists() and any(target.iterdir()):
        raise TinyFluxError(f"'{target}' is not empty: export into a new directory")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        pipeline = make_pipeline(checkpoint, zoo)
        if has_adapter(pipeline.transformer.student):
            merge_adapters(pipeline.transformer.student)
        pipeline.save_pretrained(partial, safe_serialization=True)
        index = json.loads((partial / "model_index.json").read_text())
        for key, (folder, module) in CODE.items():
            kind = index[key] if isinstance(index[key], str) else index[key][1]
            index[key] = [_write_code(partial / folder, module), kind]
        atomic_write(partial / "model_index.json", json.dumps(index, indent=2).encode())
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise TinyFluxError(f"cannot export to '{target}': {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_code(folder: Path, module: str) -> str:
    """Write ``module`` and what it needs into ``folder``; its new name.

    diffusers copies a folder's modules into one place for all models, so names carry a digest of
    the code; and it copies what a module imports itself, no further, so this one imports all.
    """
    sources = _closure(module)
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:8]
    names = {name: f"{name.replace('.', '_')}_{digest}" for name in sources}
    for name, text in sources.items():
        text = re.sub(
            rf"^(\s*)from ({PACKAGE}[\w.]*) import ",
            lambda found: f"{found[1]}from .{names[found[2]]} import ",
            text,
            flags=re.MULTILINE,
        )
        if name == module:
            needed = "".join(
                f"from .{names[other]} import __name__ as _\n" for other in names if other != name
            )
            text += f"\n# diffusers copies what is imported here.\n{needed}"
        (folder / f"{names[name]}.py").write_text(text)
    return names[module]


def _closure(module: str) -> dict[str, str]:
    """Sources of ``module`` and of this package's modules that it needs, by name."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        found[name] = Path(spec.origin).read_text()
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                waiting.append(str(node.module))
    return dict(sorted(found.items()))
