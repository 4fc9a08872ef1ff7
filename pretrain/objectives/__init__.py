"""What a run can learn: the interface (`objective.py`), a file for each kind, and the choice of one (`kinds.py`)."""
