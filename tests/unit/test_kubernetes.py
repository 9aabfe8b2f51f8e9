"""The manifest for Kubernetes, as far as it can be checked without a cluster."""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]

from trainer.config import recipes

MANIFEST = Path(__file__).resolve().parents[2] / "launch" / "kubernetes" / "trainjob.yaml"


def test_the_manifest_trains_what_its_flags_say() -> None:
    runtime, job = yaml.safe_load_all(MANIFEST.read_text())
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    program, module, *flags = job["spec"]["trainer"]["args"]
    assert (job["spec"]["trainer"]["command"], program, module) == (["torchrun"], "-m", "trainer")
    config = recipes.parse(flags, "trainer")
    assert config.run.resume == "auto"
    assert config.checkpoint.every_s > 0
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (rule,) = node["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]
