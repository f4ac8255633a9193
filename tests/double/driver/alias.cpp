// libcuda.so.1: nothing of its own, see tests/support/double.rs.
