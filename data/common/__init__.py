"""What all rooms of `data` share: whole files and manifests, workers, settings, hashing, Parquet."""
