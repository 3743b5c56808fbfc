"""Packages of fastrlhf and its two optional extensions, fastrlhf._C_cpu and fastrlhf._C_cuda.

`fastrlhf/kernels` is a link to ../kernels, so namespace discovery finds it as a subpackage. The
extensions compile against the installed torch: `pip install --no-build-isolation .`. An extension
that cannot be built (no compiler, no nvcc, no torch) is skipped with one line on stderr, and the
installation continues: every op has a plain torch implementation.

  FASTRLHF_SKIP_EXT=1     build neither
  FASTRLHF_FORCE_CUDA=1   build _C_cuda with the nvcc on PATH even if torch has no CUDA
  CXX, NVCC               the compilers, if not c++ and nvcc
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

# The oldest torch and Python that the binaries run on: both are used through their stable
# interfaces only.
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_LEVELS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
# sm_90 and what comes after it: the cluster kernels need thread block clusters.
CUDA_FLAGS = [
    "-std=c++20",
    "-O3",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    "-Xcompiler=-fPIC",
]


class Unbuildable(Exception):
    """The reason why an extension is skipped."""


def compiler() -> str:
    name = os.environ.get("CXX") or "c++"
    if shutil.which(name.split()[0]) is None:
        raise Unbuildable(f"no C++ compiler ({name} is not on PATH)")
    return name


def torch_folders() -> tuple[list[str], list[str]]:
    """Return the include and library folders of the installed torch."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise Unbuildable(
            f"torch cannot be imported here ({error}); install torch first, then fastrlhf with"
            " --no-build-isolation"
        ) from None
    return include_paths(), library_paths()


def nvcc() -> str:
    """Return the nvcc to use: one that fits torch's CUDA, or any if forced."""
    import torch

    forced = os.environ.get("FASTRLHF_FORCE_CUDA") == "1"
    if torch.version.cuda is None and not forced:
        raise Unbuildable("this torch has no CUDA")
    name = os.environ.get("NVCC") or "nvcc"
    if shutil.which(name) is None:
        raise Unbuildable(f"no CUDA compiler ({name} is not on PATH)")
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release (\d+)\.(\d+)", said)
    if version is None or int(version[1]) < 12:
        raise Unbuildable(f"{name} is older than CUDA 12, which sm_90 needs")
    if torch.version.cuda and not forced and version[1] != torch.version.cuda.split(".")[0]:
        raise Unbuildable(
            f"{name} is CUDA {version[1]}.{version[2]} and torch was built with"
            f" {torch.version.cuda}"
        )
    return name


def run(*command: str) -> None:
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise Unbuildable(f"{command[0]} failed, see above")


class BuildKernels(build_ext):
    def run(self) -> None:
        self.left_out: list[str] = []
        super().run()
        self._remove_left_out()  # in the source tree, which editable installs run from

    def _remove_left_out(self) -> None:
        """Remove the extension of an earlier build, which newer Python code would load."""
        for name in self.left_out:
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        for extension in list(self.extensions):
            try:
                if os.environ.get("FASTRLHF_SKIP_EXT") == "1":
                    raise Unbuildable("FASTRLHF_SKIP_EXT=1")
                self.build_extension(extension)
            except Unbuildable as why:
                self.extensions.remove(extension)  # later steps copy what is listed here
                print(f"fastrlhf: {extension.name} is left out: {why}", file=sys.stderr)
                self.left_out.append(extension.name)
        self._remove_left_out()  # in the build folder, from which wheels are made

    def build_extension(self, ext: Extension) -> None:
        includes, libraries = torch_folders()
        includes = [*includes, *self.compiler.include_dirs]
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp) / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        build = self.build_cpu if ext.name.endswith("_C_cpu") else self.build_cuda
        build(folder, output, [f"-I{i}" for i in includes], [f"-L{i}" for i in libraries])

    def build_cpu(
        self, folder: Path, output: Path, includes: list[str], libraries: list[str]
    ) -> None:
        """Compile kernels.cpp once per instruction set; the bindings choose at run time."""
        cxx = [*compiler().split(), *CXX_FLAGS]
        levels = X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {}
        have = [f"-DFASTRLHF_HAVE_{level.upper()}" for level in levels]
        bindings = str(folder / "bindings.o")
        commands = [
            [*cxx, *STABLE, *have, *includes, "-c", "csrc/bindings_cpu.cpp", "-o", bindings]
        ]
        for level, flags in {"default": [], **levels}.items():
            # Contraction into fused multiply-adds is what some compilers do only when asked.
            flags = [*flags, "-ffp-contract=fast", f"-DFASTRLHF_TABLE=kernels_{level}"]
            commands.append(
                [
                    *cxx,
                    *flags,
                    *have,
                    "-c",
                    "csrc/cpu/kernels.cpp",
                    "-o",
                    str(folder / f"{level}.o"),
                ]
            )
        with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
            list(pool.map(lambda command: run(*command), commands))
        shared = (
            ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        )
        objects = [command[-1] for command in commands]
        run(*compiler().split(), *shared, "-o", str(output), *objects, *libraries, "-ltorch_cpu")

    def build_cuda(
        self, folder: Path, output: Path, includes: list[str], libraries: list[str]
    ) -> None:
        cuda = nvcc()
        sources = [Path("csrc/bindings_cuda.cpp"), *sorted(Path("csrc/cuda").glob("*.cu"))]
        objects = [str(folder / f"{source.stem}.o") for source in sources]
        for source, target in zip(sources, objects, strict=True):
            run(
                cuda, *CUDA_FLAGS, *STABLE, "-DUSE_CUDA", *includes, "-c", str(source), "-o", target
            )
        # A torch without CUDA has no libtorch_cuda: the build then shows that everything compiles,
        # and no more.
        present = [
            name
            for name in ("torch_cpu", "torch_cuda")
            if any(Path(i[2:], f"lib{name}.so").exists() for i in libraries)
        ]
        run(
            cuda,
            *CUDA_FLAGS,
            "-shared",
            "-o",
            str(output),
            *objects,
            *libraries,
            *(f"-l{name}" for name in present),
        )


# The sources listed are those that a source distribution must hold; headers are in MANIFEST.in.
EXTENSIONS = [
    Extension(
        "fastrlhf._C_cpu", ["csrc/bindings_cpu.cpp", "csrc/cpu/kernels.cpp"], py_limited_api=True
    ),
    Extension(
        "fastrlhf._C_cuda",
        ["csrc/bindings_cuda.cpp", "csrc/cuda/logprob_cluster.cu"],
        py_limited_api=True,
    ),
]

setup(
    packages=find_namespace_packages(include=["fastrlhf", "fastrlhf.*"]),
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildKernels},
)
