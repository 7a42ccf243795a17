"""Reads GGUF files: Llama models into the tree of ``jaxzip.models``, quantised blocks decoded one tensor at a time."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxzip.checkpoint import hf_names
from jaxzip.checkpoint.source import BF16, TensorInfo, dict_leaf, dotted_paths
from jaxzip.checkpoint.tree_metadata import Leaf
from jaxzip.errors import CheckpointError, CorruptDataError
from jaxzip.tensor import TABLE_AXIS

_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BF16, "F64": np.dtype(np.float64)}
_PLAIN |= {f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)}
_SLAB_ELEMENTS = 4 << 20


class GgufSource:
    """One GGUF file.

    In a file with quantised tensors everything becomes bf16: blocks are decoded to fp32 and rounded to nearest even,
    and so are its fp32 norms, because the model that comes out is a bf16 model. Of a Llama in BF16, whose norms are
    F32 in GGUF, only those vectors are rounded. The metadata says so. Everything else passes through as it is. The rows
    of q and k, which llama.cpp permutes for its rotary embedding, are put back into Hugging Face's order. Tensors of
    other architectures, and of Llamas with experts, keep their own names.
    """

    kind = "gguf"
    custom_metadata = None

    def __init__(self, path: Path):
        import gguf

        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError) as error:
            raise CorruptDataError(
                f"{path} is no readable GGUF file ({error}); it is truncated or corrupt, get it again"
            ) from None
        self._fields = _Fields(self._reader)
        self._check_whole()
        # Mixtral is a "llama" there, too.
        experts = self._fields.get("llama.expert_count", 0)
        self._llama = self._fields.get("general.architecture") == "llama" and not experts
        self._tensors = {}
        size, types = path.stat().st_size, set()
        for tensor in self._reader.tensors:
            kind = gguf.GGMLQuantizationType(tensor.tensor_type).name
            if tensor.data_offset + int(tensor.n_bytes) > size:
                raise CorruptDataError(
                    f"{path}: {tensor.name} ends at byte {tensor.data_offset + int(tensor.n_bytes)}, the "
                    f"file has {size}; "
                    "it is truncated, get it again"
                )
            self._tensors[tensor.name] = (tensor, kind)
            types.add(kind)
        quantised = sorted(types - set(_PLAIN))
        self._derived = None
        if quantised:
            self._derived = f"dequantised from {'/'.join(quantised)}, rounded to bf16"
        elif self._llama and {"BF16", "F32"} <= types:
            self._derived = "F32 vectors rounded to bf16"
        self._quantised = bool(quantised)
        self._paths = self._tree_paths()
        self._infos = tuple(self._info(tensor, kind) for tensor, kind in self._tensors.values())
        self.hf_config = hf_config(self._fields, self._tensors) if self._llama else None
        self.notes = (self._derived,) if self._derived else ()
        self.extra_files = self._tokenizer()

    def _check_whole(self) -> None:
        """Refuses a file in the other byte order, and one of a model's several."""
        if self._reader.byte_order == "S":
            raise CheckpointError(
                f"{self.path} is not in this machine's byte order ({sys.byteorder}-endian); "
                f"change a copy of it with gguf-convert-endian COPY {sys.byteorder} and convert that"
            )
        count = int(self._fields.get("split.count", 1))
        if count > 1:
            raise CheckpointError(
                f"{self.path} is file {int(self._fields.get('split.no', 0)) + 1} of the {count} that the model is "
                "split into; merge them with llama-gguf-split --merge FIRST MERGED and convert that"
            )

    def tensors(self) -> tuple[TensorInfo, ...]:
        return self._infos

    def other_leaves(self) -> tuple[Leaf, ...]:
        return ()

    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, info: TensorInfo) -> np.ndarray:
        tensor, kind = self._tensors[info.source_name]
        # Not the reader's memory map: its pages would count as this process's memory.
        raw = np.fromfile(self.path, np.uint8, int(tensor.n_bytes), offset=tensor.data_offset)
        if raw.size != int(tensor.n_bytes):
            raise CorruptDataError(f"{self.path}: {tensor.name} is truncated; get the file again")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        array = self._decode(raw, shape, kind)
        heads = self._permuted_heads(tensor.name)
        if heads:
            array = unpermute_rows(array, heads)
        return array.swapaxes(-1, -2) if self._transposed(tensor) else array

    def _decode(self, raw: np.ndarray, shape: tuple[int, ...], kind: str) -> np.ndarray:
        if kind in _PLAIN:
            array = raw.view(_PLAIN[kind]).reshape(shape)
            return array.astype(BF16) if self._rounds(kind, len(shape)) else array
        import gguf

        rows = raw.reshape(int(np.prod(shape[:-1])), -1)
        out = np.empty((rows.shape[0], shape[-1]), BF16)
        step = max(1, _SLAB_ELEMENTS // shape[-1])
        for start in range(0, rows.shape[0], step):
            try:
                block = gguf.quants.dequantize(rows[start : start + step], gguf.GGMLQuantizationType[kind])
            except NotImplementedError:
                raise CheckpointError(
                    f"{self.path}: the gguf package cannot decode {kind}; upgrade it or use another file"
                ) from None
            out[start : start + step] = block.reshape(-1, shape[-1])
        return out.reshape(shape)

    def _info(self, tensor, kind: str) -> TensorInfo:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if self._transposed(tensor):
            shape = shape[::-1]
        rounds = kind not in _PLAIN or self._rounds(kind, len(shape))
        dtype = BF16 if rounds else _PLAIN[kind]
        axis, path = None, self._paths[tensor.name]
        if len(shape) >= 2:
            axis = hf_names.output_axis(path) if self._known(tensor.name) else TABLE_AXIS
        derived = self._derived if rounds else None
        return TensorInfo(dict_leaf(path), shape, dtype, axis, tensor.name, derived)

    def _rounds(self, kind: str, ndim: int) -> bool:
        """Whether a tensor that is not quantised becomes bf16."""
        return kind in ("F16", "F32", "F64") and self._derived is not None and (self._quantised or ndim == 1)

    def _transposed(self, tensor) -> bool:
        path = self._known(tensor.name)
        return path is not None and len(tensor.shape) == 2 and hf_names.is_kernel(path)

    def _known(self, name: str) -> tuple[str, ...] | None:
        """Path of a Llama's tensor in the model's tree, or ``None``."""
        name = hf_names.hf_name(name) if self._llama else None
        return None if name is None else hf_names.tree_path(name)

    def _tree_paths(self) -> dict[str, tuple[str, ...]]:
        known = {name: path for name in self._tensors if (path := self._known(name)) is not None}
        return known | dotted_paths(self._tensors.keys() - known.keys(), known.values())

    def _permuted_heads(self, name: str) -> int:
        if not self._llama or not name.startswith("blk."):
            return 0
        heads = _whole(self._fields, "llama.attention.head_count")
        if ".attn_q." in name:
            return heads
        return _whole(self._fields, "llama.attention.head_count_kv", heads) if ".attn_k." in name else 0

    def _tokenizer(self) -> dict[str, bytes]:
        """The file's own tokenizer as tokenizer.json, or where that cannot be expressed, the one beside the file."""
        problem = "the GGUF file has no tokenizer"
        if "tokenizer.ggml.tokens" in self._reader.fields:
            try:
                from jaxzip.models.tokenizer_gguf import tokenizer_json_from_gguf

                return {"tokenizer.json": tokenizer_json_from_gguf(self._reader).encode()}
            except ImportError:
                problem = "jaxzip.models is not installed"
            except (NotImplementedError, ValueError, KeyError, IndexError, TypeError) as error:
                problem = str(error)
        beside = self.path.parent / "tokenizer.json"
        if beside.is_file():
            self.notes += (f"tokenizer.json is the one beside the file: {problem}",)
            return {"tokenizer.json": beside.read_bytes()}
        if self._llama:
            self.notes += (f"no tokenizer.json: {problem}; put the model's beside the file and convert it again",)
        return {}


class _Fields(Mapping):
    """A GGUF file's metadata as a mapping of plain values."""

    def __init__(self, reader):
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].contents()

    def __iter__(self):
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def unpermute_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows of q and k, which interleaves the two halves of each head."""
    rows = array.shape[0]
    pairs = array.reshape(heads, rows // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _whole(fields: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of the metadata, or what all layers have in a list of one for each.

    Raises:
      CheckpointError: it is something else, or missing with no default.
    """
    found = fields.get(key, default)
    if found is None:
        raise CheckpointError(f"the GGUF file has no {key!r}; it is no complete Llama model, get another file")
    value = found[0] if isinstance(found, list) and len(set(found)) == 1 else found
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"the GGUF file has {key} {found!r}, expected a positive integer, the same for all layers; it is no Llama "
            "model, get another file"
        )
    return value


