"""One real run through the command line, with the real Prefect, DVC, Great Expectations, MLflow and BentoML."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sqlite3
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from tests.conftest import Project, SmokeRun

STAGES = (
    "ingest", "version", "validate", "sequences", "tokenise", "judge", "sft", "rl", "evaluate", "package", "register",
    "gate",
)  # fmt: skip
ROWS = {
    "grpo", "sft", "unconditional", "wrong_user", "random_item", "copy_last", "nearest_item", "popularity", "oracle",
    "sft_guided", "best_of_n", "copy_favourites",
}  # fmt: skip
METRICS = {
    "basket_precision", "hit@10", "ndcg@10", "sim_next", "sim_history", "diversity", "novelty", "validity", "frechet",
}  # fmt: skip


def test_retrain_answers_in_the_promised_form(smoke_run: SmokeRun) -> None:
    record = smoke_run.record
    assert tuple(record["stages"]) == STAGES
    assert not any(stage["reused"] for stage in record["stages"].values())
    assert all(stage["s"] >= 0 for stage in record["stages"].values())
    assert record["model"] == {"name": "couturier", "version": 1, "alias": record["model"]["alias"]}
    assert re.fullmatch(r"couturier:[0-9a-z]+", record["bento"])
    assert Path(record["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert 0 < record["overhead_share"] < 1
    assert record["peak_rss_bytes"] > 100e6
    assert record["wall_s"] > sum(stage["s"] for stage in record["stages"].values()) * 0.9
    assert record["verdict"] in ("promote", "hold", "reject")


def test_the_summary_says_where_everything_is_and_what_to_type_next(smoke_run: SmokeRun) -> None:
    said = smoke_run.answer.err
    for word in ("report", "bento", "MLflow", "Prefect", "Next:", "couturier report latest"):
        assert word in said


def test_nothing_is_written_outside_the_project_but_its_own_folders(smoke_run: SmokeRun) -> None:
    names = {path.name for path in smoke_run.project.folder.iterdir()}
    assert names <= {".couturier", "data", "data.dvc", ".dvc", ".dvcignore", ".gitignore"}


def test_scratch_is_empty_after_a_run(smoke_run: SmokeRun) -> None:
    assert not [path for path in (smoke_run.project.workspace / "scratch").iterdir() if path.name != "build"]


def test_report_has_every_row_and_metric(smoke_run: SmokeRun) -> None:
    found = smoke_run.project.run("report", "latest", "--json").json
    assert found["run_id"] == smoke_run.record["run_id"]
    assert set(found["table"]) >= ROWS
    for row in ROWS:
        assert set(found["table"][row]) >= METRICS, row
        for metric in METRICS:
            mean, low, high = found["table"][row][metric]
            assert low is None or low <= mean <= high
    assert {"gauc", "gauc_popularity"} <= set(found["judge"])
    text = smoke_run.project.run("report", smoke_run.record["run_id"][:6]).out
    assert "basket_precision" in text
    assert "copy_favourites" in text


def test_runs_and_models_list_it(smoke_run: SmokeRun) -> None:
    (run, *_) = smoke_run.project.run("runs", "--json").json["runs"][::-1]
    assert run["run_id"] == smoke_run.record["run_id"]
    assert run["status"] == "finished"
    models = smoke_run.project.run("models", "--json").json["models"]
    assert models[-1]["bento"] == smoke_run.record["bento"]
    assert smoke_run.record["bento"] in smoke_run.project.run("models").out


def test_compare_ranks_judges_on_the_same_data(smoke_run: SmokeRun) -> None:
    found = smoke_run.project.run(
        "compare", "--judges", "attention", "--recipe", "smoke", "--set", "steps=4", "--set", "test_users=60", "--json"
    ).json
    assert found["best"] == "attention" and set(found["table"]) == {"attention", "popularity", "own_favourites"}
    assert Path(found["picture"]).exists()


def test_lineage_goes_from_the_model_back_to_the_data(smoke_run: SmokeRun) -> None:
    text = json.dumps(smoke_run.project.run("lineage", "latest", "--json").json)
    assert smoke_run.record["data_md5"] in text
    for stage in ("validate", "sft", "rl", "package"):
        assert smoke_run.record["stages"][stage]["id"] in text
    assert smoke_run.record["data_md5"] in smoke_run.project.run("lineage", "latest").out
    assert "flowchart" in smoke_run.project.run("lineage", "latest", "--mermaid").out


def test_data_is_versioned_and_clean(smoke_run: SmokeRun) -> None:
    found = smoke_run.project.run("data", "status", "--json").json
    assert found["status"] == "clean"
    assert found["md5"] == smoke_run.record["data_md5"]


def test_data_travels_through_a_remote(smoke_run: SmokeRun, tmp_path: Path) -> None:
    remote, other = tmp_path / "remote", type(smoke_run.project)(folder=tmp_path / "other")
    other.folder.mkdir()
    assert smoke_run.project.run("data", "push", str(remote), "--json").json["files"] > 0
    assert "Nothing to do" in smoke_run.project.run("data", "push", str(remote)).out
    shutil.copy(smoke_run.project.folder / "data.dvc", other.folder)
    assert other.run("data", "pull", str(remote), "--json").json["files"] > 0
    assert "clean" in other.run("data", "status").out
    for path in (smoke_run.project.folder / "data").iterdir():
        assert (other.folder / "data" / path.name).read_bytes() == path.read_bytes()


def test_validate_finds_what_retrain_left(smoke_run: SmokeRun) -> None:
    found = smoke_run.project.run("validate", "--recipe", "smoke", "--json").json
    assert found["reused"]
    assert found["id"] == smoke_run.record["stages"]["validate"]["id"]
    for table in found["tables"].values():
        assert table["kept"] + table["quarantined"] == table["raw"]
    assert Path(found["docs"]).exists()
    assert "kept + quarantined = raw" in smoke_run.project.run("validate", "--recipe", "smoke").out


def test_prefect_has_the_run_and_its_results_are_json(smoke_run: SmokeRun) -> None:
    home = smoke_run.project.workspace / "prefect"
    with sqlite3.connect(f"file:{home / 'prefect.db'}?mode=ro", uri=True) as database:
        states = database.execute("select state_type from flow_run").fetchall()
    assert ("COMPLETED",) in states
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in (home / "storage").iterdir()]
    assert kept
    assert {one["metadata"]["serializer"]["type"] for one in kept} == {"json"}
    ids = {smoke_run.record["stages"][name]["id"] for name in ("validate", "sft", "rl", "package")}
    assert ids <= {path.name for path in (home / "storage").iterdir()}


def test_a_second_run_reuses_everything(smoke_run: SmokeRun) -> None:
    again = smoke_run.project.run(*smoke_run.words).json
    assert all(stage["reused"] for stage in again["stages"].values()), again["stages"]
    for key in ("model", "bento", "report", "verdict"):
        assert again[key] == smoke_run.record[key]
    assert again["run_id"] != smoke_run.record["run_id"]


def test_an_artifact_that_is_gone_is_made_again_though_prefect_knows_it(smoke_run: SmokeRun) -> None:
    """The artifact store is the truth, not Prefect's cache."""
    artifact = smoke_run.project.workspace / "artifacts" / smoke_run.record["stages"]["sequences"]["id"]
    before = {
        path.name: path.read_bytes() for path in artifact.iterdir() if path.suffix in (".safetensors", ".parquet")
    }
    shutil.rmtree(artifact)
    again = smoke_run.project.run(*smoke_run.words).json
    made = {name for name, stage in again["stages"].items() if not stage["reused"]}
    assert made == {"sequences"}
    assert {name: (artifact / name).read_bytes() for name in before} == before


