"""Human names of what runs call their evaluations, figures and objectives."""

import dataclasses
import re

_DIRECTIONS = {"text_to_visual": "text → {}", "visual_to_text": "{} → text"}
_RECALL = re.compile(r"(reranked_)?(text_to_visual|visual_to_text)_(?:r(\d+)|median_rank)")
_FIGURES = {
    "accuracy_at_0.5": "accuracy at IoU 0.5",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "cider": "CIDEr",
    "f1": "F1",
    "masked_share": "share of its masked words",
    "matthews": "Matthews",
    "mean_iou": "mean IoU",
    "meteor": "METEOR",
    "minus_error": "minus the error",
    "minus_rank": "minus the right text's rank",
    "pearson": "Pearson",
    "probability": "probability of the right class",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "spearman": "Spearman",
    "spice": "SPICE",
    "top_1": "top-1 accuracy",
    "top_5": "top-5 accuracy",
    "vqa_accuracy": "VQA accuracy",
    "mfu": "MFU",
    "ilm": "instruction",
    "mlm": "masked words",
    "scst": "captions by reward",
    "vlc": "contrast",
    "vlm": "matching",
    "examples_per_second": "examples per second",
    "data_wait": "time spent waiting for data",
}


@dataclasses.dataclass(frozen=True)
class TaskLabels:
    """How a task's samples and baselines are spoken of, and what says how good an example is."""

    said: str = "said"
    true: str = "true"
    baseline: str = ""
    measure: str = "goodness"  # the name of a figure, where the mean over all examples is one
    marked: bool = False  # whether what is said is either right or wrong


_CLASS = TaskLabels("classified", "true", "always the most frequent class", "probability", marked=True)
_TASKS = {
    "answer": TaskLabels("answered", "true", "always the most frequent answer", "accuracy", marked=True),
    "ilm": TaskLabels("answered", "true", "always the most frequent answer", "accuracy", marked=True),
    "vqa": TaskLabels("answered", "true", "always the most frequent answer", "vqa_accuracy"),
    "summarize": TaskLabels("summarised", "true", "the first eight words", "rouge_l"),
    "ground": TaskLabels("pointed at", "true", "always the mean box", "mean_iou"),
    **dict.fromkeys(("caption", "scst"), TaskLabels("said", "true", "another example's caption", "cider")),
    "vlc": TaskLabels("found", "true", "chance", "minus_rank"),
    "rerank": TaskLabels("found", "true", "chance", "minus_rank"),
    "mlm": TaskLabels("completed", "true", "always the most frequent word", "masked_share"),
    **dict.fromkeys(("classify", "zero_shot", "cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte"), _CLASS),
    "stsb": TaskLabels("rated", "true", "always the mean", "minus_error"),
}


def task_labels(task: str) -> TaskLabels:
    """The words for a task; plain ones for a task that this page does not know."""
    return _TASKS.get(task, TaskLabels())


def display_name(name: str, shown: str = "picture") -> str:
    """A name as people say it; ``shown`` is what examples show.

    Example:
        >>> display_name("text_to_visual_r1"), display_name("image_question")
        ('text → picture R@1', 'image question')
    """
    if recall := _RECALL.fullmatch(name):
        how = " re-ranked" if recall[1] else ""
        return f"{_DIRECTIONS[recall[2]].format(shown)}{how} {f'R@{recall[3]}' if recall[3] else 'median rank'}"
    return _FIGURES.get(name, name.replace("_", " "))
