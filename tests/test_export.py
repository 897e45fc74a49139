"""Files: what is saved comes back bit for bit, and a file that is not what was saved never does."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save as write_tensors

import amortlib.export as export
from amortlib.export import (
    FORMAT_VERSION,
    CheckpointError,
    build_and_load,
    load,
    read_settings,
    save,
)


class Inner(eqx.Module):
    weight: jax.Array
    act: Callable
    name: str = eqx.field(static=True)


class Outer(eqx.Module):
    layers: tuple[Inner, ...]
    table: dict[str, jax.Array]
    key: jax.Array
    count: jax.Array
    seen: jax.Array
    history: np.ndarray
    nothing: None = None


def outer(seed: int) -> Outer:
    """A module with every kind of leaf; another seed gives other values everywhere."""
    rng = np.random.default_rng(seed)
    normal = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    # The values that a detour through text or another precision would lose.
    special = jnp.asarray([np.nan, np.inf, -0.0, 1e-42, np.float32(1 / 3)], jnp.float32)
    return Outer(
        layers=(Inner(normal, jax.nn.gelu, "a"), Inner(normal[0], jnp.tanh, "b")),
        table={"special": special * (1 + seed), "empty": jnp.zeros((0, 2))},
        key=jax.random.key(seed),
        count=jnp.asarray(7 + seed),
        seen=jnp.asarray(rng.random(5) < 0.5),
        history=rng.normal(size=4),
    )


def bits(leaf: jax.Array | np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


def all_bits(tree: object) -> list:
    return [bits(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


SMALL = {"w": jnp.arange(3, dtype=jnp.float32), "n": jnp.asarray([4, 5])}
LIKE = {"w": jnp.zeros(3), "n": jnp.zeros(2, int)}
SETTINGS = {"width": 12, "kind": "plain", "shape": [3]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("whole") / "model"
    save(path, SMALL, settings=SETTINGS)
    return path.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the examples of one test write, one over the other."""
    return tmp_path_factory.mktemp("damaged") / "model"


def refused(path: Path, message: str | None = None) -> None:
    """Both readers refuse the file, with the error that callers catch and its name in it."""
    for read in (lambda: load(path, LIKE), lambda: read_settings(path)):
        with pytest.raises(CheckpointError, match=message) as caught:
            read()
        assert str(path) in str(caught.value)


# --- round trips ------------------------------------------------------------------------------


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    saved, like = outer(0), outer(1)
    assert all(
        a != b for a, b in zip(all_bits(saved), all_bits(like), strict=True) if a[1] != (0, 2)
    )
    save(tmp_path / "model", saved)
    loaded = load(tmp_path / "model", like)
    assert all_bits(loaded) == all_bits(saved)
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)


def test_a_loaded_key_draws_what_the_saved_one_drew(tmp_path):
    saved = {"typed": jax.random.key(3), "raw": jax.random.PRNGKey(4)}
    save(tmp_path / "keys", saved)
    loaded = load(tmp_path / "keys", {"typed": jax.random.key(0), "raw": jax.random.PRNGKey(0)})
    for name, key in saved.items():
        assert bits(jax.random.normal(loaded[name], (3,))) == bits(jax.random.normal(key, (3,)))


def test_functions_are_the_template_s_and_never_the_file_s(tmp_path):
    saved = Inner(jnp.ones(2), jax.nn.gelu, "saved")
    save(tmp_path / "model", saved)
    loaded = load(tmp_path / "model", Inner(jnp.zeros(2), jnp.tanh, "template"))
    assert loaded.act is jnp.tanh
    assert loaded.name == "template"
    assert b"gelu" not in (tmp_path / "model").read_bytes()


def test_a_bare_array_and_a_tree_without_arrays_come_back(tmp_path):
    save(tmp_path / "bare", jnp.arange(4.0))
    assert bits(load(tmp_path / "bare", jnp.zeros(4))) == bits(jnp.arange(4.0))
    save(tmp_path / "none", {"f": jnp.tanh})
    assert load(tmp_path / "none", {"f": jnp.sin}) == {"f": jnp.sin}


def test_an_array_that_lies_in_another_order_comes_back_as_it_was(tmp_path):
    saved = np.arange(12.0).reshape(3, 4).T[::2]
    save(tmp_path / "model", {"a": saved})
    loaded = load(tmp_path / "model", {"a": np.zeros((2, 3))})["a"]
    np.testing.assert_array_equal(loaded, saved)
    loaded[0, 0] = 5.0  # numpy arrays can be written to, as those that were saved
    assert loaded[0, 0] == 5.0


