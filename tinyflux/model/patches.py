"""A student's weights carried to another patch size.

A token's weights stand in two layers: ``img_in`` makes a token of ``p x p`` latents and
``final_linear`` a patch of velocities of a token. Rotary positions have no weights, so a grid of
any size needs nothing.
"""

from collections.abc import Mapping

from torch import Tensor

from tinyflux.errors import CheckpointError

PATCH_IN = "img_in.weight"
PATCH_OUT = ("final_linear.weight", "final_linear.bias")


def carry_patches(
    tensors: Mapping[str, Tensor], channels: int, patch_size: int, where: str
) -> dict[str, Tensor]:
    """``tensors`` of a student for tokens of ``patch_size``, made of those for another size.

    A larger patch is as many smaller ones: its token begins as the mean of theirs, and its
    velocity as theirs side by side. A smaller patch's token begins as that of a patch filled with
    it, and its velocity as the mean over it. To larger patches and back changes nothing; it is the
    resizing of FlexiViT (Beyer et al. 2022, arXiv:2212.08013) for patches that divide each other.

    Args:
        channels: of a latent.
        where: names the weights in errors.

    Raises:
        CheckpointError: neither patch size divides the other, or the latents have other channels.
    """
    weight = tensors.get(PATCH_IN)
    wanted = channels * patch_size**2
    if weight is None or weight.ndim != 2 or weight.shape[1] == wanted:
        return dict(tensors)
    former = round((weight.shape[1] / channels) ** 0.5)
    if channels * former**2 != weight.shape[1]:
        raise CheckpointError(
            f"{where} is of tokens of {weight.shape[1]} channels, which are no square of latents "
            f"of {channels}: a student learns one VAE's latents, so begin without it"
        )
    if former % patch_size and patch_size % former:
        raise CheckpointError(
            f"{where} has model.patch_size {former}, whose weights mean nothing for {patch_size}: "
            "one must divide the other"
        )
    carried = dict(tensors)
    carried[PATCH_IN] = _resize(weight.float(), 1, channels, former, patch_size, adds_up=True)
    for name in PATCH_OUT:
        if name in tensors:
            carried[name] = _resize(
                tensors[name].float(), 0, channels, former, patch_size, adds_up=False
            )
    return carried


def _resize(
    tensor: Tensor, dim: int, channels: int, former: int, patch_size: int, adds_up: bool
) -> Tensor:
    """``tensor`` with the ``C * p * p`` of ``dim``, channels first, for patches of another side.

    Args:
        adds_up: of inputs: their contributions to a token are summed, so a token that is spread
            over several patches counts for a share.
    """
    if patch_size > former:
        times = patch_size // former
        parts = tensor.unflatten(dim, (channels, 1, former, 1, former))
        sizes = list(parts.shape)
        sizes[dim + 1] = sizes[dim + 3] = times
        spread: Tensor = parts.expand(sizes).flatten(dim, dim + 4)
        return (spread / times**2 if adds_up else spread).contiguous()
    times = former // patch_size
    parts = tensor.unflatten(dim, (channels, times, patch_size, times, patch_size))
    over = (dim + 1, dim + 3)
    gathered = parts.sum(over) if adds_up else parts.mean(over)
    whole: Tensor = gathered.flatten(dim, dim + 2)
    return whole.contiguous()