def test_another_rl_setting_redoes_rl_and_what_follows(smoke_run: SmokeRun) -> None:
    again = smoke_run.project.run(*smoke_run.words, "--set", "rl.seed=1").json
    made = [name for name, stage in again["stages"].items() if not stage["reused"]]
    assert made == ["rl", "evaluate", "package", "register", "gate"]
    assert again["model"]["version"] > smoke_run.record["model"]["version"]


def known_user(smoke_run: SmokeRun) -> str:
    users = smoke_run.project.workspace / "artifacts" / smoke_run.record["stages"]["sequences"]["id"]
    found: list[str] = json.loads((users / "users-latest.json").read_text(encoding="utf-8"))
    return found[0]


def generate(smoke_run: SmokeRun, out: Path, *more: str) -> dict[str, Any]:
    words = ("generate", "--model", "1", "--n", "3", "--out", str(out), "--json", *more)
    found: dict[str, Any] = smoke_run.project.run(*words).json
    return found


def test_generate_writes_pictures_and_a_grid(smoke_run: SmokeRun, tmp_path: Path) -> None:
    user = known_user(smoke_run)
    found = generate(smoke_run, tmp_path / "a", "--user", user)
    assert len(found["pictures"]) == 3
    assert "OpenMoji" in found["attribution"]
    for picture in found["pictures"]:
        assert Image.open(picture["path"]).size == (128, 128)
    assert Image.open(found["grid"]).size[0] > 128
    again = generate(smoke_run, tmp_path / "b", "--user", user)
    assert Path(again["pictures"][0]["path"]).read_bytes() == Path(found["pictures"][0]["path"]).read_bytes()
    other = generate(smoke_run, tmp_path / "c", "--user", user, "--seed", "5")
    assert [one["id"] for one in other["pictures"]] != [one["id"] for one in found["pictures"]]
    items = ",".join(item["item_id"] for item in found["history"][:3])
    titled = generate(smoke_run, tmp_path / "d", "--history", items, "--titles", "--writer", "phrases")
    assert titled["user"] is None
    assert all(one["titled_by"] in ("item", "phrases") and one["title"] for one in titled["pictures"])


