"""Notes on what each runtime does with zero weights. A sparse model is not faster by itself."""

from __future__ import annotations

_TENSORRT = {
    "unstructured": "TensorRT computes these zeros as dense weights: its sparse kernels take the 2:4 pattern only.",
    "two_four": (
        "TensorRT can skip these zeros: engines are built with SPARSE_WEIGHTS, for Sparse Tensor Cores (Ampere and "
        "later, Orin included), and a sparse kernel runs only in layers where the builder found it faster; no gain is promised."
    ),
}


def zeros_note(kind: str, sparsity: float) -> list[str]:
    """Return a sentence on the fraction of zero weights, then one sentence for each runtime on the effect of zeros there.

    Args:
        kind: `unstructured` or `two_four`.
        sparsity: Fraction of the convolution weights that are exactly 0.

    Sources: ONNX Runtime turns sparse initialisers into dense ones at load (microsoft/onnxruntime #5578). OpenVINO documents
    `CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE` for INT8 matrix multiplications with AMX. For TensorRT see its developer guide, "Sparsity".
    `benchmarks/sparsity.py` times both CPU runtimes.
    """
    name = {"unstructured": "unstructured", "two_four": "2:4"}[kind]
    return [
        f"{sparsity:.1%} of the convolution weights are exactly zero ({name}), in every file; parameters, FLOPs and file sizes here "
        "count them like any other number.",
        "ONNX Runtime computes these zeros as dense weights: no faster, no smaller.",
        "OpenVINO on a CPU computes these zeros as dense weights: its CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE is for INT8 matrix "
        "multiplications on CPUs with AMX, not for convolutions.",
        _TENSORRT[kind],
    ]
