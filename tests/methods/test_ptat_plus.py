"""PTAT-plus: its routers against scikit-learn, its trees, its budget."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.naive_bayes import MultinomialNB

from configs import tail_clap
from tail_jax import backbone as backbones
from tail_jax import cli, evaluate, methods, settings
from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import BUFFERS, DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.training.checkpoints import load_tree, save_tree
from tail_jax.run import open_run
from tail_jax.train import train
from tail_jax.tuning import routers
from tail_jax.tuning.masks import count

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT = TextConfig(vocab_size=20, width=8, layers=2, heads=2, hidden=12, max_positions=16,
                  pool="cls", position_offset=0)
MODELS = {
    "ast": DualEncoder(ASTConfig(frames=12, mels=8, patch=4, stride=4, width=8, layers=2, heads=2,
                                 hidden=12), TEXT, embedding=6),
    "htsat": DualEncoder(HTSATConfig(spec_size=16, mels=8, patch=4, width=8, depths=(1, 2),
                                     heads=(2, 2), window=2), TEXT, embedding=6)}
ROWS, TASKS = 5, 3


@functools.cache
def params(name):
    return jax.device_get(jax.jit(MODELS[name].init)(jax.random.key(0)))


def batch(model, seed=1):
    rng = np.random.default_rng(seed)
    return {"audio": rng.normal(size=(ROWS, *model.audio.input_shape)).astype(np.float32),
            "token_ids": rng.integers(0, 20, (ROWS, 7)).astype(np.int32),
            "token_mask": np.arange(7) < np.array([7, 3, 5, 2, 4])[:, None],
            "clip_id": np.arange(ROWS, dtype=np.int32), "mask": np.ones(ROWS, bool),
            "caption_key": np.arange(ROWS, dtype=np.int32)}


def trained(method, name, task):
    """A state in which all rows are something and the routers decide by chance."""
    model, rng = MODELS[name], np.random.default_rng(3)
    state = method.init(jax.random.key(1), model, params(name))
    draw = lambda x: jnp.asarray(x + rng.normal(0, 0.3, x.shape), jnp.float32)
    return {"trainable": jax.tree.map(draw, state["trainable"]),
            "aux": state["aux"] | {"task": jnp.asarray(task, jnp.int32),
                                   "routers": jax.tree.map(draw, state["aux"]["routers"])}}


def embed(method, name, state, rows, side):
    run = jax.jit(functools.partial(getattr(method, f"embed_{side}"), MODELS[name]))
    return np.asarray(run(state["trainable"], params(name), state["aux"], rows))


# --- Routers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(40, 40), (33, 21, 57)])
def test_audio_router_is_linear_discriminant_analysis(sizes):
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(5, 5))
    data = [rng.normal(size=(n, 5)) @ spread + rng.normal(size=5) for n in sizes]
    statistics = routers.empty_statistics(4, 5)
    for task, features in enumerate(data):  # one after another, the data then gone
        statistics = routers.add_task(statistics, task, features)
    new = rng.normal(size=(60, 5)) * 2
    scores = routers.linear_scores(routers.discriminant(statistics), jnp.asarray(new, jnp.float32))
    got = routers.posterior(scores, jnp.arange(4) < len(sizes), hard=False)
    reference = LinearDiscriminantAnalysis("lsqr", priors=[1 / len(sizes)] * len(sizes))
    x, y = np.concatenate(data), np.repeat(np.arange(len(sizes)), sizes)
    reference.fit(x, y)
    # Its covariance is the mean over classes where the priors are equal; ours is over all rows.
    centred = np.concatenate([d - d.mean(0) for d in data])
    covariance = centred.T @ centred / len(centred)
    covariance += 1e-3 * np.trace(covariance) / 5 * np.eye(5)
    means = np.stack([d.mean(0) for d in data])
    solved = np.linalg.solve(covariance, means.T)
    expected = softmax(new @ solved - 0.5 * np.einsum("md,dm->m", means, solved), axis=1)
    np.testing.assert_allclose(got[:, :len(sizes)], expected, atol=2e-3)
    assert not np.asarray(got[:, len(sizes):]).any()
    agree = np.asarray(got).argmax(1) == reference.predict(new)
    assert agree.mean() > 0.9


def test_text_router_is_multinomial_naive_bayes():
    rng = np.random.default_rng(1)
    vocabulary, data = 11, []
    for _ in range(3):
        p = rng.dirichlet(np.ones(vocabulary))
        data.append(rng.choice(vocabulary, size=(30, 6), p=p))
    mask = rng.random((30, 6)) < 0.7
    weight = np.stack([routers.word_log_probabilities(ids, mask, vocabulary) for ids in data])
    counts = lambda ids: np.stack([np.bincount(r[m], minlength=vocabulary)
                                   for r, m in zip(ids, mask)])
    reference = MultinomialNB(alpha=routers.PSEUDO_COUNT, fit_prior=False).fit(
        np.concatenate([counts(ids) for ids in data]), np.repeat(range(3), 30))
    np.testing.assert_allclose(weight, reference.feature_log_prob_, atol=1e-6)
    router = {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.zeros(3)}
    new = rng.integers(0, vocabulary, (30, 6))
    got = routers.posterior(routers.word_scores(router, new, jnp.asarray(mask)),
                            jnp.ones(3, bool), hard=False)
    np.testing.assert_allclose(got, reference.predict_proba(counts(new)), atol=1e-5)


def test_hard_routing_takes_the_best_task_seen():
    scores = jnp.asarray([[0.0, 2.0, 9.0], [1.0, 0.5, 9.0]])
    got = routers.posterior(scores, jnp.asarray([True, True, False]), hard=True)
    np.testing.assert_array_equal(got, [[0, 1, 0], [1, 0, 0]])


# --- Trees --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_tree_without_prompts_in_the_way_is_the_frozen_model(name):
    method = methods.build({"name": "ptat_plus"}, TASKS)
    model = MODELS[name]
    state = method.init(jax.random.key(1), model, params(name))
    pool = state["trainable"]["pool"]
    tuning, head = method._tuned(jax.tree.map(lambda x: x[0], pool), model, "text")
    assert not any(np.any(p["b"]) for p in tuning["lora"].values()) and not np.any(head["b"])
    assert len({np.asarray(x).tobytes() for x in pool["head"]["text"]["a"]}) == TASKS  # own draws


@pytest.mark.parametrize("name, settings", [
    ("ast", {}), ("htsat", {}), ("ast", {"rank": 0}), ("ast", {"head_rank": 0, "route": "final"})])
@pytest.mark.parametrize("side", ["audio", "text"])
def test_an_item_is_embedded_by_the_mean_tree_of_its_own_posterior(name, settings, side):
    method = methods.build({"name": "ptat_plus"} | settings, TASKS)
    model, state = MODELS[name], trained(method, name, task=1)
    rows = batch(model)
    weights = np.asarray(jax.jit(functools.partial(method.tasks_of, side, model))(
        state["trainable"], params(name), state["aux"], rows))
    assert weights.shape == (ROWS, TASKS) and not weights[:, 2].any()
    got = embed(method, name, state, rows, side)
    tuned = [method._tuned(jax.tree.map(lambda x: x[m], state["trainable"]["pool"]), model, side)
             for m in range(TASKS)]
    for row in range(ROWS):
        tuning, head = jax.tree.map(lambda *x: sum(w * v for w, v in zip(weights[row], x)), *tuned)
        one = {k: v[row:row + 1] for k, v in rows.items()}
        out = model.encode(side, params(name), {side: tuning}, one)
        e = np.asarray(out["embedding"], np.float64)
        if head is not None:
            e = e + np.asarray(out["pooled"], np.float64) @ head["a"] @ head["b"] + head["c"]
        np.testing.assert_allclose(got[row], (e / np.linalg.norm(e))[0], atol=2e-5)


def test_loaded_with_heads_of_its_own_it_routes_by_those_of_the_backbone(tmp_path):
    method = methods.build({"name": "ptat_plus", "route": "final", "train_heads": True}, TASKS)
    state, rows = trained(method, "ast", 2), batch(MODELS["ast"])
    backbone = backbones.Backbone("tiny", MODELS["ast"], params("ast"), None, 7, None)
    header = {"kind": "tuning", "backbone_sha256": backbone.sha256,
              "method": methods.defaults("ptat_plus") | {
                  "route": "final", "train_heads": True, "tasks": TASKS}}
    save_tree(tmp_path / "tree.safetensors", jax.device_get(method.stored(state)), header)
    loaded = backbones.tuned(backbone, tmp_path / "tree.safetensors")
    out = jax.jit(loaded.encoders["text"])(loaded.params, loaded.tuning, rows["token_ids"],
                                           rows["token_mask"])
    np.testing.assert_allclose(out["embedding"], embed(method, "ast", state, rows, "text"),
                               atol=1e-5)


@pytest.mark.parametrize("side", ["audio", "text"])
def test_embedding_depends_on_neither_the_batch_nor_the_other_modality(side):
    method = methods.build({"name": "ptat_plus"}, TASKS)
    model, state = MODELS["ast"], trained(methods.build({"name": "ptat_plus"}, TASKS), "ast", 2)
    rows, order = batch(model), np.array([3, 0, 4, 2, 1])
    whole = embed(method, "ast", state, rows, side)
    turned = embed(method, "ast", state, {k: v[order] for k, v in rows.items()}, side)
    np.testing.assert_allclose(turned, whole[order], atol=1e-6)
    other = {"audio": ("token_ids", "token_mask"), "text": ("audio",)}[side]
    changed = rows | {k: batch(model, seed=9)[k] for k in other}
    np.testing.assert_array_equal(embed(method, "ast", state, changed, side), whole)


def test_training_moves_the_row_of_the_task_alone_and_keeps_old_embeddings(tiny_config, tmp_path):
    # Coupled: weight decay would move the maps of every task, if the mask did not stop it.
    config = tiny_config("ptat_plus", tasks=3, **{
        "train.duration": "3 steps", "method.prompts.coupling": "linear_shared"})
    results = train(config, tmp_path)
    assert results["trace_count"] == 1
    trees = [load_tree(tmp_path / "tuning" / f"task_{m}.safetensors")[0] for m in (1, 2, 3)]
    for m, tree in enumerate(trees):
        for before, after in zip(jax.tree.leaves(trees[max(m - 1, 0)]["pool"]),
                                 jax.tree.leaves(tree["pool"])):
            others = np.arange(3) != m
            np.testing.assert_array_equal(before[others], after[others])
        words = tree["aux"]["routers"]["text"]["weight"]
        assert words[:m + 1].all() and not words[m + 1:].any()
        if m:
            np.testing.assert_array_equal(words[:m], trees[m - 1]["aux"]["routers"]["text"][
                "weight"][:m])
            moved = [not np.array_equal(a[m], b[m]) for a, b in
                     zip(jax.tree.leaves(trees[m - 1]["pool"]), jax.tree.leaves(tree["pool"]))]
            assert all(moved)


def test_four_tasks_on_clap_are_within_the_budget_of_ptat():
    config = settings.with_checkpoint(cli.plain(tail_clap.get_config("method=ptat_plus")))
    model = settings.described_model(config)
    method = methods.build(config["method"], 4)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: method.init(jax.random.key(0), model, p), shapes)
    learned = count(state["trainable"]) + count(state["aux"]["routers"])
    assert learned / count(shapes, BUFFERS) <= 0.0242


@pytest.mark.parametrize("field, value, message", [
    ("rank", -1, "method.rank is -1"), ("head_rank", -2, "method.head_rank is -2"),
    ("layers", ["query", "keys"], "method.layers is"), ("route", "middle", "method.route is"),
    ("prompts", {"first_layer": 1, "last_layer": 2}, "expected 0 and 0")])
def test_wrong_settings_are_errors_that_name_them(field, value, message):
    with pytest.raises(ValueError, match=message):
        methods.build({"name": "ptat_plus", field: value}, 2)


@pytest.mark.parametrize("name", ["ptat_plus", "sprompts"])
def test_evaluation_tells_how_often_an_item_is_given_its_own_task(tiny_config, tmp_path, name):
    train(tiny_config(name, tasks=2, **{"train.duration": "1 steps"}), tmp_path)
    first, both = (evaluate.evaluate(tmp_path, task=m)["routed"] for m in (1, 2))
    assert first == {"audio": [1.0], "text": [1.0]}  # no other task to be given
    # By hand, from what the tuning file holds and the readers give.
    run = open_run(json.loads((tmp_path / "config.json").read_text()), tmp_path)
    tree, _ = load_tree(tmp_path / "tuning" / "task_2.safetensors")
    kept = run.method.restored(tree)
    for number, reader in enumerate(run.tests):
        rows = {"token_ids": reader.token_ids, "token_mask": reader.token_mask}
        weights = run.method.tasks_of("text", run.model, kept["trainable"], run.frozen,
                                      kept["aux"], rows)
        right = np.asarray(weights).argmax(1) == number
        assert both["text"][number] == pytest.approx(right.mean())
    assert len(both["audio"]) == 2 and all(0 <= x <= 1 for x in both["audio"])
    assert "given its own task" in evaluate.text(evaluate.evaluate(tmp_path))
