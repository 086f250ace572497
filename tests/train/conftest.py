"""A data set that trains in a second."""

import pytest

from fastres.train import data


def tiny(recipe):
    return data.synthetic(size=16, train=48, test=16, classes=4)


@pytest.fixture
def tiny_data(monkeypatch):
    monkeypatch.setattr(data, "load", tiny)
