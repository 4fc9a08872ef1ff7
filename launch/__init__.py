"""How a run is started: the `biogpt` command, recipes, DeepSpeed files and scripts."""
