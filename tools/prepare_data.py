"""Prepare public data sets for training: check the rows, split off validation, write what the loader streams.

python tools/prepare_data.py llava-pretrain --source blip_laion_cc_sbu_558k.json --images images/ --out data/llava
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from qwen3_vlm.data.prepare import prepare_llava
from qwen3_vlm.errors import DataError


def main() -> int:
    """Parse the command line, prepare, print the report; exit code 1 and a message if the data cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = parser.add_subparsers(dest="dataset", required=True)
    llava = datasets.add_parser("llava-pretrain", help="LLaVA-form JSON: {id, image, conversations: [{from, value}]}")
    llava.add_argument("--source", type=Path, required=True, help="JSON or JSONL file, or the folder that holds it")
    llava.add_argument("--images", type=Path, required=True, help="folder that image names are relative to")
    llava.add_argument("--out", type=Path, required=True, help="folder to write")
    llava.add_argument("--val-fraction", type=float, default=0.0, help="share of rows for validation (default: 0)")
    args = parser.parse_args()
    try:
        report = prepare_llava(args.source, args.images, args.out, val_fraction=args.val_fraction)
    except DataError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(report), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
