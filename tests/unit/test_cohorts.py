"""Who is drawn, who is heard and what the virtual clock shows: tables by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config.federated import FederatedConfig, check_federated, device_plan
from trainer.config.sync import SyncConfig
from trainer.errors import ConfigError
from trainer.federated.cohorts import Cohorts, Fleet, batch_sizes, open_cohorts, samples_in
from trainer.federated.profiles import Profile
from trainer.plan import Plan

FAST = 1e15


def profile(*seconds: float, samples: int = 10, availability: float = 1.0) -> Profile:
    """Devices that need so many seconds for so many samples, and none for transfers."""
    speeds = np.array([samples / each for each in seconds])
    many = np.ones(len(seconds))
    return Profile(speeds, FAST * many, FAST * many, availability * many)


def rounds(seconds: tuple[float, ...], **settings: Any) -> Cohorts:
    config = FederatedConfig(devices=len(seconds), **settings)
    return open_cohorts(Fleet(config, (10,) * len(seconds), profile(*seconds), 0, 1_000))


PLAN = Plan(10, sync_period_steps=1)


def test_a_deadline_drops_the_late_and_is_when_the_round_ends() -> None:
    found = rounds((1, 2, 10), deadline_s=5.0).next(PLAN)
    assert [heard.device for heard in found.heard] == [0, 1]
    assert found.dropped == (2,)
    assert found.ended_s == 5.0
    assert [heard.weight for heard in found.heard] == [10, 10]
    all_in_time = rounds((1, 2, 4), deadline_s=5.0).next(PLAN)
    assert (len(all_in_time.heard), all_in_time.ended_s) == (3, pytest.approx(4.0))


def test_late_devices_may_send_what_they_have() -> None:
    plan = Plan(2, sync_period_steps=5)  # 10 samples
    found = rounds((1, 2, 10), deadline_s=5.0, late="partial").next(plan)
    assert [(visit.device, visit.steps, visit.samples) for visit in found.visits] == [(0, 5, 10), (1, 5, 10), (2, 2, 4)]
    assert found.ended_s == pytest.approx(4.0)  # two steps of two seconds each


def test_too_few_reports_keep_the_model() -> None:
    found = rounds((1, 20, 30), deadline_s=5.0, min_reports=1).next(PLAN)
    assert len(found.heard) == 1
    config = FederatedConfig(devices=3, deadline_s=5.0, min_reports=2, cohort=2)
    fleet = Fleet(config, (10,) * 3, profile(1, 1, 30), 0, 1_000)
    ended = [open_cohorts(fleet)]
    seen = [ended[0].next(PLAN) for _ in range(20)]
    kept = [each for each in seen if not each.heard]
    assert kept
    assert all(2 in each.dropped for each in kept)
    assert all(not each.visits for each in kept)


def test_over_selection_hears_the_first() -> None:
    found = rounds((5, 4, 3, 2), cohort=2, over_select=2.0).next(PLAN)
    assert [heard.device for heard in found.heard] == [2, 3]
    assert found.dropped == (0, 1)
    assert found.ended_s == pytest.approx(3.0)


def test_cohorts_follow_from_seed_and_round_alone() -> None:
    ones = rounds((1,) * 40, cohort=5)
    drawn = [[visit.device for visit in ones.next(PLAN).visits] for _ in range(30)]
    again = rounds((1,) * 40, cohort=5)
    again.load_state_dict({"number": 20, "now_s": 0.0})
    assert [visit.device for visit in again.next(PLAN).visits] == drawn[20]
    assert {len(each) for each in drawn} == {5}
    counts = np.bincount(np.concatenate(drawn), minlength=40)
    assert counts.sum() == 150
    assert counts.max() <= 12  # 3.75 in the mean


def test_batch_by_speed_and_epochs() -> None:
    config = FederatedConfig(devices=2, batch="speed")
    fleet = Fleet(config, (100, 100), profile(1, 3, samples=3), 0, 1)  # speeds 3 and 1: 1.5 and 0.5 of the mean
    found = open_cohorts(fleet).next(Plan(20, sync_period_steps=4))
    assert [(visit.batch, visit.steps) for visit in found.visits] == [(30, 4), (10, 4)]
    assert [heard.weight for heard in found.heard] == [visit.samples for visit in found.visits] == [100 + 0 + 0 - 0, 40]
    epochs = FederatedConfig(devices=2, local_epochs=3)
    found = open_cohorts(Fleet(epochs, (25, 7), profile(1, 1), 0, 1)).next(Plan(10, sync_period_steps=4))
    assert [(visit.steps, visit.samples) for visit in found.visits] == [(9, 75), (3, 21)]
    assert samples_in(25, 10, 4) == 35
    assert batch_sizes(21, 10) == (10, 6, 5)  # no batch of one sample
    assert (batch_sizes(5, 10), batch_sizes(3, 1), batch_sizes(1, 4)) == ((5,), (1, 1, 1), (1,))
    assert samples_in(21, 10, 5) == 37
    assert (batch_sizes(7, 2), batch_sizes(8, 2)) == ((2, 2, 3), (2, 2, 2, 2))
    slow = Fleet(FederatedConfig(devices=2, batch="speed", local_epochs=2), (7, 7), profile(70.0, 1.0), 0, 0)
    assert [(each.batch, each.steps) for each in (slow.visit(device, 0, Plan(4), 100.0) for device in (0, 1))] == [
        (2, 6),
        (2, 6),
    ]


def test_transfers_cost_what_the_link_carries() -> None:
    links = Profile(np.array([10.0]), np.array([1_000.0]), np.array([500.0]), np.ones(1))
    for wire, up_s in (("float32", 32 * 100 / 500), ("int8", 8 * 100 / 500)):
        fleet = Fleet(FederatedConfig(devices=1), (10,), links, 0, 100)
        found = open_cohorts(fleet).next(Plan(10, sync_period_steps=1, wire_format=wire))  # type: ignore[arg-type]
        assert found.ended_s == pytest.approx(1.0 + 3.2 + up_s)
        assert found.transfer_s == pytest.approx(3.2 + up_s)


def test_buffered_updates_by_hand() -> None:
    """Devices of 1, 2 and 10 seconds, all training, an update at every second arrival."""
    cohorts = rounds((1, 2, 10), rule="fedbuff", buffer=2, weights="uniform")
    first = cohorts.next(PLAN)
    # 0 arrives at 1 s and begins anew; at 2 s both 0 (again) and 1 arrive: the one that began first comes first
    assert [heard.device for heard in first.heard] in ([0, 0], [0, 1])
    assert first.ended_s == pytest.approx(2.0)
    assert all(heard.scale == 1.0 for heard in first.heard)
    seen = [first] + [cohorts.next(PLAN) for _ in range(12)]
    slow = [heard for each in seen for heard in each.heard if heard.device == 2]
    assert slow[0].staleness >= 4
    assert slow[0].scale == pytest.approx((1 + slow[0].staleness) ** -0.5)
    assert [each.ended_s for each in seen] == sorted(each.ended_s for each in seen)


def test_asynchronous_rounds_resume_exactly() -> None:
    settings: dict[str, Any] = {"rule": "fedasync", "cohort": 3}
    ones = rounds((1, 2, 3, 5, 8), **settings)
    for _ in range(7):
        ones.next(PLAN)
    state = json.loads(json.dumps(ones.state_dict()))
    rest = [ones.next(PLAN) for _ in range(9)]
    again = rounds((1, 2, 3, 5, 8), **settings)
    again.load_state_dict(state)
    assert [again.next(PLAN) for _ in range(9)] == rest
    assert all(len(each.heard) == 1 for each in rest)


def test_profiles_are_read_and_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "profile.csv"
    file.write_text("\ufeffsamples_per_s,availability\n10,0.5\n20,1\n")  # as spreadsheets write it
    found = Profile.of(str(file), 2, 0)
    assert found.samples_per_s.tolist() == [10, 20]
    assert found.up_bits_per_s.tolist() == [10e6, 10e6]
    with pytest.raises(ConfigError, match="has 2 rows for 3 devices"):
        Profile.of(str(file), 3, 0)
    for text, said in (
        ("samples_per_s\n0\n", "samples_per_s of device 0 is '0'; must be a number above 0"),
        ("speed\n1\n", "has a column 'speed'"),
        ("availability\n2\n", "availability of device 0 is above 1"),
        ("samples_per_s\n1,5\n", "the row of device 0 has more values than there are columns"),
        ("samples_per_s\n1\n\udcff", "is no CSV file of UTF-8 text"),
    ):
        file.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ConfigError, match=said):
            Profile.of(str(file), 1, 0)
    with pytest.raises(ConfigError, match="choose equal, lognormal or a CSV file"):
        Profile.of("nowhere", 1, 0)
    drawn = Profile.of("lognormal", 4_000, 1)
    assert np.log(drawn.samples_per_s).std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cohort": 5}, "cohort = 5: there are 4 devices"),
        ({"cohort": 2, "min_reports": 3}, "min_reports = 3: the cohort has 2 devices"),
        ({"local_steps": 2, "local_epochs": 1}, "not both"),
        ({"rule": "fedavg", "mu": 1.0}, "mu = 1.0: goes with rule"),
        ({"rule": "fedbuff", "deadline_s": 1.0}, "waits for nobody"),
        ({"rule": "fedbuff", "buffer": 5}, "only 4 devices train"),
        ({"late": "partial"}, "goes with deadline_s"),
        ({"rule": "scafold"}, "choose one of"),
        ({"deadline_s": 0.0}, "must be above 0 seconds"),
        ({"over_select": 0.5}, "must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FederatedConfig(devices=4, **settings)


def test_a_deadline_that_nobody_meets_names_one_that_would_do() -> None:
    config = FederatedConfig(devices=3, deadline_s=0.5, min_reports=2)
    with pytest.raises(ConfigError, match=r"deadline_s = 0\.5: .* 2 would report after 2\.0\d? s"):
        Fleet(config, (10,) * 3, profile(1, 2, 10), 0, 1_000).check_deadline(PLAN)


def test_plans_and_averages_that_devices_cannot_have() -> None:
    federated, plan = FederatedConfig(devices=2, local_steps=7), Plan(8, sync_period_steps=1)
    carried = device_plan(plan, federated, SyncConfig(wire_format="int8"))
    assert (carried.averages, carried.sync_period_steps, carried.wire_format) == ("parameters", 7, "int8")
    for settings, said in (({"delay_steps": 2}, "delay_steps = 2"), ({"batch_norm": "keep"}, "a device keeps no")):
        with pytest.raises(ConfigError, match=said):
            check_federated(federated, SyncConfig(**settings), [plan])
    with pytest.raises(ConfigError, match="sync_period_steps = 0"):
        check_federated(federated, SyncConfig(), [Plan(8, sync_period_steps=0)])
    with pytest.raises(ConfigError, match="noise_batch = 4: a device has no gradient"):
        check_federated(federated, SyncConfig(), [Plan(8, 2, noise_batch=4)])
