"""Classifiers on benchmarks, against transformers' own pipelines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BioGptForSequenceClassification, BioGptForTokenClassification
from transformers import pipeline as make_pipeline

from data.common.errors import UserError
from data.text.spans import tags_of
from pretrain.benchmark import answer, benchmark
from pretrain.tasks.bc5cdr_entities import ChemicalDiseaseEntities
from pretrain.tasks.hoc import HallmarksOfCancer
from pretrain.tasks.pubmedqa import PubMedQA
from tests.pretrain.tasks.invented import WRITE
from tests.pretrain.test_bits_per_byte import biogpt_config, save_biogpt

pipeline: Any = make_pipeline


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The invented files of all benchmarks."""
    folder = tmp_path_factory.mktemp("data")
    for write in WRITE.values():
        write(folder)
    return folder


def save_classifier(folder: Path, kind: type, classes: list[str], context: int = 128, **settings: Any) -> Any:
    """A tiny classifier with random weights in a folder that `save_biogpt` makes. Returns the model."""
    torch.manual_seed(3)
    if not folder.exists():
        save_biogpt(folder, fast=True)
        (folder / "model.safetensors").unlink()
    config = biogpt_config(
        len(AutoTokenizer.from_pretrained(folder)),
        context,
        num_hidden_layers=1,
        initializer_range=1.0,
        id2label=dict(enumerate(classes)),
        label2id={label: number for number, label in enumerate(classes)},
        **settings,
    )
    model = kind(config)
    model.save_pretrained(folder)
    return model


def test_entities_are_those_of_the_pipeline(data: Path, tmp_path: Path) -> None:
    save_classifier(tmp_path / "hf", BioGptForTokenClassification, tags_of(["Chemical", "Disease"]))
    task, tagger = ChemicalDiseaseEntities(data, "test"), pipeline("token-classification", str(tmp_path / "hf"))
    found = answer(tmp_path / "hf", task, "sum")
    for item, given in zip(task.items, found, strict=True):
        groups = tagger(item.text, aggregation_strategy="simple")
        assert given.answers == tuple((each["start"], each["end"], each["entity_group"]) for each in groups)
    assert {label for given in found for _, _, label in given.answers} == {"Chemical", "Disease"}


def test_long_texts_are_read_whole_in_pieces(data: Path, tmp_path: Path) -> None:
    """A model that calls every token the beginning of a disease finds each token of a text."""
    classes = tags_of(["Disease"])
    model = save_classifier(tmp_path / "hf", BioGptForTokenClassification, classes, context=10)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([float(each == "B-Disease") for each in classes])
    model.save_pretrained(tmp_path / "hf")
    task = ChemicalDiseaseEntities(data, "test")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for item, given in zip(task.items, answer(tmp_path / "hf", task, "sum"), strict=True):
        offsets = tokenizer(item.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert len(offsets) >= 2 * 9 and given.answers == tuple((start, end, "Disease") for start, end in offsets)


@pytest.mark.parametrize("task_class", [PubMedQA, HallmarksOfCancer])
def test_labels_are_those_of_the_pipeline(task_class: type, data: Path, tmp_path: Path) -> None:
    several = task_class is HallmarksOfCancer
    problem = "multi_label_classification" if several else "single_label_classification"
    labels = list(task_class.labels)
    save_classifier(tmp_path / "hf", BioGptForSequenceClassification, labels, problem_type=problem, pad_token_id=1)
    task, classifier = task_class(data, "test"), pipeline("text-classification", str(tmp_path / "hf"))
    found = answer(tmp_path / "hf", task, "sum")
    for item, given in zip(task.items, found, strict=True):
        likely = classifier(item.text, top_k=None)
        expected = [each["label"] for each in likely if each["score"] > 0.5] if several else [likely[0]["label"]]
        assert sorted(given.answers) == sorted(expected)
        logits = torch.tensor(list(given.scores.values()))
        probabilities = logits.sigmoid() if several else logits.softmax(0)
        assert dict(zip(given.scores, probabilities.tolist(), strict=True)) == pytest.approx(
            {each["label"]: each["score"] for each in likely}, abs=1e-5
        )


def test_other_classes_and_other_kinds_are_named(data: Path, tmp_path: Path) -> None:
    save_classifier(tmp_path / "hf", BioGptForSequenceClassification, ["yes", "perhaps"], pad_token_id=1)
    with pytest.raises(UserError, match="has the class 'perhaps', but pubmedqa knows yes, no, maybe"):
        benchmark("pubmedqa", tmp_path / "hf", data, "sum", None, None)
    with pytest.raises(UserError, match="is a BioGptForSequenceClassification, which cannot do bc5cdr-entities"):
        benchmark("bc5cdr-entities", tmp_path / "hf", data, "sum", None, None)
    with pytest.raises(UserError, match="is a BioGptForSequenceClassification, which cannot do bc5cdr-relations"):
        benchmark("bc5cdr-relations", tmp_path / "hf", data, "sum", None, None)
