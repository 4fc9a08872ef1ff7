"""The task folder for lm-evaluation-harness: it loads offline, and its texts are those of `biogpt benchmark`."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from jinja2 import Template

from pretrain.tasks.pubmedqa import PubMedQA
from tests.paths import ROOT
from tests.pretrain.tasks.invented import write_pubmedqa

FOLDER = ROOT / "launch" / "lm_eval" / "pubmedqa"


def read_task() -> dict[str, Any]:
    """The YAML, with the names of functions in their places."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: node.value)
    return yaml.load((FOLDER / "pubmedqa.yaml").read_text(), Loader)


def test_the_harness_reads_the_texts_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_pubmedqa(tmp_path)
    settings = read_task()
    module_name, function = settings["custom_dataset"].split(".")
    spec = importlib.util.spec_from_file_location(module_name, FOLDER / f"{module_name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    split: Any = getattr(module, function)(data=str(tmp_path), **settings["metadata"])[settings["test_split"]]
    task = PubMedQA(tmp_path, "test")
    assert isinstance(split, Dataset) and len(split) == len(task.items)
    rows: list[dict[str, Any]] = split.to_list()
    for row, item in zip(rows, task.items, strict=True):
        prompt, choices, right = (
            Template(settings[key]).render(**row) for key in ("doc_to_text", "doc_to_choice", "doc_to_target")
        )
        assert prompt == item.prompt
        assert choices == str(["yes.", "no.", "maybe."])  # the harness evaluates it as a list
        assert f"{prompt}{settings['target_delimiter']}{row['choices'][int(right)]}" == f"{item.prompt} {item.target}"
    assert settings["output_type"] == "multiple_choice" and settings["metric_list"][0]["metric"] == "acc"
