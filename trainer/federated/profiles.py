"""What each device can do: its speed, its link, and how often it is there."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.errors import ConfigError

Floats = npt.NDArray[np.float64]
SAMPLES_PER_S = 100.0
BITS_PER_S = 10e6
SPREAD = 1.0
"""Standard deviation of the logarithm of speeds and links under `lognormal`: one device in six is 2.7 times slower than
the median. FedScale (Lai et al. 2022) reports spreads of this order for phones."""
COLUMNS = {
    "samples_per_s": SAMPLES_PER_S,
    "down_bits_per_s": BITS_PER_S,
    "up_bits_per_s": BITS_PER_S,
    "availability": 1.0,
}
TOO_MANY = "values beyond the columns"


@dataclass(frozen=True)
class Profile:
    """Every device's figures, (devices,) each."""

    samples_per_s: Floats
    down_bits_per_s: Floats
    up_bits_per_s: Floats
    availability: Floats
    """Share of the rounds in which a device may be drawn."""

    def __len__(self) -> int:
        return len(self.samples_per_s)

    @classmethod
    def of(cls, name: str, devices: int, seed: int) -> Profile:
        """The profile that `federated.profile` names.

        Raises:
            ConfigError: an unknown name, or a file whose figures cannot be.
        """
        if name == "equal":
            columns = [np.full(devices, value) for value in COLUMNS.values()]
            return cls(columns[0], columns[1], columns[2], columns[3])
        if name == "lognormal":
            draw = np.random.default_rng([seed, 7])
            drawn = [value * np.exp(SPREAD * draw.standard_normal(devices)) for value in [*COLUMNS.values()][:3]]
            return cls(drawn[0], drawn[1], drawn[2], np.ones(devices))
        return cls._read(name, devices)

    @classmethod
    def _read(cls, name: str, devices: int) -> Profile:
        said = f"federated.profile = {name!r}"
        try:
            with open(Path(name), encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a mark
                rows = list(csv.DictReader(file, restkey=TOO_MANY))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{said}: is no CSV file of UTF-8 text ({error})") from error
        except OSError as error:
            raise ConfigError(f"{said}: choose equal, lognormal or a CSV file ({error.strerror})") from error
        long = next((number for number, row in enumerate(rows) if TOO_MANY in row), None)
        if long is not None:
            raise ConfigError(f"{said}: the row of device {long} has more values than there are columns")
        unknown = sorted({column for row in rows for column in row if column not in COLUMNS})
        if unknown:
            raise ConfigError(f"{said}: has a column {unknown[0]!r}; the columns are {', '.join(COLUMNS)}")
        if len(rows) < devices:
            raise ConfigError(f"{said}: has {len(rows)} rows for {devices} devices; add rows, or lower devices")
        found = []
        for column, value in COLUMNS.items():
            read = [_number(said, column, number, row.get(column, value)) for number, row in enumerate(rows[:devices])]
            found.append(np.array(read))
        if found[-1].max() > 1:
            raise ConfigError(f"{said}: availability of device {int(found[-1].argmax())} is above 1")
        return cls(found[0], found[1], found[2], found[3])


def _number(said: str, column: str, device: int, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = float("nan")
    if not number > 0:
        raise ConfigError(f"{said}: {column} of device {device} is {value!r}; must be a number above 0")
    return number