def test_an_unknown_user_is_told(smoke_run: SmokeRun) -> None:
    answer = smoke_run.project.run("generate", "--model", "1", "--user", "nobody", code=1)
    assert "user_id 'nobody'" in answer.err
    assert "Traceback" not in answer.err


def test_explain_names_what_speaks_for_the_next_picture(smoke_run: SmokeRun) -> None:
    user = known_user(smoke_run)
    found = smoke_run.project.run("explain", user, "--model", "1", "--top", "2", "--json").json
    assert found["user"] == user and found["judge"] == "attention" and found["history"] >= 2
    (candidate,) = found["candidates"]
    assert len(candidate["because"]) == 2 and candidate["nearest"]["title"]
    told = smoke_run.project.run(
        "explain", user, "--model", "1", "--items", found["candidates"][0]["nearest"]["item_id"]
    )
    assert candidate["nearest"]["title"] in told.out and " SD" in told.out


def test_two_retrainings_do_not_collide_and_ctrl_c_is_clean(smoke_run: SmokeRun, tmp_path: Path) -> None:
    project = smoke_run.project
    words = (*smoke_run.words, "--set", "sft.seed=9")
    process = project.start(*words)
    try:
        wait_for_stage(project, "sft", process)
        assert "retraining is under way" in project.run(*words, code=1).err
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Run the same command again" in json.loads(out.splitlines()[-1])["error"]
    assert project.run("runs", "--json").json["runs"][0]["status"] == "stopped"


def wait_for_stage(project: Project, stage: str, process: Any, patience_s: float = 120) -> None:
    """Return when a stage has begun to work: its half-made folder is there."""
    until = time.monotonic() + patience_s
    while not list((project.workspace / "artifacts").glob(f".{stage}-*.half")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"{stage} did not begin within {patience_s} s"
        time.sleep(0.02)


def test_serve_answers_until_it_is_stopped(smoke_run: SmokeRun) -> None:
    process = smoke_run.project.start("serve", "--model", "1", "--json")
    try:
        assert process.stdout is not None
        where = json.loads(process.stdout.readline())
        assert where["bento"] == smoke_run.record["bento"]
        with urllib.request.urlopen(f"{where['url']}/version", timeout=30) as answer:
            version = json.load(answer)
        assert smoke_run.record["stages"]["rl"]["id"] in json.dumps(version)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()


def test_promote_by_force_and_roll_back(smoke_run: SmokeRun) -> None:
    project = smoke_run.project
    if len(_models(project)) < 2:
        # The test that makes a second version may have run on another worker, in another project.
        project.run(*smoke_run.words, "--set", "rl.seed=1")
    numbers = [model["version"] if "version" in model else model["number"] for model in _models(project)]
    for number in sorted(numbers)[:2]:
        done = project.run("promote", str(number), "--force", "--why", "the smoke test says so", "--json").json
        assert done["moved"]
    back = project.run("rollback", "--why", "and now it does not", "--json").json
    assert back["version"] == sorted(numbers)[0]
    champions = [model["number"] for model in _models(project) if "champion" in model["aliases"]]
    assert champions == [back["version"]]
    assert "champion" in project.run("lineage", "champion").out


def _models(project: Project) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = project.run("models", "--json").json["models"]
    return found
