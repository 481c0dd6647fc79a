"""verify: an export passes at every layout; one changed value, a changed or added file or another model does not."""

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vlm.convert.export import Part, compare_folder, export_hf
from qwen3_vlm.eval.verify import TOLERANCE, verify
from qwen3_vlm.parallel import topology as topologies
from tests.cases import Case
from tests.distributed.launch import launch
from tests.hf_folders import rewrite_config, rewrite_tensors

ROOT = Path(__file__).parents[2]
NAMES = ("kv1_tied", "kv8_untied")
TWO = ("parallel=tp2", "parallel=pp2")
FOUR = ("parallel=tp4", "parallel=tp2pp2")
EIGHT = ("parallel=tp4pp2",)


@pytest.fixture(scope="module")
def folder(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CASE/ckpt, its exports CASE/hf and CASE/llm, and CASE/published, the decoder it was imported from."""
    folder = tmp_path_factory.mktemp("verify")
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "ckpt").symlink_to(cases[name].checkpoint)
        (folder / name / "published").symlink_to(cases[name].folder / "llm")
        export_hf(checkpoint=cases[name].checkpoint, out=folder / name / "hf", part=Part.all, max_shard_bytes=200_000)
        export_hf(checkpoint=cases[name].checkpoint, out=folder / name / "llm", part=Part.llm)
    return folder


def command(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    parts = [sys.executable, str(ROOT / "tools/convert.py"), "verify", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(parts, capture_output=True, text=True, input=stdin, env=environment, timeout=240)


def both_parts_pass(folder: Path, parallel: str) -> None:
    """Worst largest difference: 3.1e-6."""
    from megatron.core import parallel_state

    for name in NAMES:
        for part in ("hf", "llm"):
            with mock.patch.object(topologies, "shutdown", parallel_state.destroy_model_parallel):
                found = verify(
                    checkpoint=str(folder / name / "ckpt"),
                    hf=folder / name / part,
                    tolerance=TOLERANCE,
                    overrides=[parallel],
                )
            if found is not None:
                assert found.passed, found.describe()
                assert list(found.logits) == ["text", "one image", "three images"][: 3 if part == "hf" else 1]
                assert min(difference.cosine for difference in found.logits.values()) > 1 - 1e-9


@pytest.mark.parametrize(
    ("num_processes", "layouts"),
    [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.full), pytest.param(8, EIGHT, marks=pytest.mark.full)],
    ids=["two", "four", "eight"],
)
def test_an_export_passes_at_every_layout(folder: Path, tmp_path: Path, num_processes: int, layouts: tuple[str, ...]):
    for name in NAMES:
        (tmp_path / name).symlink_to(folder / name)
    checks = [functools.partial(both_parts_pass, parallel=parallel) for parallel in layouts]
    results = launch(checks, num_processes=num_processes, folder=tmp_path)
    for check in checks:
        results.require(check)


def test_the_command(folder: Path, tmp_path: Path):
    """One process: passes; fails by exit code and by name when one value is changed, or a file."""
    case, findings = folder / "kv8_untied", tmp_path / "found.json"
    done = command("--checkpoint", case / "ckpt", "--hf", case / "hf", "--json", findings)
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout and json.loads(findings.read_text())["passed"]

    changed = tmp_path / "hf"
    shutil.copytree(case / "hf", changed)
    shard = sorted(changed.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[7] = torch.nextafter(tensors[name].view(-1)[7], torch.tensor(9.0))
    save_file(tensors, shard, metadata={"format": "pt"})
    done = command("--checkpoint", case / "ckpt", "--hf", changed, "--json", findings)
    assert done.returncode == 1 and "FAIL" in done.stdout, done.stderr
    found = json.loads(findings.read_text())
    assert found["different_tensors"] == [f"{name}: 1 of {tensors[name].numel()} values"]
    assert found["different_files"] == []
    assert max(difference["largest"] for difference in found["logits"].values()) < TOLERANCE  # logits would not tell


@pytest.mark.full
def test_another_model_fails(folder: Path, tmp_path: Path):
    """As large, with other weights; and the tolerance is the user's."""
    case, hf = folder / "kv8_untied", tmp_path / "hf"
    shutil.copytree(case / "llm", hf)
    rewrite_tensors(hf, lambda tensors: {name: t * 1.01 for name, t in tensors.items()})
    done = command("--checkpoint", case / "ckpt", "--hf", hf, "--tolerance", "100")
    assert done.returncode == 1 and "differ" in done.stdout and "largest difference" in done.stdout


@pytest.mark.parametrize(
    "source", ["hf", pytest.param("llm", marks=pytest.mark.full), pytest.param("published", marks=pytest.mark.full)]
)
def test_no_code_of_the_folder_is_run(folder: Path, tmp_path: Path, source: str):
    """Not even if the one who is asked says yes; files that differ are named and nothing of the folder is loaded."""
    case, hf, proof = folder / "kv8_untied", tmp_path / "hf", tmp_path / "executed"
    shutil.copytree(case / source, hf)
    (hf / "evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor", "AutoProcessor")
    auto_map = dict.fromkeys(classes, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (hf / name).is_file():
            (hf / name).write_text(json.dumps(json.loads((hf / name).read_text()) | {"auto_map": auto_map}))
    for name in ("configuration", "modeling", "processing"):
        if source == "hf":
            shutil.copyfile(hf / "evil.py", hf / f"{name}_qwen3_siglip.py")
    done = command("--checkpoint", case / "ckpt", "--hf", hf, stdin="y\n" * 20)
    assert not proof.exists() and "Traceback" not in done.stderr and "[y/N]" not in done.stdout + done.stderr
    if source == "published":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1 and "evil.py: not a file of an export" in done.stdout
        assert "logits were not compared" in done.stdout


# One file or tensor, without logits.


def change_json(name: str, key: str, value: object) -> Callable[[Path], None]:
    """Set a key of a file; a key of config.json's text_config as "text_config.KEY"."""

    def change(hf: Path) -> None:
        content = json.loads((hf / name).read_text())
        outer, _, inner = key.rpartition(".")
        (content[outer] if outer else content)[inner] = value
        (hf / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    return change


def swap_ids(hf: Path) -> None:
    text = (hf / "tokenizer.json").read_text()
    a, b = '"A": 32', '"B": 33'
    assert a in text and b in text
    (hf / "tokenizer.json").write_text(text.replace(a, '"A": 33').replace(b, '"B": 32'))


def found_files(case: Path, hf: Path, part: Part) -> list[str]:
    found = compare_folder(checkpoint=case / "ckpt", folder=hf, part=part)
    assert not found.misfits and not found.values
    return found.files


BOTH = ("hf", "llm")
CHANGES: dict[str, tuple[tuple[str, ...], str, Callable[[Path], object]]] = {
    "num_image_tokens": (("hf",), "processor_config.json", change_json("processor_config.json", "num_image_tokens", 3)),
    "ids swapped": (BOTH, "tokenizer.json", swap_ids),
    "stop tokens": (BOTH, "generation_config.json", change_json("generation_config.json", "eos_token_id", [1])),
    "padding": (BOTH, "tokenizer_config.json", change_json("tokenizer_config.json", "padding_side", "right")),
    "template": (BOTH, "chat_template.jinja", lambda hf: (hf / "chat_template.jinja").write_text("{{ 1 }}")),
    "mean": (("hf",), "preprocessor_config.json", change_json("preprocessor_config.json", "image_mean", [0, 0, 0])),
    "auto_map": (("hf",), "config.json", change_json("config.json", "auto_map", {"AutoModel": "other--evil.Evil"})),
    "image token": (("hf",), "config.json", change_json("config.json", "image_token_id", 1)),
    "image size": (("hf",), "config.json", change_json("config.json", "vision_config.image_size", 40)),
    "eps": (("hf",), "config.json", change_json("config.json", "text_config.rms_norm_eps", 0.00100001)),
    "theta": (("llm",), "config.json", change_json("config.json", "rope_theta", 200001.0)),
    "missing": (BOTH, "generation_config.json", lambda hf: (hf / "generation_config.json").unlink()),
    "code": (("hf",), "modeling_qwen3_siglip.py", lambda hf: (hf / "modeling_qwen3_siglip.py").write_text("")),
}
"""Parts that have the file, the file, what changes it."""


@pytest.mark.parametrize(("part", "change"), [(part, name) for name, (parts, *_) in CHANGES.items() for part in parts])
def test_a_changed_file_is_named(folder: Path, tmp_path: Path, part: str, change: str):
    _, name, apply = CHANGES[change]
    hf = Path(shutil.copytree(folder / "kv8_untied" / part, tmp_path / "hf"))
    before = (hf / name).read_bytes()
    apply(hf)
    assert not (hf / name).exists() or (hf / name).read_bytes() != before
    found = found_files(folder / "kv8_untied", hf, Part.all if part == "hf" else Part.llm)
    assert found == [f"{name}: not as export writes it"]


@pytest.mark.parametrize("part", BOTH)
def test_files_that_do_not_belong_are_named(folder: Path, tmp_path: Path, part: str):
    """What people and the Hub add is no finding: card, licence, .gitattributes."""
    hf = Path(shutil.copytree(folder / "kv8_untied" / part, tmp_path / "hf"))
    strange = ["adapter_config.json", "custom_generate", "evil.py", "extra.safetensors", "pytorch_model.bin"]
    for name in [*strange, "README.md", "LICENSE", ".gitattributes"]:
        (hf / name).mkdir() if name == "custom_generate" else (hf / name).write_text("{}")
    if part == "llm":  # without an index, every safetensors file would be read for the model's
        (hf / "extra.safetensors").unlink()
        strange.remove("extra.safetensors")
    found = found_files(folder / "kv8_untied", hf, Part.all if part == "hf" else Part.llm)
    assert found == [f"{name}: not a file of an export" for name in strange]


def test_numbers_of_a_published_decoder_are_compared(folder: Path, tmp_path: Path):
    """Its small files are its own."""
    case = folder / "kv8_untied"
    hf = Path(shutil.copytree(case / "published", tmp_path / "hf"))
    (hf / "LICENSE.txt").write_text("free")
    assert found_files(case, hf, Part.llm) == []
    rewrite_config(hf, rms_norm_eps=0.00100001)
    assert found_files(case, hf, Part.llm) == ["config.json: rms_norm_eps is 0.00100001, 0.001 in the checkpoint"]


def test_a_tied_models_own_head(folder: Path, tmp_path: Path):
    """Some are published with both; the import leaves it out."""
    case = folder / "kv1_tied"
    hf = Path(shutil.copytree(case / "published", tmp_path / "hf"))
    name = "model.embed_tokens.weight"
    rewrite_tensors(hf, lambda tensors: tensors | {"lm_head.weight": tensors[name].clone()})
    done = command("--checkpoint", case / "ckpt", "--hf", hf)
    assert done.returncode == 0 and "PASS" in done.stdout, done.stdout + done.stderr
    for change in (lambda t: t + 1, lambda t: t[1:].clone(), lambda t: t.bfloat16()):
        shutil.copyfile(case / "published" / "model.safetensors", hf / "model.safetensors")
        rewrite_tensors(hf, lambda tensors, change=change: tensors | {"lm_head.weight": change(tensors[name])})
        found = compare_folder(checkpoint=case / "ckpt", folder=hf, part=Part.llm)
        assert found.misfits == ["lm_head.weight: not the embedding, and the model is tied"] and not found.values


@pytest.mark.parametrize("part", BOTH)
def test_a_tensor_of_another_shape_is_named(folder: Path, tmp_path: Path, part: str):
    case = folder / "kv8_untied"
    hf = Path(shutil.copytree(case / part, tmp_path / "hf"))
    file = sorted(hf.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(name for name, t in tensors.items() if t.dim() == 2)
    save_file(tensors | {name: tensors[name][:-1].clone()}, file, metadata={"format": "pt"})
    done = command("--checkpoint", case / "ckpt", "--hf", hf)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"  {name}: (torch.float32, " in done.stdout and "logits were not compared" in done.stdout


def test_a_folder_that_transformers_cannot_load_is_one_line(folder: Path, tmp_path: Path):
    case = folder / "kv8_untied"
    hf = Path(shutil.copytree(case / "published", tmp_path / "hf"))
    (hf / "tokenizer.json").write_text("{}")
    done = command("--checkpoint", case / "ckpt", "--hf", hf)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"error: transformers cannot load {hf}" in done.stderr
