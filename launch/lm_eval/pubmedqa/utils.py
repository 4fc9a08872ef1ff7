"""The items of `biogpt benchmark pubmedqa` for lm-evaluation-harness, as a dataset in memory: it loads no script."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from pretrain.tasks.pubmedqa import PubMedQA


def load(data: str, **_: Any) -> dict[str, Dataset]:
    """The test split, from the folder `data` of PubMedQA's published files.

    Each row has the prompt, the text of each choice, and which of them is right.
    """
    task = PubMedQA(Path(data), "test")
    choices = task.choices()
    rows = [
        {
            "id": item.id,
            "prompt": item.prompt,
            "choices": [task.target(choice) for choice in choices],
            "right": choices.index(item.answers),
        }
        for item in task.items
    ]
    return {"test": Dataset.from_list(rows)}
