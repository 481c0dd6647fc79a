"""Nothing of ours lets transformers run code from a model folder."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_trust_remote_code_is_never_switched_on():
    files = [path for room in ("qwen3_vlm", "tools", "examples") for path in (ROOT / room).rglob("*.py")]
    given = [
        (path, keyword.value)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code"
    ]
    assert given  # the tokenizer says no, explicitly
    assert [path for path, value in given if not (isinstance(value, ast.Constant) and value.value is False)] == []
