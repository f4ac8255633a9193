// libcuda.so.1 and libnccl.so: nothing of their own, see tests/support/double.rs.
