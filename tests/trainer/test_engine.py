import pytest
import torch

from tinyflux.trainer.engine import set_tf32


@pytest.fixture
def precision():
    """Torch's own setting, which is what it was afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_tf32_is_set_for_gpus_alone_and_left_alone_unless_it_is_said(precision):
    gpu, before = torch.device("cuda"), precision()
    set_tf32(torch.device("cpu"), True)
    assert precision() == before
    set_tf32(gpu, True)
    assert precision() == "high"
    set_tf32(gpu, None)
    assert precision() == "high"
    set_tf32(gpu, False)
    assert precision() == "highest"
