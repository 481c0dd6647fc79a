"""Nothing of ours lets transformers run code from a model folder, or ask whether it may."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for room in ("qwen3_vlm", "tools", "examples") for path in sorted((ROOT / room).rglob("*.py"))]
OWN_CLASSES = {"Qwen3ForCausalLM", "Qwen3SiglipForConditionalGeneration", "Qwen3SiglipImageProcessor"}
"""Model and image processor classes load themselves alone; every other class may look for code in the folder."""


def calls_that_may_run_code(source: str) -> list[int]:
    """Lines that switch trust_remote_code on, or load with a class that asks and do not say no."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
        says_no = bool(given) and all(isinstance(value, ast.Constant) and value.value is False for value in given)
        name = ast.unparse(node.func)
        owner, _, method = name.rpartition(".")
        loads = method in ("from_pretrained", "from_config") or name in ("pipeline", "transformers.pipeline")
        if not says_no and (given or (loads and owner not in OWN_CLASSES)):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    ("source", "runs"),
    [
        ("AutoTokenizer.from_pretrained(x)", True),
        ("transformers.AutoModel.from_pretrained(x, local_files_only=True)", True),
        ("AutoModel.from_config(x)", True),
        ("Tokenizer.from_pretrained(x, trust_remote_code=True)", True),
        ("AutoTokenizer.from_pretrained(x, trust_remote_code=flag)", True),
        ("pipeline('text-generation', x)", True),
        ("AutoTokenizer.from_pretrained(x, trust_remote_code=False)", False),
        ("Qwen3ForCausalLM.from_pretrained(x)", False),
    ],
)
def test_the_scan_sees_what_asks(source: str, runs: bool):
    assert bool(calls_that_may_run_code(source)) == runs


def test_no_call_may_run_code_of_a_folder():
    found = {str(path.relative_to(ROOT)): calls_that_may_run_code(path.read_text()) for path in FILES}
    assert "qwen3_vlm/eval/verify.py" in found
    assert {path: lines for path, lines in found.items() if lines} == {}
