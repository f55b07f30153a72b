"""What the service says of a store: every route against the store itself, or against numpy and safetensors alone."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from api.server import read_settings
from statsvc.errors import PlanError
from statsvc.store.reader import Store, Teacher, open_store
from tests.support.damage import edit_attributes
from tests.support.finished import ABSENT, ROWS_PER_SHARD, Finished
from tests.support.service import Running, always_counting, serving
from tests.support.tiny import photographs, write_tar

METHODS = ["phi-s", "global", "standardize"]


@pytest.fixture
def client(service_once: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service_once.url, timeout=30) as found:
        yield found


@pytest.fixture
def store(service_once: Running) -> Store:
    return open_store(str(service_once.store_path))


@pytest.fixture
def dino(store: Store) -> Teacher:
    return store.teacher("dino")


def got(client: httpx.Client, path: str, **parameters: Any) -> Any:
    """The JSON of an answer that must be 200."""
    answer = client.get(path, params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def problem(client: httpx.Client, path: str, status: int, **headers: str) -> Any:
    """The problem document of an answer that must have that status."""
    answer = client.get(path, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == status
    assert found["detail"]
    return found


class TestTeachers:
    def test_the_list_has_every_teacher_with_its_outputs_counts_and_links(
        self, client: httpx.Client, store: Store, service_once: Running
    ) -> None:
        found = got(client, "/teachers")
        assert [card["name"] for card in found["teachers"]] == ["dino", "siglip"]
        assert found["rows_per_shard"] == store.rows_per_shard
        for card in found["teachers"]:
            assert card == got(client, f"/teachers/{card['name']}")
            teacher = store.teacher(card["name"])
            assert card["fingerprint"] == teacher.fingerprint
            assert card["outputs"]["patches"]["dim"] == teacher.dims["patches"]
            assert tuple(card["outputs"]["patches"]["grid"]) == teacher.grid
            (cache_set,) = card["cache_sets"]
            assert cache_set["rows"] == len(teacher.targets().rows()) == cache_set["status"]["ok"]
            folder = service_once.store_path / "teachers" / card["name"]
            chunks = [path for path in folder.rglob("c/**/*") if path.is_file() and "moments" not in path.parts]
            samples = [
                p for name in ("status", "views") for p in (folder.parents[1] / "samples" / name / "c").rglob("*")
            ]
            assert cache_set["bytes"] == sum(path.stat().st_size for path in chunks + samples if path.is_file())

    def test_links_lead_somewhere(self, client: httpx.Client) -> None:
        links = got(client, "/teachers/dino")["links"]
        for name in set(links) - {"targets", "zarr"}:
            assert client.get(links[name]).status_code == 200, name
        assert client.get(links["targets"], params={"rows": "0"}).status_code == 200
        assert client.get(links["zarr"] + "/zarr.json").status_code == 200

    def test_an_unknown_teacher_is_404_and_the_answer_names_those_there_are(self, client: httpx.Client) -> None:
        assert "dino, siglip" in problem(client, "/teachers/sam", 404)["detail"]
        problem(client, "/teachers/..%2f..", 404)
        problem(client, "/teachers/SAM", 422)


class TestTransforms:
    @pytest.mark.parametrize("output", ["patches", "summary"])
    def test_phis_is_the_fitted_transform(self, client: httpx.Client, dino: Teacher, output: str) -> None:
        card, transform = got(client, "/teachers/dino/phis", output=output), dino.transform("phi-s", output)
        assert card["digest"] == transform.digest
        assert card["mean"] == transform.mean.tolist()
        assert (card["alpha"], card["count"], card["rank"]) == (transform.alpha, transform.count, transform.rank)
        assert (card["dim"], card["hadamard"]) == (dino.dims[output], transform.hadamard)
        report = dino.report()[output]["phi-s"]
        assert (card["images"], card["converged"]) == (report["images"], report["converged"])
        assert (card["teacher"], card["output"], card["method"]) == ("dino", output, "phi-s")

    @pytest.mark.parametrize("method", METHODS)
    def test_every_fitted_method_is_there_and_the_same_by_digest(self, client: httpx.Client, method: str) -> None:
        by_name = got(client, f"/teachers/dino/transforms/{method}")
        by_digest = got(client, f"/transforms/{by_name['digest']}")
        assert by_name["method"] == method
        assert {**by_name, "links": {}} == {**by_digest, "links": {}}
        for link in by_digest["links"].values():
            assert client.get(link).status_code == 200

    def test_the_artifact_comes_byte_for_byte_as_safetensors(
        self, client: httpx.Client, service_once: Running, dino: Teacher
    ) -> None:
        digest = dino.transform("phi-s").digest
        artifact = (service_once.store_path / ".statsvc" / "transforms" / f"{digest}.safetensors").read_bytes()
        for path in ("/teachers/dino/phis", f"/transforms/{digest}"):
            assert client.get(path, params={"format": "safetensors"}).content == artifact

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("format_", ["safetensors", "npz"])
    def test_matrices_come_in_both_formats_and_precisions(
        self, client: httpx.Client, dino: Teacher, format_: str, dtype: str
    ) -> None:
        answer = client.get("/teachers/dino/phis", params={"format": format_, "dtype": dtype})
        transform = dino.transform("phi-s")
        arrays = load(answer.content) if format_ == "safetensors" else np.load(io.BytesIO(answer.content))
        for name in ("mean", "matrix", "inverse"):
            assert arrays[name].dtype == dtype
            assert np.array_equal(arrays[name], getattr(transform, name).astype(dtype))
        assert answer.headers["statsvc-transform"] == transform.digest
        assert client.get("/teachers/dino/phis", params={"format": format_, "dtype": dtype}).content == answer.content
        if format_ == "npz":
            assert (str(arrays["digest"]), str(arrays["method"])) == (transform.digest, "phi-s")

    @pytest.mark.parametrize(
        ("accept", "content_type"),
        [
            ("application/json", "application/json"),
            ("*/*", "application/json"),
            ("application/vnd.safetensors", "application/vnd.safetensors"),
            ("application/x-npz;q=0.5, application/vnd.safetensors;q=0.4", "application/x-npz"),
            ("application/json;q=0, */*", "application/vnd.safetensors"),
            ("text/html, application/*;q=0.8", "application/json"),
        ],
    )
    def test_the_accept_header_chooses(self, client: httpx.Client, accept: str, content_type: str) -> None:
        answer = client.get("/teachers/dino/phis", headers={"accept": accept})
        assert answer.headers["content-type"] == content_type
        assert answer.headers["vary"] == "Accept"

    def test_what_cannot_be_had_is_406_and_names_what_can(self, client: httpx.Client) -> None:
        found = problem(client, "/teachers/dino/phis", 406, accept="text/html, image/png")
        assert "application/vnd.safetensors" in found["detail"]

    def test_the_etag_is_the_digest_and_spares_a_second_answer(self, client: httpx.Client, dino: Teacher) -> None:
        digest = dino.transform("phi-s").digest
        first = client.get("/teachers/dino/phis")
        assert first.headers["etag"] == f'"{digest}"'
        for known in (f'"{digest}"', f'W/"{digest}"', f'"other", "{digest}"', "*"):
            again = client.get("/teachers/dino/phis", headers={"if-none-match": known})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == first.headers["etag"]
        assert client.get("/teachers/dino/phis", headers={"if-none-match": '"other"'}).status_code == 200

    def test_every_representation_has_an_etag_of_its_own(self, client: httpx.Client) -> None:
        forms = [{}, {"dtype": "float32"}, {"format": "npz"}, {"format": "safetensors"},
                 {"format": "safetensors", "dtype": "float32"}]  # fmt: skip
        etags = {client.get("/teachers/dino/phis", params=form).headers["etag"] for form in forms}
        assert len(etags) == len(forms)

    def test_a_digest_is_immutable_for_a_year_and_a_name_is_not(self, client: httpx.Client, dino: Teacher) -> None:
        by_digest = client.get(f"/transforms/{dino.transform('phi-s').digest}").headers["cache-control"]
        assert by_digest == "max-age=31536000, immutable"
        assert client.get("/teachers/dino/phis").headers["cache-control"] == "no-cache"

    def test_unknown_methods_outputs_and_digests_are_404_with_what_there_is(self, client: httpx.Client) -> None:
        assert "phi-s" in problem(client, "/teachers/dino/transforms/whitening", 404)["detail"]
        assert "patches, summary" in problem(client, "/teachers/dino/phis?output=tokens", 404)["detail"]
        problem(client, f"/transforms/{'0' * 64}", 404)
        problem(client, "/transforms/0", 422)


class TestStatistics:
    @pytest.mark.parametrize("output", ["patches", "summary"])
    def test_moments_are_those_of_the_pilot(self, client: httpx.Client, dino: Teacher, output: str) -> None:
        moments, card = dino.moments(output), got(client, "/teachers/dino/moments", output=output)
        assert card["count"] == moments.count
        assert card["mean"] == moments.mean.tolist()
        assert card["variance"] == np.diagonal(moments.covariance()).tolist()
        answer = client.get("/teachers/dino/moments", params={"output": output, "format": "npz"})
        arrays = np.load(io.BytesIO(answer.content))
        assert int(arrays["count"]) == moments.count
        assert np.array_equal(arrays["covariance"], moments.covariance())
        etag = {"if-none-match": answer.headers["etag"]}
        again = client.get("/teachers/dino/moments", params={"output": output, "format": "npz"}, headers=etag)
        assert again.status_code == 304

    def test_the_report_has_every_fit_and_the_drift_of_every_dataset_shard(
        self, client: httpx.Client, dino: Teacher
    ) -> None:
        found = got(client, "/teachers/dino/report")
        assert found["fits"]["patches"]["phi-s"] == dino.report()["patches"]["phi-s"]
        (drift,) = found["drift"].values()
        targets = dino.targets("patches")
        rows = targets.rows()
        for entry in drift["patches"]:
            of_shard = rows[rows // ROWS_PER_SHARD == entry["shard"]]
            y_Nk = targets.read(of_shard).reshape(-1, targets.k).astype(np.float64)
            assert entry["rows"] == len(of_shard)
            # The recorded figures are of targets before int8, whose noise has a variance of about 4e-5.
            assert entry["variance_mean"] == pytest.approx(y_Nk.var(axis=0).mean(), rel=2e-3)
            assert entry["mean_rms"] == pytest.approx(np.sqrt((y_Nk.mean(axis=0) ** 2).mean()), abs=2e-3)
        assert [entry["shard"] for entry in drift["patches"]] == [0, 1, 2]
        (part,) = got(client, "/teachers/dino/report", start=1, limit=1)["drift"].values()
        assert [entry["shard"] for entry in part["patches"]] == [1]


class TestFeatureShards:
    @pytest.mark.parametrize("array", ["patches/codes", "patches/scales", "summary/codes", "summary/target_var"])
    def test_the_list_and_the_bytes_are_those_of_the_commits(
        self, client: httpx.Client, service_once: Running, dino: Teacher, array: str
    ) -> None:
        found = got(client, "/teachers/dino/shards", array=array)
        assert [entry["shard"] for entry in found["shards"]] == [0, 1, 2]
        assert found["transform"] == dino.targets(array.partition("/")[0]).transform_digest
        for entry in found["shards"]:
            commit = dino.store.ledger.read("cache", entry["shard"], "dino", found["set"])
            assert commit is not None
            (record,) = (r for r in commit.objects if f"/{array}/" in r.path)
            assert entry["rows"] == commit.rows
            assert {key: entry[key] for key in ("bytes", "crc32c", "content_crc32c")} == {
                key: value for key, value in record._asdict().items() if key != "path"
            }
            answer = client.get(f"/teachers/dino/shards/{entry['shard']}", params={"array": array})
            assert answer.content == (service_once.store_path / record.path).read_bytes()
            assert answer.headers["etag"] == f'"{record.content_crc32c}"'

    def test_without_an_array_the_targets_of_the_patches_come(self, client: httpx.Client) -> None:
        assert got(client, "/teachers/dino/shards")["array"] == "patches/codes"
        assert client.get("/teachers/dino/shards/0").content == (
            client.get("/teachers/dino/shards/0?array=patches/codes").content
        )

    def test_the_list_comes_in_parts_that_lead_on(self, client: httpx.Client) -> None:
        path, shards = "/teachers/dino/shards?limit=1", []
        while path:
            found = got(client, path)
            shards += [entry["shard"] for entry in found["shards"]]
            path = found["next"]
        assert shards == [0, 1, 2]

    def test_what_is_not_there_is_404(self, client: httpx.Client) -> None:
        problem(client, "/teachers/dino/shards/3", 404)
        problem(client, "/teachers/dino/shards/0?set=phi-s-000000000000-int8", 404)
        assert "patches/codes" in problem(client, "/teachers/dino/shards/0?array=patches/values", 404)["detail"]
        problem(client, "/teachers/dino/shards/-1", 422)
        problem(client, "/teachers/dino/shards/0?array=../../zarr", 422)


class TestTargets:
    @pytest.mark.parametrize("output", ["patches", "summary"])
    @pytest.mark.parametrize("space", ["normalized", "teacher"])
    def test_rows_come_decoded_as_a_numpy_array(
        self, client: httpx.Client, dino: Teacher, output: str, space: str
    ) -> None:
        answer = client.get("/teachers/dino/targets", params={"rows": "7,0,14,0", "output": output, "space": space})
        targets = dino.targets(output)
        assert np.array_equal(np.load(io.BytesIO(answer.content)), targets.read([7, 0, 14, 0], space))
        assert answer.headers["statsvc-transform"] == targets.transform_digest

    def test_a_row_without_a_target_is_404_never_zeros(self, client: httpx.Client) -> None:
        for row in (*ABSENT, 21, 10**12):
            problem(client, f"/teachers/dino/targets?rows=0,{row}", 404)

    def test_rows_that_are_no_numbers_or_too_many_are_refused_with_the_limit(self, client: httpx.Client) -> None:
        for rows in ("", "a", "0,", "-1", "0 1", "00", "1e3", "٣", "9" * 19):
            problem(client, f"/teachers/dino/targets?rows={rows}", 422)
        assert "256" in problem(client, f"/teachers/dino/targets?rows={','.join(['0'] * 257)}", 413)["detail"]

    def test_an_answer_too_large_for_the_service_is_refused(self, service_once: Running) -> None:
        with serving(service_once.store_path, max_answer_bytes=16 * 32 * 4 * 2) as small, httpx.Client() as client:
            assert client.get(f"{small.url}/teachers/dino/targets?rows=0,1").status_code == 200
            assert "holds 2" in problem(client, f"{small.url}/teachers/dino/targets?rows=0,1,2", 413)["detail"]


class TestSamples:
    def test_a_key_leads_to_its_row(self, client: httpx.Client) -> None:
        (row,) = got(client, "/samples/b2")["rows"]
        assert (row["row"], row["dataset_shard"], row["shard"], row["position"]) == (10, "b.tar", 1, 3)
        assert (row["status"], row["teachers"]) == ("ok", {"dino": "ok", "siglip": "ok"})
        assert client.get(f"/teachers/dino/targets?rows={row['row']}").status_code == 200

    def test_a_sample_without_a_usable_image_says_so(self, client: httpx.Client) -> None:
        (row,) = got(client, "/samples/broken")["rows"]
        assert row["status"] == "undecodable"
        assert set(row["teachers"].values()) == {"undecodable"}

    def test_an_unknown_key_is_404(self, client: httpx.Client) -> None:
        problem(client, "/samples/nobody", 404)
        problem(client, "/samples/b2.jpg", 404)


class TestKeys:
    def test_keys_of_any_bytes_are_found_in_every_tar_that_has_them(self, finished: Finished) -> None:
        for name in ("d.tar", "e.tar"):
            (image,) = photographs("x")
            write_tar(finished.folder / name, [("ordner/bild \udce4 %41.jpg", image[1])])
        assert finished.run() == 0
        with serving(finished.path) as running:
            rows = httpx.get(f"{running.url}/samples/ordner/bild%20%E4%20%2541").json()["rows"]
        assert [(row["dataset_shard"], row["position"]) for row in rows] == [("d.tar", 0), ("e.tar", 0)]


class TestGrowth:
    def test_a_service_that_started_before_its_store_finds_it(self, damageable: Finished, tmp_path: Path) -> None:
        with serving(tmp_path / "later") as running, httpx.Client(base_url=running.url) as client:
            assert client.get("/healthz").status_code == 200
            for path in ("/readyz", "/teachers", "/teachers/dino/phis"):
                problem(client, path, 503)
                assert int(client.get(path).headers["retry-after"]) > 0
            assert got(client, "/progress")["state"] == "waiting"
            assert client.get("/metrics").status_code == 200
            assert client.get("/").status_code == 200
            shutil.copytree(damageable.path, tmp_path / "later")
            assert got(client, "/readyz") == {"status": "ready"}
            assert len(got(client, "/teachers")["teachers"]) == 2

    def test_before_the_fit_phis_is_404_with_the_progress_and_when_to_ask_again(self, damageable: Finished) -> None:
        (damageable.path / ".statsvc/commits/fit/dino.json").unlink()
        with serving(damageable.path) as running, httpx.Client(base_url=running.url) as client:
            found = problem(client, "/teachers/dino/phis", 404)
            assert found["progress"]["teachers"]["dino"]["measured"]["rows"] > 0
            assert found["progress"]["teachers"]["dino"]["fitted"] is False
            assert int(client.get("/teachers/dino/phis").headers["retry-after"]) > 0
            assert client.get("/teachers/siglip/phis").status_code == 200

    def test_a_teacher_that_is_planned_and_not_measured_yet_is_404_with_the_progress(
        self, damageable: Finished
    ) -> None:
        shutil.rmtree(damageable.path / "teachers" / "dino")
        with serving(damageable.path) as running, httpx.Client(base_url=running.url) as client:
            assert "progress" in problem(client, "/teachers/dino/phis", 404)
            assert "progress" not in problem(client, "/teachers/sam/phis", 404)

    def test_new_commits_appear_without_a_restart(self, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
        always_counting(monkeypatch)
        with serving(finished.path) as running, httpx.Client(base_url=running.url) as client:
            codes = got(client, "/teachers/dino/shards")["set"]
            chunk = f"/zarr/teachers/dino/cache/{codes}/patches/codes/c/3/0/0"
            before = client.get("/zarr/teachers/dino/status/zarr.json")
            assert client.get(chunk).status_code == 404
            write_tar(finished.folder / "d.tar", photographs("d0", "d1"))
            assert finished.run() == 0
            assert client.get(chunk).status_code == 200
            assert [entry["rows"] for entry in got(client, "/teachers/dino/shards")["shards"]][3:] == [2]
            assert got(client, "/progress")["dataset_shards"]["indexed"] == 4
            assert got(client, "/teachers/dino")["cache_sets"][0]["dataset_shards"] == 4
            assert client.get("/teachers/dino/targets?rows=21,22").status_code == 200
            grown = client.get("/zarr/teachers/dino/status/zarr.json")
            assert grown.json()["shape"] == [28]
            assert grown.headers["etag"] != before.headers["etag"]

    def test_a_repaired_store_is_served_as_it_is(self, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
        always_counting(monkeypatch)
        with serving(finished.path) as running, httpx.Client(base_url=running.url) as client:
            cache_set = got(client, "/teachers/dino/shards")["set"]
            chunk = f"teachers/dino/cache/{cache_set}/patches/codes/c/1/0/0"
            whole = client.get(f"/zarr/{chunk}").content
            targets = client.get("/teachers/dino/targets?rows=7").content
            (finished.path / chunk).write_bytes(whole[:-1])
            problem(client, "/teachers/dino/targets?rows=7", 409)
            assert "verify --repair" in problem(client, f"/zarr/{chunk}", 409)["detail"]
            (finished.path / chunk).unlink()
            problem(client, f"/zarr/{chunk}", 409)
            (finished.path / f".statsvc/commits/cache/dino/{cache_set}/000001.json").unlink()
            problem(client, f"/zarr/{chunk}", 404)
            problem(client, "/teachers/dino/targets?rows=7", 404)
            assert got(client, "/teachers/dino")["cache_sets"][0]["dataset_shards"] == 2
            assert finished.run() == 0
            assert client.get(f"/zarr/{chunk}").content == whole
            assert client.get("/teachers/dino/targets?rows=7").content == targets
            assert got(client, "/teachers/dino")["cache_sets"][0]["dataset_shards"] == 3

    def test_what_was_counted_is_not_read_again(self, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        always_counting(monkeypatch)
        got(client, "/progress")
        monkeypatch.setattr("statsvc.store.commits.Commit.from_bytes", None)  # whoever calls it fails
        assert got(client, "/progress")["samples"] == 19
        assert got(client, "/teachers")


class TestDamage:
    """One damaged record costs what depends on it, and nothing else."""

    def test_a_damaged_commit_is_told_of_and_the_other_dataset_shards_are_served(self, damageable: Finished) -> None:
        damageable.cache_commit("dino", 1).write_bytes(b"{}")
        (damageable.path / ".statsvc/commits/index/000002.json").write_bytes(b"{}")
        with serving(damageable.path) as running, httpx.Client(base_url=running.url) as client:
            # What was never sound was not counted; what was sound a moment ago is met by the routes.
            assert [entry["shard"] for entry in got(client, "/teachers/dino/shards")["shards"]] == [0, 2]
            assert got(client, "/teachers/dino")["cache_sets"][0]["damaged_commits"] == 1
            damageable.cache_commit("dino", 2).write_bytes(b"{}")
            found = got(client, "/teachers/dino/shards")
            assert ([entry["shard"] for entry in found["shards"]], found["damaged"]) == ([0], [2])
            assert got(client, "/teachers/dino/report")["damaged"] == [2]
            assert got(client, "/samples/a1")["rows"][0]["row"] == 1
            problem(client, "/teachers/dino/targets?rows=7", 409)
            assert client.get("/teachers/dino/targets?rows=0").status_code == 200

    def test_a_transform_without_its_report_is_damage_and_not_kept_by_caches(self, damageable: Finished) -> None:
        for report in (damageable.path / ".statsvc/reports").iterdir():
            report.unlink()
        with serving(damageable.path) as running, httpx.Client(base_url=running.url) as client:
            digest = damageable.store.teacher("dino").transform("phi-s").digest
            problem(client, f"/transforms/{digest}", 409)
            assert client.get(f"/transforms/{digest}").headers["cache-control"] == "no-store"
            assert client.get(f"/transforms/{digest}?format=npz").status_code == 200

    @pytest.mark.parametrize(
        ("key", "value"),
        [("preprocessing", 5), ("fingerprint", 5), ("outputs", {"patches": {"tokens": True, "dim": 32}}),
         ("outputs", {"patches": {"tokens": 16, "dim": 32, "grid": [None]}}),
         ("outputs", {"patches": {"tokens": 10**30, "dim": 32}})],
    )  # fmt: skip
    def test_odd_metadata_of_a_teacher_is_damage(self, damageable: Finished, key: str, value: Any) -> None:
        edit_attributes(damageable.path / "teachers/dino/zarr.json", **{key: value})
        with serving(damageable.path) as running, httpx.Client(base_url=running.url) as client:
            for route in ("/teachers/dino", "/teachers/dino/phis", "/teachers/dino/targets?rows=0"):
                problem(client, route, 409)
            assert client.get("/teachers/siglip/phis").status_code == 200

    @pytest.mark.parametrize("views", [None, [], {}, {"per_image": None}, {"per_image": 0}])
    def test_odd_views_of_a_store_are_damage(self, damageable: Finished, views: Any) -> None:
        edit_attributes(damageable.path / "zarr.json", views=views)
        with serving(damageable.path) as running, httpx.Client(base_url=running.url) as client:
            problem(client, "/samples/a0", 409)

    def test_records_of_the_run_that_nobody_wrote_are_left_aside(self, damageable: Finished) -> None:
        for nonsense in ("[" * 100_000, '{"heartbeat": 1e400}', '{"plan": {"teachers": [1]}, "locations": {}}'):
            (damageable.path / ".statsvc/run.json").write_text(nonsense)
            (damageable.path / ".statsvc/lease.json").write_text(nonsense)
            with serving(damageable.path) as running, httpx.Client(base_url=running.url) as client:
                assert got(client, "/progress")["samples"] == 19

    def test_a_folder_without_a_commit_is_no_cache_set(self, damageable: Finished) -> None:
        (damageable.path / "teachers/dino/cache/phi-s-000000000000-int8").mkdir()
        with serving(damageable.path) as running, httpx.Client(base_url=running.url) as client:
            assert got(client, "/teachers/dino/shards")["shards"]
            assert client.get("/teachers/dino/targets?rows=0").status_code == 200


def test_computed_answers_have_a_limit_and_say_so(service_once: Running) -> None:
    with serving(service_once.store_path, max_answer_bytes=1000) as small, httpx.Client(base_url=small.url) as client:
        for path in ("phis?format=npz", "transforms/global?format=safetensors", "moments?format=npz"):
            assert "1000" in problem(client, f"/teachers/dino/{path}", 413)["detail"]


def test_a_service_does_not_serve_another_service() -> None:
    with pytest.raises(PlanError, match=r"store: .*give its path"):
        read_settings(store="http://localhost:1")


def test_head_is_the_head_of_get(client: httpx.Client) -> None:
    for path in ("/teachers", "/teachers/dino/phis", "/teachers/dino/targets?rows=0", "/healthz", "/", "/nothing"):
        get, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        ours = {"date", "x-request-id"}
        assert {k: v for k, v in head.headers.items() if k not in ours} == {
            k: v for k, v in get.headers.items() if k not in ours
        }
    assert 'route="/teachers/{name}/phis"' in client.get("/metrics").text


class TestProgress:
    def test_a_finished_run_is_finished_and_counts_add_up(self, client: httpx.Client, store: Store) -> None:
        found = got(client, "/progress")
        assert found["state"] == "finished"
        assert found["dataset_shards"] == {"planned": 3, "indexed": 3, "quarantined": 0}
        assert found["samples"] == 19
        for name in store.teachers():
            (cached,) = found["teachers"][name]["cached"].values()
            assert cached["rows"] == cached["status"]["ok"] == len(store.teacher(name).targets().rows()) == 17

    def test_a_run_with_a_heartbeat_is_running_and_one_without_is_stopped(self, damageable: Finished) -> None:
        lease = damageable.path / ".statsvc/lease.json"
        (damageable.path / ".statsvc/commits/cache/dino").rename(damageable.path / "gone")
        with serving(damageable.path) as running, httpx.Client(base_url=running.url) as client:
            assert got(client, "/progress")["state"] == "stopped"
            lease.write_text(json.dumps({"heartbeat": time.time()}))
            assert got(client, "/progress")["state"] == "running"
            lease.write_text(json.dumps({"heartbeat": time.time() - 100}))
            assert got(client, "/progress")["state"] == "stopped"

    def test_the_rate_is_that_of_the_rows_that_came(self, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
        always_counting(monkeypatch)
        with serving(finished.path) as running, httpx.Client(base_url=running.url) as client:
            assert got(client, "/progress")["rows_per_second"] == 0
            write_tar(finished.folder / "d.tar", photographs("d0", "d1", "d2"))
            assert finished.run() == 0
            assert got(client, "/progress")["rows_per_second"] > 0


def test_the_page_asks_nobody_but_this_service(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "https://" not in page.text
