"""Broken files, each by its defect, with the error and the words that it is refused with; None where it is read."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bntool.errors import BntoolError, CorruptFileError, UnknownFormatError, UnsafeFileError
from tests.checkpoints.foreign import write_zip
from tests.checkpoints.samples import tiny_net

# building blocks


def make_archive(pickle_bytes: bytes, records: dict[str, bytes] | None = None, *, deflate: bool = False) -> bytes:
    """A torch archive around a pickle, with one storage of 16 bytes unless told otherwise."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("m/data.pkl", pickle_bytes)
        for name, data in ({"data/0": bytes(16)} if records is None else records).items():
            archive.writestr(f"m/{name}", data)
    return buffer.getvalue()


def _script(records: dict[str, bytes] | None = None) -> bytes:
    """A TorchScript archive of one module with one buffer."""
    text = b'class M(Module):\n  __buffers__ = ["a.weight", ]\n'
    module = b"\x80\x02c__torch__\nM\n)\x81" + make_tensor()[2:-1] + b"b."
    return make_archive(module, {"constants.pkl": b"\x80\x02).", "code/__torch__.py": text, **(records or {})})


def _export(config: str) -> bytes:
    """A torch.export archive with one weight of 16 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/data/weights/model_weights_config.json", config)
        archive.writestr("m/data/weights/weight_0", bytes(16))
    return buffer.getvalue()


def _weight(path_name: str = "weight_0", **changes: Any) -> str:
    meta = {"dtype": 7, "sizes": [{"as_int": 4}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}}
    entry = {"path_name": path_name, "is_param": True, "use_pickle": False}
    return json.dumps({"config": {"a.weight": {**entry, "tensor_meta": {**meta, "layout": 7, **changes}}}})


def make_legacy(pickle_bytes: bytes, keys: Any = ("0",), tail: bytes = struct.pack("<q", 4) + bytes(16)) -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    parts = [pickle.dumps(part, 2) for part in head]
    return b"".join([*parts, pickle_bytes, pickle.dumps(list(keys), 2), tail])


_ROOT = b"\x80\x02}X\x08\x00\x00\x00a.weight"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def make_tensor(
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    *,
    count: int = 4,
    storage: str = "FloatStorage",
    key: str = "0",
    raw_shape: bytes | None = None,
) -> bytes:
    """A pickle of {"a.weight": tensor}."""
    reference = (
        b"("
        + _text("storage")
        + b"ctorch\n"
        + storage.encode()
        + b"\n"
        + _text(key)
        + _text("cpu")
        + _number(count)
        + b"tQ"
    )
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + _number(offset) + (raw_shape or _numbers(shape))
    return _ROOT + call + _numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtRs."


def make_safetensors(header: Any, data: bytes = bytes(16), *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def make_entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _valid_archive(folder: Path) -> bytes:
    return write_zip(tiny_net().state_dict(), folder).read_bytes()


def _patched(data: bytes, where: int, new: bytes) -> bytes:
    return data[:where] + new + data[where + len(new) :]


def _central(data: bytes, name: bytes) -> int:
    """Where the entry of a record begins in the directory."""
    position = data.find(b"PK\x01\x02")
    while data[position + 46 : position + 46 + len(name)] != name:
        position = data.find(b"PK\x01\x02", position + 1)
    return position


def _duplicate_record() -> bytes:
    data = make_archive(make_tensor(), {"data/0": bytes(16), "data/1": bytes(16)})
    return data.replace(b"m/data/1", b"m/data/0")


def _overlapping_records() -> bytes:
    data = make_archive(make_tensor(), {"data/0": bytes(16), "data/1": bytes(16)})
    first = struct.unpack_from("<I", data, _central(data, b"m/data/0") + 42)[0]
    inner = data.replace(b"PK\x03\x04", b"PK\x03\x04")
    # the second record's entry points into the data of the first, where a local header is planted
    planted = data[data.rfind(b"PK\x03\x04") :][: 30 + len("m/data/1")]
    records = {"data/0": planted + bytes(40), "data/1": bytes(16)}
    data = make_archive(make_tensor(), records)
    start = struct.unpack_from("<I", data, _central(data, b"m/data/0") + 42)[0] + 30 + len("m/data/0")
    assert first >= 0
    assert inner
    return _patched(data, _central(data, b"m/data/1") + 42, struct.pack("<I", start))


def _name_mismatch() -> bytes:
    data = make_archive(make_tensor())
    return _patched(data, data.find(b"m/data/0"), b"m/data/9")


def _size_mismatch() -> bytes:
    data = make_archive(make_tensor())
    return _patched(data, data.rfind(b"PK\x03\x04") + 22, struct.pack("<I", 15))


def _wrong_checksum() -> bytes:
    data = bytearray(make_archive(make_tensor()))
    data[data.find(b"_rebuild")] ^= 1
    return bytes(data)


def _deflated_bomb() -> bytes:
    return make_archive(make_tensor(count=1 << 24, shape=(1 << 24,)), {"data/0": bytes(1 << 26)}, deflate=True)


def _lying_deflated_size() -> bytes:
    data = make_archive(make_tensor() + bytes(5000), deflate=True)
    where = _central(data, b"m/data.pkl") + 24
    data = _patched(data, where, struct.pack("<I", 100))
    return _patched(data, data.find(b"PK\x03\x04") + 22, struct.pack("<I", 100))


def _encrypted() -> bytes:
    data = make_archive(make_tensor())
    return _patched(data, _central(data, b"m/data/0") + 8, b"\x01\x00")


def _hidden_entry() -> bytes:
    data = make_archive(make_tensor())
    end = data.rfind(b"PK\x05\x06")
    return _patched(data, end + 8, struct.pack("<HH", 1, 1))


def _nested(opening: bytes, depth: int, closing: bytes) -> bytes:
    return b"\x80\x02" + opening * depth + b"N" + closing * depth + b"."


def _tuple_bomb() -> bytes:
    return b"\x80\x02K\x01" + b"2\x86" * 5000 + b"."


def _shape_bomb() -> bytes:
    return make_tensor(shape=(1 << 62,) * 60, strides=(0,) * 60)


def _module_bomb(width: int = 12, depth: int = 30) -> bytes:
    """Modules that each hold the next one many times: exponentially many paths."""
    opening = b"ctorch.nn\nModule\n)\x81}(" + _text("_parameters") + b"}" + _text("_modules") + b"}"
    inner = opening + b"ub"
    for _ in range(depth):
        names = b"".join(_text(f"m{i}") + b"h\x00" for i in range(width))
        inner = inner + b"q\x000" + opening[:-1] + b"}(" + names + b"uub"
    return b"\x80\x02" + inner + b"."


def _self_containing_tensor() -> bytes:
    rebuild = b"ctorch._utils\n_rebuild_parameter\n("
    return _ROOT + rebuild * 30_000 + b"N" + b"\x88NtR" * 30_000 + b"s."


def _subclass_in_subclass() -> bytes:
    function = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    call = function + (b"(" + function + b"ctorch\nTensor\n") * 30_000 + b")" + b"}t" * 30_000 + b"R"
    return _ROOT + call + b"s."


def _many_states_share_a_mapping() -> bytes:
    """Ten thousand objects with one state of ten thousand entries: a hundred million steps for the careless."""
    state = b"}(" + b"".join(_text(f"k{i}") + b"N" for i in range(10_000)) + b"uq\x000"
    instance = b"cx\ny\n)\x81h\x00b"
    return b"\x80\x02" + state + b"](" + (b"](" + instance * 100 + b"e") * 100 + b"e."


def _wrap(make: Callable[[], bytes]) -> Callable[[], bytes]:
    return lambda: make_archive(make())


def _two_pickles() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", make_tensor())
        archive.writestr("b/data.pkl", make_tensor())
    return buffer.getvalue()


def make_index(weight_map: Any, **more: Any) -> bytes:
    return json.dumps({"weight_map": weight_map, **more}).encode()


# name of the file: (its bytes, the error, words of its message); None where it may be read all the same
Case = tuple[Callable[[], bytes], type[BntoolError] | None, str]
BROKEN: dict[str, Case] = {
    # zip archives
    "zip_without_directory.pt": (lambda: make_archive(make_tensor())[:-30], CorruptFileError, "directory is missing"),
    "zip_of_other_things.pt": (
        lambda: _rename(make_archive(make_tensor()), b"data.pkl", b"else.txt"),
        UnknownFormatError,
        "a zip archive, but it holds none of the formats",
    ),
    "zip_with_two_pickles.pt": (
        lambda: make_archive(make_tensor(), {"data/0": bytes(16), "../n/data.pkl": b"N."}),
        None,
        "",
    ),
    "zip_with_two_top_pickles.pt": (_two_pickles, CorruptFileError, "more than one data.pkl"),
    "zip_with_data_pkl_twice.pt": (
        lambda: make_archive(make_tensor(), {"data/0": bytes(16), "data.pk2": b"N."}).replace(b"data.pk2", b"data.pkl"),
        CorruptFileError,
        "two records",
    ),
    "zip_with_unknown_byte_order.pt": (
        lambda: make_archive(make_tensor(), {"data/0": bytes(16), "byteorder": b"middle"}),
        CorruptFileError,
        "byteorder",
    ),
    "zip_with_duplicate_record.pt": (_duplicate_record, CorruptFileError, "two records"),
    "zip_with_overlapping_records.pt": (_overlapping_records, CorruptFileError, "overlap"),
    "zip_local_name_differs.pt": (_name_mismatch, CorruptFileError, "disagree"),
    "zip_local_size_differs.pt": (_size_mismatch, CorruptFileError, "disagree"),
    "zip_with_bad_checksum_of_pickle.pt": (_wrong_checksum, CorruptFileError, "checksum"),
    "zip_deflated_bomb.pt": (_deflated_bomb, UnsafeFileError, "claims to inflate"),
    "zip_deflated_with_false_size.pt": (_lying_deflated_size, CorruptFileError, "another size"),
    "zip_encrypted.pt": (_encrypted, CorruptFileError, "encrypted"),
    "zip_with_uncounted_record.pt": (_hidden_entry, CorruptFileError, "more than it counts"),
    "zip_with_tail.pt": (lambda: make_archive(make_tensor()) + b"tail", CorruptFileError, "bytes follow"),
    "torchscript_storage_missing.pt": (_script, CorruptFileError, "missing"),
    "torchscript_storage_short.pt": (lambda: _script({"data/0": bytes(15)}), CorruptFileError, "15 bytes"),
    "pt2_without_weights.pt2": (lambda: _export('{"config": []}'), CorruptFileError, "malformed"),
    "pt2_with_nan.pt2": (lambda: _export('{"config": NaN}'), CorruptFileError, "not valid JSON"),
    "pt2_storage_missing.pt2": (lambda: _export(_weight(path_name="weight_1")), CorruptFileError, "no elements"),
    "pt2_out_of_bounds.pt2": (lambda: _export(_weight(sizes=[{"as_int": 5}])), CorruptFileError, "needs 20 bytes"),
    "pt2_negative_size.pt2": (lambda: _export(_weight(sizes=[{"as_int": -4}])), CorruptFileError, "malformed"),
    "pt2_unknown_dtype.pt2": (lambda: _export(_weight(dtype=99)), CorruptFileError, "not known"),
    "storage_missing.pt": (lambda: make_archive(make_tensor(), {}), CorruptFileError, "missing"),
    "storage_too_short.pt": (lambda: make_archive(make_tensor(), {"data/0": bytes(15)}), CorruptFileError, "15 bytes"),
    # tensors
    "tensor_shape_out_of_bounds.pt": (
        lambda: make_archive(make_tensor(shape=(5,))),
        CorruptFileError,
        "needs 20 bytes",
    ),
    "tensor_offset_out_of_bounds.pt": (lambda: make_archive(make_tensor(offset=1)), CorruptFileError, "needs 20 bytes"),
    "tensor_stride_out_of_bounds.pt": (
        lambda: make_archive(make_tensor(strides=(2,))),
        CorruptFileError,
        "needs 28 bytes",
    ),
    "tensor_negative_offset.pt": (lambda: make_archive(make_tensor(offset=-1)), CorruptFileError, "malformed"),
    "tensor_negative_stride.pt": (lambda: make_archive(make_tensor(strides=(-1,))), CorruptFileError, "malformed"),
    "tensor_negative_shape.pt": (lambda: make_archive(make_tensor(shape=(-4,))), CorruptFileError, "malformed"),
    "tensor_rank_differs.pt": (
        lambda: make_archive(make_tensor(strides=(1, 1))),
        CorruptFileError,
        "does not go with 2 strides",
    ),
    "tensor_size_overflows.pt": (
        lambda: make_archive(make_tensor(shape=(1 << 62, 4), strides=(4, 1))),
        CorruptFileError,
        "more than 64 bits",
    ),
    "tensor_count_overflows.pt": (lambda: make_archive(make_tensor(count=1 << 62)), CorruptFileError, "are announced"),
    "tensor_shape_beyond_64_bits.pt": (
        lambda: make_archive(make_tensor(shape=(1 << 70,), strides=(0,))),
        CorruptFileError,
        "malformed",
    ),
    "tensor_of_unknown_storage.pt": (
        lambda: make_archive(make_tensor(storage="system")),
        CorruptFileError,
        "unknown storage type",
    ),
    "tensor_key_leads_out.pt": (lambda: make_archive(make_tensor(key="../data.pkl")), CorruptFileError, "missing"),
    "tensor_shape_is_a_number.pt": (
        lambda: make_archive(make_tensor(raw_shape=b"K\x04")),
        CorruptFileError,
        "malformed",
    ),
    "tensor_with_many_dimensions.pt": (
        lambda: make_archive(make_tensor(raw_shape=_numbers((1,) * 100_000))),
        CorruptFileError,
        "malformed",
    ),
    "tensor_expands_to_terabytes.pt": (
        lambda: make_archive(make_tensor(shape=(10**6, 10**6), strides=(0, 0))),
        UnsafeFileError,
        "expands",
    ),
    "tensor_expands_beyond_measure.pt": (_wrap(_shape_bomb), CorruptFileError, "more than 64 bits"),
    "tensor_with_few_arguments.pt": (
        lambda: make_archive(_ROOT + b"ctorch._utils\n_rebuild_tensor_v2\n(" + _number(1) + _number(2) + b"tRs."),
        CorruptFileError,
        "malformed",
    ),
    "tensor_nested_in_itself.pt": (_wrap(_self_containing_tensor), CorruptFileError, "nested"),
    "tensor_subclass_in_subclass.pt": (_wrap(_subclass_in_subclass), CorruptFileError, "nested"),
    # pickles
    "pickle_truncated.pt": (lambda: make_archive(make_tensor()[:-3]), CorruptFileError, "truncated"),
    "pickle_empty.pt": (lambda: make_archive(b""), CorruptFileError, "truncated"),
    "pickle_unknown_opcode.pt": (lambda: make_archive(b"\x80\x02\xff."), CorruptFileError, "is no opcode"),
    "pickle_unknown_protocol.pt": (lambda: make_archive(b"\x80\x09N."), CorruptFileError, "protocol 9"),
    "pickle_stack_underflow.pt": (lambda: make_archive(b"\x80\x020."), CorruptFileError, "malformed"),
    "pickle_without_mark.pt": (lambda: make_archive(b"\x80\x02Nt."), CorruptFileError, "malformed"),
    "pickle_mark_as_value.pt": (lambda: make_archive(b"\x80\x02(."), CorruptFileError, "mark"),
    "pickle_memo_missing.pt": (lambda: make_archive(b"\x80\x02h\x07."), CorruptFileError, "malformed"),
    "pickle_memo_index_huge.pt": (lambda: make_archive(b"\x80\x02Nr\xff\xff\xff\x7f."), None, ""),
    "pickle_text_length_huge.pt": (lambda: make_archive(b"\x80\x02X\xff\xff\xff\xff."), UnsafeFileError, "text of"),
    "pickle_bytes_length_huge.pt": (
        lambda: make_archive(b"\x80\x04\x8e" + b"\xff" * 8 + b"."),
        CorruptFileError,
        "truncated",
    ),
    "pickle_of_many_objects.pt": (
        lambda: make_archive(b"\x80\x02(" + b"]" * 3_100_000 + b"t."),
        UnsafeFileError,
        r"makes more than \d+ objects",
    ),
    "pickle_of_many_globals.pt": (
        lambda: make_archive(b"\x80\x02(" + b"".join(b"ca\n%d\n" % i for i in range(10_001)) + b"t."),
        UnsafeFileError,
        "more than 10000 classes",
    ),
    "pickle_integer_of_6000_digits.pt": (
        lambda: make_archive(pickle.dumps({"epoch": 10**6000}, 2)),
        UnsafeFileError,
        "item of 2492 bytes",
    ),
    "pickle_integer_length_huge.pt": (
        lambda: make_archive(b"\x80\x02\x8b\xff\xff\xff\x7f."),
        UnsafeFileError,
        "item of",
    ),
    "pickle_integer_length_negative.pt": (
        lambda: make_archive(b"\x80\x02\x8b\xff\xff\xff\xff."),
        CorruptFileError,
        "negative",
    ),
    "pickle_decimal_huge.pt": (lambda: make_archive(b"I" + b"9" * 1_000_000 + b"\n."), UnsafeFileError, "decimal"),
    "pickle_memo_decimal_huge.pt": (
        lambda: make_archive(b"Np" + b"9" * 1_000_000 + b"\n."),
        UnsafeFileError,
        "decimal",
    ),
    "pickle_line_without_end.pt": (lambda: make_archive(b"V" + b"x" * 1_000_000), CorruptFileError, "truncated"),
    "pickle_string_of_brackets.pt": (
        lambda: make_archive(b"S" + b"(" * 200_000 + b"\n."),
        CorruptFileError,
        "not quoted",
    ),
    "pickle_string_of_signs.pt": (
        lambda: make_archive(b"S'" + b"-" * 200_000 + b"1\n."),
        CorruptFileError,
        "not quoted",
    ),
    "pickle_invalid_utf8.pt": (lambda: make_archive(b"\x80\x02X\x01\x00\x00\x00\xff."), CorruptFileError, "malformed"),
    "pickle_nested_lists.pt": (lambda: make_archive(_nested(b"]", 200_000, b"a")), None, ""),
    "pickle_nested_tuples.pt": (lambda: make_archive(_nested(b"", 200_000, b"\x85")), None, ""),
    "pickle_nested_dicts.pt": (lambda: make_archive(_nested(b"}X\x01\x00\x00\x00k", 200_000, b"s")), None, ""),
    "pickle_nested_calls.pt": (lambda: make_archive(_nested(b"ca\nb\n", 200_000, b"\x85R")), None, ""),
    "pickle_cyclic.pt": (lambda: make_archive(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."), None, ""),
    "pickle_tuple_bomb.pt": (lambda: make_archive(_tuple_bomb()), None, ""),
    "pickle_module_bomb.pt": (lambda: make_archive(_module_bomb()), UnsafeFileError, "modules have more than"),
    "pickle_module_in_itself.pt": (lambda: make_archive(_module_in_itself()), None, ""),
    "pickle_states_share_a_mapping.pt": (lambda: make_archive(_many_states_share_a_mapping()), None, ""),
    "pickle_global_with_line_break.pt": (
        lambda: make_archive(b"\x80\x02X\x03\x00\x00\x00a\nbX\x01\x00\x00\x00c\x93."),
        None,
        "",
    ),
    "pickle_list_in_itself.pt": (
        lambda: make_archive(b"\x80\x02}" + _text("optimizer") + b"]q\x00h\x00as."),
        None,
        "",
    ),
    "pickle_name_of_many_wrappers.pt": (
        lambda: make_archive(make_tensor().replace(_text("a.weight"), _text("module." * 3_000_000 + "x"), 1)),
        None,
        "",
    ),
    "pickle_keys_of_keys_of_long_keys.pt": (
        lambda: make_archive(
            b"\x80\x02" + _text("k" * 3_000_000) + b"q\x000" + b"}h\x00" * 90 + make_tensor()[2:-1] + b"s" * 90 + b"."
        ),
        None,
        "",
    ),
    "tensor_of_26_dimensions.pt": (
        lambda: make_archive(make_tensor(shape=(2,) * 26, strides=(0,) * 26)),
        UnsafeFileError,
        "expands",
    ),
    "tensor_of_22_dimensions.pt": (
        lambda: make_archive(make_tensor(shape=(2,) * 22, strides=(0,) * 22)),
        UnsafeFileError,
        "expands",
    ),
    "tensor_of_18_dimensions.pt": (lambda: make_archive(make_tensor(shape=(2,) * 18, strides=(0,) * 18)), None, ""),
    "tensor_key_is_long.pt": (lambda: make_archive(make_tensor(key="k" * 1_000_000)), CorruptFileError, "missing"),
    "pickle_in_record_bntool.pt": (
        lambda: make_archive(make_tensor(), {"data/0": bytes(16), "bntool.json": b"[" * 100_000}),
        None,
        "",
    ),
    # legacy
    "legacy_truncated_storage.pth": (lambda: make_legacy(make_legacy_tensor())[:-1], CorruptFileError, "does not fit"),
    "legacy_negative_storage.pth": (
        lambda: make_legacy(make_legacy_tensor(), tail=struct.pack("<q", -4)),
        CorruptFileError,
        "-4 elements",
    ),
    "legacy_huge_storage.pth": (
        lambda: make_legacy(make_legacy_tensor(), tail=struct.pack("<q", 1 << 62)),
        CorruptFileError,
        "does not fit",
    ),
    "legacy_unknown_key.pth": (
        lambda: make_legacy(make_legacy_tensor(), keys=["7"]),
        CorruptFileError,
        "no tensor uses",
    ),
    "legacy_key_twice.pth": (
        lambda: make_legacy(make_legacy_tensor(), ["0", "0"], (struct.pack("<q", 4) + bytes(16)) * 2),
        CorruptFileError,
        "twice",
    ),
    "legacy_keys_are_no_list.pth": (lambda: make_legacy(make_legacy_tensor() + b"N."), CorruptFileError, "malformed"),
    "legacy_keys_are_a_bomb.pth": (
        lambda: make_legacy(make_legacy_tensor() + b"](K\x01" + b"2\x86" * 300 + b"e."),
        CorruptFileError,
        "no tensor",
    ),
    "legacy_storage_missing.pth": (lambda: make_legacy(make_legacy_tensor(), keys=[]), CorruptFileError, "missing"),
    "legacy_view_out_of_bounds.pth": (
        lambda: make_legacy(make_legacy_tensor(b"(" + _text("0v") + _number(2) + _number(4) + b"t")),
        CorruptFileError,
        "view",
    ),
    "legacy_header_only.pth": (lambda: make_legacy(b"")[:14], CorruptFileError, "truncated"),
    "legacy_other_version.pth": (
        lambda: make_legacy(b"N.").replace(b"M\xe9\x03", b"M\xe8\x03", 1),
        CorruptFileError,
        "version",
    ),
    # safetensors
    "safetensors_short.safetensors": (lambda: b"\x08\x00\x00", CorruptFileError, "too short"),
    "safetensors_header_too_long.safetensors": (lambda: make_safetensors({}, length=10**9), CorruptFileError, "claims"),
    "safetensors_header_beyond_file.safetensors": (
        lambda: make_safetensors({}, b"", length=50),
        CorruptFileError,
        "claims",
    ),
    "safetensors_not_json.safetensors": (lambda: make_safetensors(b"{nonsense"), CorruptFileError, "not valid JSON"),
    "safetensors_not_utf8.safetensors": (lambda: make_safetensors(b'{"\xff":1}'), CorruptFileError, "not valid JSON"),
    "safetensors_list.safetensors": (lambda: make_safetensors(b"[]"), CorruptFileError, "not a JSON object"),
    "safetensors_nested.safetensors": (
        lambda: make_safetensors(b'{"a":' + b"[" * 200_000),
        CorruptFileError,
        "not valid JSON",
    ),
    "safetensors_nan.safetensors": (
        lambda: make_safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
        CorruptFileError,
        "JSON",
    ),
    "safetensors_overlap.safetensors": (
        lambda: make_safetensors({"a": make_entry(), "b": make_entry()}),
        CorruptFileError,
        "overlap",
    ),
    "safetensors_tail.safetensors": (
        lambda: make_safetensors({"a": make_entry()}, bytes(17)),
        CorruptFileError,
        "tail",
    ),
    "safetensors_truncated.safetensors": (
        lambda: make_safetensors({"a": make_entry()}, bytes(15)),
        CorruptFileError,
        "truncated",
    ),
    "safetensors_duplicate_key.safetensors": (
        lambda: make_safetensors(
            b'{"a":' + json.dumps(make_entry()).encode() + b',"a":' + json.dumps(make_entry()).encode() + b"}"
        ),
        CorruptFileError,
        "twice",
    ),
    "safetensors_unknown_dtype.safetensors": (
        lambda: make_safetensors({"a": make_entry("F99")}),
        CorruptFileError,
        "dtype",
    ),
    "safetensors_dtype_is_a_list.safetensors": (
        lambda: make_safetensors({"a": {**make_entry(), "dtype": []}}),
        CorruptFileError,
        "dtype",
    ),
    "safetensors_shape_overflows.safetensors": (
        lambda: make_safetensors({"a": make_entry(shape=[1 << 62, 4])}),
        CorruptFileError,
        "do not hold",
    ),
    "safetensors_shape_beyond_64_bits.safetensors": (
        lambda: make_safetensors({"a": make_entry(shape=[10**4000] * 1000)}),
        CorruptFileError,
        "malformed",
    ),
    "safetensors_shape_negative.safetensors": (
        lambda: make_safetensors({"a": make_entry(shape=[-4])}),
        CorruptFileError,
        "malformed",
    ),
    "safetensors_shape_of_floats.safetensors": (
        lambda: make_safetensors({"a": make_entry(shape=[4.0])}),
        CorruptFileError,
        "malformed",
    ),
    "safetensors_shape_of_booleans.safetensors": (
        lambda: make_safetensors({"a": make_entry(shape=[True, 4])}),
        CorruptFileError,
        "malformed",
    ),
    "safetensors_offsets_reversed.safetensors": (
        lambda: make_safetensors({"a": make_entry(offsets=[16, 0])}),
        CorruptFileError,
        "run backwards",
    ),
    "safetensors_offsets_missing.safetensors": (
        lambda: make_safetensors({"a": {"dtype": "F32", "shape": [4]}}),
        CorruptFileError,
        "malformed",
    ),
    "safetensors_entry_is_a_number.safetensors": (lambda: make_safetensors({"a": 1}), CorruptFileError, "dtype"),
    "safetensors_metadata_of_numbers.safetensors": (
        lambda: make_safetensors({"__metadata__": {"a": 1}}, b""),
        CorruptFileError,
        "metadata",
    ),
    "safetensors_lone_surrogate.safetensors": (
        lambda: make_safetensors(b'{"\\ud800":' + json.dumps(make_entry()).encode() + b"}"),
        CorruptFileError,
        "half of a surrogate pair",
    ),
    "safetensors_lone_surrogate_in_metadata.safetensors": (
        lambda: make_safetensors(b'{"__metadata__":{"a":"x\\udc80"},"b":' + json.dumps(make_entry()).encode() + b"}"),
        CorruptFileError,
        "half of a surrogate pair",
    ),
    "safetensors_record_is_nonsense.safetensors": (
        lambda: make_safetensors({"__metadata__": {"bntool": "[[["}, "a": make_entry()}),
        None,
        "",
    ),
    # the index of a sharded checkpoint
    "index_leads_up.index.json": (
        lambda: make_index({"a": "../x.safetensors"}),
        UnsafeFileError,
        "no file of its folder",
    ),
    "index_absolute.index.json": (lambda: make_index({"a": "/etc/passwd"}), UnsafeFileError, "no file of its folder"),
    "index_windows_path.index.json": (
        lambda: make_index({"a": "..\\x.safetensors"}),
        UnsafeFileError,
        "no file of its folder",
    ),
    "index_names_nothing.index.json": (lambda: make_index({"a": ""}), UnsafeFileError, "no file of its folder"),
    "index_names_dots.index.json": (lambda: make_index({"a": ".."}), UnsafeFileError, "no file of its folder"),
    "index_names_nul.index.json": (lambda: make_index({"a": "x\0y"}), UnsafeFileError, "no file of its folder"),
    "index_names_surrogate.index.json": (
        lambda: make_index({"a": "\ud800"}),
        CorruptFileError,
        "half of a surrogate pair",
    ),
    "index_names_itself.index.json": (
        lambda: make_index({"a": "index_names_itself.index.json"}),
        UnsafeFileError,
        "another index",
    ),
    "index_shard_missing.index.json": (lambda: make_index({"a": "none.safetensors"}), BntoolError, "no such file"),
    "index_map_is_a_list.index.json": (lambda: make_index(["a"]), CorruptFileError, "weight_map"),
    "index_map_is_empty.index.json": (lambda: make_index({}), CorruptFileError, "weight_map"),
    "index_map_to_numbers.index.json": (lambda: make_index({"a": 1}), CorruptFileError, "file names"),
    "index_is_a_list.index.json": (lambda: b"[]", CorruptFileError, "weight_map"),
    "index_is_nested.index.json": (lambda: b"[" * 200_000, CorruptFileError, "JSON"),
    "index_key_twice.index.json": (lambda: b'{"weight_map":{"a":"x","a":"y"}}', CorruptFileError, "twice"),
    "index_of_many_shards.index.json": (
        lambda: make_index({str(i): f"{i}.bin" for i in range(10_001)}),
        UnsafeFileError,
        "more than",
    ),
}


def _rename(data: bytes, old: bytes, new: bytes) -> bytes:
    return data.replace(old, new)


def _module_in_itself() -> bytes:
    opening = b"ctorch.nn\nModule\n)\x81q\x00}(" + _text("_parameters") + b"}" + _text("_modules") + b"}"
    return b"\x80\x02" + opening + _text("again") + b"h\x00sub."


def make_legacy_tensor(view: bytes = b"N") -> bytes:
    return make_tensor().replace(_number(4) + b"tQ", _number(4) + view + b"tQ", 1)
