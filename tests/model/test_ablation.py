"""The ablation's table and verdicts; the command itself is run by hand (README)."""

import math

import pytest

from cumo_model.demo.ablation import CLAIMS, ROWS, run_ablation, table, verdict


def _row(choice, exact, flops=100, loss=0.5):
    return {
        "choice": choice,
        "exact": exact,
        "loss": [loss, loss + 0.1],
        "flops": flops,
        "parameters": 1_000_000,
        "load_entropy": {"clip": 0.9} if flops > 100 else {},
    }


def test_rows_are_the_papers_ablations():
    assert {name for claim in CLAIMS for name in claim[1:]} <= set(ROWS)
    assert ROWS["clip"].vision == ROWS["clip"].projector == 4 and ROWS["clip"].top_k == 2
    assert ROWS["top1"].top_k == 1 and ROWS["e8"].vision == 8 and not ROWS["no-stage2"].stage2
    assert ROWS["clip-scratch"].scratch and not ROWS["no-losses"].losses


def test_a_verdict_needs_a_t_test():
    mean, error, word = verdict([0.7, 0.72, 0.71], [0.6, 0.61, 0.62])
    assert mean == pytest.approx(0.1) and error < 0.02 and word == "seen here too"
    assert verdict([0.6, 0.61, 0.62], [0.7, 0.72, 0.71])[2] == "the opposite here"
    assert verdict([0.7, 0.5], [0.6, 0.6])[2] == "not told apart"
    assert verdict([0.64, 0.60, 0.62], [0.6, 0.6, 0.6])[2] == "not told apart"  # 1.7 errors, t is 4.3
    assert math.isnan(verdict([0.7], [0.6])[1]) and verdict([0.7], [0.6])[2] == "not told apart"


def test_the_table_has_mean_spread_cost_and_claims():
    text = table({"dense": _row([0.5, 0.7], [0.4, 0.4]), "mlp": _row([0.6, 0.8], [0.5, 0.5], 120, 0.4)})
    assert "| dense | 60.0 ± 14.1 | 40.0 ± 0.0 | 0.550 ± 0.071 | 1.00x | 1.0 M | - |" in text
    assert "| + MLP-MoE, 2 of 4 | 70.0 ± 14.1 |" in text and "1.20x" in text and "clip 0.90" in text
    assert "+10.0 ± 0.0: seen here too" in text and "-0.100 ± 0.000: seen here too" in text
    assert len([line for line in text.splitlines() if "seen here" in line]) == 1


def test_unknown_rows_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"rows must be some of dense, mlp, .*, got \['x'\], 3"):
        run_ablation(tmp_path / "out", rows=["x"])
    assert not (tmp_path / "out").exists()
