"""Damaged safetensors and GGUF files: typed errors that name what and where; nothing is half-written."""

import json
import struct
from pathlib import Path

import checkpoint_cases as cases
import gguf
import numpy as np
import pytest
from checkpoint_cases import fail_to_convert, truncate

from jaxzip.errors import CheckpointError, CorruptDataError


@pytest.fixture
def weights(tmp_path):
    return cases.write_two_tensors(tmp_path / "w.safetensors")


def test_safetensors_truncated(weights):
    truncate(weights)
    fail_to_convert(weights, CorruptDataError, "w.safetensors: .* ends at byte .* truncated")
    weights.write_bytes(weights.read_bytes()[:5])
    fail_to_convert(weights, CorruptDataError, "w.safetensors: the header needs")


def rewrite_header(file: Path, change) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("offsets", [[8000, 1 << 40], [-16, 8176], [4, 8196], [0, 12]])
def test_safetensors_offsets_pointing_outside(weights, offsets):
    rewrite_header(weights, lambda header: header["a.weight"].update(data_offsets=offsets))
    fail_to_convert(weights, CorruptDataError, "w.safetensors: (a.weight|b) ")


def test_safetensors_header_corrupt(weights):
    cases.flip_bit(weights, 8)
    fail_to_convert(weights, CorruptDataError, "header is corrupt")


def test_safetensors_unknown_dtype(weights):
    rewrite_header(weights, lambda header: header["b"].update(dtype="Q7"))
    fail_to_convert(weights, CheckpointError, "b has dtype Q7")


def test_safetensors_shard_missing(tmp_path):
    cases.write_llama(tmp_path / "hf")
    (tmp_path / "hf" / "model-00002-of-00002.safetensors").unlink()
    fail_to_convert(tmp_path / "hf", CheckpointError, "model-00002-of-00002.safetensors is missing")


def test_gguf_truncated_and_corrupt(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + b"\xff" * 40)
    fail_to_convert(file, CorruptDataError, "m.gguf is no readable GGUF")


def write_gguf(path: Path, **options) -> None:
    writer = gguf.GGUFWriter(path, "foo", **options)
    for name in ("a", "b", "c"):
        writer.add_tensor(name, np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_of_the_other_byte_order(tmp_path):
    write_gguf(tmp_path / "m.gguf", endianess=gguf.GGUFEndian.BIG)
    fail_to_convert(tmp_path / "m.gguf", CheckpointError, "m.gguf is not in this machine's byte order .*convert-endian")


def test_gguf_in_several_files(tmp_path):
    write_gguf(tmp_path / "m.gguf", split_max_tensors=1)
    for number in (1, 2, 3):
        file = tmp_path / f"m-0000{number}-of-00003.gguf"
        fail_to_convert(file, CheckpointError, f"{file.name} is file {number} of the 3 .*llama-gguf-split --merge")
