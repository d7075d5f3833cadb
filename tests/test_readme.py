"""The README promises files, flags and line counts; each promise is checked here."""

import json
import re
import shlex
from pathlib import Path

import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()


def test_every_local_link_and_picture_exists():
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")}
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_every_train_command_parses():
    commands = re.findall(r"python (train\.py [^\n`#&|]*)", README)
    assert commands
    for command in commands:
        if "--help" in command:
            continue  # it would print the manual and leave
        train.build_parser().parse_args(shlex.split(command)[1:])


def test_every_flag_in_the_text_exists():
    known = {option for action in train.build_parser()._actions for option in action.option_strings}
    flags = set(re.findall(r"`(--[a-z_0-9.]+)", README))
    evaluate = set(re.findall(r'"(--[a-z_0-9]+)"', (ROOT / "evaluate.py").read_text()))
    assert flags <= known | evaluate, flags - known - evaluate


def test_line_counts_of_the_reading_table_are_right_within_a_tenth():
    rows = re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README)
    assert len(rows) == 7
    for name, lines in rows:
        true = len((ROOT / name).read_text().splitlines())
        assert abs(int(lines) - true) <= true / 10, f"{name} has {true} lines"


def test_every_test_that_the_readme_names_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 10
    assert not [name for name in named if f"def {name}(" not in tests]


def test_scores_of_the_numbers_table_are_those_of_the_recorded_runs():
    rows = re.findall(r"\| ours, laptop preset, seed (\d), .*?\| rendered twin \|(.*)\|", README)
    assert [seed for seed, _ in rows] == ["0", "1", "2"]
    table = []
    for seed, cells in rows:
        recorded = json.loads((ROOT / f"assets/results/laptop-seed{seed}/metrics.json").read_text())
        scores = [recorded["scores"][name]["value"]
                  for name in ("factorvae", "dci_disentanglement", "mig", "infomec_infom")]
        *shown, images, minutes = (float(cell.replace(",", "")) for cell in cells.split("|"))
        assert shown == [round(score, 3) for score in scores]
        assert (images, minutes) == (recorded["images_seen"], round(recorded["minutes"], 1))
        table.append(scores)
    (mean,) = re.findall(r"\| mean of the three \| rendered twin \|(.*?)\| \| \|", README)
    assert [float(cell) for cell in mean.split("|")] == [round(sum(column) / 3, 3) for column in zip(*table)]


def test_scores_of_the_ablation_table_are_those_of_the_recorded_runs():
    rows = re.findall(r"\| `(neither|dyga|sd|both|fsq|sd01|sd03|bd01)` \|(.*)\|(.*)\|(.*)\|", README)
    assert len(rows) == 8
    for name, *cells in rows:
        runs = sorted(ROOT.glob(f"assets/results/ablation/{name}-*/metrics.json"))
        scores = [json.loads(run.read_text())["scores"] for run in runs]
        vae, dci = ([score[key]["value"] for score in scores] for key in ("factorvae", "dci_disentanglement"))
        for cell, values in zip(cells, (vae, dci, [sum(dci) / len(dci)])):
            assert [float(number) for number in cell.split(",")] == [round(value, 3) for value in values], name
