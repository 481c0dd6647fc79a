"""Public data sets -> a prepared folder that `RowLoader` streams.

rows.py      what a row is, and the checks that all sources share
llava.py     LLaVA's JSON lists          one reader each: where the rows are, and how one is converted
mantis.py    Mantis-Instruct's parquet
run.py       reader -> parts, in parallel and restartable -> train and val files
shards.py    the images of the kept rows as tar shards
report.py    what was kept and dropped
"""

from qwen3_vlm.data.prepare.llava import prepare_llava
from qwen3_vlm.data.prepare.mantis import prepare_mantis
from qwen3_vlm.data.prepare.report import Report
from qwen3_vlm.data.prepare.run import Form, Options

__all__ = ["Form", "Options", "Report", "prepare_llava", "prepare_mantis"]
