"""What a warm start gains, as the benchmark measures it."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from bench import growth  # noqa: E402


def comparison(seed, warm, fresh):
    runs = [
        growth.Run({"first_val_loss": losses[0]}, dict(zip((0, 3, 6, 12), losses, strict=False)))
        for losses in (warm, fresh)
    ]
    return growth.Comparison("4 to 6 layers", seed, warm[0], *runs)


def test_the_table_has_a_row_for_each_seed_and_one_of_means():
    found = [comparison(1, (3.0, 2.0, 1.0), (9.0, 5.0, 4.0, 3.0)), comparison(2, (2.0, 2.0, 2.0), (9.0, 5.0, 2.0, 1.0))]
    header, rule, *rows = growth.table(found, 6)
    assert header == (
        "| growth | seed | donor | warm at 0 | warm at 3 | fresh at 3 | warm at 6 | fresh at 6 | fresh at 12 |"
    )
    assert rule.count("---") == 9
    assert rows == [
        "| 4 to 6 layers | 1 | 3.0000000 | 3.0000000 | 2.0000 | 5.0000 | 1.0000 | 4.0000 | 3.0000 |",
        "| 4 to 6 layers | 2 | 2.0000000 | 2.0000000 | 2.0000 | 5.0000 | 2.0000 | 2.0000 | 1.0000 |",
        "| 4 to 6 layers | mean | 2.5000000 | 2.5000000 | 2.0000 | 5.0000 | 1.5000 | 3.0000 | 2.0000 |",
    ]


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_what_has_grown_begins_at_the_donors_loss_and_stays_ahead_of_a_fresh_start(tmp_path, counted):
    for seed in (1, 2, 3):
        for found in growth.compare(tmp_path / str(seed), seed, 60, None):
            assert found.warm.summary["first_val_loss"] == pytest.approx(found.donor, abs=1e-5)
            assert all(loss < found.fresh.losses[iteration] for iteration, loss in found.warm.losses.items())
            counted("warm starts", "growths that were compared with a fresh start", 1)