def test_an_array_that_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"\['w'\].*bfloat16"):
        save(tmp_path / "model", {"w": jnp.ones(2, jnp.bfloat16)})
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_the_library_comes_back_with_its_answers(tmp_path):
    from amortlib.posterior import regression_posterior
    from amortlib.problems import ornstein_uhlenbeck

    prior = ornstein_uhlenbeck(3).prior
    sizes = {"features": 3, "width": 4, "depth": 1}
    made, like = (
        regression_posterior("information", key=jax.random.key(i), prior=prior, **sizes)
        for i in (0, 1)
    )
    save(tmp_path / "model", made)
    assert all_bits(load(tmp_path / "model", like)) == all_bits(made)
    assert all_bits(like) != all_bits(made)


# --- damage -----------------------------------------------------------------------------------


def test_a_file_cut_short_at_any_length_is_refused(whole, place):
    for length in range(len(whole)):
        place.write_bytes(whole[:length])
        refused(place)


def test_a_file_with_something_after_its_end_is_refused(whole, place):
    for tail in (b"\0", b" ", whole):
        place.write_bytes(whole + tail)
        refused(place)


def test_one_changed_byte_anywhere_is_found(whole, place):
    """Every position, each with a flipped lowest and highest bit."""
    for flip in (0x01, 0x80):
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            place.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load(place, LIKE)


@given(st.data())
def test_a_byte_of_any_other_value_is_found(whole, place, data):
    position = data.draw(st.integers(0, len(whole) - 1), "position")
    value = data.draw(st.integers(0, 255).filter(lambda v: v != whole[position]), "value")
    place.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
    refused(place)


def test_settings_changed_by_hand_are_found(whole, place):
    """Another width that is valid JSON of the same length would build another model."""
    changed = whole.replace(rb"\"width\": 12", rb"\"width\": 21")
    assert changed != whole
    place.write_bytes(changed)
    refused(place, "digest")


def test_a_space_in_the_header_that_becomes_a_tab_is_found(place, tmp_path):
    """The header is padded with spaces; JSON reads the same out of it with tabs."""
    for name in ("w", "ww", "www", "wwww"):  # of some length the header needs padding
        save(tmp_path / "padded", {name: jnp.ones(1)})
        data = (tmp_path / "padded").read_bytes()
        if b"} " in data:
            place.write_bytes(data.replace(b"} ", b"}\t", 1))
            refused(place, "digest")
            return
    raise AssertionError("expected one of the headers to be padded")


@given(st.binary(max_size=200))
@example(b"")
@example(b"\0" * 8)
@example((2).to_bytes(8, "little") + b"{}")
@example((2).to_bytes(8, "little") + b"[]")
@example((17).to_bytes(8, "little") + b'{"__metadata__":1}')
@example((200_000).to_bytes(8, "little") + b"[" * 200_000)  # nested beyond the stack
@example(b"\xff" * 8 + b"{}")  # a header longer than any file
def test_bytes_that_are_no_checkpoint_are_refused(place, data):
    place.write_bytes(data)
    refused(place)


@pytest.mark.parametrize("digest", ["", "0" * 64, "\ud800", 7, None])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_digest_that_is_no_digest_is_refused(place, digest, separators):
    """With a space before the digest, a check that looks for it in one spelling finds nothing."""
    metadata = {"format": "amortlib", "version": str(FORMAT_VERSION), "settings": "{}"}
    metadata["sha256"] = digest
    header = json.dumps({"__metadata__": metadata}, separators=separators).encode()
    place.write_bytes(len(header).to_bytes(8, "little") + header)
    refused(place, "digest")


def test_a_file_of_another_writer_is_refused(place):
    place.write_bytes(write_tensors({"['w']": np.zeros(3, np.float32)}))
    refused(place, "written by amortlib")
    place.write_bytes(write_tensors({"a": np.zeros(3)}, metadata={"format": "pt"}))
    refused(place, "written by amortlib")


def test_a_file_of_another_version_says_which(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export, "FORMAT_VERSION", FORMAT_VERSION + 1)
        save(tmp_path / "model", SMALL)
    refused(tmp_path / "model", rf"version {FORMAT_VERSION}, got {FORMAT_VERSION + 1}")


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_and_its_code_never_runs(tmp_path, protocol):
    marker, path = tmp_path / "marker", tmp_path / "model"
    path.write_bytes(pickle.dumps({"w": Bomb(marker)}, protocol))
    refused(path)
    np.savez(tmp_path / "arrays.npz", w=np.array([Bomb(marker)], object))
    refused(tmp_path / "arrays.npz")
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the bomb was live
    assert marker.exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    refused(tmp_path / "nothing", "found no file")
    refused(tmp_path, "found no file")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "below", "found no file")


