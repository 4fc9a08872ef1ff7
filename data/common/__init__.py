"""Shared by all of `data`: whole files and manifests, workers, settings, hashing, Parquet."""
