"""A report's time, memory and page by the number of runs. `synthetic.py` measures one of 20,000."""

import pytest
import synthetic
from processes import call, python

FEW, MANY = 960, 2_880
MOST = {"cpu_seconds": 6.0, "MB": 20.0, "page_MB": 0.5}
"""What a thousand runs more may cost: time on a busy processor, memory, and a page whose figures are not full yet."""


@pytest.mark.timeout(600)
def test_a_thousand_runs_more_cost_a_report_little(tmp_path):

    def forked(script, *words):
        code, said = call(python, script, {}, *words, output=tmp_path / "log")
        assert code == 0, said
        return said

    few, many = (synthetic.measure(tmp_path / f"{runs}", runs, 400, forked) for runs in (FEW, MANY))
    print(few, many)
    for name, most in MOST.items():
        assert (many[name] - few[name]) / (MANY - FEW) * 1_000 < most, name
