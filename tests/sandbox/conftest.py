"""Sandboxes of every backend that this machine has."""

import shutil

import pytest

from cycleqd_jax.sandbox import Limits, open_sandbox

PROGRAM = {"bubblewrap": "bwrap", "unshare": "unshare"}
# Generous where a test waits for success, tight where it waits for a limit.
ROOMY = Limits(seconds=20.0, memory_mb=256, processes=16, file_mb=8, output_kb=64)
TIGHT = Limits(seconds=2.0, memory_mb=128, processes=12, file_mb=4, output_kb=64)


@pytest.fixture(scope="session", params=sorted(PROGRAM))
def backend(request):
    if shutil.which(PROGRAM[request.param]) is None:
        pytest.skip(f"{PROGRAM[request.param]} is not installed")
    return request.param


@pytest.fixture(scope="session")
def roomy(backend):
    with open_sandbox(backend, ROOMY, workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def tight(backend):
    with open_sandbox(backend, TIGHT, workers=3) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def single(backend):
    with open_sandbox(backend, ROOMY, workers=1) as sandbox:
        yield sandbox
