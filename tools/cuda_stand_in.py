"""Make libraries that stand in for CUDA, so that ONNX Runtime decides placements where there is no GPU.

    python tools/cuda_stand_in.py ONNXRUNTIME_GPU_FOLDER OUT
    LD_LIBRARY_PATH=OUT PYTHONPATH=PARENT_OF_THAT_FOLDER python -m pytest tests/placement

With them the CUDA provider of the wheel opens sessions: it chooses kernels, places nodes and inserts copies
as it does on a GPU. It computes nothing: every call succeeds, memory is the host's, launched kernels do not
run. So this says where a node would run, and nothing about what it would give or how fast. Wants gcc and nm.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROVIDERS = ("libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so")
UNVERSIONED = {"curand": "libcurand.so.10", "cu": "libcuda.so.1"}

RUNTIME = r"""
#include <stdlib.h>
#include <string.h>
typedef void *P;
static long ok(void) { return 0; }
static int make(P *p, size_t n) { *p = calloc(1, n + 256); return *p ? 0 : 2; }
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *n) { *n = 0; return 0; }
int cudaGetDeviceProperties(char *p, int d) {
  memset(p, 0, 1008); strcpy(p, "stand-in");
  *(size_t *)(p + 288) = 8ull << 30; *(size_t *)(p + 296) = 49152;
  int *q = (int *)(p + 304); q[0] = 65536; q[1] = 32;
  q = (int *)(p + 320); q[0] = q[1] = q[2] = 1024; q[3] = 64; q[4] = 2147483647; q[5] = q[6] = 65535;
  *(size_t *)(p + 352) = 65536; q = (int *)(p + 360); q[0] = 9; q[1] = 0;
  return 0;
}
int cudaMalloc(P *p, size_t n) { return make(p, n); }
int cudaMallocHost(P *p, size_t n) { return make(p, n); }
int cudaHostAlloc(P *p, size_t n, unsigned f) { return make(p, n); }
int cudaMallocFromPoolAsync(P *p, size_t n, P a, P b) { return make(p, n); }
int cudaFree(P p) { free(p); return 0; }
int cudaFreeAsync(P p, P s) { free(p); return 0; }
int cudaFreeHost(P p) { free(p); return 0; }
int cudaMemcpy(P d, P s, size_t n, int k) { memmove(d, s, n); return 0; }
int cudaMemcpyAsync(P d, P s, size_t n, int k, P t) { memmove(d, s, n); return 0; }
int cudaMemset(P d, int v, size_t n) { memset(d, v, n); return 0; }
int cudaMemsetAsync(P d, int v, size_t n, P t) { memset(d, v, n); return 0; }
int cudaMemGetInfo(size_t *f, size_t *t) { *f = 6ull << 30; *t = 8ull << 30; return 0; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
int cudaDeviceGetAttribute(int *v, int a, int d) {
  *v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 8 : 1024;
  return 0;
}
const char *cudaGetErrorString(int e) { return "stand-in"; }
const char *cudaGetErrorName(int e) { return "stand-in"; }
int cudaStreamCreate(P *s) { return make(s, 64); }
int cudaStreamCreateWithFlags(P *s, unsigned f) { return make(s, 64); }
int cudaEventCreate(P *s) { return make(s, 64); }
int cudaEventCreateWithFlags(P *s, unsigned f) { return make(s, 64); }
P __cudaRegisterFatBinary(P p) { static P x[8]; return x; }
int cudaStreamIsCapturing(P s, int *v) { *v = 0; return 0; }
int cudaPointerGetAttributes(int *a, P p) { memset(a, 0, 32); return 0; }
int cudaEventElapsedTime(float *f, P a, P b) { *f = 0; return 0; }
int cudaGetDriverEntryPointByVersion(const char *s, P *f, unsigned v, unsigned long long g, int *r) {
  *f = (P)ok; if (r) *r = 0; return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, P f, int b, size_t s, unsigned g) {
  *n = 8;
  return 0;
}
"""
"""The calls whose answers matter; all others return 0."""

OBJECT = """
#include <stdlib.h>
static long none(void) { return 0; }
static void *table[64];
static void *object(void) {
  void **made = malloc(sizeof(void *));
  for (int i = 0; i < 64; i++) table[i] = (void *)none;
  *made = table;
  return made;
}
"""
"""A C++ object whose virtual methods return null, for TensorRT's factories."""


def undefined_symbols(library: Path) -> dict[str, set[str]]:
    """Return the symbols that a provider wants of each of NVIDIA's libraries."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    wanted: dict[str, set[str]] = {}
    for line in listed.stdout.splitlines():
        name, _, version = line.split()[-1].partition("@")
        prefix = next((p for p in UNVERSIONED if name.startswith(p)), None)
        owner = (
            version if version.startswith("libcu") else UNVERSIONED.get(prefix or "") if not version else None
        )
        if owner is None and re.fullmatch(r"create\w+_INTERNAL|getInferLibVersion|getPluginRegistry", name):
            owner = "libnvonnxparser.so.10" if "Onnx" in name else "libnvinfer.so.10"
        if owner is not None:
            wanted.setdefault(owner, set()).add(name)
    return wanted


def source_of(library: str, symbols: set[str]) -> str:
    """Return the C source of one stand-in."""
    text = RUNTIME if library.startswith("libcudart") else OBJECT
    for name in sorted(symbols):
        if re.search(rf"\b{name}\(", text):
            continue
        if library.startswith("libnv"):
            body = "return 101300;" if name == "getInferLibVersion" else "return (long)object();"
            text += f"long {name}(void) {{ {body} }}\n"
        elif "Create" in name and not name.startswith("cudaGraph"):
            text += f"long {name}(void **h) {{ *h = calloc(1, 256); return 0; }}\n"
        else:
            text += f"long {name}(void) {{ return 0; }}\n"
    return text


def main() -> None:
    """Make the libraries of a wheel's folder."""
    folder, out = (Path(word) for word in sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, set[str]] = {"libcurand.so.10": set(), "libcuda.so.1": set()}
    for provider in PROVIDERS:
        for library, symbols in undefined_symbols(folder / "capi" / provider).items():
            wanted.setdefault(library, set()).update(symbols)
    versioned = [library for library in wanted if library.startswith(("libcudart", "libcublas", "libcudnn"))]
    for library, symbols in wanted.items():
        source = out / f"{library}.c"
        source.write_text(source_of(library, symbols))
        command = [
            "gcc",
            "-shared",
            "-fPIC",
            "-w",
            "-o",
            str(out / library),
            str(source),
            f"-Wl,-soname,{library}",
        ]
        if library in versioned:
            script = out / f"{library}.map"
            script.write_text(f"{library} {{ global: *; }};\n")
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)  # noqa: S603
        sys.stderr.write(f"{library}: {len(symbols)} symbols\n")


if __name__ == "__main__":
    main()
