"""Stage ``package``: a bento from our own tree, booted, asked and compared with the model in this process.

    bundle ──▶ build beside ──▶ rename into the store ──▶ boot on a free loopback port ──▶ same pictures? ──▶ end

The bento carries the modules that the service imports and nothing else of ours: no flows, no DVC, MLflow, Prefect or
Great Expectations, no pickle. ``bentoml build`` locks nothing, so it asks no index. Its tag derives from the manifest
id; it is built under ``scratch`` and renamed into the store, so that the store never holds half a bento.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from couturier.components.errors import LineageError, MissingExtraError
from couturier.components.files import (
    read_json,
    sha256_of_file,
    sha256_of_json,
    sync_folder,
    write_json,
    written_beside,
)
from couturier.components.lineage.provenance import code_commit
from couturier.components.lineage.sources import source_digests
from couturier.components.lineage.stages import ArtifactStore, StageContext
from couturier.components.runtime import derived_seed, threads
from couturier.serving.bundle import Bundle, write_bundle
from couturier.serving.client import QUIET, Client, ServiceError, serve_bento
from couturier.serving.pictures import png_bytes
from couturier.serving.sampling import Sampling

SERVICE = "couturier.serving.service"
PAGE_FILES = ("studio.html", "studio.js", "studio.css")
NAME = "couturier"
# What a generator's kind imports beyond the ``serve`` extra.
GENERATOR_NEEDS: Mapping[str, Sequence[str]] = {"diffusion": ("diffusers",)}
# File types that can run code when they are read; a bento of ours has none.
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz")


def _page_digest() -> str:
    return sha256_of_json([sha256_of_file(Path(__file__).with_name(name)) for name in PAGE_FILES])


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is packed and how it is proved."""

    golden_users: int = 3
    """People whose pictures are drawn twice, in this process and over HTTP."""
    golden_pictures: int = 4
    """Pictures for each of them."""
    golden_seed: int = 0
    latency_requests: int = 5
    """Requests of one picture whose median time is recorded."""
    boot_timeout_s: float = 120.0
    page: str = field(default_factory=_page_digest)
    """Digest of the web page's files, so that a changed page makes a new bento. Set by itself."""


def run(ctx: StageContext) -> None:
    """``sequences, tokenise, judge, rl`` → ``bento.json``, ``golden/`` and a bento in the workspace's store.

    Raises:
        MissingExtraError: BentoML is not installed.
        LineageError: the build failed, or the served pictures differ from the ones drawn here.
        ServiceError: the bento did not become ready.
    """
    config: Config = ctx.config
    if importlib.util.find_spec("bentoml") is None:
        raise MissingExtraError("bentoml", extra="serve", needed_for="the package stage")
    version = re.sub(r"[^a-z0-9]", "", ctx.scratch.name.removeprefix("package-").lower())
    tag = f"{NAME}:{version}"
    ctx.progress.start("package", 4, unit="steps")
    context = ctx.scratch / "context"
    shutil.rmtree(context, ignore_errors=True)
    write_context(context, ctx, bundle_id=f"{NAME}-{version}")
    ctx.progress.advance(note="bundle written")
    bento = build(context, home=ctx.workspace.bentos, beside=ctx.scratch / "build", version=version)
    ctx.progress.advance(note="bento built")
    with threads(1):
        golden = draw_golden(Bundle.load(bento / "src" / "model"), config)
    ctx.progress.advance(note="golden pictures drawn")
    figures = prove(tag, golden, config, ctx)
    ctx.progress.advance(note="served pictures are the same")
    ctx.progress.stop()
    for name, png in golden.pngs.items():
        path = ctx.out / "golden" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        ctx.tracker.picture(f"golden/{name}", np.asarray(Image.open(path)))
    facts = {
        "tag": tag,
        "path": bento.relative_to(ctx.workspace.root).as_posix(),
        "sha256": tree_digest(bento / "src"),
        "bytes": sum(file.stat().st_size for file in bento.rglob("*") if file.is_file()),
        "golden": {name: hashlib.sha256(png).hexdigest() for name, png in golden.pngs.items()},
        **figures,
    }
    write_json(ctx.out / "bento.json", facts)
    ctx.tracker.file(ctx.out / "bento.json")
    ctx.facts.update({name: facts[name] for name in ("tag", "path", "bytes", "boot_s", "latency_ms")})


