"""Every Python block of the README runs, top to bottom, in one namespace."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_readme_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    names = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    assert blocks
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        source = "\n" * line + block.group(1)  # tracebacks name the README's line
        exec(compile(source, str(README), "exec"), names)
