"""Weight files and indexes as strangers write them: read as their header says, or one sentence; no other file is read.

`safetensors` itself is the oracle for what a header means.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from finetune.checkpoint.finite import all_finite
from finetune.checkpoint.header import Stored
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.shards import INDEX, Checkpoint, open_checkpoint, read_header
from finetune.checkpoint.weights import from_pretrained
from tests.configs import CONFIGS
from tests.tiny_checkpoints import save_released, transformers_model

EXPERT = "model.layers.3.mlp.experts.5.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of weights; never written to."""
    folder = tmp_path_factory.mktemp("checkpoints") / "released"
    return save_released(transformers_model(CONFIGS["base"]), folder, shard="1GB", mtp=False)


@pytest.fixture
def base(released: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(released, tmp_path / "base"))


def change(folder: Path, name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = make(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder, dtype=torch.float32)
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 1000
    return told


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_floating_point_weights_are_cast(base: Path, dtype: torch.dtype) -> None:
    change(base, EXPERT, lambda tensor: tensor.to(dtype))
    expected = load_file(base / "model.safetensors")[EXPERT].float()
    loaded = from_pretrained(base, dtype=torch.float32).model.layers[3].mlp.experts.gate_up_proj[5, 16:]
    assert torch.equal(loaded, expected)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.int64, "I64"),
        (torch.complex64, "C64"),
    ],
)
def test_other_dtypes_are_refused_with_tensor_and_file(base: Path, dtype: torch.dtype, stored: str) -> None:
    for name in (EXPERT, "model.layers.0.linear_attn.A_log"):
        change(base, name, lambda tensor: tensor.to(dtype))
    told = refusal(base)
    assert told.startswith(f"{base}: 2 tensors hold {stored}, which does not train; ")
    assert f"{EXPERT} (in model.safetensors: {stored})" in told
    assert ("float8 needs its scales" in told) == stored.startswith("F8")


