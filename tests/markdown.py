"""Code blocks in Markdown, which tests execute as they stand."""

import re


def python_blocks(text: str) -> list[str]:
    """The Python blocks of a page, in its order."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
