"""The README promises files, flags, line counts and numbers; each promise is checked here."""

import json
import re
import shlex
from pathlib import Path

import evaluate
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "assets/results/README.md").read_text()
RUNS = sorted(ROOT.glob("assets/results/laptop-seed*/metrics.json"))


def test_every_local_link_and_picture_exists():
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")}
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_every_command_parses():
    commands = re.findall(r"python (\w+\.py) ([^\n`#&|]*)", README)
    assert {"train.py", "evaluate.py"} <= {script for script, _ in commands}
    for script, flags in commands:
        assert (ROOT / script).exists()
        flags = shlex.split(flags)
        if script in ("train.py", "vqgan.py") and "--help" not in flags:
            train.build_parser().parse_args(flags)
        if script == "evaluate.py":
            evaluate.build_parser().parse_args(flags)


def test_every_flag_in_the_text_exists():
    known = set()
    for parser in (train.build_parser(), evaluate.build_parser()):
        known |= {option for action in parser._actions for option in action.option_strings}
    flags = set(re.findall(r"`(--[a-z_0-9.]+)", README))
    assert len(flags) >= 8 and flags <= known, flags - known


def test_line_counts_of_the_reading_table_are_right_within_a_tenth():
    rows = re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README)
    assert len(rows) == 7
    for name, lines in rows:
        true = len((ROOT / name).read_text().splitlines())
        assert abs(int(lines) - true) <= true / 10, f"{name} has {true} lines"


def test_every_test_that_the_pages_name_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGES)) - {"test_evaluate"}
    assert len(named) > 5
    assert not [name for name in named if f"def {name}(" not in tests]


def test_a_first_reader_needs_at_most_2200_words():
    assert len(README.split()) <= 2_200


def test_scores_of_the_numbers_table_are_those_of_the_recorded_runs():
    rows = dict(re.findall(r"\| ours, laptop preset, seed (\d) \|(.*)\|", README))
    assert rows.keys() == {path.parent.name[-1] for path in RUNS} and rows
    names = ["factorvae", "dci_disentanglement", "mig", "sap", "infomec_infom", "infomec_infoc",
             "infomec_infoe"]
    for path in RUNS:
        scores = json.loads(path.read_text())["scores"]
        cells = [cell.strip() for cell in rows[path.parent.name[-1]].split("|")][:len(names)]
        values = [scores[name]["value"] if name in scores else None for name in names]
        assert cells == ["-" if value is None else f"{value:.3f}" for value in values]
