"""Closed-form classifiers as methods: against scikit-learn on the features that the tower gives."""

import json

import jax
import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.covariance import EmpiricalCovariance
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity

from tail_jax import analytic
from tail_jax.evaluate import evaluate
from tail_jax.methods import closed_form, ridge_head
from tail_jax.run import open_run, read
from tail_jax.training.checkpoints import load_tree, tree_hash
from tail_jax.train import train
from tail_jax.tuning.adapters import adapter_tuning, init_adapters

pytestmark = pytest.mark.usefixtures("quick_compilation")
NAMES = ("ncm", "aper", "lda", "fecam", "acil", "ranpac")
SMALL = {"acil": {"method.features": 37}, "ranpac": {"method.features": 41}}


@pytest.fixture(scope="module")
def runs(tiny_classes_config, tmp_path_factory):
    """runs(name) -> (config, workdir, results) over all three sessions, each run done once."""
    done = {}

    def run(name):
        if name not in done:
            tuned = {} if name == "ncm" else {"method.first_session": "4 steps"}
            config = tiny_classes_config(name, **tuned | SMALL.get(name, {}))
            workdir = tmp_path_factory.mktemp(name)
            done[name] = config, workdir, train(config, workdir)
        return done[name]

    return run


def features(config, workdir):
    """(run, state as at the end, (z, labels) of all training clips, the same of all test clips)."""
    run = open_run(config, workdir)
    tree, _ = load_tree(workdir / "tuning" / "task_3.safetensors")
    state = run.initial_state() | run.method.restored(tree)
    classes = run.stream.classes
    readers = [read(config, None, task.train, classes) for task in run.stream.tasks]

    def rows(reader):
        data = run.task_data(reader, 0, hook=0)
        return data.map_audio(run.method.scores, state), reader.labels

    both = [tuple(map(np.concatenate, zip(*map(rows, some)))) for some in (readers, run.tests)]
    return run, state, *both


@pytest.mark.parametrize("name", NAMES)
def test_tower_is_tuned_in_the_first_session_or_never(runs, name):
    config, workdir, results = runs(name)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["task"] for line in lines]
    assert steps == ([] if name == "ncm" else ["tones_1"] * 4)
    trees = [load_tree(workdir / "tuning" / f"task_{k}.safetensors")[0] for k in (1, 2, 3)]
    assert len({tree_hash(tree.get("adapters", {})) for tree in trees}) == 1
    assert (results["trainable_parameters"] == 0) == (name == "ncm")
    assert results["trace_count"] == int(name != "ncm")


@pytest.mark.parametrize("name", ["ncm", "lda", "acil"])
def test_three_sessions_give_what_scikit_learn_gives_on_all_data_at_once(runs, name):
    config, workdir, _ = runs(name)
    run, state, (z, y), (tests, _) = features(config, workdir)
    ours = run.method.decide(state, tests).argmax(1)
    means = np.stack([z[y == c].mean(0, dtype=np.float64) for c in range(6)])
    if name == "ncm":
        expected = cosine_similarity(tests, means).argmax(1)
    elif name == "lda":
        within = EmpiricalCovariance(assume_centered=True).fit(z - means[y]).covariance_
        within += 1e-4 * np.trace(within) / len(within) * np.eye(len(within))
        expected = np.stack([multivariate_normal(m, within).logpdf(tests) for m in means]).argmax(0)
    else:
        hidden = lambda x: np.maximum(x.astype(np.float64) @ state["statistics"]["projection"], 0)
        model = Ridge(1e-3, fit_intercept=False).fit(hidden(z), np.eye(6)[y])
        np.testing.assert_allclose(state["statistics"]["weights"], model.coef_.T, rtol=1e-4,
                                   atol=1e-6)
        expected = model.predict(hidden(tests)).argmax(1)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_from_the_tuning_file_gives_the_last_row(runs, name):
    _, workdir, results = runs(name)
    row = evaluate(workdir)["row"]["accuracy/seen"]
    assert row == results["matrices"]["accuracy/seen"][-1]
    assert np.mean(row) > 1 / 3  # of six classes of tones; chance is 1/6


