"""What a recipe of federated devices may not say: one line and exit code 2, before any process group."""

from __future__ import annotations

import pytest

from trainer.__main__ import main

BASE = "--data.name fake --data.train-limit 60 --federated.devices 6 --policy.name constant"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data.alpha 0", "data.alpha = 0.0: must be above 0"),
        ("--federated.cohort 7", "federated.cohort = 7: there are 6 devices"),
        ("--federated.cohort 3 --federated.min-reports 4", "federated.min_reports = 4: the cohort has 3 devices"),
        ("--federated.devices 61", "data set of 60 samples: too few for 61 ranks or devices"),
        ("--data.partition classes --data.classes-per-device 11", "data.classes_per_device = 11: the data set has 10"),
        ("--federated.rule scaffold --optim.name adamw", "federated.rule = 'scaffold': needs plain SGD"),
        ("--federated.rule feddyn --optim.name adamw", "federated.rule = 'feddyn': needs plain SGD"),
        ("--federated.deadline-s 0.001", "federated.deadline_s = 0.001: too few devices meet it"),
        ("--federated.profile nowhere.csv", "federated.profile = 'nowhere.csv': choose equal, lognormal or a CSV"),
        ("--data.partition natural", "data.partition = 'natural': needs whom every sample is of"),
        ("--data.partition file", "data.partition_file = None: goes with data.partition = file"),
        ("--data.min-samples 11", "data.min_samples = 11: 6 shards of 60 can have 10 each"),
        ("--federated.rule fedbuff --federated.buffer 9", "federated.buffer = 9: only 6 devices train"),
        ("--sync.delay-steps 1", "sync.delay_steps = 1: devices average at a round's end"),
    ],
)
def test_bad_settings_are_one_line(
    flags: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # no peer exists here, so a rank that tried to join a group would not come back
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main([*BASE.split(), *flags.split()]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1, told