def hf_config(fields: Mapping[str, Any], tensor_names: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama's configuration in the terms of Hugging Face's config.json.

    Raises:
      CheckpointError: a key that every Llama has is missing, or the rotary embedding is one that cannot be expressed.
    """

    def decimal(key: str, default: float | None = None) -> float | None:
        # GGUF holds float32; the shortest decimal that rounds to it is what the model's author wrote.
        return default if key not in fields else float(str(np.float32(fields[key])))

    heads, hidden = _whole(fields, "llama.attention.head_count"), _whole(fields, "llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _whole(fields, "llama.feed_forward_length"),
        "num_hidden_layers": _whole(fields, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(fields, "llama.attention.head_count_kv", heads),
        "head_dim": _whole(fields, "llama.attention.key_length", hidden // heads),
        "max_position_embeddings": _whole(fields, "llama.context_length"),
        "rms_norm_eps": decimal("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": decimal("llama.rope.freq_base", 10000.0),
    }
    if "rope_freqs.weight" in tensor_names:
        raise CheckpointError(
            "the GGUF file has rope_freqs (Llama 3.1 rotary scaling), which GGUF stores without its parameters; "
            "convert the model's safetensors instead"
        )
    if fields.get("llama.rope.scaling.type", "none") != "none":
        factor = decimal("llama.rope.scaling.factor", 1.0)
        config["rope_scaling"] = {"rope_type": fields["llama.rope.scaling.type"], "factor": factor}
    config["tie_word_embeddings"] = "output.weight" not in tensor_names
    config["vocab_size"] = int(fields.get("llama.vocab_size", 0)) or len(fields["tokenizer.ggml.tokens"])
    for name in ("bos", "eos"):
        if f"tokenizer.ggml.{name}_token_id" in fields:
            config[f"{name}_token_id"] = int(fields[f"tokenizer.ggml.{name}_token_id"])
    config["torch_dtype"] = "bfloat16"
    return config
