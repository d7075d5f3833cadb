"""The README promises files, flags, line counts and numbers; each promise is checked here."""
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "assets/results/README.md").read_text()

def test_a_first_reader_needs_at_most_2000_words_and_every_local_link_and_picture_exists():
    links = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    assert links and not [link for link in links if not (ROOT / link).exists()]
    assert len(README.split()) <= 2_000

def test_every_command_parses_and_every_flag_in_the_text_exists():
    parsers = {"train.py": train.build_parser(), "evaluate.py": evaluate.build_parser()}
    commands = re.findall(r"python (\w+\.py) ([^\n`#&|]*)", README)
    assert parsers.keys() <= {script for script, _ in commands}
    for script, flags in commands:
        assert (ROOT / script).exists()
        if "--help" not in flags and script in ("vqgan.py", *parsers):
            parsers[script.replace("vqgan", "train")].parse_args(shlex.split(flags))
    known = "".join(parser.format_help() for parser in parsers.values())
    flags = set(re.findall(r"`(--(?:no-)?[a-z_0-9.]+)", README))
    assert len(flags) >= 8 and flags <= set(re.findall(r"--(?:no-)?[a-z_0-9.]+", known))

def test_line_counts_are_right_within_a_tenth_and_every_test_that_the_pages_name_exists():
    rows = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
    true = {name: (ROOT / name).read_text().count("\n") for name in rows}
    assert len(rows) == 7
    assert {name: int(rows[name]) for name in rows} == pytest.approx(true, rel=0.1)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGES))
    assert len(named) > 5 and named <= set(re.findall(r"^def (\w+)\(", tests, re.M))

def test_the_numbers_table_has_mean_and_deviation_of_the_recorded_runs():
    names = ["factorvae", "dci_disentanglement", "mig", "sap",
             "infomec_infom", "infomec_infoc", "infomec_infoe"]
    runs = [json.loads(path.read_text())["scores"]
            for path in ROOT.glob("assets/results/laptop-seed*/metrics.json")]
    scores = np.array([[run[name]["value"] for name in names] for run in runs])  # (runs, scores)
    found = re.search(r"\| ours, laptop preset, (\d) seeds \|(.*)\|", README)
    assert int(found[1]) == len(runs) > 2
    cells = [cell.strip() for cell in found[2].split("|")][:len(names)]
    assert cells == [f"{mean:.3f} +- {deviation:.3f}"
                     for mean, deviation in zip(scores.mean(0), scores.std(0, ddof=1))]
