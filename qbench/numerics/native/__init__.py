"""A layer in training by a few functions in C++, for CPUs: optional, checked against PyTorch's operators bit for bit.

    layer.cpp       the functions
    library.py      compiles them once for a machine, and calls them
    steps.py        a layer's steps by them, and whether they agree with the steps by PyTorch's operators

What generated code (`qbench.numerics.generated`) makes of these steps is as fast in memory's terms. But each of its
calls makes a dozen small tensors and goes through Python between its loops, which in a small layer takes longer than
the loops: there is no asking Inductor for one call with one buffer. Where there is no compiler, or no such processor,
generated code goes on, and where there is none, PyTorch's operators.
"""
