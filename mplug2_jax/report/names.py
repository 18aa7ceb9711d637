"""Human names of what runs call their evaluations, figures and objectives."""

import dataclasses
import re

_DIRECTIONS = {"text_to_visual": "text → picture", "visual_to_text": "picture → text"}
_RECALL = re.compile(r"(text_to_visual|visual_to_text)_r(\d+)")
_FIGURES = {
    "cider": "CIDEr",
    **{f"bleu_{order}": f"BLEU-{order}" for order in range(1, 5)},
    "rouge_l": "ROUGE-L",
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
    "caption": TaskWords("said", "true", "another example's caption"),
    "vlc": TaskWords("found", "true", "chance"),
    "mlm": TaskWords("completed", "true", "always the most frequent word"),
}


def task_words(task: str) -> TaskWords:
    """The words for a task; plain ones for a task that this page does not know."""
    return _TASKS.get(task, TaskWords())


def human(name: str) -> str:
    """A name as people say it.

    Example:
        >>> human("text_to_visual_r1"), human("image_question")
        ('text → picture R@1', 'image question')
    """
    if recall := _RECALL.fullmatch(name):
        return f"{_DIRECTIONS[recall[1]]} R@{recall[2]}"
    return _FIGURES.get(name, name.replace("_", " "))


def is_share(figure: str) -> bool:
    """Whether a figure is a fraction of examples; CIDEr is the one that is not."""
    return figure != "cider"
