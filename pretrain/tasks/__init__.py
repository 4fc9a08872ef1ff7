"""Benchmarks. To add one, write a file with a subclass of `Task` beside the others and enter it in `TASKS`."""

from pretrain.tasks.bc5cdr_entities import ChemicalDiseaseEntities
from pretrain.tasks.bc5cdr_relations import ChemicalDiseaseRelations
from pretrain.tasks.hoc import HallmarksOfCancer
from pretrain.tasks.pubmedqa import PubMedQA
from pretrain.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (PubMedQA, HallmarksOfCancer, ChemicalDiseaseRelations, ChemicalDiseaseEntities)
}
"""From the name of each benchmark to its class."""
