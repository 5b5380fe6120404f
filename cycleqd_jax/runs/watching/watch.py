"""What is shown and logged while a run runs; nothing here changes its outcome."""

from dataclasses import dataclass
from typing import Literal

LoggerName = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class Watch:
    """How a run is watched.

    Attributes:
        log: where metrics go besides ``metrics.jsonl``: tensorboard (event files in
            ``OUT/tensorboard``) and wandb (Weights & Biases; ``WANDB_MODE=offline`` needs no
            account).
        pictures_every: generations between two refreshes of the pictures; 0 draws them at the end
            alone.
        profile: write a ``jax.profiler`` trace of one generation to ``OUT/profile``, for
            TensorBoard and Perfetto.

    Raises:
        ValueError: a negative number of generations, or a logger given twice.
    """

    log: tuple[LoggerName, ...] = ()
    pictures_every: int = 20
    profile: bool = False

    def __post_init__(self) -> None:
        if self.pictures_every < 0:
            raise ValueError(f"pictures_every: expected at least 0, found {self.pictures_every}")
        if len(set(self.log)) != len(self.log):
            raise ValueError(f"log: expected each logger once, found {', '.join(self.log)}")
