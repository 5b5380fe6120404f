"""Published figures of accelerators: what a plan holds its bytes and operations against."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        name: as in ``--chip``.
        memory: bytes.
        bandwidth: bytes a second from that memory.
        flops: dense bfloat16 operations a second (a multiplication and an addition are two).
        kinds: words of ``jax.Device.device_kind`` by which it is recognised.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    kinds: tuple[str, ...]


# NVIDIA's data sheets of A100, H100 (SXM) and H200, without sparsity; Google Cloud's "TPU system
# architecture" pages, per chip. Peaks that no program reaches: they bound a time from below.
_CHIPS = (
    Chip("a100", 80e9, 2.039e12, 312e12, ("A100-SXM4-80GB",)),
    Chip("h100", 80e9, 3.35e12, 989e12, ("H100 80GB HBM3",)),
    Chip("h200", 141e9, 4.8e12, 989e12, ("H200",)),
    Chip("v4", 32e9, 1.2e12, 275e12, ("TPU v4",)),
    Chip("v5e", 16e9, 0.819e12, 197e12, ("TPU v5 lite", "TPU v5e")),
    Chip("v5p", 95e9, 2.765e12, 459e12, ("TPU v5p", "TPU v5")),
    Chip("v6e", 32e9, 1.6e12, 918e12, ("TPU v6 lite", "TPU v6e")),
)

CHIPS = {chip.name: chip for chip in _CHIPS}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls ``device_kind``; None for one that the table lacks."""

    def named(kind: str) -> bool:
        return re.search(rf"\b{kind}\b", device_kind) is not None

    return next((chip for chip in _CHIPS if any(map(named, chip.kinds))), None)
