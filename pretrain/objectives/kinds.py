"""The objectives by the names that recipes give them."""

from pretrain.objectives.bert_source import BertSource
from pretrain.objectives.classification import SequenceClassification, TokenClassification
from pretrain.objectives.denoising import Denoising
from pretrain.objectives.fill_in_the_middle import FillInTheMiddle
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.objective import Objective
from pretrain.objectives.prompt_target import PromptTarget
from pretrain.objectives.source_target import SourceTarget
from pretrain.recipe import Recipe

OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
    "fill_in_the_middle": FillInTheMiddle,
    "denoising": Denoising,
    "prompt_target": PromptTarget,
    "source_target": SourceTarget,
    "token_classification": TokenClassification,
    "sequence_classification": SequenceClassification,
}


def make_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe. Raises UserError if the recipe does not fit the data."""
    return BertSource(recipe) if recipe.model.encoder else OBJECTIVES[recipe.objective.kind](recipe)
