"""Human names of what runs call their evaluations, figures and objectives."""

import dataclasses
import re

_DIRECTIONS = {"text_to_visual": "text → picture", "visual_to_text": "picture → text"}
_RECALL = re.compile(r"(reranked_)?(text_to_visual|visual_to_text)_(?:r(\d+)|median_rank)")
_FIGURES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "cider": "CIDEr",
    "f1": "F1",
    "mean_iou": "mean IoU",
    "meteor": "METEOR",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "top_1": "top-1 accuracy",
    "top_5": "top-5 accuracy",
    "vqa_accuracy": "VQA accuracy",
    "mfu": "MFU",
    "ilm": "instruction",
    "mlm": "masked words",
    "vlc": "contrast",
    "vlm": "matching",
    "examples_per_second": "examples per second",
    "data_wait": "time spent waiting for data",
}


@dataclasses.dataclass(frozen=True)
class TaskWords:
    """How a task's samples and baselines are spoken of."""

    said: str = "said"
    true: str = "true"
    baseline: str = ""
    marked: bool = False  # whether what is said is either right or wrong


_TASKS = {
    "answer": TaskWords("answered", "true", "always the most frequent answer", marked=True),
    "ilm": TaskWords("answered", "true", "always the most frequent answer", marked=True),
    "vqa": TaskWords("answered", "true", "always the most frequent answer"),
    "summarise": TaskWords("summarised", "true", "the first eight words"),
    "ground": TaskWords("pointed at", "true", "always the mean box"),
    "classify": TaskWords("classified", "true", "always the most frequent class", marked=True),
    "caption": TaskWords("said", "true", "another example's caption"),
    "vlc": TaskWords("found", "true", "chance"),
    "rerank": TaskWords("found", "true", "chance"),
    "mlm": TaskWords("completed", "true", "always the most frequent word"),
}


def task_words(task: str) -> TaskWords:
    """The words for a task; plain ones for a task that this page does not know."""
    return _TASKS.get(task, TaskWords())


def human(name: str) -> str:
    """A name as people say it.

    Example:
        >>> human("text_to_visual_r1"), human("reranked_text_to_visual_r1"), human("image_question")
        ('text → picture R@1', 'text → picture re-ranked R@1', 'image question')
    """
    if recall := _RECALL.fullmatch(name):
        how = " re-ranked" if recall[1] else ""
        return f"{_DIRECTIONS[recall[2]]}{how} {f'R@{recall[3]}' if recall[3] else 'median rank'}"
    return _FIGURES.get(name, name.replace("_", " "))
