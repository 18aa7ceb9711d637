"""``mplug2 tasks``: the list, the details of a task, and an unknown name."""

from pathlib import Path

import pytest

from mplug2_jax.cli.main import main


def test_the_list_shows_what_each_task_needs_and_whether_it_is_present(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPLUG2_DATA", str(tmp_path))
    for path in ("msrvtt/videos", "msrvtt_qa"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "msrvtt_qa" / "train.json").touch()
    assert main(["tasks", "--size", "tiny"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert len(lines) == 37 + 3
    assert "vision, temporal, text, universal, fusion, decoder" in lines["msrvtt_qa"]
    assert lines["msrvtt_qa"].endswith("2 of 3")
    assert lines["imagenet"].endswith("no")
    assert str(tmp_path) in lines["data"]


def test_the_details_show_where_the_data_comes_from_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPLUG2_DATA", str(tmp_path))
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    assert main(["tasks", "vqa_v2", "--size", "tiny"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("VQA v2: questions about COCO's images")
    for words in (
        "https://visualqa.org/download.html", "evaluation val: vqa", f"here     {tmp_path}/coco/val2014",
        f"missing  {tmp_path}/coco/train2014", "mplug2 train --config vqa_v2 --config.init_from=RUN",
    ):  # fmt: skip
        assert words in out


def test_an_unknown_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "msrvtt-qa"]) == 2
    assert "task 'msrvtt-qa' is unknown: did you mean 'msrvtt_qa'?" in capsys.readouterr().err
