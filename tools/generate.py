"""Answer a prompt about images from a Megatron checkpoint; under torchrun at any parallel= layout.

python tools/generate.py --checkpoint CKPT --image a.jpg --image b.jpg --prompt "<image> <image> What changed?"
torchrun --nproc-per-node 2 tools/generate.py --checkpoint CKPT --image a.jpg --prompt "<image> Describe." parallel=tp2
"""

import json
from pathlib import Path
from typing import Annotated

import typer


def main(
    checkpoint: Annotated[str, typer.Option(help="Import's --out, a saved step, or an exp_dir.")],
    prompt: Annotated[str, typer.Option(help="One user turn; <image> stands where an image belongs.")],
    image: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Image files, in the order of <image>.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write prompt and answer here.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="parallel=tp2, precision=bf16, ...")] = None,
) -> None:
    """Print the greedy answer."""
    from qwen3_vlm.eval.session import open_session

    with open_session(checkpoint, overrides or []) as session:
        from qwen3_vlm.data.sample import Message
        from qwen3_vlm.eval.generate import Prompt

        turns = [Message(role="system", content=system)] if system else []
        turns.append(Message(role="user", content=prompt))
        media = {"image": [path.read_bytes() for path in image or []]}
        [answer] = session.generator.generate([Prompt(messages=turns, media=media)], max_new_tokens=max_new_tokens)
        if session.topology.rank == 0:
            print(answer)
            if json_file is not None:
                json_file.write_text(json.dumps({"prompt": prompt, "answer": answer}) + "\n")


if __name__ == "__main__":
    from qwen3_vlm.cli import run

    run(main)
