"""Where things came from: workspace, stages and manifests, checkpoints, the journal, MLflow, the registry."""