def test_float8_is_told_before_the_scales_that_are_unknown(base: Path) -> None:
    change(base, EXPERT, lambda tensor: tensor.to(torch.float8_e4m3fn))
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, f"{EXPERT}_scale_inv": torch.ones(1)}, base / "model.safetensors")
    assert "1 tensors hold F8_E4M3, which does not train; float8 needs its scales" in refusal(base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "place"),
    [(EXPERT, (3, 7)), (EMBEDDING, (95, 31)), ("model.layers.0.linear_attn.A_log", (2,)), ("model.norm.weight", (0,))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_is_not_finite_is_named(
    base: Path, name: str, place: tuple[int, ...], value: float, dtype: torch.dtype
) -> None:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(dtype)
        tensor[place] = value
        return tensor

    change(base, name, put)
    count = load_file(base / "model.safetensors")[name].numel()
    assert refusal(base) == (
        f"{base}: holds numbers that are infinite or undefined in float32: {name} (in model.safetensors: 1 of {count:,}"
        f" numbers, the first at {list(place)}); download these files again, or use a checkpoint without such numbers"
    )


def test_numbers_that_the_dtype_of_the_run_cannot_hold_are_named(base: Path) -> None:
    change(base, "model.norm.weight", lambda tensor: torch.full_like(tensor.double(), 1e200))
    assert "infinite or undefined in float32: model.norm.weight (in model.safetensors: 32 of 32 numbers" in refusal(
        base
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_that_overflows_is_no_infinite_number(dtype: torch.dtype) -> None:
    large = torch.full((1000, 7), torch.finfo(dtype).max, dtype=dtype)
    assert not large.sum().isfinite()
    assert all_finite(large)
    large[999, 6] = float("nan")
    assert not all_finite(large)
    assert not all_finite(torch.tensor([float("inf"), float("-inf")], dtype=dtype))
    assert all_finite(torch.empty(0, dtype=dtype))


def test_a_rank_names_what_it_reads_itself(base: Path) -> None:
    change(base, EXPERT, lambda tensor: tensor.fill_(float("nan")))
    from_pretrained(base, dtype=torch.float32, experts=range(4))
    with pytest.raises(CheckpointError, match=r"experts\.5\.up_proj\.weight \(in .*: 512 of 512 numbers, the first"):
        from_pretrained(base, dtype=torch.float32, experts=range(4, 8))


# ------------------------------------------------------------------------------------------------------ index


def split(base: Path, files: dict[str, str]) -> None:
    """Cut the one file into several, with an index; `files` gives the file of each tensor, by default `rest`."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    places = {name: files.get(name, "rest.safetensors") for name in tensors}
    for file in set(places.values()):
        (base / file).parent.mkdir(exist_ok=True)
        save_file({name: tensors[name] for name in tensors if places[name] == file}, base / file)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def edit_index(base: Path, **places: str) -> None:
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] |= places
    (base / INDEX).write_text(json.dumps(index))


def test_files_of_one_name_in_two_folders_are_two_files(base: Path) -> None:
    """Headers of one with values of the other would be training on another model."""
    expected = load_file(base / "model.safetensors")
    gates = [f"model.layers.{layer}.mlp.experts.0.gate_proj.weight" for layer in range(4)]
    split(base, {gates[0]: "m.safetensors", gates[1]: "sub/m.safetensors", gates[2]: "other/m.safetensors"})
    checkpoint = open_checkpoint(base)
    assert {checkpoint.tensors[name].file for name in gates} == {
        *("m.safetensors", "sub/m.safetensors", "other/m.safetensors", "rest.safetensors")
    }
    for name in gates:
        assert torch.equal(checkpoint.read(name), expected[name])
    loaded = from_pretrained(base, dtype=torch.float32)
    for layer, name in enumerate(gates):
        assert torch.equal(loaded.model.layers[layer].mlp.experts.gate_up_proj[0, :16], expected[name])


@pytest.mark.parametrize(
    "file",
    [
        *(
            "../m.safetensors",
            "sub/../../m.safetensors",
            "sub/../m.safetensors",
            "./m.safetensors",
            "sub//m.safetensors",
        ),
        *("sub/", "", ".", "..", "m.safe\ntensors", "m\0.safetensors", "ABSOLUTE"),
    ],
)
def test_an_index_reads_no_file_outside_its_folder(base: Path, tmp_path: Path, file: str) -> None:
    split(base, {EXPERT: "m.safetensors"})
    (base / "sub").mkdir()
    for place in (tmp_path / "m.safetensors", base / "sub/m.safetensors"):
        shutil.copy(base / "m.safetensors", place)
    file = file.replace("ABSOLUTE", str(base / "m.safetensors"))
    edit_index(base, **{EXPERT: file})
    told = refusal(base)
    assert told.startswith(f"{base}/{INDEX}: not an index of weights (it says that {EXPERT} is in {file!r}, but only")


def test_links_may_leave_the_folder(base: Path, tmp_path: Path) -> None:
    """A hub cache: every file of a snapshot is a link to a blob beside it."""
    split(base, {EXPERT: "m.safetensors"})
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(tmp_path / f"blobs/{number}")
        path.symlink_to(f"../blobs/{number}")
    from_pretrained(base, dtype=torch.float32)


def test_a_tensor_in_two_files_is_named(base: Path) -> None:
    split(base, {EXPERT: "m.safetensors"})
    again = load_file(base / "rest.safetensors") | load_file(base / "m.safetensors")
    save_file(again, base / "rest.safetensors")
    assert f"rest.safetensors: holds {EXPERT} (in m.safetensors), for which {INDEX} names another file" in refusal(base)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"[]", "not an index of weights (no readable `weight_map`)"),
        (b'{"weight_map": []}', "not an index of weights (no readable `weight_map`)"),
        (b'{"weight_map": {}}', "not an index of weights (no readable `weight_map`)"),
        (b'{"weight_map": {"a": 1}}', "not an index of weights (no readable `weight_map`)"),
        (b'{"weight_map": {"a\\n": "m"}}', "not an index of weights (a tensor has the name 'a\\n')"),
        (b'{"weight_map": {"a": "rest.safetensors"}}', "holds lm_head.weight, model.embed_tokens.weight"),
        (b'{"weight_map": {"a": "sub"}}', "sub: is a folder, not a regular file"),
        (b'{"weight_map": {"a": "' + b"n" * 300 + b'"}}', f"no such file, but {INDEX} names it"),
        (b'{"a":' * 50_000, "nested more than 100 deep; an index of weights is expected"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds a number of 5,000 digits"),
        (b'{"a": "\xff"}', ":1: not UTF-8"),
    ],
)
def test_an_index_that_is_none_is_one_sentence(base: Path, contents: bytes, message: str) -> None:
    split(base, {})
    (base / "sub").mkdir()
    (base / INDEX).write_bytes(contents)
    assert message in refusal(base)


@pytest.mark.parametrize("file", ["model.safetensors", INDEX, "rest.safetensors"])
def test_what_is_no_regular_file_is_named_at_once(base: Path, file: str) -> None:
    split(base, {})
    for make, kind in (
        (os.mkfifo, "a FIFO"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
        (os.mkdir, "a folder"),
    ):
        path = base / file
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        make(path)
        assert f"{path}: is {kind}, not a regular file" in refusal(base)
    (base / file).rmdir()
    (base / file).symlink_to("gone")
    assert f"{base / file}: no such file" in refusal(base)


# ----------------------------------------------------------------------------------------------------- header


def write(path: Path, header: Any, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(start: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "(header:1:2: not JSON"),
        ([], "(its header is not an object)"),
        ({"a": 1}, "(a is not described by an object)"),
        ({"a": {}}, "(a has no dtype)"),
        ({"a": tensor(dtype=["F32"])}, "(a has no dtype)"),
        ({"a": tensor(dtype="F\n32")}, "(a has no dtype)"),
        ({"a": tensor(shape=[-4])}, "(a has no shape of whole numbers)"),
        ({"a": tensor(shape=[4.0])}, "(a has no shape of whole numbers)"),
        ({"a": tensor(shape=[True] * 4)}, "(a has no shape of whole numbers)"),
        ({"a": tensor(shape=[1] * 100_000)}, "(a has no shape of whole numbers)"),
        ({"a": {**tensor(), "shape": None}}, "(a has no shape of whole numbers)"),
        ({"a": {**tensor(), "data_offsets": [0]}}, "(a has no two offsets)"),
        ({"a": {**tensor(), "data_offsets": "016"}}, "(a has no two offsets)"),
        ({"a": tensor(16, 0)}, "(a does not begin where the tensor before it ends)"),
        ({"a": tensor(-16, 0)}, "(a has no two offsets)"),
        ({"a": tensor(0, 8, [2]), "b": tensor(4, 16, [3])}, "(b does not begin where the tensor before it ends)"),
        ({"a": tensor(0, 4, [1]), "b": tensor(8, 16, [2])}, "(b does not begin where the tensor before it ends)"),
        ({"a": tensor(shape=[5])}, "(a is 16 bytes, which is not [5] of F32)"),
        ({"a": tensor(shape=[2**62, 2**62])}, "(a is 16 bytes, which is not ["),
        ({"a\n": tensor()}, r"(a tensor has the name 'a\n')"),
        ({"a" * 501: tensor()}, "(a tensor has the name 'aaaaaaa"),
        (b'{"a": {}, "a": {}}', "(header: has the key 'a' twice)"),
        (b'{"a":' * 100_000, "(header: nested more than 100 deep)"),
        (b'{"a": ' + b"1" * 5000 + b"}", "(header: holds a number of 5,000 digits"),
        (b'{"\xff": {}}', "(header:1: not UTF-8"),
        (b"", "(header:1:1: not JSON"),
        ({"a": tensor(0, 8, [2])}, " bytes, but its header describes "),
    ],
)
def test_a_header_that_describes_no_tensors_is_one_sentence(tmp_path: Path, header: Any, message: str) -> None:
    path = write(tmp_path / "m.safetensors", header)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    told = str(caught.value)
    assert told.startswith(f"{path}: ")
    assert message in told
    assert "\n" not in told


def test_a_header_is_never_longer_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for contents in (b"", b"1234567", (2**63).to_bytes(8, "little"), (9).to_bytes(8, "little") + b"{}      "):
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match=r"m\.safetensors: not a safetensors file \(it"):
            read_header(path)


SAMPLE = json.dumps({"__metadata__": {"format": "pt"}, "a": tensor(0, 8, [1, 2]), "b": tensor(8, 16, [2])}).encode()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, len(SAMPLE)),
    st.integers(0, 3),
    st.binary(max_size=3) | st.sampled_from([b"0", b"9", b"[", b'"', b"e9"]),
)
@example(0, 0, b"")
def test_a_damaged_header_means_what_safetensors_makes_of_it_or_is_refused(
    tmp_path: Path, place: int, removed: int, inserted: bytes
) -> None:
    path = write(tmp_path / "m.safetensors", SAMPLE[:place] + inserted + SAMPLE[place + removed :])
    try:
        found: dict[str, Stored] = read_header(path)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return
    try:
        with safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) == set(found)
            for name, stored in found.items():
                read = Checkpoint(tmp_path, found).read(name)
                assert tuple(theirs.get_slice(name).get_shape()) == stored.shape
                assert torch.equal(theirs.get_tensor(name).view(torch.uint8), read.view(torch.uint8))
    except SafetensorError:
        pass  # it is stricter about what follows, which does no harm here
    except CheckpointError:
        assert {stored.dtype for stored in found.values()} != {"F32"}
