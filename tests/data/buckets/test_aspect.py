"""Size tables: order, nearest ratio, ties, vectorised equal to one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.data.buckets.aspect import AspectTable, get_aspect_table, load_aspect_tables


def test_tables_hold_all_resolutions_with_sizes_near_their_pixel_count():
    tables = load_aspect_tables()
    assert list(tables) == ["144p", "256", "240p", "360p", "512", "480p", "720p", "1024", "1080p", "4k"]
    assert [len(tables[name].sizes) for name in tables] == [17, 40, 17, 17, 40, 17, 17, 40, 17, 17]
    for table in tables.values():
        for height, width in table.sizes.values():
            assert height * width == pytest.approx(table.pixels, rel=0.1)


def test_order_of_the_4k_table_is_kept():
    assert list(get_aspect_table("4k").sizes)[6:8] == ["0.62", "0.56"]


def test_of_two_equally_near_ratios_the_first_is_taken():
    table = AspectTable("test", 100, {"2.00": (2, 1), "1.00": (1, 1), "0.50": (1, 2)})
    assert table.nearest(3, 2) == "2.00"
    assert table.nearest(3, 4) == "1.00"
    assert table.nearest_index(np.array([1.5, 0.75])).tolist() == [0, 1]


@given(
    st.sampled_from(list(load_aspect_tables())),
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=50),
)
def test_nearest_index_equals_nearest(resolution, sizes):
    table = get_aspect_table(resolution)
    height, width = np.array(sizes).T
    indices = table.nearest_index(height / width)
    for index, (h, w) in zip(indices, sizes, strict=True):
        assert table.names[index] == table.nearest(h, w)
        assert table.nearest(h, w) == min(table.sizes, key=lambda name: abs(float(name) - h / w))


def test_nearest_index_at_every_boundary():
    for table in load_aspect_tables().values():
        ascending = np.sort(table.ratios)
        middle = (ascending[1:] + ascending[:-1]) / 2
        ratios = np.concatenate([ascending, middle, np.nextafter(middle, 0), np.nextafter(middle, 9), [1e-3, 1e3]])
        expected = [int(np.argmin(np.abs(table.ratios - ratio))) for ratio in ratios]
        assert table.nearest_index(ratios).tolist() == expected


@pytest.mark.parametrize(("name", "hint"), [("240", "'240p'"), ("720P", "'720p'"), (256, "quotes"), ("xyz", "known: ")])
def test_unknown_resolution_names_the_nearest(name, hint):
    with pytest.raises(ValueError, match=hint):
        get_aspect_table(name)
