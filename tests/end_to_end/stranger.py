"""What a stranger does with an exported folder: transformers and PEFT alone, no line of this project.

It runs by itself, `python tests/end_to_end/stranger.py hf/`, with transformers 4.46 and newer, and needs torch,
transformers and peft. Letters in names: B batch, T positions.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

PROMPTS = ["The role of", "Patients with diabetes were treated", "We"]
TEXTS = ["IL-6 (5 ng/ml) rises in mice; it's seen.", "  Two  spaces, naïve α-synuclein — and P<0.001!", "HIV-1"]
BOUND = 1e-4  # of logits in fp32


def load(auto: Any, folder: Path, **options: Any) -> Any:
    """A model for evaluation."""
    return auto.from_pretrained(folder, **options).eval()


def auto_classes(folder: Path) -> None:
    """Every class takes its weights from the folder; only the new heads of classifiers are drawn."""
    assert AutoConfig.from_pretrained(folder).model_type == "biogpt"
    body = load(AutoModelForCausalLM, folder).biogpt.state_dict()
    heads = {AutoModel: "", AutoModelForSequenceClassification: "score", AutoModelForTokenClassification: "classifier"}
    for auto, head in heads.items():
        model = load(auto, folder)
        found = (model.biogpt if head else model).state_dict()
        assert found.keys() == body.keys() and all(torch.equal(found[name], body[name]) for name in body), auto
        rest = {name for name in model.state_dict() if not name.startswith("biogpt.")} if head else set()
        assert all(name.startswith(f"{head}.") for name in rest), rest


def offsets(folder: Path) -> None:
    """The characters of a text's tokens, in order, are the text without its white space.

    Several tokens may share a character: an apostrophe becomes `&apos;` before it is cut into tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        assert tuple(spans[0]) == (0, 0), spans  # </s>, which the text does not hold
        assert spans == sorted(spans) and all(text[start:end].split() == [text[start:end]] for start, end in spans[1:])
        covered = {place for start, end in spans for place in range(start, end)}
        assert covered == {place for place, character in enumerate(text) if not character.isspace()}, (text, spans)


def left_padding(folder: Path) -> None:
    """Prompts in a batch, padded on the left, are continued with the scores and tokens that each gets alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder, padding_side="left"), load(AutoModelForCausalLM, folder)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    together = model.generate(**batch, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = tokenizer(prompt, return_tensors="pt")
        single = model.generate(**alone, **options)
        for ours, theirs in zip(single.scores, together.scores):  # noqa: B905  (a longer prompt may go on for longer)
            assert (ours[0] - theirs[row]).abs().max() < BOUND, prompt
        new = single.sequences[0, alone["input_ids"].shape[1] :]
        assert torch.equal(new, together.sequences[row, batch["input_ids"].shape[1] :][: len(new)]), prompt


def cache(folder: Path) -> None:
    """With the cache of keys and values, logits and continuations are those without it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(AutoModelForCausalLM, folder)
    encoded = tokenizer(PROMPTS[1], return_tensors="pt")
    ids_BT = encoded["input_ids"]
    first = model(ids_BT[:, :3], use_cache=True)
    mask = torch.ones_like(ids_BT[:, :4])
    step = model(ids_BT[:, 3:4], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    assert (step.logits[0, 0] - model(ids_BT[:, :4]).logits[0, 3]).abs().max() < BOUND
    results = [model.generate(**encoded, max_new_tokens=12, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*results)


def beam_search(folder: Path) -> None:
    """The scores of the beams are the mean log-likelihoods of their new tokens, and the best comes first."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(AutoModelForCausalLM, folder)
    encoded = tokenizer(PROMPTS[0], return_tensors="pt")
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4, "min_new_tokens": 6, "max_new_tokens": 6}
    found = model.generate(
        **encoded, **options, do_sample=False, output_scores=True, return_dict_in_generate=True, early_stopping=True
    )
    length = encoded["input_ids"].shape[1]
    likelihoods = model(found.sequences[:, :-1]).logits.log_softmax(-1)
    scores = likelihoods.gather(2, found.sequences[:, 1:, None])[:, length - 1 :, 0].sum(1)
    assert found.sequences.shape == (4, length + 6)
    assert torch.equal(found.sequences_scores, found.sequences_scores.sort(descending=True).values)
    ratio = found.sequences_scores * 6 / scores  # 1, or a constant where a version counts the prompt's length too
    assert torch.allclose(ratio, ratio[0].expand(4), rtol=1e-3), (found.sequences_scores, scores)


def classify(folder: Path) -> None:
    """A text in a padded batch is classified as alone, as a whole and by its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels: dict[str, Any] = {"num_labels": 3, "id2label": {0: "no", 1: "maybe", 2: "yes"}}
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        torch.manual_seed(1)  # of the head
        model = load(auto, folder, **labels)
        together = model(**batch).logits
        assert model.config.id2label[2] == "yes" and together.shape[-1] == 3
        for row, text in enumerate(TEXTS):
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
            expected = together[row] if together.dim() == 2 else together[row, : len(alone)]
            assert (alone - expected).abs().max() < BOUND, (auto, text)


def lora(folder: Path) -> None:
    """LoRA learns a sentence and leaves the base as it is; saved, reloaded and merged it gives the same logits."""
    tokenizer, base = AutoTokenizer.from_pretrained(folder), load(AutoModelForCausalLM, folder)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    encoded = tokenizer(TEXTS[0], return_tensors="pt")
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "fc1", "fc2"])
    model: Any = get_peft_model(base, config)
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=0.02)
    losses = []
    for _ in range(20):
        loss = model(**encoded, labels=encoded["input_ids"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2, losses
    logits = model.eval()(**encoded).logits
    with tempfile.TemporaryDirectory() as saved, torch.no_grad():
        model.save_pretrained(saved)
        again: Any = PeftModel.from_pretrained(load(AutoModelForCausalLM, folder), saved).eval()
        assert (again(**encoded).logits - logits).abs().max() < BOUND
        assert (again.merge_and_unload()(**encoded).logits - logits).abs().max() < BOUND
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items() if "lora" not in name}
    assert kept.keys() == before.keys() and all(torch.equal(kept[name], before[name]) for name in before)


def save_and_reload(folder: Path) -> None:
    """What transformers saves gives the same ids, text and logits."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(AutoModelForCausalLM, folder)
    encoded = tokenizer(TEXTS[1], return_tensors="pt")
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        model.save_pretrained(saved)
        again = AutoTokenizer.from_pretrained(saved)
        assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)
        ids = encoded["input_ids"][0]
        assert again.decode(ids) == tokenizer.decode(ids)
        assert torch.equal(load(AutoModelForCausalLM, Path(saved))(**encoded).logits, model(**encoded).logits)


CHECKS = (auto_classes, offsets, left_padding, cache, beam_search, classify, lora, save_and_reload)


def main(folder: Path) -> int:
    """Run every check and say which fail. Returns how many do."""
    failed = 0
    for check in CHECKS:
        try:
            with torch.set_grad_enabled(check is lora):
                check(folder)
            print(f"{check.__name__}: passed")
        except Exception as error:
            failed += 1
            print(f"{check.__name__}: FAILED, {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    print(f"transformers {transformers.__version__}: {len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    return failed


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])) > 0)
