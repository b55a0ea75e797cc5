"""The toys are installed for the length of a test, as a third party's package would be; no run outlives it."""

from __future__ import annotations

import sys

import pytest

from mmaccel.registry import entries
from tests.batch.toys import PLUGIN, end_all


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    entries.cache_clear()
    yield
    end_all()
    entries.cache_clear()
    sys.modules.pop("toy_tasks", None)
