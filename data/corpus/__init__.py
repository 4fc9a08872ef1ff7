"""Citations and other text -> the corpus: cleaning, selection, duplicates, Parquet."""
