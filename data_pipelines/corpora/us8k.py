"""UrbanSound8K: `metadata/UrbanSound8K.csv`, `audio/fold1` to `fold10`; 8,732 clips, 10 classes.

As on https://urbansounddataset.weebly.com/urbansound8k.html (J. Salamon, C. Jacoby and J. P. Bello,
ACM Multimedia 2014). Clips last up to 4 s.
"""

from data_pipelines.corpora import Corpus
from data_pipelines.corpora.folds import FoldTable, read_folds

_TABLE = FoldTable(
    folder="metadata",
    file="UrbanSound8K.csv",
    name="slice_file_name",
    fold="fold",
    number="classID",
    label="class",
    group="fsID",
    folds=10,
    test=(9, 10),
    audio="audio/fold{fold}",
)


def read_us8k(root) -> Corpus:
    """Reads UrbanSound8K with folds 9 and 10 as test (errors: `read_folds`); groups are fsIDs."""
    return read_folds(root, "us8k", _TABLE)
