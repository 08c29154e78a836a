"""A report's time, memory and page by the number of runs. `synthetic.py` measures one of 20,000."""

import pytest
import synthetic

FEW, MANY = 960, 2_880
MOST = {"cpu_seconds": 2.5, "MB": 25.0, "page_MB": 0.35}
"""What a thousand runs more may cost: of 20,000 runs 50 s, 500 MB and 7 MB, beside what a report of few takes."""


@pytest.mark.timeout(600)
def test_a_thousand_runs_more_cost_a_report_little(tmp_path):
    few, many = (synthetic.measure(tmp_path / f"{runs}", runs) for runs in (FEW, MANY))
    print(few, many)
    for name, most in MOST.items():
        assert (many[name] - few[name]) / (MANY - FEW) * 1_000 < most, name
