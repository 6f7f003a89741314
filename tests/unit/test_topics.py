import gzip
import tracemalloc
from collections import Counter

import pytest

from speed_utils.topics import (
    TopicError,
    read_topic_paths,
    sample_topics,
    summarize_paths,
    truncate_path,
)

RDF = """<?xml version="1.0" encoding="UTF-8"?>
<RDF xmlns:r="http://www.w3.org/TR/RDF/" xmlns="http://dmoz.org/rdf/">
  <Topic r:id=""><catid>1</catid></Topic>
  <Topic r:id="Top"><catid>1</catid></Topic>
  <Topic r:id="Top/Arts/Movies"><narrow r:resource="Top/Arts/Movies/Titles"/></Topic>
  <Alias r:id="Top/Arts/Film"><Target r:resource="Top/Arts/Movies"/></Alias>
  <Topic r:id="Top/World/Deutsch"></Topic><Topic r:id="Top/Home/Food_&amp;_Drink"></Topic>
  <Topic r:id="Top/Adult/Arts"></Topic>
</RDF>
"""
KEPT = ["Arts/Movies", "Home/Food_&_Drink"]


def test_the_papers_example_is_truncated_as_in_the_paper():
    deep = "Arts/Movies/Titles/3/36_Hours_-_1964/Cast_and_Crew"
    assert truncate_path(deep) == "Arts/Movies/36_Hours_-_1964/Cast_and_Crew"
    assert truncate_path("A/B/C/D") == "A/B/C/D"
    assert truncate_path("A/B/C/D/E") == "A/B/D/E"
    assert truncate_path("A/B/C/D", 3) == "A/C/D"


@pytest.mark.parametrize("packed", [False, True])
def test_a_dump_is_parsed_plain_or_gzipped(tmp_path, packed):
    path = tmp_path / ("structure.rdf.u8" + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(RDF.encode()) if packed else RDF.encode())
    assert list(read_topic_paths(path)) == KEPT
    assert "World/Deutsch" in list(read_topic_paths(path, drop=()))


def test_lists_and_tables_give_the_same_paths(tmp_path):
    (tmp_path / "t.txt").write_text("Top/Arts/Movies\nHome/Food_&_Drink\nAdult/X\n\n")
    (tmp_path / "t.tsv").write_text("sites\tpath\n3\tTop/Arts/Movies\n1\tTop/Home/Food_&_Drink\n")
    assert list(read_topic_paths(tmp_path / "t.txt")) == KEPT
    assert list(read_topic_paths(tmp_path / "t.tsv")) == KEPT


def test_bad_files_say_what_is_wrong(tmp_path):
    with pytest.raises(TopicError, match="no topic file"):
        list(read_topic_paths(tmp_path / "none.tsv"))
    (tmp_path / "t.tsv").write_text("name\nArts\n")
    with pytest.raises(TopicError, match="column 'path'"):
        list(read_topic_paths(tmp_path / "t.tsv"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"Arts/Movies\n" * 9999)[:40])
    with pytest.raises(TopicError, match="damaged"):
        list(read_topic_paths(tmp_path / "cut.txt.gz"))
    (tmp_path / "empty.txt").write_text("World/Deutsch\n")
    with pytest.raises(TopicError, match="no topics"):
        list(read_topic_paths(tmp_path / "empty.txt"))


def many_paths(n=3000):
    for i in range(n):
        category = ("Arts", "Regional", "Regional", "Regional", "Science")[i % 5]
        yield "/".join([category, *(f"P{i}_{level}" for level in range(i % 7))])


def test_samples_are_balanced_over_categories_and_depths():
    topics = sample_topics(many_paths(), n_topics=90, seed=1)
    categories = Counter(topic.category for topic in topics)
    assert max(categories.values()) - min(categories.values()) <= 3
    depths = Counter(topic.depth for topic in topics if topic.category == "Regional")
    assert max(depths.values()) <= 8 and len(depths) == 7
    assert len({topic.path for topic in topics}) == 90
    assert all(topic.path.count("/") < 4 for topic in topics)


def test_a_seed_names_its_sample_whatever_the_run():
    first = sample_topics(many_paths(), n_topics=30, seed=1)
    assert first == sample_topics(many_paths(), n_topics=30, seed=1)
    assert first != sample_topics(many_paths(), n_topics=30, seed=2)


def test_only_keeps_what_a_recorded_teacher_covers():
    topics = sample_topics(["A/B/C/D/E", "A/X"], n_topics=5, seed=0, only={"A/B/D/E"})
    assert [(topic.path, topic.raw_path) for topic in topics] == [("A/B/D/E", "A/B/C/D/E")]
    with pytest.raises(TopicError, match="no topics left"):
        sample_topics(["A/B"], n_topics=1, seed=0, only={"Z"})


def test_memory_does_not_grow_with_the_stream():
    def peak(n):
        tracemalloc.start()
        sample_topics((f"Arts/P{i}" for i in range(n)), n_topics=10, seed=0)
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    assert peak(80_000) < 1.3 * peak(20_000)


def test_a_catalogue_is_described_in_one_pass():
    catalogue = summarize_paths(iter(["A", "A/B/C", "A/B", "B/C"]), n_examples=2)
    assert (catalogue.n_paths, catalogue.widest, catalogue.deepest) == (4, "A", "A/B/C")
    assert catalogue.n_by_depth == {1: 1, 2: 2, 3: 1}
    assert len(catalogue.examples) == 2