def write_context(folder: Path, ctx: StageContext, *, bundle_id: str) -> None:
    """The folder that ``bentoml build`` packs: ``couturier/`` (our modules), ``model/`` (the bundle), its settings."""
    copy_sources(folder)
    write_bundle(
        folder / "model",
        **{name: ctx.inputs[name] for name in ("sequences", "tokenise", "judge", "rl")},
        version={"bundle": bundle_id, **origin(ctx)},
    )
    also = GENERATOR_NEEDS.get(read_json(folder / "model" / "model" / "generator.json")["kind"], ())
    listed = "".join(f'    - "{requirement}"\n' for requirement in requirements(also))
    (folder / "bentofile.yaml").write_text(
        f'service: "{SERVICE}:Couturier"\nname: {NAME}\nlabels:\n  bundle: "{bundle_id}"\n'
        'include:\n  - "/couturier/**"\n  - "/model/**"\n'
        f"python:\n  lock_packages: false\n  packages:\n{listed}",
        encoding="utf-8",
    )
    (folder / "README.md").write_text(
        f"# {bundle_id}\n\nDraws the next item for one person. `model/version.json` says where it came from; "
        "`POST /generate` draws, `GET /` is a page to try it on.\n",
        encoding="utf-8",
    )


def copy_sources(folder: Path) -> None:
    """Copy every module of ours that the service imports, directly or not, and the page, under ``folder/couturier``."""
    for module, _ in source_digests(SERVICE):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise LineageError(f"{module} has no file, so it cannot be packed; install the project again.")
        place = folder / module.replace(".", "/")
        target = place / "__init__.py" if spec.submodule_search_locations else place.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(spec.origin, target)
    root = folder / NAME
    # A regular package at the top: it wins over an installed couturier, so the bento runs the code it carries.
    for package in (root, *(path for path in root.rglob("*") if path.is_dir())):
        if package != root / "kernels":
            (package / "__init__.py").touch()
    for name in PAGE_FILES:
        shutil.copyfile(Path(__file__).with_name(name), root / "serving" / name)


def requirements(also: Iterable[str] = ()) -> list[str]:
    """The pinned packages of the base install and the ``serve`` extra, as the project's own metadata lists them, and
    those named ``also``, from whichever extra lists them."""
    listed, wanted = [], set(also)
    for line in importlib.metadata.requires(NAME) or []:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if not marker or re.fullmatch(r"""extra\s*==\s*['"]serve['"]""", marker) or name in wanted:
            listed.append(requirement)
    return sorted(set(listed))


def origin(ctx: StageContext) -> dict[str, Any]:
    """Where a bundle comes from: commit, data md5, configuration and manifest ids of every stage before it."""
    store = ArtifactStore(ctx.workspace)
    ancestry: dict[str, dict[str, Any]] = {}
    for folder in ctx.inputs.values():
        if store.has(folder.name):
            ancestry |= store.ancestry(folder.name)
    stages = {manifest["stage"]: manifest for manifest in ancestry.values()}
    return {
        "git_commit": code_commit(),
        "data_md5": stages.get("validate", {}).get("external", {}).get("data"),
        "config": {name: manifest["config"] for name, manifest in sorted(stages.items())},
        "manifests": {name: manifest["id"] for name, manifest in sorted(stages.items())},
    }


