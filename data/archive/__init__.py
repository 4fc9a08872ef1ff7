"""NLM's archive: download it, read its MEDLINE XML; the embedded sample in the same format."""
