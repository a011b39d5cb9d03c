"""Caches of twelve captions built by the bare loop, changed and compared."""

from dataclasses import replace

import torch

from tinyflux.cache.build import LocalRunner, build
from tinyflux.cache.dataset import CachedDataset

CAPTIONS = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in
            ("circle", "square", "heart", "star")]  # fmt: skip


def changed(configs, **sections):
    """``configs`` with other fields, as ``data={"folder": ...}``."""
    new = {name: replace(getattr(configs, name), **values) for name, values in sections.items()}
    return replace(configs, **new)


def make(configs):
    return build(configs, LocalRunner(configs))


def rows_by_key(path):
    """Every sample's tensors and caption, by key."""
    dataset = CachedDataset(path)
    keys, captions = dataset.keys(), dataset.captions()
    assert len(set(keys)) == len(keys)
    found = {}
    for _, run in dataset.grids():
        columns = dataset.read(run)
        for at, row in enumerate(run):
            tensors = {name: values[at] for name, values in columns.items()}
            found[keys[row]] = (captions[row], tensors)
    return found


def assert_same(one, other, tolerance=0.0):
    found, expected = rows_by_key(one), rows_by_key(other)
    assert found.keys() == expected.keys()
    for key, (caption, tensors) in expected.items():
        assert found[key][0] == caption
        assert found[key][1].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                found[key][1][name], tensor, rtol=tolerance, atol=tolerance, msg=name
            )
