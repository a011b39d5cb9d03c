"""What is inside a dataset, in words and in pictures."""

import base64
import html
import io
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.manifest import Manifest
from tinyflux.cache.schema import ROWS
from tinyflux.errors import CacheError
from tinyflux.model.zoo import ModelZoo
from tinyflux.util.files import atomic_write

_STYLE = """body{font:15px/1.5 system-ui;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
figure{display:inline-block;width:150px;margin:6px;vertical-align:top}
img{width:150px;image-rendering:auto}figcaption{font-size:12px;color:#555;overflow-wrap:anywhere}
pre{background:#f5f5f5;padding:1em;overflow:auto}"""


def bytes_by_group(manifest: Manifest) -> Counter[str]:
    """Size on disk of each column group."""
    total: Counter[str] = Counter()
    for shard in manifest.shards:
        total.update({group: file.bytes for group, file in shard.files.items()})
    return total


def describe(manifest: Manifest) -> str:
    """Rows, sizes, bytes, and what made what; a few dozen lines."""
    rows, total = manifest.rows, bytes_by_group(manifest)
    lines = [
        f"{manifest.name}: {rows} rows in {len(manifest.shards)} shards, "
        f"{sum(total.values()) / 2**20:.1f} MiB, {sum(total.values()) / rows / 1024:.1f} KiB a row",
        "made by a build job" if manifest.built else "saved from memory",
        "",
    ]
    grids: Counter[str] = Counter()
    for shard in manifest.shards:
        if "latents" in shard.files:
            _, height, width = shard.files["latents"].columns["latents"].shape
            grids[f"{width} x {height}"] += shard.samples
    lines += [f"latents of {grid}: {count} rows" for grid, count in grids.most_common()]
    if len(manifest.variants) > 1:
        lines.append(f"variants of each picture: plain, {', '.join(manifest.variants[1:])}")
    lines.append("")
    recipe = manifest.recipe
    for name in ("seed", "t_buckets", "t5_layers", "max_text_length", "text_padding"):
        lines.append(f"{name}: {getattr(recipe, name)}")
    lines.append(f"latent shift and scale: {recipe.latent_shift}, {recipe.latent_scale}")
    for group, size in total.items():
        lines += ["", f"{group}: {size / 2**20:.2f} MiB, {size / rows / 1024:.2f} KiB a row"]
        if group in recipe.groups:
            info = recipe.groups[group]
            lines.append(f"  code version {info.code_version}, {info.dtype}")
            lines += [f"  {n}: {m.repo} ({m.digest[:12]})" for n, m in info.models.items()]
    if manifest.cut_captions:
        lines += ["", str(manifest.cut_captions)]
    dropped = sum(len(shard.dropped) for shard in manifest.shards)
    if manifest.rejected:
        lines += ["", f"rejected: see {manifest.rejected.path} ({dropped} of them in the shards)"]
    return "\n".join(lines)


def write_page(location: str, path: Path, samples: int, device: str) -> None:
    """A self-contained HTML page with pictures decoded from the latents beside their captions.

    Raises:
        CacheError: the dataset was made of tensors, so nothing says what decodes them.
    """
    dataset = CachedDataset(location)
    manifest = dataset.manifest
    if ROWS not in manifest.groups or "latents" not in manifest.recipe.groups:
        raise CacheError(
            f"the cache '{location}' was made of tensors: it holds no captions and does not name "
            f"the VAE that decodes its latents"
        )
    vae = manifest.recipe.groups["latents"].models["vae"].repo
    zoo = ModelZoo(vae_repo=vae, device=device, vae_shift=manifest.recipe.latent_shift)
    captions, sources, keys = dataset.captions(), dataset.sources(), dataset.keys()
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int))
    figures = []
    for row in chosen.tolist():
        columns, count = dataset.read([row]), len(manifest.variants)
        pictures = []
        for variant in range(count):
            draw = np.array([(variant + 0.5) / count])
            latents = dataset.read([row], groups=("latents",), draws=draw)["latents"]
            pixels = zoo.decode_latents(latents)[0].permute(1, 2, 0).cpu().numpy()
            pictures.append(Image.fromarray((pixels * 255).round().astype(np.uint8)))
        picture = pictures[0]
        about = f"<b>{html.escape(captions[row])}</b><br>{html.escape(sources[row])}, "
        about += f"{picture.width} x {picture.height}<br>{keys[row][:12]}"
        tags = [_image(shown) for shown in pictures]
        if "sol_spatial" in columns:
            maps = columns["sol_spatial"][0].mean(0)
            grey = (maps / maps.max() * 255).round().byte().numpy()
            tags.append(
                _image(Image.fromarray(grey).resize(picture.size, Image.Resampling.NEAREST))
            )
        figures.append(f"<figure>{''.join(tags)}<figcaption>{about}</figcaption></figure>")
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>{html.escape(manifest.name)}</title><style>{_STYLE}</style>
<h1>{html.escape(manifest.name)}</h1>
<p>{len(figures)} of {len(dataset)} samples, decoded from their latents, every variant of each;
below each, where Sol's attention goes, over all times.</p>
{"".join(figures)}
<pre>{html.escape(describe(manifest))}</pre></html>
"""
    atomic_write(path, page.encode())


def _image(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return (
        f"<img alt='' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
    )
