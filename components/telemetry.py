"""No library of ours phones home: every switch that keeps them quiet and offline, in one place.

Called before anything heavy is imported (the command line, the tests, the service). A value that the environment
already holds wins: with ``HF_HUB_OFFLINE=0``, ``--set sft.generator.base=deepseek-ai/Janus-Pro-1B`` may reach a hub.
"""

from __future__ import annotations

import os

SWITCHES = {
    "BENTOML_DO_NOT_TRACK": "True",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Not telemetry, but noise: a warning on each fork, and one where git is absent.
    "GIT_PYTHON_REFRESH": "quiet",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that wait spin by default, and starve each other as soon as anything else runs: with a second busy process
    # on two cores a codec step on two threads took 0.25 s instead of 0.09 s.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def quiet_environment() -> None:
    """Set each of :data:`SWITCHES` that the environment does not hold yet."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
