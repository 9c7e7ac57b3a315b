"""A second reader, written from docs/format.md alone: json, struct, zstandard and numpy, nothing of statecodec.

It trusts its input, knows the codec `raw` only, and exists to show that the page is enough.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

WIDTH = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "complex64": 4, "complex128": 8,
         "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}  # fmt: skip


def unfold(f: Any) -> Any:
    return np.where(f % 2 == 0, f // 2, -(f + 1) // 2)


class MinimalReader:
    """`raw_bytes(name)`: the little-endian bytes of a raw item's tensor."""

    def __init__(self, path: Path) -> None:
        if path.name.endswith(".index.json"):  # section 6
            path = path.with_name(json.loads(path.read_text())["weight_map"]["__manifest__"])
        entries, data = self._open(path)
        metadata = entries["__metadata__"]
        assert metadata["format"] == "statecodec"
        start, stop = entries["__manifest__"]["data_offsets"]
        text = data[start:stop]
        assert xxhash.xxh3_128_hexdigest(text) == metadata["statecodec.manifest"]
        if text.startswith(b"\x28\xb5\x2f\xfd"):
            text = zstandard.decompress(text)
        self.manifest: dict[str, Any] = json.loads(text)
        self.shards = [self._open(path.with_name(s["file"])) for s in self.manifest["shards"]] + [(entries, data)]
        for shard, known in zip(self.shards, self.manifest["shards"], strict=False):
            assert shard[0]["__metadata__"]["statecodec.header"] == known["header"]
        if self.manifest["format_version"][0] > 1:
            self._place()

    def _open(self, path: Path) -> tuple[dict[str, Any], bytes]:  # section 2
        data = path.read_bytes()
        (n,) = struct.unpack("<Q", data[:8])
        header = data[8 : 8 + n]
        entries = json.loads(header)
        digest = entries["__metadata__"]["statecodec.header"].encode()
        zeroed = header.replace(b'"statecodec.header":"' + digest, b'"statecodec.header":"' + b"0" * 16)
        assert xxhash.xxh3_64_hexdigest(zeroed).encode() == digest
        return entries, data[8 + n :]

    def _place(self) -> None:  # sections 3.2 and 3.3
        """What every item is, as in a manifest of format 1.x, and where its records lie."""
        items, records = self.manifest["items"], self.manifest["records"]
        shard_of = [shard for shard, count in enumerate(items["shards"]) for _ in range(count)]
        self.items = []
        for i, form in enumerate(items["form"]):
            item = {**self.manifest["forms"][form], "name": items["name"][i], "shard": shard_of[i], "records": []}
            item["chunks"] = [{"shape": shape} for number, shape in item["chunks"] for _ in range(number)]
            self.items.append(item)
        for i, entry in items["entry"]:
            self.items[i]["entry"] = entry
        packed = [item for item in self.items if item["storage"] == "packed" for _ in item["chunks"]]
        small = [item for item in self.items if item["storage"] == "shared"]
        sharing, at = dict(records["shared"]), [0] * len(self.shards)
        for r, nbytes in enumerate(records["nbytes"]):
            owners, small = (small[: sharing[r]], small[sharing[r] :]) if r in sharing else ([packed.pop(0)], small)
            shard = owners[0]["shard"]
            entries, data = self.shards[shard]
            start = entries[f"__packed_{shard}__"]["data_offsets"][0] + at[shard]
            record = data[start : start + nbytes]
            assert xxhash.xxh3_64_hexdigest(record) == records["checksums"][16 * r : 16 * r + 16]
            at[shard] += nbytes
            for owner in owners:
                owner["records"].append((record, owners))
        assert not packed
        assert not small

    def raw_bytes(self, name: str) -> bytes:
        if self.manifest["format_version"][0] > 1:
            item = next(i for i in self.items if i["name"] == name)
            if item["storage"] != "plain":
                return self._from_records(item)
        else:
            item = next(i for i in self.manifest["items"] if i["name"] == name)
        assert item["codec"]["name"] == "raw"
        entries, data = self.shards[item["shard"]]
        base = item.get("entry", name)
        if item["storage"] == "plain":  # section 4
            start, stop = entries[f"{base}/data"]["data_offsets"]
            if len(item["chunks"]) == 1 and "checksums" in item["chunks"][0]:
                assert [xxhash.xxh3_64_hexdigest(data[start:stop])] == item["chunks"][0]["checksums"]
            return data[start:stop]
        start, stop = entries[base]["data_offsets"]
        out = b""
        for chunk in item["chunks"]:
            record = data[start : start + chunk["nbytes"]]
            assert xxhash.xxh3_64_hexdigest(record) == chunk["checksum"]
            out += self._record(record, item["dtype"], chunk["shape"])
            start += chunk["nbytes"]
        assert start == stop
        return out

    def _from_records(self, item: dict[str, Any]) -> bytes:  # section 5
        if item["storage"] == "packed":
            pairs = zip(item["records"], item["chunks"], strict=True)
            return b"".join(self._record(record, item["dtype"], chunk["shape"]) for (record, _), chunk in pairs)
        ((record, owners),) = item["records"]
        sizes: dict[str, int] = {}
        for owner in owners:
            for part in owner["parts"].values():
                if owner is item:
                    start = sizes.get(part["dtype"], 0)
                sizes[part["dtype"]] = sizes.get(part["dtype"], 0) + int(np.prod(part["shape"]))
        at = 5 * sum(WIDTH.get(dtype, 1) for dtype in sizes)
        table = record[:at]
        for dtype, numel in sizes.items():
            rows, table = table[: 5 * WIDTH.get(dtype, 1)], table[5 * WIDTH.get(dtype, 1) :]
            length = sum(struct.unpack_from("<BI", rows, k)[1] for k in range(0, len(rows), 5))
            if dtype == item["dtype"]:
                vector = self._record(rows + record[at : at + length], dtype, [numel])
                size = len(vector) // max(numel, 1)
                return vector[start * size : (start + int(np.prod(item["shape"]))) * size]
            at += length
        raise AssertionError("its dtype is not among the vectors")

    def _record(self, record: bytes, dtype: str, shape: list[int]) -> bytes:  # section 5
        width = WIDTH.get(dtype, 1)
        if record[0] in (5, 7) and dtype in ("int16", "int32"):
            (length,) = struct.unpack_from("<I", record, 1)
            assert record[5 : 5 * width] == (b"\6" + bytes(4)) * (width - 1)
            assert len(record) == 5 * width + length
            codes = self._narrowed if record[0] == 5 else self._predicted
            return codes(record[5 * width :], dtype, int(np.prod(shape)))
        rows = int(np.prod(shape[:-1]))
        n = int(np.prod(shape)) * (2 if dtype.startswith("complex") else 1)
        at, planes = 5 * width, []
        for k in range(width):
            method, length = struct.unpack_from("<BI", record, 5 * k)
            payload = record[at : at + length]
            at += length
            if method in (3, 4):
                planes.append(self._centred(zstandard.decompress(payload), rows, n // rows, nibbles=method == 4))
            else:
                planes.append({0: lambda p: p, 1: zstandard.decompress, 2: lambda p: p * n}[method](payload))
        assert at == len(record)
        if width == 1:
            return planes[0]
        words = np.zeros(n, f"<u{width}")
        for k, plane in enumerate(planes):
            words |= np.frombuffer(plane, np.uint8).astype(words.dtype) << np.array(8 * k, words.dtype)
        if "float" in dtype or "complex" in dtype:
            top = np.array(8 * width - 1, words.dtype)
            words = (words >> np.array(1, words.dtype)) | (words << top)
        return words.tobytes()

    def _predicted(self, payload: bytes, dtype: str, n: int) -> bytes:  # section 5.2
        rank, shift, columns = struct.unpack_from("<BBI", payload)
        rows = n // columns
        specs = [("int16", [rank * (rows + columns)]), (dtype, [rows, columns])]
        numbers, rest = self._parts(payload[6:], specs)
        factors = np.frombuffer(numbers, "<i2").astype(np.int64)
        left, right = factors[: rank * rows].reshape(rank, rows), factors[rank * rows :].reshape(rank, columns)
        prediction = (left.T @ right + (1 << shift >> 1)) >> shift
        value = np.frombuffer(rest, f"<i{WIDTH[dtype]}").reshape(rows, columns) + prediction
        return value.astype(f"<i{WIDTH[dtype]}").tobytes()

    def _parts(self, record: bytes, specs: list[tuple[str, list[int]]]) -> list[bytes]:
        """The parts of a record within a record."""
        at = 5 * sum(WIDTH.get(dtype, 1) for dtype, _ in specs)
        row, parts = 0, []
        for dtype, shape in specs:
            width = WIDTH.get(dtype, 1)
            rows = record[row : row + 5 * width]
            size = sum(struct.unpack_from("<BI", rows, 5 * k)[1] for k in range(width))
            parts.append(self._record(rows + record[at : at + size], dtype, shape))
            row, at = row + 5 * width, at + size
        assert at == len(record)
        return parts

    def _narrowed(self, payload: bytes, dtype: str, n: int) -> bytes:  # section 5.1
        flags, low, columns, count = struct.unpack_from("<BBII", payload)
        rows, b, bits = (n // columns if columns else 0), low % 8, 8 * WIDTH[dtype]
        sizes = [
            columns * -(-rows // 64),
            rows,
            n if low >= 8 else 0,
            -(-n * b // 8),
            -(-n // 2) if flags else n,
            count,
        ]
        dtypes = ["int16", "int16", "uint8", "uint8", "uint8", dtype]
        specs = [(dtype, [size]) for dtype, size in zip(dtypes, sizes, strict=True)]
        parts = self._parts(payload[10:], specs)
        terms, lines = (np.frombuffer(p, "<u2").astype(np.int64) for p in parts[:2])
        whole, few, symbols = (np.frombuffer(p, np.uint8).astype(np.int64) for p in parts[2:5])
        exceptions = iter(np.frombuffer(parts[5], f"<u{WIDTH[dtype]}").tolist())
        if flags:
            symbols = np.stack((symbols & 15, symbols >> 4), -1).reshape(-1)[:n]
        escape = 15 if flags else 255
        f = np.array([next(exceptions) if s == escape else s for s in symbols.tolist()], np.int64) << low
        assert next(exceptions, None) is None
        if low >= 8:
            f += whole
        if b:
            f += np.stack([few >> k & ((1 << b) - 1) for k in range(0, 8, b)], -1).reshape(-1)[:n] << (low - b)
        f &= (1 << bits) - 1
        if columns:
            c = np.cumsum(unfold(terms).reshape(-1, columns), 0).repeat(64, 0)[:rows]
            value = unfold(f - 1) + (c + np.cumsum(unfold(lines))[:, None]).reshape(-1)
            value = np.where(f == 0, 0, value)
        else:
            value = unfold(f)
        return value.astype(f"<i{WIDTH[dtype]}").tobytes()

    def _centred(self, content: bytes, rows: int, cols: int, nibbles: bool) -> bytes:
        data = np.frombuffer(content, np.uint8)
        c, line, r = data[:cols], data[cols : cols + rows, None], data[cols + rows :].reshape(rows, cols)
        if not nibbles:
            return (r + c + line).tobytes()
        low, high = (r & 15) + (c & 15) + line, (r >> 4) + (c >> 4) + line
        return ((low & 15) | (high & 15) << 4).tobytes()
