"""Weight files: what is read, and what is said of files that cannot be."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tail_jax.pretrained.files import Options, empty, open_tensors, read_json


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return {"a.weight": random.normal(size=(3, 5)).astype(np.float32),
            "b": random.normal(size=(7,)).astype(np.float16),
            "c": random.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
            "ids": np.arange(4), "scalar": np.array(2.5, np.float32)}


def test_safetensors_are_read_as_written(arrays, tmp_path):
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path)
    assert tensors.shapes == {k: v.shape for k, v in arrays.items()}
    for key, array in arrays.items():
        read = tensors.read(key)
        np.testing.assert_array_equal(read, array)
        assert read.dtype == array.dtype


def test_shards_are_found_through_their_index(arrays, tmp_path):
    keys = [*arrays]
    for i, part in enumerate((keys[:2], keys[2:])):
        safetensors.numpy.save_file({k: arrays[k] for k in part}, tmp_path / f"{i}.safetensors")
    index = {"weight_map": {k: f"{int(i >= 2)}.safetensors" for i, k in enumerate(keys)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = open_tensors(tmp_path)
    assert set(tensors.shapes) == set(keys)
    np.testing.assert_array_equal(tensors.read("a.weight"), arrays["a.weight"])

    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(ValueError, match="names the file '1.safetensors', which is not in"):
        open_tensors(tmp_path)
    for name in ("../secret.safetensors", "model.safetensors.index.json"):
        index["weight_map"]["b"] = name
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="which is not in .* or holds no weights"):
            open_tensors(tmp_path)


@pytest.mark.parametrize("keep", [4, 60, -1])
def test_a_truncated_file_is_named(arrays, tmp_path, keep):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors: (truncated|not a whole)"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("header", [
    b"[1, 2]", b"{", b'{"a": {"dtype": "F32"}}', b'{"a": 3}', b'{"__metadata__": 3}',
    *(b'{"a": {"dtype": "F32", "shape": %s, "data_offsets": %s}}' % numbers for numbers in (
        (b"[2]", b"[0, 4]"), (b"[2]", b"[-8, 0]"), (b"[2]", b"[0.0, 8]"),
        (b"[-1, -2]", b"[0, 8]")))])
def test_a_damaged_header_is_one_error(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        open_tensors(path)


def test_what_is_no_weight_file_is_said(tmp_path):
    with pytest.raises(ValueError, match="has no weights; expected one of model.safetensors"):
        open_tensors(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        open_tensors(tmp_path / "no.safetensors")
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="2 weight files, a.pt, b.pt; pass one of them"):
        open_tensors(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="cannot tell what kind of file"):
        open_tensors(tmp_path / "a.txt")


class TestTorch:
    """Files of PyTorch: tensors and nothing else."""

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch")

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("below", ["state_dict", "model", None])
    def test_a_state_dict_is_found_where_trainers_put_it(self, tmp_path, below, legacy):
        weight = self.torch.arange(6.0).reshape(2, 3)
        state = {"w": weight, "half": weight.to(self.torch.bfloat16)}
        content = {below: state, "epoch": 3} if below else state
        self.torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        tensors = open_tensors(tmp_path)
        np.testing.assert_array_equal(tensors.read("w"), weight.numpy())
        np.testing.assert_array_equal(tensors.read("half"), weight.numpy())
        assert tensors.extras == ({"epoch": 3} if below else {})

    def test_arrays_are_whole_however_often_a_file_is_mapped_anew(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tail_jax.pretrained.files._MAPPED", 100)
        weights = {f"w{i}": self.torch.randn(7, i) for i in range(1, 9)}
        # An optimizer's tensors are no weights, and must not keep the file in memory.
        optimizer = {"state": [{"momentum": self.torch.ones(3)}], "step": 5}
        self.torch.save({"model": weights, "optimizer": optimizer, "epoch": 3}, tmp_path / "x.pt")
        tensors = open_tensors(tmp_path)
        assert tensors.extras == {"epoch": 3}
        for key in [*weights, *weights]:
            np.testing.assert_array_equal(tensors.read(key), weights[key].numpy())

    def test_numbers_of_numpy_are_data(self, tmp_path):
        extras = {"epoch": np.int64(3), "loss": np.float64(0.5), "best": np.float32(2), "name": "x"}
        self.torch.save({"state_dict": {"w": self.torch.ones(2)}, **extras}, tmp_path / "x.pt")
        tensors = open_tensors(tmp_path)
        assert tensors.extras == extras and tensors.shapes == {"w": (2,)}

    def test_a_pickle_that_wants_to_run_code_is_refused(self, tmp_path):
        ran = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return open, (str(ran), "w")

        self.torch.save({"w": self.torch.zeros(2), "x": Evil()}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="x.pt: refused: a pickle that asks for"):
            open_tensors(tmp_path)
        assert not ran.exists()

    def test_a_truncated_file_is_named(self, tmp_path):
        path = tmp_path / "x.bin"
        self.torch.save({"w": self.torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:900])
        with pytest.raises(ValueError, match="x.bin: not a whole PyTorch file|x.bin: refused"):
            open_tensors(path)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_damaged_file_is_read_or_named(self, tmp_path, legacy):
        """Damage that only changes values cannot be told."""
        path, random = tmp_path / "x.bin", np.random.default_rng(0)
        self.torch.save({"w": self.torch.zeros(3)}, path,
                        _use_new_zipfile_serialization=not legacy)
        whole, errors = np.frombuffer(path.read_bytes(), np.uint8), 0
        for _ in range(100):
            damaged = whole.copy()
            damaged[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
            path.write_bytes(damaged.tobytes())
            try:
                open_tensors(path)
            except ValueError as error:
                assert str(path) in str(error)
                errors += 1
        assert errors > 10

    def test_a_file_without_tensors_is_said(self, tmp_path):
        self.torch.save({"epoch": 3}, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match="holds no tensors"):
            open_tensors(tmp_path)


def test_buffers_suit_xla():
    for shape in ((), (3,), (5, 7, 11)):
        array = empty(shape)
        assert array.shape == shape and array.ctypes.data % 64 == 0


def test_options_name_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"act": "gelu", "odd": [1, 2], "none": null, "audio": {"act": "tanh"}}')
    options = Options(read_json(path), path)
    assert options.get("none", 4) == 4
    assert options.choose("act", "relu", {"gelu": "exact"}) == "exact"
    assert options.choose("odd", None, {(1, 2): 3}) == 3
    with pytest.raises(ValueError, match=r"config.json: audio: option act is 'tanh'.*'gelu'"):
        options.section("audio").choose("act", "gelu", {"gelu": "gelu"})
    assert Options({"n": 3}, path).count("n", 1) == 3
    for value in (0, -1, True, 2.0, "3", 2**31, 10**30):
        with pytest.raises(ValueError, match="config.json: option n is .*; expected a whole"):
            Options({"n": value}, path).count("n", 1)
    assert Options({"n": 0}, path).count("n", 1, least=0) == 0
    for value in (3, 0.5, 1e30):
        assert Options({"n": value}, path).number("n", 1) == value
    for value in ("1e-5", [1], {}, True, float("nan"), float("inf"), 10**400, -1):
        with pytest.raises(ValueError, match="config.json: option n is .*; expected a finite"):
            Options({"n": value}, path).number("n", 1, least=0)
    for value in ([], [[1]], {}, {"a": 1}, float("nan")):
        with pytest.raises(ValueError, match="config.json: option n is .*supported: 'gelu'"):
            Options({"n": value}, path).choose("n", "gelu", {"gelu": "gelu"})
    with pytest.raises(ValueError, match="config.json: option audio is 3; expected an object"):
        Options({"audio": 3}, path).section("audio")
    with pytest.raises(ValueError, match="config.json: not supported: invalid literal"):
        options.build(lambda text: int(text), text="x")
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds a list; expected an object"):
        read_json(path)
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="config.json: not JSON"):
            read_json(path)
