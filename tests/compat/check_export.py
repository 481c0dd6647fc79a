"""Load exported folders and answer, with torch, transformers and Pillow alone; run by test_transformers_versions.py.

    python check_export.py FOLDER...        each with hf/ (the export), expected.pt, expected.json and its images

Nothing of the package or of other tests is imported: this runs where neither is installed.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

TOLERANCE = 1e-4


def check(folder: Path) -> float:
    """Compare ids, logits and answers of one folder; the largest difference of logits."""
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder / "hf", trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    processor = AutoProcessor.from_pretrained(folder / "hf", trust_remote_code=True)
    expected = json.loads((folder / "expected.json").read_text())
    logits = torch.load(folder / "expected.pt", weights_only=True)
    conversations = []
    for prompt in expected.values():
        for message in prompt["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    part["path"] = str(folder / part["path"])
        conversations.append(prompt["messages"])
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    worst = 0.0
    for batch in [[c] for c in conversations] + [conversations]:
        inputs = processor.apply_chat_template(batch, **options)
        with torch.no_grad():
            rows = model.eval()(**inputs).logits
        answers = model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :]
        names = list(expected) if len(batch) > 1 else [list(expected)[conversations.index(batch[0])]]
        for name, row, mask, ids, answer in zip(
            names, rows, inputs["attention_mask"].bool(), inputs["input_ids"], answers, strict=True
        ):
            assert ids[mask].tolist() == expected[name]["ids"], f"{name}: other token ids"
            worst = max(worst, (row[mask] - logits[name]).abs().max().item())
            length = len(expected[name]["answer"])
            assert answer[:length].tolist() == expected[name]["answer"], f"{name}: another answer"
    text = processor.apply_chat_template(conversations[0], add_generation_prompt=True)
    assert processor(text=text, return_tensors="pt")["input_ids"].tolist() == [next(iter(expected.values()))["ids"]]
    two = processor.apply_chat_template(conversations, **options)
    beams = model.generate(**two, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert len(beams) == 2 * len(conversations)
    chat = pipeline("image-text-to-text", model=str(folder / "hf"), trust_remote_code=True)
    assert isinstance(chat(text=conversations[1], max_new_tokens=2)[0]["generated_text"][-1]["content"], str)
    resaved = folder / "resaved"
    model.save_pretrained(resaved)
    processor.save_pretrained(resaved)
    again = AutoModelForImageTextToText.from_pretrained(resaved, trust_remote_code=True).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert AutoProcessor.from_pretrained(resaved, trust_remote_code=True).num_image_tokens == processor.num_image_tokens
    return worst


if __name__ == "__main__":
    present = [name for name in ("qwen3_vlm", "torchvision", "megatron") if importlib.util.find_spec(name)]
    assert not present, f"this environment holds {present}"
    worst = max(check(Path(argument)) for argument in sys.argv[1:])
    assert worst <= TOLERANCE, f"logits differ by {worst}"
    print(f"transformers {transformers.__version__}: {len(sys.argv) - 1} folders, largest difference {worst:.1e}")
