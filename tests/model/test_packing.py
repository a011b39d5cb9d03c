"""Latents as tokens and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyflux.errors import InputError
from tinyflux.model.packing import pack_latents, token_grid, unpack_latents

SIDES = st.integers(1, 6)


@given(st.integers(1, 3), st.integers(1, 4), SIDES, SIDES, st.integers(1, 3))
def test_unpacking_is_the_inverse_of_packing(batch, channels, rows, columns, patch):
    latents = torch.randn(batch, channels, rows * patch, columns * patch)
    tokens = pack_latents(latents, patch)
    assert tokens.shape == (batch, rows * columns, channels * patch**2)
    assert torch.equal(unpack_latents(tokens, rows * patch, columns * patch, patch), latents)


def test_a_token_holds_its_patch_channels_first_as_in_flux():
    diffusers = pytest.importorskip("diffusers")
    latents = torch.randn(2, 16, 6, 8)
    wanted = diffusers.FluxPipeline._pack_latents(latents, 2, 16, 6, 8)
    assert torch.equal(pack_latents(latents, 2), wanted)


def test_latents_that_patches_do_not_fill_are_refused():
    with pytest.raises(InputError, match="latents of 5 x 4 do not divide into patches of 2 x 2"):
        token_grid(5, 4, 2)
    with pytest.raises(InputError, match="multiples of 2 latents"):
        pack_latents(torch.zeros(1, 1, 4, 3), 2)