def build(context: Path, *, home: Path, beside: Path, version: str) -> Path:
    """Run ``bentoml build`` into a store of its own under ``beside``, then move the bento into ``home``; its folder.

    Raises:
        LineageError: BentoML refused; the sentence ends with its last words.
    """
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    settings = {**os.environ, **QUIET, "BENTOML_HOME": str(beside), "PYTHONDONTWRITEBYTECODE": "1"}
    # Named outright: BentoML looks for a bentofile of its own accord in no folder below a hidden one (.couturier).
    command = [sys.executable, "-m", "bentoml", "build", str(context), "--bentofile", str(context / "bentofile.yaml")]
    command += ["--version", version, "--output", "tag"]
    answer = subprocess.run(
        command, cwd=context, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    made = beside / "bentos" / NAME / version
    if answer.returncode or not (made / "bento.yaml").exists():
        last = (answer.stderr + answer.stdout).strip().splitlines()[-5:]
        raise LineageError(f"bentoml build ended with exit code {answer.returncode}: {' | '.join(last)}")
    final = home / "bentos" / NAME / version
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # of an earlier try that was killed before the stage was done
        final.rename(beside / "replaced")
    made.rename(final)
    with written_beside(final.parent / "latest") as latest:
        latest.write_text(version, encoding="utf-8")
    sync_folder(final.parent)
    shutil.rmtree(beside, ignore_errors=True)
    return final


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Pictures that must come out the same everywhere, and the forms that ask for them."""

    forms: dict[str, dict[str, Any]]
    pngs: dict[str, bytes]
    items: list[str]
    scores: dict[str, float]


def draw_golden(bundle: Bundle, config: Config) -> Golden:
    """Draw in this process: for each chosen person, and once from a history of item ids."""
    users = bundle.users
    step = max(1, len(users) // config.golden_users)
    forms: dict[str, dict[str, Any]] = {}
    pngs: dict[str, bytes] = {}
    histories: Sequence[tuple[str, dict[str, Any]]] = [
        *((f"user-{place}", {"user_id": user}) for place, user in enumerate(users[::step][: config.golden_users])),
        ("history", {"history": bundle.catalogue.item_ids[:5]}),
    ]
    for place, (name, about) in enumerate(histories):
        seed = derived_seed(config.golden_seed, "golden", name) % 2**31
        sampling = Sampling(n=config.golden_pictures, seed=seed, guidance=(1.0, 2.0)[place % 2])
        whom = bundle.history_of(about["user_id"]) if "user_id" in about else bundle.history_from(about["history"])
        forms[name] = {**about, "n": sampling.n, "seed": sampling.seed, "guidance": sampling.guidance}
        for number, picture in enumerate(bundle.generate([whom], sampling)[0]):
            pngs[f"{name}-{number}"] = png_bytes(picture.rgb_HWC)
    items = bundle.catalogue.item_ids[:5]
    scores = bundle.score(bundle.history_from(items), bundle.indices(items, "item_ids")).tolist()
    return Golden(forms=forms, pngs=pngs, items=items, scores=dict(zip(items, scores, strict=True)))


def prove(tag: str, golden: Golden, config: Config, ctx: StageContext) -> dict[str, Any]:
    """Boot the bento, ask it everything once, compare the golden pictures; figures for ``bento.json``.

    Raises:
        LineageError: an answer is not what this process computes.
    """
    feedback = ctx.scratch / "feedback"  # a proof is no behaviour: the workspace's events stay as they are
    shutil.rmtree(feedback, ignore_errors=True)  # of an earlier try that was killed
    with serve_bento(
        tag,
        bentoml_home=ctx.workspace.bentos,
        feedback=feedback,
        log=ctx.scratch / "serve.log",
        timeout_s=config.boot_timeout_s,
    ) as served:
        compare(served.client, tag, golden)
        latency_ms = _latency_ms(served.client, golden, config.latency_requests)
    if sum(file.read_text(encoding="utf-8").count("\n") for file in feedback.glob("*.jsonl")) != 1:
        raise LineageError(f"the bento {tag} did not keep one feedback event exactly once.")
    return {"boot_s": round(served.boot_s, 2), "latency_ms": latency_ms}


def compare(client: Client, tag: str, golden: Golden) -> None:
    """Ask a running service everything once and hold its answers against this process, bit for bit.

    Raises:
        LineageError: an answer is not what this process computes.
    """
    bento = client.version()["bento"]
    if bento != tag:
        raise LineageError(f"the service on {client.url} is {bento}, wanted {tag}.")
    for name, form in golden.forms.items():
        for number, picture in enumerate(client.generate(**form)["pictures"]):
            if picture["png"] != golden.pngs[f"{name}-{number}"]:
                raise LineageError(
                    f"picture {number} of golden request {name!r} differs between {tag} and this process. "
                    "Training and serving no longer prepare or draw alike; look at serving/bundle.py."
                )
    ranked = client.score(history=golden.items, item_ids=golden.items)["items"]
    if {item["item_id"]: item["score"] for item in ranked} != golden.scores:
        raise LineageError(f"the judge's scores differ between the bento {tag} and this process.")
    client.feedback(user_id="golden", item_id=golden.items[0], kind="like", value=1.0)
    _refuses_pickle(client)


def tree_digest(folder: Path) -> str:
    """One digest over every file's path and content, but not BentoML's own record of the build.

    Raises:
        LineageError: a file is of a type that can hold a pickle.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "__pycache__"]
    files = [path for path in files if path.name != "bentofile.yaml"]
    for path in files:
        if path.suffix in _PICKLES:
            raise LineageError(f"{path.name} in the bento can hold a pickle; save it as safetensors or JSON.")
    return sha256_of_json([[path.relative_to(folder).as_posix(), sha256_of_file(path)] for path in files])


def _refuses_pickle(client: Client) -> None:
    try:
        client.request("POST", "/generate", b"", {"Content-Type": "application/vnd.bentoml+pickle"})
    except ServiceError as error:
        if error.status == 415:
            return
    raise LineageError("the bento reads pickles; it must refuse their media type with status 415.")


def _latency_ms(client: Client, golden: Golden, requests: int) -> Mapping[str, float]:
    """Median and worst milliseconds of one picture, after the golden requests have warmed everything up."""
    form = {**next(iter(golden.forms.values())), "n": 1}
    took = []
    for seed in range(max(1, requests)):
        began = time.perf_counter()
        client.generate(**{**form, "seed": seed})
        took.append((time.perf_counter() - began) * 1000)
    return {"p50": round(statistics.median(took), 1), "worst": round(max(took), 1)}