# --- templates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros(4), "n": jnp.zeros(2, int)}, r"\['w'\] to be float32\(4,\).*\(3,\)"),
        ({"w": jnp.zeros((1, 3)), "n": jnp.zeros(2, int)}, r"\['w'\] to be float32\(1, 3\)"),
        ({"w": jnp.zeros(3, int), "n": jnp.zeros(2, int)}, r"\['w'\] to be int32.*got float32"),
        ({"w": jnp.zeros(3, jnp.float16), "n": jnp.zeros(2, int)}, r"\['w'\] to be float16"),
        ({"w": jnp.zeros(3)}, r"not expected .*\['n'\]"),
        (LIKE | {"more": jnp.zeros(1)}, r"missing .*\['more'\]"),
        ({"v": jnp.zeros(3), "n": jnp.zeros(2, int)}, r"missing .*\['v'\].*not expected .*\['w'\]"),
        ([jnp.zeros(3), jnp.zeros(2, int)], r"missing .*\[0\].*not expected .*\['n'\]"),
        ({"w": jnp.zeros(3), "n": jax.random.key(0)}, r"\['n'\] to be uint32"),
    ],
    ids=["length", "rank", "kind", "precision", "fewer", "more", "name", "structure", "key"],
)
def test_a_template_that_does_not_fit_is_refused_by_name(tmp_path, like, message):
    save(tmp_path / "model", SMALL)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model", like)


# --- writing ----------------------------------------------------------------------------------


def boom(*_, **__):
    raise OSError("no space left")


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("failure", [boom, interrupt])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, call, failure
):
    path = tmp_path / "model"
    save(path, SMALL, settings=SETTINGS)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failure)
        with pytest.raises((OSError, KeyboardInterrupt)):
            save(path, {"w": jnp.zeros(3)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "nowhere" / "model", SMALL)


def test_nothing_is_at_the_place_before_the_file_is_whole(tmp_path, monkeypatch):
    """At the moment of the move the new file is complete beside the old one."""
    path = tmp_path / "model"
    save(path, {"w": jnp.zeros(3), "n": jnp.zeros(2, int)})
    before, seen = path.read_bytes(), []
    move = os.replace

    def look(source, target):
        assert path.read_bytes() == before
        seen.append(load(source, LIKE))
        move(source, target)

    monkeypatch.setattr(os, "replace", look)
    save(path, SMALL)
    assert all_bits(seen) == all_bits(load(path, LIKE)) == all_bits(SMALL)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save(tmp_path / "model", SMALL)
        save(tmp_path / "model", SMALL)
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == mode


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"a": object()}, {"a": np.float32(1.0)}, {"a": float("nan")}, {"a": {1, 2}}, {"a": b"x"}],
    ids=["object", "numpy", "nan", "set", "bytes"],
)
def test_settings_that_are_not_json_are_refused_and_nothing_is_written(tmp_path, settings):
    with pytest.raises(CheckpointError, match="settings that JSON can hold"):
        save(tmp_path / "model", SMALL, settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_hold_themselves_are_refused(tmp_path):
    settings: dict = {}
    settings["again"] = settings
    with pytest.raises(CheckpointError, match="settings that JSON can hold"):
        save(tmp_path / "model", SMALL, settings=settings)


def test_settings_come_back(tmp_path):
    given = {
        "text": 'quotes " and \\ and "sha256":"' + "0" * 64 + '"',
        "unicode": "ξ²",
        "nested": {"list": [1, 2.5, None, True]},
    }
    save(tmp_path / "model", SMALL, settings=given)
    assert read_settings(tmp_path / "model") == given
    assert all_bits(load(tmp_path / "model", LIKE)) == all_bits(SMALL)
    save(tmp_path / "bare", SMALL)
    assert read_settings(tmp_path / "bare") == {}


def template(width: int, kind: str, shape: list[int]) -> dict:
    del width, kind
    return {"w": jnp.zeros(shape), "n": jnp.zeros(2, int)}


def test_a_model_is_built_from_its_settings(tmp_path):
    path = tmp_path / "model"
    save(path, SMALL, settings=SETTINGS)
    assert all_bits(build_and_load(path, template)) == all_bits(SMALL)
    save(path, SMALL, settings=SETTINGS | {"shape": [4]})
    with pytest.raises(CheckpointError, match=r"\['w'\]"):
        build_and_load(path, template)


def test_a_builder_that_does_not_take_the_settings_is_named(tmp_path):
    path = tmp_path / "model"
    for settings, what in [
        ({"kind": "plain"}, "missing a required argument: 'width'"),
        (SETTINGS | {"colour": "red"}, "unexpected keyword argument 'colour'"),
    ]:
        save(path, SMALL, settings=settings)
        with pytest.raises(CheckpointError, match=re.escape(what)) as caught:
            build_and_load(path, template)
        assert "expected template to take" in str(caught.value)


def test_an_error_inside_a_builder_is_its_own(tmp_path):
    """A mistake in the builder's code is not blamed on the file."""

    def broken(**_):
        raise TypeError("my mistake")

    save(tmp_path / "model", SMALL, settings=SETTINGS)
    with pytest.raises(TypeError, match="my mistake"):
        build_and_load(tmp_path / "model", broken)
