"""The README's commands and example do what it says."""

import dataclasses
import pathlib
import re
import shlex
import shutil
import subprocess

import jax
import numpy as np
import pytest
import soundfile

from configs import quickstart
from data_pipelines.front_end import CLAP, FrontEnd
from data_pipelines.text import Tokenizer
from tail_jax import methods
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.pretrained.export import export_clap
from tail_jax.train import train

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def test_the_example_method_is_short_and_trains(tiny_config, tmp_path, monkeypatch):
    code = next(block for block in blocks("python") if "class Heads" in block)
    assert len(code.splitlines()) < 40
    exec(code, names := {"__name__": "heads"})
    monkeypatch.setattr(methods, "METHODS", methods.METHODS | {"heads": names["Heads"]})
    config = tiny_config("frozen", tasks=2) | {"method": methods.defaults("heads")}
    results = train(config, tmp_path / "run")
    assert results["method"] == "heads" and results["trace_count"] == 1
    heads = 2 * (16 * 8 + 8 + 8 * 8 + 8)
    assert results["trainable_parameters"] == heads


def test_the_example_method_is_found_where_the_readme_puts_it(run_python, tmp_path):
    package = tmp_path / "tail_jax"
    shutil.copytree(ROOT / "tail_jax", package)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    code = next(block for block in blocks("python") if "class Heads" in block)
    (package / "methods" / "heads.py").write_text(code)
    listed = package / "methods" / "__init__.py"
    assert '`"heads": Heads` among the `METHODS`' in README
    listed.write_text(listed.read_text().replace(
        "METHODS: dict[str, type[Method]] = {",
        "from tail_jax.methods.heads import Heads\nMETHODS: dict[str, type[Method]] = {\n"
        '    "heads": Heads,'))
    done = run_python("-c", "from configs import quickstart;"
                      "print(quickstart.get_config('method=heads').method.to_dict())",
                      cwd=tmp_path)
    assert "'name': 'heads'" in done.stdout and "'learning_rate': 0.001" in done.stdout, done.stderr


def test_the_example_of_embedding_runs(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for name in ("dog.wav", "rain.flac"):
        soundfile.write(tmp_path / name, 0.1 * random.normal(size=4000), 8000)
    model = DualEncoder(
        HTSATConfig(spec_size=32, mels=16, patch=4, width=8, depths=(1, 1), heads=(2, 2), window=4),
        TextConfig(vocab_size=300, width=8, layers=1, heads=2, hidden=16, max_positions=20), 6)
    export_clap(model, jax.device_get(model.init(jax.random.key(0))), FrontEnd(
        dataclasses.replace(CLAP, sampling_rate=8000, n_fft=256, hop_length=160, n_mels=16,
                            fmax=4000.0), 1.0),
        Tokenizer.train(["a dog barks", "heavy rain"], 300), tmp_path / "clap-htsat-unfused")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(next(block for block in blocks("python") if "embed_audio" in block), names)
    assert names["audio"].shape == (2, 6) and names["scores"].shape == (2, 2)
    np.testing.assert_allclose(np.linalg.norm(names["text"], axis=1), 1, atol=1e-5)


def test_every_command_names_files_and_modules_that_exist():
    pages = (README, (ROOT / "launch" / "results" / "README.md").read_text())
    text = "".join("".join(blocks("bash", page)) for page in pages).replace("\\\n", " ")
    commands = text.splitlines()
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command, comments=True)
        while re.match(r"[A-Z_]+=", words[0]):  # settings of a launch script
            words = words[1:]
        if words[0] == "python":
            assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), command
            for word in words:
                if word.startswith("--config=configs/"):
                    assert (ROOT / word.removeprefix("--config=").split(":")[0]).is_file(), command
        else:
            assert (ROOT / words[0]).is_file(), command


@pytest.mark.parametrize("page", ["README.md", "launch/results/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        file, _, title = link.partition("#")
        target = (ROOT / page).parent / file
        assert target.exists(), link
        if title:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert title in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


def test_every_folder_named_in_the_table_exists():
    table = README.partition("## Where things are")[2]
    for name in re.findall(r"^\| `([a-z_/.]+)`", table, re.M):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "launch").glob("*.s*")))
def test_launch_scripts_are_executable_and_parse(script):
    path = ROOT / "launch" / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], check=True)


def test_install_says_which_python_it_needs(tmp_path):
    target = tmp_path / "launch"
    target.mkdir()
    (target / "install.sh").write_bytes((ROOT / "launch" / "install.sh").read_bytes())
    done = subprocess.run(["bash", target / "install.sh"], env={"PATH": "/usr/bin:/bin",
                          "PYTHON": "no-such-python"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: found no Python 3.11 to 3.13")
    assert "no-such-python" in done.stderr


@pytest.mark.parametrize("method", methods.for_streams("retrieves", ablations=True))
def test_the_quickstart_has_every_method(method):
    config = quickstart.get_config(f"method={method},seed=3")
    assert config.method.name == method and config.seed == 3
    methods.build(config.method.to_dict())
