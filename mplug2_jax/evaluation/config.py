"""What is asked of a model on held-out data."""

import dataclasses

from data_pipelines.config import DataConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """A task on held-out data. ``samples`` examples are kept for people to look at, and a few of the best and worst.

    ``answers`` is a file with a JSON list of all answers that may be given to questions. A search is held to them; or
    with ``ranked`` so many, those likeliest by their first token, are scored whole, and the likeliest is given: a batch
    is then so many times as large for the decoder. The release ranks 128.

    ``prompts`` are texts that stand for a class, with ``{label}`` where its name belongs, and ``class_names`` what
    ``data.examples.classes`` are called there; empty: as they are.

    With ``java`` captions are scored by METEOR and SPICE, too, whose programs take seconds to start; where there is no
    Java they are absent.

    ``device_rows`` examples are predicted at a time on each device, and ``data.batch_size`` read, rounded up to whole
    numbers of these: the first may change last digits, the second changes nothing.
    """

    task: str  # the name of a task: mplug2 tasks
    data: DataConfig
    samples: int = 6  # examples kept to look at
    answers: str = ""  # file of all answers that may be given; empty: any
    ranked: int = 0  # so many of them are scored whole; 0: search
    prompts: tuple[str, ...] = ()  # texts that stand for a class, with {label}; empty: none
    class_names: tuple[str, ...] = ()  # of the prompts; empty: the classes'
    java: bool = False  # METEOR and SPICE, too
    device_rows: int = 8  # examples predicted at a time on each device
