"""What a rank reports to the others at a round's end, and what all ranks must report alike."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.errors import MismatchError

Header = dict[str, float]
AGREED = ("round", "step", "batch", "period", "lr_scale", "plan")
"""What every rank must believe alike."""


def compare(headers: Sequence[Header]) -> None:
    """Every rank must have come to the same point by the same Plan.

    Raises:
        MismatchError: names two ranks and what each believes.
    """
    for rank, header in enumerate(headers):
        for name in AGREED:
            if header[name] != headers[0][name]:
                sides = "; ".join(
                    f"rank {who} is at round {it['round']:.0f}, local step {it['step']:.0f}, "
                    f"{it['samples']:.0f} samples, plan of batch {it['batch']:.0f} and period {it['period']:.0f}"
                    for who, it in ((0, headers[0]), (rank, header))
                )
                raise MismatchError(f"ranks disagree about their {name}: {sides}")


SKETCH = 256
"""Values of a sketch: a product of two gradients is then off by 1/16 of the product of their norms (standard
deviation), which is about what the gradients' own noise does to it."""
SKETCH_NAMES = tuple(f"sketch{number}" for number in range(SKETCH))
