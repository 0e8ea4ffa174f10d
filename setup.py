"""Native build only; metadata lives in pyproject.toml.

Three libraries, compiled by ninja with every source in parallel and incrementally:
  jepa_kernels/_native.so   torch ops on the stable ABI and the CPU kernels (g++; always)
  jepa_kernels/_cuda.so     CUDA kernels behind a C ABI, no torch inside (nvcc; when it is found, or
                            JEPA_KERNELS_CUDA=1)
  jepa_kernels/_host*.so    pybind11 + NumPy host code: mask sampling in data workers (g++; always)

Environment:
  JEPA_KERNELS_NATIVE=0     leaves all native code out; the package then runs on its torch backend,
                            as it does where no C++ compiler is found, and
                            `python -m jepa_kernels doctor` says so
  JEPA_KERNELS_NATIVE=1     refuses to leave it out
  JEPA_KERNELS_CUDA=0|1     decides about the CUDA library, JEPA_KERNELS_CUDA_ARCHS="80;90a" its
                            architectures
  JEPA_KERNELS_TORCH=FOLDER takes headers and libraries from that torch, whichever Python it was
                            installed for: the stable ABI knows no Python
  JEPA_KERNELS_NAMESPACE=X  registers the native ops under torch.ops.X (release/hf_kernel.py)
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_TARGET = (
    "0x020b000000000000ULL"  # torch 2.11: the oldest whose stable ABI has what the binding uses
)
CUDA_ARCHS = "80;90a;100a;120"
_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"-mavx512f -mavx512bw -mavx512dq -mavx512vl {_AVX2}"
# Instruction sets in the order of jk_isa (csrc/abi.h) and their flags. A file named kernels.cpp is
# built once for each of them, with JK_KERNEL_ISA as its number; launch.cpp beside it chooses at run
# time. No other file may use instructions beyond baseline x86-64.
ISAS = {
    "portable": "",
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": f"{_AVX512} -mavx512bf16 -mavx512vbmi",
}
# Ops bound by memory gain nothing from wider vectors.
LAST_ISA = {"ema_update": "avx2", "adamw_ema": "avx2", "visible_patch_embed": "avx2"}


def torch_folder() -> Path:
    """The installed torch, found without importing it: an isolated build sees it only through the
    interpreter's own site folder."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
    # pip's isolated build replaces the site folder of this process; that of the environment stays
    # under sys.prefix.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for base in (sys.prefix, sys.base_prefix, os.environ.get("VIRTUAL_ENV", "")):
        folders.append(str(Path(base) / "lib" / version / "site-packages"))
    if named := os.environ.get("JEPA_KERNELS_TORCH"):
        folders = [str(Path(named).parent)]
    for folder in folders:
        candidate = Path(folder or ".") / "torch"
        if (candidate / "include" / "torch" / "csrc" / "stable").is_dir():
            return candidate
    raise SystemExit(
        "jepa-kernels: building needs the headers of torch >= 2.11, and none was found. Install "
        "torch first; where a builder hides it, as uv does, name its folder:\n"
        "  pip install torch\n"
        "  JEPA_KERNELS_TORCH=$(python -c 'import torch; print(torch.__path__[0])') "
        "uv pip install .\n"
        "or leave the native code out: JEPA_KERNELS_NATIVE=0 pip install ."
    )


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of the nvidia-cuda-nvcc wheels; JEPA_KERNELS_CUDA=0|1
    overrides."""
    wanted = os.environ.get("JEPA_KERNELS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"jepa-kernels: JEPA_KERNELS_CUDA must be 0 or 1, got {wanted!r}.")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    found = found or shutil.which("nvcc")
    if found is None and wanted == "1":
        raise SystemExit(
            "jepa-kernels: JEPA_KERNELS_CUDA=1 needs nvcc on PATH or under CUDA_HOME, and none "
            "was found."
        )
    return found


def kernel_builds(source: Path) -> dict[str, str]:
    """Instruction set -> flags for each time that a source is built; one without a name if it is
    not a kernels.cpp."""
    if source.name != "kernels.cpp":
        return {"": ""}
    names = list(ISAS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]
    last = LAST_ISA.get(source.parents[1].name, names[-1])
    return {
        name: f"-DJK_KERNEL_ISA={names.index(name)} {ISAS[name]}".strip()
        for name in names[: names.index(last) + 1]
    }


def gencode() -> str:
    """One front-end pass for all architectures: kernels use nothing beyond compute_80 (mma.sync,
    ldmatrix, cp.async)."""
    archs = os.environ.get("JEPA_KERNELS_CUDA_ARCHS", CUDA_ARCHS).split(";")
    codes = ",".join([f"sm_{a}" for a in archs] + ["compute_80"])
    return f"'-gencode=arch=compute_80,code=[{codes}]'"


class Ninja:
    """A build.ninja in the making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = ["ninja_required_version = 1.5"]
        self.outputs: list[Path] = []

    @staticmethod
    def escape(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def rule(self, name: str, command: str, depfile: bool) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: Path, rule: str, inputs: list[Path], flags: str = "") -> Path:
        self.lines.append(
            f"build {self.escape(output)}: {rule} {' '.join(self.escape(i) for i in inputs)}"
        )
        if flags:
            self.lines.append(f"  flags = {flags}")
        return output

    def objects(self, rule: str, sources: list[Path], flags: str = "") -> list[Path]:
        made = []
        for source in sources:
            place = self.folder / rule / source.relative_to(CSRC)
            for isa, isa_flags in kernel_builds(source).items():
                target = place.with_name(".".join(filter(None, (source.stem, isa, "o"))))
                made.append(
                    self.build(target, rule, [source], " ".join(filter(None, (flags, isa_flags))))
                )
        return made

    def run(self, verbose: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        try:
            import ninja

            program = [str(Path(ninja.BIN_DIR) / "ninja")]
        except ImportError:
            program = ["ninja"]
        jobs = os.environ.get("MAX_JOBS")
        command = [
            *program,
            "-C",
            str(self.folder),
            *(["-j", jobs] if jobs else []),
            *(["-v"] if verbose else []),
        ]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit(
                "jepa-kernels: building needs ninja. Install it: pip install ninja"
            ) from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"jepa-kernels: the native build failed (ninja exit status {error.returncode}); "
                "its output is above. It needs a g++ with C++20 (11 or later); "
                "JEPA_KERNELS_NATIVE=0 pip install ... leaves the native code out."
            ) from None


