"""The TOSA reference model behind ExecuTorch's Arm backend, in an environment of its own.

    python3.11 -m venv runs/tosa
    runs/tosa/bin/pip install tosa-tools==2026.8.0 torch==2.13.0 executorch==1.5.1
    QBENCH_TOSA_PYTHON=runs/tosa/bin/python python -m benchmarks.exactness.ops --targets tosa

The environment is its own because tosa-tools wants a version of ml_dtypes that onnx refuses. torch must be the CPU
build. `worker.py` runs there and imports nothing of this library: it writes each case as a Q/DQ program, lowers it with
ExecuTorch's TOSAPartitioner, which computes every multiplier and shift, and runs the TOSA graph.
"""
