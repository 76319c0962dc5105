"""The report: one file, offline, escaped, capped with the loss stated."""

import re

import numpy as np
import pandas as pd
import pytest
from plots.cases import HARD_TOKENS

from ernie_lab import plots


@pytest.fixture
def sections():
    view = plots.plot_expert_load(np.ones((2, 4)), n_tokens=9, k=1, model="<m>")
    table = pd.DataFrame({"token": ["<script>", "b"], "x": [0.123456, np.nan]})
    table.index.name = "layer"
    text = plots.token_html(np.zeros(len(HARD_TOKENS)), HARD_TOKENS, name="x")
    return [
        plots.Section("Load & <more>", ["a paragraph <b>", view]),
        plots.Section("Tables", [table, text]),
    ]


def test_report_is_one_offline_escaped_file(sections, tmp_path):
    path = plots.report(tmp_path / "deep" / "r.html", title="T <1>", sections=sections)
    page = path.read_text()
    assert list(path.parent.iterdir()) == [path]
    assert not re.search(r"<script|<b>|<link|<iframe|https?://|url\(|@import", page)
    assert all(source.startswith("data:image/png") for source in re.findall(r'src="([^"]*)', page))
    assert re.search(r'<img alt="[^"]{40,}"', page)
    assert "&lt;script&gt;" in page and "0.1235" in page and "<th>layer</th>" in page
    assert "default-src 'none'" in page and "color-scheme: light dark" in page
    assert 'class="loss"' not in page


def test_report_states_what_its_size_cost(sections, tmp_path):
    page = plots.report(tmp_path / "r.html", title="T", sections=sections, max_bytes=9_000)
    text = page.read_text()
    assert len(text.encode()) < 9_500
    assert "left out the figure" in text and "Left out for size" in text and "72 dpi" in text


def test_long_tables_are_cut_and_say_so(tmp_path):
    table = pd.DataFrame({"x": range(1000)})
    sections = [plots.Section("S", [table])]
    text = plots.report(tmp_path / "r.html", title="T", sections=sections).read_text()
    assert "First 200 of 1,000 rows" in text and text.count("<tr") < 210


def test_report_takes_no_foreign_html(tmp_path):
    sections = [plots.Section("S", [object()])]
    with pytest.raises(TypeError, match="'S' has a object"):
        plots.report(tmp_path / "r.html", title="T", sections=sections)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_report(sections, tmp_path):
    with pytest.raises(IsADirectoryError, match=f"name a file in it: {tmp_path}/report.html"):
        plots.report(tmp_path, title="T", sections=sections)
