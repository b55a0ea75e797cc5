"""Settings for all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two workers share the cores
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from hypothesis import settings

settings.register_profile("house", deadline=None)  # a busy machine is no failure
settings.load_profile("house")

import tests.shapes  # noqa: E402, F401  # what --jaxtyping-packages names has to be there before a package is imported
