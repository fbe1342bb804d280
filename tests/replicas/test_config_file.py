"""The Serve config file of docs/replicas.md is one, and its application can be built."""

from __future__ import annotations

from pathlib import Path

import yaml
from ray.serve.schema import ServeDeploySchema

DOCUMENT = Path(__file__).parents[2] / "docs" / "replicas.md"


def test_the_config_file_of_the_document_deploys_what_it_says() -> None:
    config = yaml.safe_load(DOCUMENT.read_text().split("```yaml\n")[1].split("```")[0])
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, _, name = application.import_path.partition(":")
    built = getattr(__import__(module, fromlist=[name]), name)(application.args)
    deployment = built._bound_deployment
    assert deployment.name == "Replica"
    scale = deployment._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas, scale.target_ongoing_requests) == (1, 4, 32)
    assert deployment._deployment_config.health_check_period_s == 5