def test_features_of_aper_are_those_before_and_after(runs):
    config, workdir, _ = runs("aper")
    run, state, (z, _), _ = features(config, workdir)
    ncm_config, ncm_workdir, _ = runs("ncm")
    _, _, (before, _), _ = features(ncm_config, ncm_workdir)
    width = run.model.embedding
    np.testing.assert_allclose(z[:, :width], before, atol=1e-5)
    assert np.abs(z[:, width:] - before).max() > 1e-3


def test_ranpac_chooses_its_ridge_in_each_session():
    random = np.random.default_rng(0)
    method = closed_form.RanPAC(features=30, first_session="")
    kept = {name: x for name, x in method.empty(_Model()).items()}
    seen = []
    for session in range(3):
        labels = np.repeat([2 * session, 2 * session + 1], 10)
        # Noise grows, so that a stronger ridge is wanted.
        z = random.normal(size=(20, 8)) * 10.0**session + 5 * np.eye(8)[labels % 8]
        kept = method.learn(kept, z.astype(np.float32), labels, session)
        seen.append(float(kept["gamma"]))
        rows = np.maximum(z.astype(np.float32).astype(np.float64) @ kept["projection"], 0)
        assert kept["gamma"] == analytic.held_out(
            rows, labels, seed=session).gamma
    assert len(set(seen)) > 1
    one = method.learn(kept, z[:1].astype(np.float32), labels[:1], 7)
    assert one["gamma"] == kept["gamma"]  # one clip says nothing


def test_adapters_change_nothing_at_first_and_add_their_formula(tiny_classes_config, tmp_path):
    run = open_run(tiny_classes_config("ncm"), tmp_path)
    tree = init_adapters(jax.random.key(0), run.model.audio, 3)
    batch = {"audio": np.random.default_rng(0).normal(
        size=(2, *run.model.audio.input_shape)).astype(np.float32)}
    encode = lambda tuning: run.model.encode("audio", run.backbone.params, tuning, batch)["pooled"]
    plain = encode(None)
    np.testing.assert_array_equal(encode({"audio": adapter_tuning(tree, 0.1)}), plain)
    tree["up"]["bias"] = tree["up"]["bias"] + np.arange(run.model.embedding)  # no norm takes it out
    assert np.abs(encode({"audio": adapter_tuning(tree, 0.1)}) - plain).max() > 1e-3
    np.testing.assert_array_equal(encode({"audio": adapter_tuning(tree, 0.0)}), plain)


class _Model:
    """What the statistics ask of a model."""

    classes, embedding = 6, 8


def test_a_chosen_gamma_that_float64_cannot_solve_with_is_raised():
    """Features of size 1e3: 1e-8 would be 1e-16 of the mean diagonal of G, less than rounding."""
    random = np.random.default_rng(0)
    head, labels = ridge_head.empty(3, 5, 60, recursion=False), np.arange(21) % 3
    z = 1e3 * random.standard_normal((21, 5))
    for _ in range(3):
        head = ridge_head.learn(head, z, labels, 0, chooser=lambda rows, own: 1e-8)
    assert float(head["gamma"]) == 1e-8
    rows = analytic.random_features(z, head["projection"])
    level = 3 * np.square(rows).sum() / 60
    joint = Ridge(alpha=1e-11 * level, fit_intercept=False).fit(np.tile(rows, (3, 1)),
                                                              np.eye(3)[np.tile(labels, 3)])
    np.testing.assert_allclose(rows @ head["weights"], joint.predict(rows), atol=1e-4)
    with pytest.raises(ValueError, match="too little for float64"):
        ridge_head.learn(head, z, labels, 0)  # no chooser: the gamma is somebody's wish
