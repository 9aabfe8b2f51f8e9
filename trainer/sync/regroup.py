"""The place in a run for another number of ranks: what all know alike is kept, what was a rank's own begins anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

State = Mapping[str, Any]


def regrouped(fresh: State, saved: State) -> dict[str, Any]:
    """The state of a LocalSGD that goes on from the consensus model between two rounds.

    Kept: counts, the policy's memory and phase, outer optimizers, signals, clocks. Begun anew: the open round's
    observation, what wire formats owe, averages under way.

    Args:
        fresh: this rank's own, as it is after entering.
        saved: rank 0's of the ranks that wrote the checkpoint.
    """
    progress, told = saved["progress"], saved["told"]
    samples = told["agreed_samples"] + sum(sent["samples"] for sent in told["sent"].values())
    counts = {name: progress[name] for name in ("local_step", "rounds")}
    in_a_row = {"skipped_in_a_row": progress["ledger"]["skipped_in_a_row"]}
    parts = [{"exchange": {}, "within": {}, "outer": part["outer"]} for part in saved["averager"]["parts"]]
    return {
        **fresh,
        "progress": {**fresh["progress"], **counts, "ledger": {**fresh["progress"]["ledger"], **in_a_row}},
        "told": {**told, "agreed_samples": samples + progress["ledger"]["everyones"], "sent": {}, "told": []},
        "averager": {"parts": parts, "flying": []},
        "timetable": {**fresh["timetable"], "delay": saved["timetable"]["delay"], "are_one": True},
        "sent_bytes": saved["sent_bytes"],
        "clock": saved["clock"],
    }


def weights_of_replicas(timetables: Sequence[State]) -> list[float]:
    """Each rank's share of the consensus, by the samples that it trained since the replicas were last one."""
    apart = [0 if each["are_one"] else each["samples_apart"] for each in timetables]
    total = sum(apart)
    return [each / total if total else 1 / len(apart) for each in apart]
