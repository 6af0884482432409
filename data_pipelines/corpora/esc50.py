"""ESC-50: `meta/esc50.csv` and `audio/`, 2,000 recordings of 5 s, 50 classes of 40, five folds.

As on https://github.com/karolpiczak/ESC-50 (K. J. Piczak, ACM Multimedia 2015).
"""

from data_pipelines.corpora import Corpus
from data_pipelines.corpora.folds import FoldTable, read_folds

_TABLE = FoldTable(
    folder="meta",
    file="esc50.csv",
    name="filename",
    fold="fold",
    number="target",
    label="category",
    group="src_file",
    folds=5,
    test=(5,),
    audio="audio",
)


def read_esc50(root) -> Corpus:
    """Reads ESC-50 with fold 5 as test (errors: `read_folds`); groups are source recordings."""
    return read_folds(root, "esc50", _TABLE)
