"""Display names of evaluations, metrics and objectives."""

import dataclasses
import re

_DIRECTIONS = {"text_to_visual": "text → {}", "visual_to_text": "{} → text"}
_RETRIEVAL = re.compile(r"(reranked_)?(text_to_visual|visual_to_text)_(?:r(\d+)|median_rank)")
_NAMES = {
    "accuracy_at_0.5": "accuracy at IoU 0.5", "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4", "cider": "CIDEr", "f1": "F1", "masked_share": "masked words correct",
    "matthews": "Matthews correlation", "mean_iou": "mean IoU", "meteor": "METEOR", "minus_error": "negated error",
    "minus_rank": "negated rank of the correct text", "pearson": "Pearson",
    "probability": "probability of the correct class", "rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L", "spearman": "Spearman", "spice": "SPICE", "top_1": "top-1 accuracy",
    "top_5": "top-5 accuracy", "vqa_accuracy": "VQA accuracy", "mfu": "MFU",
    "ilm": "instruction LM", "mlm": "masked LM", "scst": "SCST", "vlc": "contrastive", "vlm": "matching",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TaskLabels:
    """Labels of a task's results."""

    baseline: str = ""  # what the baseline is
    score: str = "score"  # the name of the example scores; a metric's name if that is their mean
    binary: bool = False  # whether a prediction is either correct or wrong


_ANSWER = TaskLabels("always the most frequent answer", "accuracy", binary=True)
_CLASS = TaskLabels("always the most frequent class", "probability", binary=True)
_TASKS = {
    **dict.fromkeys(("answer", "ilm"), _ANSWER),
    "vqa": TaskLabels("always the most frequent answer", "vqa_accuracy"),
    "summarize": TaskLabels("the first eight words", "rouge_l"),
    "ground": TaskLabels("always the mean box", "mean_iou"),
    **dict.fromkeys(("caption", "scst"), TaskLabels("another example's caption", "cider")),
    **dict.fromkeys(("vlc", "rerank"), TaskLabels("chance", "minus_rank")),
    "mlm": TaskLabels("always the most frequent word", "masked_share"),
    **dict.fromkeys(("classify", "zero_shot", "cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte"), _CLASS),
    "stsb": TaskLabels("always the mean", "minus_error"),
}


def task_labels(task: str) -> TaskLabels:
    """Return the labels of a task; generic ones for an unknown task."""
    return _TASKS.get(task, TaskLabels())


def display_name(name: str, modality: str = "image") -> str:
    """Return a name as text; ``modality`` is what the examples show: "image" or "video".

    Example:
        >>> display_name("text_to_visual_r1"), display_name("image_question")
        ('text → image R@1', 'image question')
    """
    if match := _RETRIEVAL.fullmatch(name):
        reranked = " re-ranked" if match[1] else ""
        return f"{_DIRECTIONS[match[2]].format(modality)}{reranked} {f'R@{match[3]}' if match[3] else 'median rank'}"
    return _NAMES.get(name, name.replace("_", " "))
