"""How a run is started: the front door, recipes, DeepSpeed files and scripts."""