def cuda_sources() -> list[Path]:
    return sorted(CSRC.glob("*/cuda/launch.cu"))


def plan(ninja: Ninja, nvcc: str | None) -> dict[str, Path]:
    """Writes every compile and link step; returns library name -> file."""
    import numpy
    import pybind11

    torch = torch_folder()
    cxx = os.environ.get("CXX", "g++")
    common = (
        "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter -MD "
        "-MF $out.d $flags -c $in -o $out"
    )
    includes = " ".join(
        f"-isystem {ninja.escape(torch / 'include' / p)}" for p in ("", "torch/csrc/api/include")
    )
    ninja.rule(
        "native", f"{cxx} -DTORCH_TARGET_VERSION={TORCH_TARGET} {includes} {common}", depfile=True
    )
    python_includes = " ".join(
        f"-isystem {ninja.escape(p)}"
        for p in (sysconfig.get_path("include"), pybind11.get_include(), numpy.get_include())
    )
    # Masks must be the same bits as those of the NumPy fallback: no fused multiply-add, which
    # aarch64 would use.
    ninja.rule("host", f"{cxx} -ffp-contract=off {python_includes} {common}", depfile=True)
    ninja.rule("link", f"{cxx} -shared $in -o $out $flags", depfile=False)

    libraries = {}
    host_sources = [CSRC / "host.cpp", *sorted((CSRC / "host").glob("*.cpp"))]
    native_sources = [s for s in sorted(CSRC.rglob("*.cpp")) if s not in host_sources]
    bindings = [s for s in native_sources if s.name in ("binding.cpp", "registration.cpp")]
    namespace = os.environ.get("JEPA_KERNELS_NAMESPACE")
    objects = ninja.objects("native", [s for s in native_sources if s not in bindings])
    objects += ninja.objects("native", bindings, f"-DJK_LIBRARY={namespace}" if namespace else "")
    link_torch = f"-L{ninja.escape(torch / 'lib')} -ltorch_cpu -lc10 -ldl"
    libraries["_native"] = ninja.build(ninja.folder / "_native.so", "link", objects, link_torch)
    libraries["_host"] = ninja.build(
        ninja.folder / "_host.so",
        "link",
        ninja.objects("host", [s for s in host_sources if s.exists()]),
    )
    if nvcc is not None and cuda_sources():
        host_flags = "-Xcompiler -fPIC,-fvisibility=hidden"
        command = (
            f"{nvcc} -std=c++17 -O3 -t 0 {gencode()} {host_flags} -MD -MF $out.d $flags -c "
            "$in -o $out"
        )
        ninja.rule("cuda", command, depfile=True)
        ninja.rule("link_cuda", f"{nvcc} -shared -cudart static $in -o $out", depfile=False)
        libraries["_cuda"] = ninja.build(
            ninja.folder / "_cuda.so", "link_cuda", ninja.objects("cuda", cuda_sources())
        )
    return libraries


