"""The evidence on a result page: the choice of K, the baseline, the restarts, the merge tree."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from fastapi.testclient import TestClient

from app import storage
from app.db.session import open_session
from app.services import results
from app.web import evidence, wording
from models import hierarchy
from tests.app.test_web import HOSTILE, METRICS, PAGE, finished_run

AUTO = {
    "clusters": 2,
    "interval": [2, 3],
    "votes": {"eigengap": 2.0, "height": 2.0, "reproduced": 3.3},
    "clarity": 0.5,
    "steady": 3,
    "sweep": [
        {"clusters": 2, "eigengap": 0.75, "height": 0.9, "reproduced": 0.1},
        {"clusters": 4, "eigengap": 0.25, "height": 0.8, "reproduced": 0.3},
        {"clusters": 8, "eigengap": 0.5, "height": 0.7, "reproduced": 0.2},
    ],
    "rejected": [{"clusters": 3, "why": HOSTILE}, {"clusters": 4, "why": "its gap is 0.25"}],
}
BASELINE = {"method": "kmeans", "agreement": 0.71, "sizes": [3, 2]}
# Cluster 0 in two leaves; the clusters are one at last.
TREE = {
    "clusters": 2,
    "levels": [1, 2, 3],
    "leaf_clusters": [0, 0, 1],
    "leaf_sizes": [3, 1, 1],
    "merges": [[0, 1, 0.1, 4], [2, 3, 0.5, 5]],
}
WHOLE = METRICS | {
    "auto": AUTO,
    "baseline": BASELINE | METRICS["baseline"],
    "restarts": {"count": 6, "agreement": 0.87},
    "calibration": {"ece": 0.034, "bins": []},
    "tree": TREE,
}


def words_of(page: str) -> str:
    """What a page says, without its tags."""
    words = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    return re.sub(r" (?=[.,)])|(?<=\() ", "", words)


def test_the_chosen_number_is_shown_with_what_was_tried_and_rejected(api: TestClient):
    page = api.get(f"/runs/{finished_run(metrics=WHOLE).id}", headers=PAGE).text
    words = words_of(page)
    assert "Why 2 clusters" in words
    assert "lie apart: 2 How unlike are groups that would merge: 2 How alike are the groups of two halves: 3.3" in words
    assert "2 is their mean, in which the first counts for more." in words
    assert "The groups lie apart, but not all of them. 2 to 3 clusters fit nearly as well." in words
    assert "Up to 3 clusters come out nearly alike from either half of the images" in words
    assert "try that for a finer reading" in words
    assert "Not 4: its gap is 0.25" in words
    assert "Not 3: &lt;script&gt;" in words
    assert len(re.findall("<polyline", page)) == 3


def test_the_baseline_stands_beside_the_run_without_true_labels_too(api: TestClient):
    metrics = WHOLE | {"quality": None, "baseline": BASELINE | {"quality": None}}
    page = api.get(f"/runs/{finished_run(metrics=metrics).id}", headers=PAGE).text
    words = words_of(page)
    assert "Quality" not in words
    assert "SCL and of k-means on the same features agree for the most part (ARI 0.71)" in words
    assert "SCL: 4 images in the largest group, 1 in the smallest" in words
    assert "k-means: 3 images in the largest group, 2 in the smallest" in words
    assert len(re.findall("<rect", page.partition("Beside plain k-means")[2])) == 4


def test_what_a_head_found_before_the_network_learned_stands_beside_the_run(api: TestClient):
    frozen = {"agreement": 0.66, "quality": {"acc": 0.611, "nmi": 0.522, "ari": 0.433}}
    run = finished_run(metrics=WHOLE | {"frozen": frozen})
    words = words_of(api.get(f"/runs/{run.id}", headers=PAGE).text)
    told = "The groups from before the network learned them, and these, agree for the most part (ARI 0.66)."
    assert told in words
    assert "before the network learned 0.611 0.522 0.433" in words
    run = finished_run(metrics=WHOLE | {"quality": None, "frozen": {"agreement": 0.66, "quality": None}})
    words = words_of(api.get(f"/runs/{run.id}", headers=PAGE).text)
    assert told in words
    assert "before the network learned" not in words.replace(told, "")
    for none in ({}, {"frozen": None}):
        run = finished_run(metrics=WHOLE | none)
        assert "learned" not in words_of(api.get(f"/runs/{run.id}", headers=PAGE).text)


def test_how_far_confidence_can_be_believed_is_told_where_that_is_known(api: TestClient):
    words = words_of(api.get(f"/runs/{finished_run(metrics=WHOLE).id}", headers=PAGE).text)
    assert "differ by 3% on average (ECE 0.034)" in words


def test_how_far_restarts_agree_is_said_in_words(api: TestClient):
    run = finished_run(metrics=WHOLE)
    words = words_of(api.get(f"/runs/{run.id}", headers=PAGE).text)
    assert "6 independent starts agree closely (ARI 0.87)." in words
    run = finished_run(metrics=WHOLE | {"restarts": {"count": 6, "agreement": 0.2}})
    words = words_of(api.get(f"/runs/{run.id}", headers=PAGE).text)
    assert "6 independent starts differ widely (ARI 0.20), so another seed may well give other groups." in words
    run = finished_run(metrics=WHOLE | {"restarts": {"count": 8, "started": 24, "agreement": 0.87}})
    words = words_of(api.get(f"/runs/{run.id}", headers=PAGE).text)
    assert "8 independent starts, chosen from 24, agree closely (ARI 0.87)." in words
    for few in ({"count": 1, "agreement": None}, None):
        run = finished_run(metrics=WHOLE | {"restarts": few})
        assert "independent starts" not in api.get(f"/runs/{run.id}", headers=PAGE).text


def test_the_levels_of_the_tree_name_what_merges_and_what_splits(api: TestClient):
    page = api.get(f"/runs/{finished_run(metrics=WHOLE).id}", headers=PAGE).text
    levels = page.partition('id="levels-title"')[2].partition("</section>")[0]
    assert "<script" not in levels
    finer, coarser = levels.split("<h3>")[1:]
    assert words_of(finer.partition("<ul>")[2]) == "Group 1 in 2: 3 + 1 1 cluster as before"
    assert words_of(finer).startswith("3 groups")
    assert words_of(coarser).startswith("1 group")
    assert re.findall(r'href="/runs/[^"]*/clusters/(\d)"', coarser) == ["0", "1"]


@pytest.mark.parametrize(
    "missing", ["auto", "baseline", "restarts", "tree", "calibration", "warnings", "quality", "sizes"]
)
@pytest.mark.parametrize("as_null", [True, False])
def test_what_a_run_does_not_say_is_not_shown(api: TestClient, missing: str, *, as_null: bool):
    metrics = {name: value for name, value in WHOLE.items() if name != missing} | ({missing: None} if as_null else {})
    run = finished_run(metrics=metrics)
    for path in (f"/runs/{run.id}", "/", f"/collections/{run.collection_id}"):
        assert api.get(path, headers=PAGE).status_code == 200, path


def test_the_report_gives_all_of_it_and_is_cached(api: TestClient):
    run = finished_run(metrics=WHOLE)
    answer = api.get(f"/v1/runs/{run.id}/report")
    body = answer.json()
    assert body["metrics"] == WHOLE
    assert (body["clusters"], body["sizes"]) == (2, [4, 1])
    again = api.get(f"/v1/runs/{run.id}/report", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_table_of_levels_is_a_file_of_the_run(api: TestClient):
    run = finished_run(metrics=WHOLE)
    path = api.get(f"/v1/runs/{run.id}").json()["links"]["levels_csv"]
    missing = api.get(path)
    assert (missing.status_code, missing.json()["type"]) == (404, "/problems/levels-not-found")
    with storage.atomic_write(storage.levels(run.id)) as file:
        file.write(b"image_id,filename,groups_1\n")
    answer = api.get(path)
    assert answer.content == b"image_id,filename,groups_1\n"
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == f'attachment; filename="levels-{run.id}.csv"'
    assert api.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert "levels_csv" not in api.get(f"/v1/runs/{finished_run(metrics=METRICS).id}").json()["links"]


def test_a_sweep_is_drawn_over_the_logarithm_of_the_clusters_and_each_criterion_fills_the_height():
    found = evidence.sweep({"auto": AUTO})
    assert found is not None
    top, bottom = evidence.MARGIN, evidence.HEIGHT - evidence.MARGIN
    middle = (top + bottom) / 2
    left, right = evidence.MARGIN, evidence.WIDTH - evidence.MARGIN
    points = [[tuple(map(float, pair.split(","))) for pair in curve.line.split()] for curve in found.curves]
    assert points[0] == [(left, top), (evidence.WIDTH / 2, bottom), (right, middle)]
    assert points[2] == [(left, bottom), (evidence.WIDTH / 2, top), (right, middle)]
    assert found.x == left
    assert found.band == pytest.approx((left, (right - left) * math.log(3 / 2) / math.log(4)))
    assert [(tick.clusters, tick.x > left) for tick in found.ticks] == [(2, False), (3, True), (5, True)]


def test_a_number_without_a_sweep_draws_nothing():
    found = evidence.sweep({"auto": {"clusters": 5}})
    assert found is not None
    others = [{"clusters": k} for k in (20, 6, 2)]
    nearest = evidence.sweep({"auto": {"clusters": 5, "rejected": others}})
    assert nearest is not None
    assert [other["clusters"] for other in nearest.rejected] == [6, 2, 20]
    assert (found.clusters, found.curves, found.band, found.rejected) == (5, [], None, [])


def test_bars_of_both_groupings_share_one_scale():
    found = evidence.comparison({"sizes": [8, 2], "baseline": {"sizes": [6, 4]}})
    assert found is not None
    heights = [bar.height / evidence.BAR_HEIGHT for sizes in (found.ours, found.baseline) for bar in sizes.bars]
    assert heights == pytest.approx([1, 0.25, 0.75, 0.5])
    many = evidence.Sizes.of(range(100, 0, -1), greatest=100)
    assert (len(many.bars), many.left_out, many.smallest) == (64, 36, 1)


def test_levels_are_those_of_the_tree_itself():
    """Beside the labels that the algorithm's own tree gives each image."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 8))
    labels = np.repeat(np.arange(6), 60)
    x = centres[labels] + 0.3 * rng.normal(size=(360, 8))
    tree = hierarchy.tree(x / np.linalg.norm(x, axis=1, keepdims=True), labels, seed=0)
    found = {level.groups: level for level in evidence.levels({"tree": tree.to_dict()})}
    assert [*found] == sorted(set(tree.levels) - {6}, reverse=True)
    for groups, level in found.items():
        pairs = {(int(group), int(cluster)) for group, cluster in zip(tree.at(groups), labels, strict=True)}
        if groups < 6:
            by_group: dict[int, list[int]] = {}
            for group, cluster in sorted(pairs):
                by_group.setdefault(group, []).append(cluster)
            assert level.merged == sorted(clusters for clusters in by_group.values() if len(clusters) > 1)
            assert level.alone == sum(len(clusters) == 1 for clusters in by_group.values())
        else:
            sizes = {k: sorted(Counter(tree.at(groups)[labels == k].tolist()).values()) for k in range(6)}
            assert {k: sorted(v) for k, v in level.parts.items()} == {k: v for k, v in sizes.items() if len(v) > 1}
            assert level.alone == sum(len(v) == 1 for v in sizes.values())


def test_faces_are_the_most_typical_images(database: None):
    run = finished_run(metrics=WHOLE)
    with open_session() as session:
        found = results.faces(session, run.id, [0, 1, 7])
        for number in (0, 1):
            assert found[number] == results.members(session, run.id, number, 1, None).items[0].image_id
    assert set(found) == {0, 1}


@pytest.mark.parametrize(
    ("index", "words"),
    [(1, "are almost the same"), (0.8, "agree closely"), (0.79, "agree for the most part"), (-0.1, "differ widely")],
)
def test_agreement_in_words(index: float, words: str):
    assert wording.agreement(index) == words
