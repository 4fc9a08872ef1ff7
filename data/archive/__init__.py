"""NLM's archive: download it and read its MEDLINE XML. The embedded sample has the same format."""
