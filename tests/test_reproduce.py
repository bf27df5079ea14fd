"""reproduce.py: what it makes of its lines, and that a finished run is not run again."""
import argparse
import json
import os
import sys

import numpy as np
import pytest

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]
import reproduce


def sdr_line(seed, routed, run="SDR"):
    scores = {"routed": routed, "largest": routed - 1, "chance": routed - 2, "best": routed + 1, "scores": [routed - 2, routed + 1], "match": [1.0, 0.25], "chosen": 0}
    return {"run": run, "seed": seed, "tasks": {"toy-shapes": scores, "toy-weaves": scores}, "images_seen": 100, "seconds": 1.0, "last_std": 0.9, "device": "d", "torch": "t"}


def simsiam_line(seed, score, run="SimSiam continued"):
    return {"run": run, "seed": seed, "tasks": {"toy-shapes": {"simsiam": score}, "toy-weaves": {"simsiam": score}}, "images_seen": 100, "seconds": 1.0, "device": "d", "torch": "t"}


def test_claims_are_paired_by_seed_and_hold_only_in_every_seed():
    lines = [simsiam_line(0, 40.0), simsiam_line(1, 50.0), sdr_line(0, 43.0), sdr_line(1, 51.0), sdr_line(0, 44.0, "SDR, random clusters"), sdr_line(1, 48.0, "SDR, random clusters")]
    rows = {(n, claim): (ours, verdict) for n, claim, _, ours, verdict in reproduce.claims(reproduce.Findings(lines, "toy"))}
    assert rows[2, "SDR beats SimSiam on the average of the tasks"] == (f"+2.00 ± {np.std([3, 1], ddof=1):.2f}", "holds")
    assert rows[2, "... above the control: random clusters"] == (f"+1.00 ± {np.std([-1, 3], ddof=1):.2f}", "in 1 of 2 seeds")
    assert rows[2, "... above the control: its own largest network"][1] == "holds"
    assert rows[5, "the chosen sub-net was trained on images of the task's kind"][1] == "holds"
    assert not any(n == 8 for n, _ in rows)            # nothing is said of what was not run


def test_tables_and_readme_are_rendered_from_the_lines(tmp_path, monkeypatch, capsys):
    with open(tmp_path / "toy.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in (simsiam_line(0, 40.0), sdr_line(0, 43.5)))
    (tmp_path / "README.md").write_text("before\n<!-- reproduce toy -->\nstale table\n<!-- end toy -->\nafter\n")
    monkeypatch.setattr(reproduce, "ROOT", str(tmp_path))
    reproduce.render(str(tmp_path / "toy.jsonl"), "toy", readme=True)
    text = (tmp_path / "README.md").read_text()
    assert "+3.50" in text and "stale table" not in text and text.startswith("before") and text.endswith("after\n")
    assert (tmp_path / "toy.md").read_text().strip() in text


def test_neighbours_stand_beside_each_other_with_their_cost():
    judged = lambda knn: {task: {"knn": knn + i, "probe": knn + 10, "gflops": 0.5} for i, task in enumerate(("a", "b"))}
    line = lambda run, seed, knn, **more: {"run": f"neighbours: {run}", "seed": seed, "judged": judged(knn), "images_seen": 1000, "seconds": 7.0, **more}
    lines = [line("SEPT", 0, 20.0, beside=3.0), line("SEPT", 1, 22.0, beside=5.0), line("SDR", 0, 30.0, largest=judged(25.0)),
             line("DATA", 0, 10.0, search={"a": {"largest": 12.0, "images": [30, 10], "similarities": [0.1, 0.3, 0.2], "trains": [8.0, 7.0, 9.0], "tests": [9.0, 10.5, 11.5]}})]
    text = reproduce.neighbours(lines)
    spread = f"± {np.std([20, 22], ddof=1):.2f}"
    assert f"| SEPT | 21.00 {spread} / 31.00 {spread} | 22.00 {spread} / 31.00 {spread} | 21.50 {spread} | 31.00 {spread} | 1,000 | 7, 4 | 0.5000 | 2 |" in text
    assert "| SDR: its largest network | 25.00 / 35.00 | 26.00 / 35.00 | 25.50 | 35.00 | 1,000 | 7, 0 | 0.5000 | 1 |" in text
    both = np.array([8.25, 7.875, 9.625])              # (30 train + 10 test) / 40; the second size is chosen, the third best
    assert f"| a | 1.00 | 0.00 | {11.5 - 31 / 3:.2f} | {9.625 - 7.875:.2f} | {9.625 - both.mean():.2f} | -0.50 |" in text and any("best of the 3 sizes" in row for row in text)
    assert reproduce.neighbours([]) == []


def test_finished_runs_are_not_run_again_and_a_failure_is_one_line(tmp_path, monkeypatch):
    args = argparse.Namespace(data="toy", seeds=[0], only=[2], budget_minutes=None, device="cpu", out=str(tmp_path / "out"))
    results, ran = tmp_path / "toy.jsonl", []
    monkeypatch.setattr(reproduce.Experiments, "simsiam", lambda self, name, *a, **k: ran.append(name) or simsiam_line(0, 40.0, name))
    monkeypatch.setattr(reproduce.Experiments, "sdr", lambda self, name, changes: ran.append(name) or sdr_line(0, 41.0, name))
    monkeypatch.setattr(reproduce.Experiments, "narrow", lambda self: ran.append("narrow") or simsiam_line(0, 39.0, "narrow"))
    reproduce.run_all(args, str(results))
    assert ran == ["SimSiam continued", "SDR", "SDR, random clusters", "narrow"]
    reproduce.run_all(args, str(results))
    assert len(ran) == 4 and len(reproduce.read(str(results))) == 4
    with pytest.raises(reproduce.Failed, match="status 2.*no such folder"):
        reproduce.script("pretrain.py", "--data", "no such folder", "--out", tmp_path / "x", log=str(tmp_path / "log"))
