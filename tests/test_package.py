"""The wheel: what is in it, and that it works from any folder, beside any other package."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEVER_BARE = {"kernels", "app", "pipelines", "configs"}  # other people's names at the top level
MODEL = ROOT / "streamvid" / "embedded" / "diorama"


def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [Path(name) for name in listed if name and (ROOT / name).is_file()]


def run(*command: str | Path, folder: Path) -> str:
    """Run a command in `folder` and return its output; fails with all that it said."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a clean copy of the repository's files."""
    copy, output = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for file in repository_files():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file)
    if not (copy / "README.md").exists():  # the metadata asks for it
        (copy / "README.md").write_text("streamvid\n")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", output, copy, folder=copy)
    (built,) = output.glob("streamvid-*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` of a new environment with the wheel in it; the other packages are borrowed from ours.

    A line in a .pth file adds our site-packages to the path, but not the .pth files in there, so our
    editable install of this repository stays out of sight.
    """
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=environment)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    run(*pip, "--ignore-installed", wheel, folder=environment)
    return environment / "bin"


def test_wheel_holds_every_module_and_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for file in map(PurePosixPath, map(Path.as_posix, repository_files())):
        inside = PurePosixPath("streamvid") / file if file.parts[0] in NEVER_BARE else file
        package = inside.parts[0] == "streamvid" and inside.suffix == ".py"
        config = inside.parts[:2] == ("streamvid", "configs") and inside.suffix in (".yaml", ".json")
        page = inside.parts[:3] == ("streamvid", "app", "static")
        if package or config or page:
            expected.add(str(inside))
    assert {"streamvid/__init__.py", "streamvid/kernels/__init__.py", "streamvid/app/__init__.py"} <= expected
    assert sorted(expected - names) == []  # a new folder must be named under [tool.setuptools] packages
    assert "streamvid/py.typed" in names


def test_wheel_holds_nothing_else(wheel):
    for name in zipfile.ZipFile(wheel).namelist():
        top = PurePosixPath(name).parts[0]
        assert top == "streamvid" or top.endswith(".dist-info"), name
        assert PurePosixPath(name).suffix not in {".pt", ".pth", ".ckpt", ".bin"}, name
        log = PurePosixPath(name).suffix == ".jsonl" and not name.startswith("streamvid/configs/")
        assert not log, name


def test_wheel_holds_the_embedded_model(wheel):
    weights = [file for file in repository_files() if (ROOT / file).is_relative_to(MODEL)]
    weights = [file for file in weights if file.suffix in (".safetensors", ".json", ".md")]
    if not weights:
        pytest.skip("the embedded model is not there yet")
    sizes = {entry.filename: entry.file_size for entry in zipfile.ZipFile(wheel).infolist()}
    assert sorted({file.as_posix() for file in weights} - set(sizes)) == []
    embedded = sum(size for name, size in sizes.items() if name.startswith("streamvid/embedded/"))
    assert embedded <= 48e6


def test_wheel_works_from_an_unrelated_folder(installed, tmp_path):
    program = (
        "import streamvid, streamvid.io, streamvid.pipelines, streamvid.kernels;"
        "import streamvid.configs, streamvid.app;"
        "print(streamvid.__file__, streamvid.kernels.__file__)"
    )
    library, kernels = run(installed / "python", "-c", program, folder=tmp_path).split()
    assert Path(library).is_relative_to(installed.parent)  # the wheel's, not this repository's
    assert Path(kernels).parent == Path(library).parent / "kernels"


needs_command_line = pytest.mark.skipif(
    not list(ROOT.glob("streamvid/cli*")), reason="the command line does not exist yet"
)
needs_model = pytest.mark.skipif(
    not (MODEL / "model_index.json").exists(), reason="the embedded model is not there yet"
)


@needs_command_line
def test_wheel_has_the_command(installed, tmp_path):
    assert "generate" in run(installed / "streamvid", "--help", folder=tmp_path)


@needs_command_line
@needs_model
def test_wheel_generates_two_seconds(installed, tmp_path):
    from streamvid.io import read_video

    prompt = "a large red ball bounces on the meadow on a clear day [2s]"
    run(installed / "streamvid", "generate", prompt, "-o", "story.mp4", folder=tmp_path)
    frames = list(read_video(tmp_path / "story.mp4"))
    assert 32 <= len(frames) <= 48  # 2 s at 16 fps, rounded up to whole blocks
    assert max(frame.std() for frame in frames) > 10  # a picture, not a grey area
    assert (tmp_path / "story.json").exists()


def test_nothing_clashes_with_the_root_on_the_path():
    """transformers and diffusers look for a package `kernels` of other people's; ours must not be it.

    transformers even imports what it finds: `kernels/__init__.py` must survive that, so it may not import
    anything relative to `streamvid`, or transformers itself.
    """
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import diffusers, transformers\n"
        "from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel\n"
        "from transformers import AutoTokenizer, UMT5EncoderModel\n"
        "import streamvid.kernels, streamvid.pipelines, streamvid.configs, streamvid.app\n"
        "from diffusers.utils.import_utils import is_kernels_available as by_diffusers\n"
        "from transformers.utils.import_utils import is_kernels_available as by_transformers\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('kernels').origin.startswith(sys.path[0])\n"
        "assert not by_diffusers() and not by_transformers()\n"
        "print(streamvid.kernels.__file__)"
    )
    assert Path(run(sys.executable, "-c", program, folder=ROOT).split()[-1]).parent == ROOT / "kernels"


def bare_imports(source: str) -> list[str]:
    """Absolute imports of names that must only be imported below `streamvid`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module or "")
    return [name for name in found if name.split(".")[0] in NEVER_BARE]


def test_nothing_is_imported_bare():
    assert bare_imports("import kernels.attention\nfrom app import page") == ["kernels.attention", "app"]
    assert bare_imports("from streamvid.kernels import x\nfrom .kernels import y\nimport apparatus") == []
    files = [file for file in repository_files() if file.suffix == ".py"]
    assert len(files) > 20
    for file in files:
        assert bare_imports((ROOT / file).read_text(encoding="utf-8")) == [], file


def test_the_tested_set_is_pinned():
    """Every dependency, and nothing but names and versions, stands in constraints.txt."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+((a|b|rc)[0-9]+)?", pin) for pin in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["train"] + extras["eval"] + extras["dev"]
    names = {re.split(r"[<>=\[ ]", requirement)[0].lower() for requirement in wanted} - {"streamvid"}
    assert sorted(names - {pin.split("==")[0] for pin in pins}) == []


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("make") is None, reason="of the set-up by make")
def test_tests_run_on_all_cores_with_one_thread_each():
    command = ["make", "--dry-run", "test"]
    told = subprocess.check_output(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    assert f"--numprocesses {len(os.sched_getaffinity(0))} " in told
