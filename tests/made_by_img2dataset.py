"""Folders laid out as img2dataset 1.47 does it: a table and statistics a shard, pictures in one of four formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboardX.record_writer import RecordWriter

FAILED = {
    2: ("failed_to_download", "HTTP Error 404: File not found"),
    5: ("failed_to_resize", "Image decoding error"),
}
SCHEMA = pa.schema(
    [("stars", pa.int64()), ("caption", pa.string()), ("url", pa.string()), ("key", pa.string())]
    + [("status", pa.string()), ("error_message", pa.string())]
    + [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    + [("exif", pa.string()), ("sha256", pa.string())]
)


def picture(key: str) -> bytes:
    return f"picture {key}".encode()


def shard_rows(shard: int, count: int = 6) -> list[dict[str, Any]]:
    """The rows of a shard in the order in which its downloads ended."""
    found = []
    for i in reversed(range(count)):
        status, error = FAILED.get(i, ("success", None))
        side = None if error else 32
        found.append(
            {
                "stars": i,
                "caption": f"caption {i}",
                "url": f"http://localhost/{i}.png",
                "key": f"{shard:05}{i:04}",
            }
            | {"status": status, "error_message": error, "width": side, "height": side}
            | {
                "original_width": side,
                "original_height": side,
                "exif": None if error else "{}",
                "sha256": None,
            }
        )
    return found


def make(folder: Path, form: str, shards: int = 2) -> None:
    """An output folder of `form`: files, webdataset, parquet, tfrecord or dummy."""
    folder.mkdir()
    for shard in range(shards):
        name, rows = f"{shard:05}", shard_rows(shard)
        good = [row for row in rows if row["status"] == "success"]
        if form == "files":
            (folder / name).mkdir()
            for row in good:
                (folder / name / f"{row['key']}.jpg").write_bytes(picture(row["key"]))
                (folder / name / f"{row['key']}.txt").write_text(row["caption"])
                (folder / name / f"{row['key']}.json").write_text(json.dumps(row, indent=4))
        elif form == "webdataset":
            with webdataset.TarWriter(str(folder / f"{name}.tar")) as tar:
                for row in good:
                    told = {"txt": row["caption"], "json": json.dumps(row, indent=4)}
                    tar.write({"__key__": row["key"], "jpg": picture(row["key"]), **told})
        elif form == "tfrecord":
            writer = RecordWriter(str(folder / f"{name}.tfrecord"))
            for row in good:
                writer.write(
                    example({"key": row["key"], "jpg": picture(row["key"]), "txt": row["caption"], **row})
                )
            writer.close()
        if form != "dummy":
            table = pa.Table.from_pylist(rows, SCHEMA)
            if form == "parquet":
                jpg = [picture(row["key"]) if row in good else None for row in rows]
                table = table.append_column("jpg", pa.array(jpg, pa.binary()))
            pq.write_table(table, folder / f"{name}.parquet")
        stats = {"count": len(rows), "successes": len(good), "status_dict": {"success": len(good)}}
        (folder / f"{name}_stats.json").write_text(json.dumps(stats, indent=4))


def _example_class() -> Any:
    """`tf.train.Example`, from its published definition."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, kind in (
        ("BytesList", kinds.TYPE_BYTES),
        ("FloatList", kinds.TYPE_FLOAT),
        ("Int64List", kinds.TYPE_INT64),
    ):
        file.message_type.add(name=name).field.add(
            name="value", number=1, type=kind, label=kinds.LABEL_REPEATED
        )
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes_list", "float_list", "int64_list"), 1):
        kind = f".tensorflow.{name.title().replace('_', '')}"
        feature.field.add(
            name=name, number=number, type=kinds.TYPE_MESSAGE, type_name=kind, label=1, oneof_index=0
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=1)
    entry.field.add(name="value", number=2, type=kinds.TYPE_MESSAGE, type_name=".tensorflow.Feature", label=1)
    inner = ".tensorflow.Features.FeatureEntry"
    features.field.add(name="feature", number=1, type=kinds.TYPE_MESSAGE, type_name=inner, label=3)
    example_type = file.message_type.add(name="Example")
    example_type.field.add(
        name="features", number=1, type=kinds.TYPE_MESSAGE, type_name=".tensorflow.Features", label=1
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


EXAMPLE = _example_class()


def example(values: dict[str, Any]) -> bytes:
    """An Example; whole numbers, floats and texts go into the lists that img2dataset puts them in."""
    made = EXAMPLE()
    for name, value in values.items():
        feature = made.features.feature[name]
        if isinstance(value, int):
            feature.int64_list.value.append(value)
        elif isinstance(value, float):
            feature.float_list.value.append(value)
        else:
            feature.bytes_list.value.append(value if isinstance(value, bytes) else (value or "").encode())
    return bytes(made.SerializeToString())
