"""Which backend runs the ops (`dispatch`), the C++ one (`cpp`), and any of them under torch.library (`registered`).

The Triton backend is `pvt_fast.kernels`, the plain-torch one `pvt_fast.ops.reference`.
"""
