"""Pictures are read a row group at a time, in any order and in both of the Hub's forms."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinyflux.distributed.picture_column import PictureColumn

CONTENTS = [bytes([index]) * 3 for index in range(10)]


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_rows_come_as_they_are_asked_for(tmp_path, form):
    values = CONTENTS if form == "bytes" else [{"bytes": one, "path": None} for one in CONTENTS]
    file = str(tmp_path / "set.parquet")
    pq.write_table(pa.table({"image": values, "text": ["a"] * 10}), file, row_group_size=3)
    column = PictureColumn(file, "image")
    for rows in ([0, 1, 2, 3, 9], [9, 0, 5, 5, 2], []):
        assert list(column.read(rows)) == [CONTENTS[row] for row in rows]


def test_each_row_group_is_read_once_by_ascending_rows(tmp_path, monkeypatch):
    file = str(tmp_path / "set.parquet")
    pq.write_table(pa.table({"image": CONTENTS}), file, row_group_size=3)
    column, read = PictureColumn(file, "image"), []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group",
        lambda self, group, **how: (read.append(group), whole(self, group, **how))[1],
    )  # fmt: skip
    assert len(list(column.read([0, 2, 3, 8, 9]))) == 5
    assert read == [0, 1, 2, 3]
