"""The script of ``mplug2 completion`` completes command lines in a real shell."""

import subprocess
from pathlib import Path

import pytest

from .conftest import mplug2

COMPLETIONS = {
    ("tr",): {"train"}, ("convert", "i"): {"import", "inspect"}, ("train", "--wo"): {"--workdir"},
    ("completion", ""): {"bash", "zsh", "tcsh"}, ("train", "--config", "pre"): {"pretrain"},
    ("train", "--config", "min"): {"mine.py"}, ("eval", "--config", "msrvtt_q"): {"msrvtt_qa"},
    ("data", "show", "dem"): {"demo"}, ("train", "--workdir", "r"): {"runs"}, ("report", "r"): {"runs"},
    ("convert", "verify", "m"): {"mine.py"}, ("data", "sample", "--out", ""): {"runs"},
    ("eval", "--out", ""): {"runs"},
}  # fmt: skip
COMPLETE = """
source "$1"
complete -p mplug2 >/dev/null || exit 1
while read -ra COMP_WORDS; do
  [ "${COMP_WORDS[-1]}" = '""' ] && COMP_WORDS[-1]=""
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  "$(complete -p mplug2 | sed 's/.*-F \\([^ ]*\\).*/\\1/')" mplug2
  echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_commands_options_recipes_and_paths(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(mplug2("completion", "bash").out)
    subprocess.run(["bash", "-n", script], check=True)
    folder = tmp_path / "folder"
    (folder / "runs").mkdir(parents=True)
    (folder / "mine.py").touch()
    lines = "".join(f"mplug2 {' '.join(word or chr(34) * 2 for word in words)}\n" for words in COMPLETIONS)
    process = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", script], cwd=folder, input=lines, capture_output=True, text=True
    )
    assert (process.returncode, process.stderr) == (0, "")
    completions = dict(zip(COMPLETIONS, (set(line.split()) for line in process.stdout.splitlines()), strict=True))
    assert completions == COMPLETIONS


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_scripts_for_other_shells_have_every_command(shell: str) -> None:
    outcome = mplug2("completion", shell)
    assert (outcome.status, outcome.err) == (0, "")
    assert all(word in outcome.out for word in ("train", "workdir", "tokenizer"))
