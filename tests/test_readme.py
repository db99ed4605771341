"""The README's Python is run: each block alone, in a folder of its own, in the order of the page."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
# What a block holds that cannot run everywhere, and where that is tested.
ELSEWHERE = {"pretrained=": "test_hub.py, on a cache in the place of the hub", ".cuda()": "test_gpu.py"}

BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
RUNNABLE = [block for block in BLOCKS if not any(word in block for word in ELSEWHERE)]


def test_blocks_are_found():
    assert len(RUNNABLE) >= 3
    assert len(BLOCKS) - len(RUNNABLE) == len(ELSEWHERE)


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: block.splitlines()[-1].strip())
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