class NinjaBuild(build_ext):
    """One ninja run for all libraries, then a copy of each to where setuptools wants it."""

    def get_ext_filename(self, fullname: str) -> str:
        path = fullname.replace(".", os.sep)
        # Only the host module is a Python extension; the other two are loaded by path and fit every
        # Python.
        return path + (
            sysconfig.get_config_var("EXT_SUFFIX") if fullname.endswith("_host") else ".so"
        )

    def build_extensions(self) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            print(
                "jepa-kernels: nvcc was not found; the CUDA library is left out (the other "
                "backends are complete without it)."
            )
        ninja = Ninja(Path(self.build_temp).resolve() / "ninja")
        libraries = plan(ninja, nvcc)
        ninja.run(verbose=bool(self.verbose and self.verbose > 1))
        for extension in self.extensions:
            name = extension.name.rpartition(".")[2]
            if name in libraries:
                target = Path(self.get_ext_fullpath(extension.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(libraries[name], target.with_suffix(".tmp"))
                # Replaced, never rewritten: a running process may have the old one mapped.
                os.replace(target.with_suffix(".tmp"), target)


def missing_compiler() -> str | None:
    """Why no C++ can be compiled here, or None."""
    compiler = os.environ.get("CXX", "g++").split()
    absent = [word for word in compiler if word[0] != "-" and shutil.which(word) is None]
    return f"the C++ compiler {absent[0]!r} was not found" if absent else None


def extensions() -> list[Extension]:
    if os.environ.get("JEPA_KERNELS_NATIVE") == "0" or platform.system() != "Linux":
        return []
    if missing_compiler() is not None:
        if os.environ.get("JEPA_KERNELS_NATIVE") == "1":
            raise SystemExit(f"jepa-kernels: JEPA_KERNELS_NATIVE=1, but {missing_compiler()}.")
        print(
            f"jepa-kernels: {missing_compiler()}; the native code is left out, and the package "
            "runs on its torch backend. Install g++ (for example: apt-get install g++) and install "
            "again for the fast kernels."
        )
        return []
    names = ["_native", "_host"] + (["_cuda"] if find_nvcc() is not None and cuda_sources() else [])
    return [Extension(f"jepa_kernels.{name}", sources=[]) for name in names]


if __name__ == "__main__":  # tests read the table of instruction sets
    setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
